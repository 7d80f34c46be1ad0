"""Write random weights in the official layouts, to try the real sizes where the real files cannot be had:

    python -m experiments.random_weights vit-b-16 OUT                          346 MB, fp32
    python -m experiments.random_weights llama-7b OUT --tokenizer FILE         13.5 GB, bf16, two shards with an index
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import llama
import vit

# Small models that tests and the golden files share: sizes and settings of LLaMA that differ from the base, ids to read
VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4, "head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}
IDS = [[5, 9, 17, 3, 3, 120, 44, 8, 71], [5, 9, 17, 60]]
TINY_VIT = vit.ViTConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=3, patch_size=8,
                         image_size=32)


def random_tensors(module, official_name, dtype, seed=0, std=0.02):
    """{official name: tensor} for a module on the meta device, at the scale `std`; such models start from 0.02."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in module.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        tensors[official_name(name)] = (torch.ones(parameter.shape, dtype=dtype) if norm else
                                        torch.empty(parameter.shape, dtype=dtype).normal_(0, std, generator=draw))
    return tensors


def write_vit(out, config=vit.ViTConfig(), seed=0, std=0.02):
    """A CLIP vision tower as transformers writes it: model.safetensors and config.json."""
    out.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = vit.ViT(config)
    tensors = random_tensors(module, vit.official_name, torch.float32, seed, std)
    save_file({f"vision_model.{name}": tensor for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **vars(config)}))


LLAMA_7B = llama.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                             num_attention_heads=32, num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-6)


def write_llama(out, config, tokenizer, dtype=torch.bfloat16, shards=1, seed=0, std=0.02):
    """A LLaMA as transformers writes it: config.json, tokenizer.model, and model.safetensors or shards with an index."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu", **vars(config)}))
    shutil.copyfile(tokenizer, out / "tokenizer.model")
    with torch.device("meta"):
        module = llama.LLaMA(config)
    names = [llama.official_name(name) for name, _ in module.named_parameters()]
    if shards == 1:
        return save_file(random_tensors(module, llama.official_name, dtype, seed, std), out / "model.safetensors")
    weight_map = {}
    for n in range(shards):                             # a shard at a time, so that memory holds one
        part = dict(list(module.named_parameters())[n * len(names) // shards:(n + 1) * len(names) // shards])
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        holder = argparse.Namespace(named_parameters=part.items)
        tensors = random_tensors(holder, llama.official_name, dtype, seed + n, std)
        save_file(tensors, out / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
        write_llama(args.out, LLAMA_7B, args.tokenizer, shards=2)


if __name__ == "__main__":
    main()
