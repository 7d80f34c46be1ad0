"""Random weights in the official layouts, in any size; the real files are large, and not free to ship."""

import shutil

import torch
from safetensors.torch import save_file

import llama
import vit
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
