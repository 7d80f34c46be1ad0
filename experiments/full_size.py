"""LLaMA-7B's size on this machine: memory, training steps, answers, and where the time of a step goes.

    python -m experiments.full_size --device cuda               random weights in bf16, made on the GPU
    python -m experiments.full_size --device cuda --dtype int8  quantised
    python -m experiments.full_size --batch-size 1 --rounds 2 --grad-checkpoint     on a CPU
    python -m experiments.full_size --llama weights/llama-7b    of a folder, with the dtype of its files

Weights may be random: only the length of an answer depends on what they say.  The products are the demo's.
"""

import argparse
import resource
import statistics
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from base import console
from experiments.speed import make_subject, seconds, stepper
from support.config import DTYPES, Config, add_flags, choose_device, number


def report(what, took, work=""):
    """Print seconds (the median), and the greatest memory so far; on a GPU since the last report."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work += f"; {torch.cuda.memory_stats()['num_device_alloc']:,} cudaMalloc so far"
    print(f"{what}: {statistics.median(took):.3g} s ({min(took):.3g} to {max(took):.3g}; {len(took)}), peak "
          f"memory {peak / 1e9:.2f} GB{work}", flush=True)


def where_time_goes(step):
    """Print the parts of a step, in ms, and its ten largest entries.  A GPU's kernels run beside the CPU."""
    with profile() as recorded:
        took = seconds(step)
    events = recorded.key_averages()
    parts = {name: sum(e.self_cpu_time_total for e in events if name in e.key)
             for name in ("LaunchKernel", "cudaMalloc", "Synchronize")}
    parts["other work of the CPU"] = took * 1e6 - sum(parts.values())
    parts["kernels"] = sum(e.self_device_time_total for e in events if e.device_type != DeviceType.CPU)
    print(", ".join(f"{name} {microseconds / 1e3:.1f}" for name, microseconds in parts.items()), "ms")
    key = "self_device_time_total" if parts["kernels"] else "self_cpu_time_total"
    print(events.table(sort_by=key, row_limit=10, max_name_column_width=60), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Seconds and gigabytes at LLaMA-7B's size.")
    parser.add_argument("--llama", help="folder of a LLaMA (default: random weights)")
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=10, help="default: %(default)s")
    add_flags(parser, ("device", "dtype", "batch_size", "grad_checkpoint"))
    flags = vars(parser.parse_args())
    rounds = range(flags.pop("rounds"))
    config = Config(**flags)
    start = time.perf_counter()
    device = choose_device(config.device)
    model, batches, questions, cls_tokens = make_subject(
        "llama" if config.llama else "7b", device, DTYPES.get(config.dtype), config.dtype == "int8",
        llama=config.llama)
    report("loading", [time.perf_counter() - start])
    model.llama.grad_checkpoint = config.grad_checkpoint
    step = stepper(model, model, cls_tokens)
    batches = [batches[i % len(batches)][:config.batch_size] for i in rounds]
    parameters = sum(p.numel() for p in model.llama.parameters())
    gigabytes = sum(p.nbytes for p in model.llama.parameters()) / 1e9
    tokens = sum(4 * len(e.photos) + len(e.prompt) + len(e.answer) for batch in batches for e in batch)
    tflop = 4e-12 * parameters * tokens / len(batches)
    # As in training, each batch has other lengths.  The second time, none is new to the GPU.
    for what in "training steps, new batches", "the same batches again":
        took = [seconds(lambda batch=batch: step(batch)) for batch in batches]
        report(what, took, f"; {tflop:.2f} TFLOP, weights read: {2 * gigabytes:.1f} GB")
    where_time_goes(lambda: step(batches[0]))
    for n in (1, 64):
        def answer():
            model.generate(questions[:n], cls_tokens, limit=5)

        answer()
        report(f"answers together: {n}, 5 tokens each", [seconds(answer) for _ in rounds],
               f"; weights read: {5 * gigabytes:.1f} GB")


if __name__ == "__main__":
    console.run(main)
