"""Record what transformers computes, for machines without it:  python -m tests.make_golden

Each file of tests/golden holds random weights under their official names, an input, and the output of
transformers: nothing in it was computed by our own code.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import llama
import vit
from tests.random_weights import write_llama, write_vit

GOLDEN = Path(__file__).parent / "golden"
LLAMA = llama.LlamaConfig(150, 32, 56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                          head_dim=12, rms_norm_eps=1e-6)
VARIANTS = {
    "grouped": LLAMA,
    "multi-head": replace(LLAMA, num_key_value_heads=4, head_dim=8),
    "tied": replace(LLAMA, tie_word_embeddings=True),
    "biased": replace(LLAMA, attention_bias=True),
    "theta": replace(LLAMA, rope_theta=500000.0, rms_norm_eps=1e-5),
}
VIT = vit.ViTConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=3,
                    patch_size=8, image_size=32)


@torch.no_grad()
def main():
    import transformers                                 # tests read the configs above without it

    for name, config in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_llama(Path(folder), config, __file__, torch.float32, std=0.2)     # any file as tokenizer
            peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            tensors = load_file(Path(folder) / "model.safetensors")
        for b, ids in enumerate(([5, 9, 17, 3, 3, 120, 44, 8, 71], [5, 9, 17, 60])):
            tensors[f"ids.{b}"] = torch.tensor(ids)
            tensors[f"logits.{b}"] = peer(torch.tensor([ids])).logits[0].contiguous()
        save_file(tensors, GOLDEN / f"llama-{name}.safetensors")

    with tempfile.TemporaryDirectory() as folder:
        write_vit(Path(folder), VIT, std=0.2)
        peer = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
        tensors = load_file(Path(folder) / "model.safetensors")
    pixels = torch.randn(2, 3, VIT.image_size, VIT.image_size, generator=torch.Generator().manual_seed(0))
    states = peer(pixels, output_hidden_states=True).hidden_states
    tensors |= {"pixels": pixels, "cls": torch.stack([states[depth][:, 0] for depth in (3, 6)], dim=1)}
    save_file(tensors, GOLDEN / "vit.safetensors")


if __name__ == "__main__":
    main()
