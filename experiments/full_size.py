"""LLaMA-7B's size on this machine: seconds and gigabytes to load it, to answer, and for a training step.

    python -m experiments.random_weights llama-7b weights-7b --tokenizer FILE
    python -m experiments.full_size weights-7b                          with the dtype of the files
    python -m experiments.full_size weights-7b --int8                   quantised as they are read
    python -m experiments.full_size weights-7b --device cuda            on a GPU; memory is then the GPU's

Weights may be random: only the length of an answer depends on what they say.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from base import console
from base.frozen_ops import frozen_linear, quantize, times
from data import Product, base_question, encode_examples
from eiven import EIVEN
from experiments.measuring import head_of, now, passes_of, peak, read_bytes
from llama import load_llama
from support.config import choose_device, keep_freed_memory
from train import make_optimizer

GB = 1e9


def seconds(do):
    start = now()
    result = do()
    return result, now() - start


def compare_matmuls():
    """One bf16 matrix of the feed-forward times 64 tokens, in five ways: median of 9."""
    weight, x = torch.randn(11008, 4096).bfloat16(), torch.randn(64, 4096)
    wide, narrow = weight.float(), quantize(weight)
    ways = {"in bf16": lambda: x.bfloat16() @ weight.T, "casting the whole matrix": lambda: x @ weight.float().T,
            "casting strips": lambda: frozen_linear(x, weight), "strips of int8": lambda: frozen_linear(x, *narrow),
            "with fp32 weights": lambda: x @ wide.T}
    for do in ways.values():
        do()
    took = {name: statistics.median(seconds(do)[1] for _ in range(9)) for name, do in ways.items()}
    print("11,008 x 4,096 by 64 tokens: " + ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in took.items()), flush=True)


def answer(model, batch, cls_tokens):
    """Answers a batch with five tokens each: (what there is to say of it, seconds, its passes: see passes_of)"""
    (answers, passes), took = seconds(lambda: passes_of(
        model.llama, lambda: model.generate(batch, cls_tokens, range(len(batch)), limit=5)))
    return (f"{took:.3g} s for {passes[0][0]:,} tokens read and {sum(len(ids) for ids, _ in answers)} written; peak memory "
            f"{peak() / GB:.2f} GB", took, passes)


def least(llama, passes):
    """Seconds that these forward passes take at least: their matmuls, with weights of the activations' dtype; or, for a single
    token, the reading of all weights once from memory.  Both are measured here, the matmuls once for each shape."""
    last, head = llama.layers[-1], head_of(llama).weight
    matrices = [p for p in llama.layers.parameters() if p.dim() == 2 and not p.requires_grad] + [head]
    like = {"dtype": llama.compute_dtype, "device": head.device}
    weights = {p.shape: torch.ones(p.shape, **like) for p in matrices}
    repeats = 1 if head.device.type == "cpu" else 20    # waiting for a GPU takes as long as a small matmul
    of_few = [head, *(layer.weight for layer in (last.self_attn.q_proj, last.self_attn.o_proj, *last.mlp.children()))]

    def matmul(shape, rows):
        x = torch.ones(rows, shape[1], **like)
        times(x, weights[shape].T)
        return seconds(lambda: [times(x, weights[shape].T) for _ in range(repeats)])[1] / repeats

    def read():
        return [p.view(-1).view(torch.int64).sum() for p in matrices]

    read()
    known = {(1, 1): seconds(read)[1]}
    for tokens, needed in set(passes) - known.keys():
        each = {(shape, rows): matmul(shape, rows) for shape in weights for rows in (tokens, needed)}
        known[tokens, needed] = sum(each[p.shape, needed if any(p is few for few in of_few) else tokens] for p in matrices)
    return sum(known[rows] for rows in passes)


def main():
    parser = argparse.ArgumentParser(description="Seconds and gigabytes at LLaMA-7B's size.")
    parser.add_argument("llama", type=Path, help="folder of a LLaMA")
    parser.add_argument("--int8", action="store_true", help="quantise LLaMA's matrices")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--products", type=int, default=32, help="how many are answered together (default: %(default)s)")
    args = parser.parse_args()
    device = choose_device(args.device)
    keep_freed_memory()                                 # as train.py and evaluate.py do
    size = sum(path.stat().st_size for path in args.llama.glob("*.safetensors"))
    once, again = read_bytes(args.llama), read_bytes(args.llama)
    (llama, tokenizer), load = seconds(lambda: load_llama(args.llama, device=device, int8=args.int8))
    _, touch = seconds(lambda: [p.view(torch.int8).view(-1)[::4096].sum() for p in llama.parameters()])
    print(f"weights {size / GB:.2f} GB; reading the files {once:.1f} s, again (cached) {again:.1f} s; loading {load:.1f} s "
          f"and touching every page {touch:.1f} s: {(load + touch) / again:.2f} x the cached reading")
    place = "Python and PyTorch included" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"peak memory after loading {peak() / GB:.2f} GB, {place}: {peak() / size:.3f} x the files", flush=True)

    model = EIVEN(llama, tokenizer, visual_width=768)
    cls_tokens = torch.randn(1, 4, 768, device=device)
    product = Product("B1", "b1.jpg", "Shoes", "Polar Fox Men's Black Lace Up Cap Toe Military Work Desert Ankle Boot",
                      "Boot Style", "Combat")
    batch, _ = encode_examples([base_question(product)], tokenizer)
    several = [replace(product, title=f"{n} {product.title}") for n in range(args.products)]       # titles share no prefix
    found = {}

    def report(name, asked, rounds=1):
        """Answers so many times, and prints the middle one."""
        each = sorted((answer(model, asked, cls_tokens) for _ in range(rounds)), key=lambda result: result[1])
        said, *found[name] = each[rounds // 2]
        spread = f"; {each[0][1]:.3g} to {each[-1][1]:.3g} s in {rounds} rounds" if rounds > 1 else ""
        print(f"{name}: {said}{spread}", flush=True)

    answer(model, batch, cls_tokens)                    # threads start, a GPU chooses its kernels
    report("one product", batch, rounds=5)

    llama.grad_checkpoint = True
    optimizer = make_optimizer(model)

    def step():
        loss = model(batch, cls_tokens)
        loss.backward()
        optimizer.step()
        return loss.item()

    if device.type != "cpu":
        step()                                          # its kernels, too
    loss, took = seconds(step)
    print(f"one training step, micro-batch 1, --grad-checkpoint: {took:.3g} s, loss {loss:.1f}; peak memory {peak() / GB:.2f} GB")

    llama.grad_checkpoint = False
    report(f"{args.products} products", encode_examples(map(base_question, several), tokenizer)[0])
    for name, (took, passes) in found.items():          # afterwards: it takes memory
        limit = statistics.median(least(llama, passes) for _ in range(3))
        print(f"{name}: {took / limit:.2f} x the limit of {limit:.3g} s, which is {100 * limit / took:.0f} % of the time", flush=True)
    if device.type == "cpu":
        compare_matmuls()


if __name__ == "__main__":
    console.run(main)
