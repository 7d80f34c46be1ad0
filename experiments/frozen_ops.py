"""What each operation of base/frozen_ops.py saves against its plain expression:  python -m experiments.frozen_ops

One training step of a batch of 32 sequences through a few layers with random weights, at the width of the demo's model, of
a 135M LLaMA and of LLaMA-7B.  The step with the operation and the step with its plain expression take turns.  Printed: the
median ratio of their seconds with its spread, and the bytes that autograd keeps for the backward pass.  Then the two fp32
matmuls that frozen_linear chooses from.
"""

import argparse
import statistics
import time

import torch

import llama
from base import frozen_ops
from base.packing import pack
from llama import LLaMA, LlamaConfig

OPERATIONS = {"rms_norm": frozen_ops.rms_norm_plain, "swiglu": frozen_ops.swiglu_plain}
# name: (sizes, lengths of the sequences)
WIDTHS = {
    "demo": (LlamaConfig(1400, 128, 344, 4, 4, 4, 32, 1e-6), [47] * 32),
    "135M": (LlamaConfig(4000, 576, 1536, 8, 9, 3, 64, 1e-5), [47] * 32),
    "7B": (LlamaConfig(4000, 4096, 11008, 1, 32, 32, 128, 1e-6), [47] * 16),
}


def random_llama(config):
    with torch.device("meta"):
        model = LLaMA(config)
    model, draw = model.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.ones_(p) if "norm" in name else torch.nn.init.normal_(p, 0, 0.02, generator=draw)
    return model


def measure(config, lengths, rounds):
    """{operation: ([seconds with it / seconds plain], bytes kept with it, bytes kept plain)}"""
    model, draw = random_llama(config), torch.Generator().manual_seed(0)
    tokens = pack([torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths], [5] * len(lengths))
    x = model.embed(tokens.ids).requires_grad_()

    def step():
        model.logits(model(x, tokens)).square().mean().backward()

    def seconds():
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def kept():
        own, found = {p.untyped_storage()._cdata for p in model.parameters()}, {}

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in own:
                found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model(x, tokens)
        size = sum(storage.nbytes() for storage in found.values())
        del y
        return size

    results = {}
    for name, plain in OPERATIONS.items():
        fast, ratios = getattr(llama, name), []
        sizes = []
        for op in (fast, plain):
            setattr(llama, name, op)
            sizes.append(kept())
            step()                                      # warm
        for _ in range(rounds):
            took = []
            for op in (fast, plain):
                setattr(llama, name, op)
                took.append(seconds())
            ratios.append(took[0] / took[1])
        setattr(llama, name, fast)
        results[name] = ratios, *sizes
    return results


def compare_matmuls(rounds):
    """Prints the seconds of oneDNN's fp32 matmul, as a share of those of `@`, for a feed-forward matrix of each width."""
    for name, (config, _) in WIDTHS.items():
        weight, cells = torch.ones(config.intermediate_size, config.hidden_size), []
        for rows in (1, 8, 32, 64, 256, 1024):
            x = torch.ones(rows, config.hidden_size)
            repeats = max(1, 10 ** 7 // (rows * weight.numel()))        # a call takes a millisecond at least
            ratios = []
            for _ in range(rounds + 1):
                took = []
                for multiply in (lambda: frozen_ops.ONEDNN(x, weight, None, "none", [], ""), lambda: x @ weight.T):
                    start = time.perf_counter()
                    for _ in range(repeats):
                        multiply()
                    took.append(time.perf_counter() - start)
                ratios.append(took[0] / took[1])
            cells.append(f"{statistics.median(ratios[1:]):.2f}")
        print(f"{name:5}  matmul, oneDNN / @, for 1, 8, 32, 64, 256 and 1,024 rows: {', '.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.frozen_ops", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="of each pair of steps (default: %(default)s)")
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads\nwidth  operation       seconds, with / plain           kept for backward, with / plain")
    for name, (config, lengths) in WIDTHS.items():
        for operation, (ratios, own, plain) in measure(config, lengths, rounds).items():
            print(f"{name:5}  {operation:14}  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                  f"{'':12}{own / 1e6:,.1f} / {plain / 1e6:,.1f} MB", flush=True)
    if frozen_ops.ONEDNN:
        compare_matmuls(rounds)


if __name__ == "__main__":
    main()
