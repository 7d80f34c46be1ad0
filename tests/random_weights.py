"""Write random weights in the official layouts, to try the real sizes where the real files cannot be had:

    python -m tests.random_weights vit-b-16 OUT                       346 MB, fp32
    python -m tests.random_weights llama-7b OUT --tokenizer FILE      13.5 GB, bf16, two shards
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import llama
import vit
from base import console
from base.console import write_json


def write_tensors(path, parameters, dtype, seed, std):
    """Write a file of random tensors at the scale `std`.  parameters: {official name: one of this shape}"""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = torch.ones(parameter.shape, dtype=dtype)
        if not ("norm" in name and name.endswith("weight")):
            tensors[name].normal_(0, std, generator=draw)
    save_file(tensors, path)


def write_vit(out, config=vit.ViTConfig(), std=0.02):
    """A CLIP vision tower as transformers writes it: model.safetensors and config.json."""
    write_json(out / "config.json", {"model_type": "clip_vision_model", **vars(config)})
    with torch.device("meta"):
        parameters = {f"vision_model.{vit.official_name(name)}": p
                      for name, p in vit.ViT(config).named_parameters()}
    write_tensors(out / "model.safetensors", parameters, torch.float32, 0, std)


def write_llama(out, config, tokenizer, dtype=torch.bfloat16, shards=1, std=0.02):
    """A LLaMA as transformers writes it: config.json, tokenizer.model, safetensors in one file or shards."""
    write_json(out / "config.json", {"model_type": "llama", "hidden_act": "silu", **vars(config)})
    shutil.copyfile(tokenizer, out / "tokenizer.model")
    with torch.device("meta"):
        parameters = [(llama.official_name(name), p) for name, p in llama.LLaMA(config).named_parameters()]
    weight_map = {}
    for n in range(shards):                             # a shard at a time, so that memory holds one
        part = dict(parameters[n::shards])
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        write_tensors(out / file, part, dtype, n, std)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def main():
    parser = argparse.ArgumentParser(description="Write random weights in the official layouts.")
    parser.add_argument("model", choices=("vit-b-16", "llama-7b"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model of 32,000 pieces, for llama-7b")
    args = parser.parse_args()
    if args.model == "vit-b-16":
        write_vit(args.out)
    elif args.tokenizer is None:
        parser.error("llama-7b needs --tokenizer")
    else:
        write_llama(args.out, llama.LLAMA_7B, args.tokenizer, shards=2)


if __name__ == "__main__":
    console.run(main)
