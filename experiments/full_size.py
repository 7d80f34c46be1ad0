"""LLaMA-7B's size on this machine: seconds and gigabytes to load it, to answer, and for a training step.

    python -m experiments.random_weights llama-7b weights-7b --tokenizer FILE
    python -m experiments.full_size weights-7b                          with the dtype of the files
    python -m experiments.full_size weights-7b --int8                   quantised as they are read
    python -m experiments.full_size weights-7b --device cuda            on a GPU; memory is then the GPU's

Weights may be random: only the length of an answer depends on what they say.
"""

import argparse
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from base import console
from data import Product, base_question, encode_examples
from eiven import EIVEN
from experiments.speed import seconds
from llama import load_llama
from support.config import choose_device
from train import make_optimizer

PRODUCT = Product("B1", "b1.jpg", "Shoes", "Polar Fox Men's Black Lace Up Cap Toe Military Work Desert Boot",
                  "Boot Style", "Combat")


def report(what, took):
    """Print seconds (the median), and the greatest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    print(f"{what}: {statistics.median(took):.3g} s ({min(took):.3g} to {max(took):.3g}; {len(took)}), peak "
          f"memory {peak / 1e9:.2f} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Seconds and gigabytes at LLaMA-7B's size.")
    parser.add_argument("llama", type=Path, help="folder of a LLaMA")
    parser.add_argument("--int8", action="store_true", help="quantise LLaMA's matrices")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--products", type=int, default=32, help="answered together (default: %(default)s)")
    args = parser.parse_args()
    device = choose_device(args.device)
    start = time.perf_counter()
    llama, tokenizer = load_llama(args.llama, device=device, int8=args.int8)
    for p in llama.parameters():                        # weights that are mapped are read when they are used
        p.view(torch.int8).sum()
    report("loading", [time.perf_counter() - start])
    model = EIVEN(llama, tokenizer, visual_width=768)
    cls_tokens = torch.randn(1, 4, 768, device=device)
    # Titles that begin differently share no prefix.
    products = [replace(PRODUCT, title=f"{n} {PRODUCT.title}") for n in range(args.products)]
    batch, _ = encode_examples(map(base_question, products), tokenizer)
    optimizer = make_optimizer(model)

    def answer(examples):
        model.generate(examples, cls_tokens, limit=5)

    def step():
        model(batch[:1], cls_tokens).backward()
        optimizer.step()

    answer(batch[:1])                                   # threads start, a GPU chooses its kernels
    report("one product, 5 tokens", [seconds(lambda: answer(batch[:1])) for _ in range(5)])
    llama.grad_checkpoint = True
    report("training steps, micro-batch 1, --grad-checkpoint", [seconds(step) for _ in range(2)])
    report(f"{args.products} products", [seconds(lambda: answer(batch))])


if __name__ == "__main__":
    console.run(main)
