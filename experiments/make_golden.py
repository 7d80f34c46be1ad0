"""Record golden files from transformers, for machines where it is not installed:  python -m experiments.make_golden

Each file holds random weights under official names and what transformers computes with them.  They are inputs and
outputs of the reference, never of our own code.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import llama
from experiments.random_weights import IDS, TINY_VIT, VARIANTS, write_llama, write_vit

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


def main():
    GOLDEN.mkdir(exist_ok=True)
    base = llama.LlamaConfig(vocab_size=150, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6)
    with tempfile.TemporaryDirectory() as folder:
        for variant, changes in VARIANTS.items():
            config = dataclasses.replace(base, **changes)
            write_llama(Path(folder), config, __file__, torch.float32, std=0.2)     # any file does as tokenizer here
            peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            tensors = load_file(Path(folder) / "model.safetensors")
            with torch.no_grad():
                for b, row in enumerate(IDS):
                    tensors[f"logits.{b}"] = peer(torch.tensor([row])).logits[0].contiguous()
            save_file(tensors, GOLDEN / f"llama-{variant}.safetensors")
            (GOLDEN / f"llama-{variant}.json").write_text(json.dumps(vars(config)) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        write_vit(Path(folder), TINY_VIT, std=0.2)
        peer = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
        pixels = torch.randn(2, 3, TINY_VIT.image_size, TINY_VIT.image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            states = peer(pixels, output_hidden_states=True).hidden_states
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors |= {"pixels": pixels, "cls.3": states[3][:, 0].contiguous(), "cls.6": states[6][:, 0].contiguous()}
        save_file(tensors, GOLDEN / "vit.safetensors")
    print(f"recorded from transformers {transformers.__version__} in tests/golden")


if __name__ == "__main__":
    main()
