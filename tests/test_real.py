"""Real weights, titles and photos against transformers; skipped where they or transformers are absent.

    python -m pytest tests/test_real.py -s                some of each, a minute or two
    FULL=1 python -m pytest tests/test_real.py -s         2,000 tokens, 20 x 64 greedy tokens, every photo and title

Prints the figures that it checks.
"""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file

import vit
from base.packing import pack
from base.photo import open_photo
from experiments.random_weights import write_vit
from llama import Tokenizer, greedy_continuation, load_llama

transformers = pytest.importorskip("transformers")
FULL = bool(os.environ.get("FULL"))


def titles():
    """Every real title."""
    folder = SHARED / "data" / "implicitave"
    if not folder.is_dir():
        pytest.skip("the real titles are not here")
    found = []
    for path in sorted(folder.glob("*/*.tsv")):
        with open(path, encoding="utf-8", newline="") as file:
            found += [row["texts"] for row in csv.DictReader(file, dialect="excel-tab")]
    return found


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """SmolLM2-135M, real pretrained weights in the official layout."""
    tool, folder = SHARED / "tools" / "make_smollm2.py", tmp_path_factory.mktemp("smol")
    if not tool.is_file():
        pytest.skip("the tool that makes the checkpoint is not here")
    done = subprocess.run([sys.executable, tool, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the checkpoint cannot be made: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def sequences_of_titles(tokenizer, tokens):
    """Titles as sequences of ids, some hundred tokens each, `tokens` in all."""
    ids = [i for title in titles()[::97] for i in tokenizer.encode(title + "\n")][:tokens]
    cuts = [0, 300, 390, 700, 1250, 2000]
    return [ids[a:b] for a, b in zip(cuts, cuts[1:]) if ids[a:b]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, None)])
def test_logits_on_real_titles(smol, dtype, tolerance):
    """fp32: within 1e-4 and the same argmax.  bf16 weights: ours compute in fp32 on a CPU, the peer in bf16; ours must be
    nearer to the peer's fp32 logits than the peer itself is."""
    model, tokenizer = load_llama(smol, dtype)
    sequences = sequences_of_titles(tokenizer, 2000 if FULL else 600)
    tokens = pack(sequences)
    needed = pack(sequences, [len(sequence) for sequence in sequences]).needed_index
    with torch.no_grad():
        ours = model.logits(model(model.embed(tokens.ids), tokens)[needed])
        exact, peer = (torch.cat([m(torch.tensor([sequence])).logits[0].float() for sequence in sequences]) for m in (
            transformers.LlamaForCausalLM.from_pretrained(smol, dtype=d).eval() for d in (torch.float32, dtype)))
    worst = (ours - exact).abs().max().item()
    same = (ours.argmax(-1) == exact.argmax(-1)).float().mean().item()
    print(f"\n{dtype}, {len(ours):,} tokens: greatest difference of logits {worst:.1e} (peer's own {dtype}: "
          f"{(peer - exact).abs().max().item():.1e}); the same argmax {100 * same:.2f} %")
    if tolerance:
        assert worst < tolerance and same == 1
    else:
        assert worst <= (peer - exact).abs().max().item()


def test_greedy_tokens_on_real_prompts(smol):
    model, tokenizer = load_llama(smol, torch.float32)
    peer = transformers.LlamaForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    prompts, n = (20, 64) if FULL else (3, 16)
    for title in titles()[::400][:prompts]:
        ids = tokenizer.encode(f"Question: What is the style of this product?\nContext: {title}\nAnswer:")
        theirs = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=n,
                               min_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(ids):].tolist()
        assert greedy_continuation(model, ids, n) == theirs, title
    print(f"\n{prompts} prompts: the same {n} greedy tokens")


def test_vit_b_16_at_full_size(tmp_path):
    write_vit(tmp_path / "hf", std=0.05)
    peer = transformers.CLIPVisionModel.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    from test_vit import openai_names
    (tmp_path / "bin").mkdir()
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(openai_names(tensors, "visual."), tmp_path / "open_clip.safetensors")
    torch.save(tensors | {"logit_scale": torch.tensor(4.6)}, tmp_path / "bin" / "pytorch_model.bin")
    with torch.no_grad():
        states = peer(pixels, output_hidden_states=True).hidden_states
    expected = torch.stack([states[depth][:, 0] for depth in (3, 6, 9, 12)], dim=1)
    for path in (tmp_path / "hf", tmp_path / "open_clip.safetensors", tmp_path / "bin"):
        model = vit.load_vit(path)
        assert model.config == vit.ViTConfig()
        with torch.no_grad():
            ours = model(pixels, (3, 6, 9, 12))
        worst = ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        print(f"\n{path.name}: [cls] after layers 3, 6, 9, 12 within {worst:.1e} of transformers', relative")
        assert worst < 1e-5


def test_preprocessing_of_real_photos():
    folder = SHARED / "data" / "implicitave" / "images"
    if not folder.is_dir():
        pytest.skip("the real photos are not here")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    paths = sorted(folder.glob("*.jpg"))[::1 if FULL else 20]
    levels, worst = torch.tensor(vit.CLIP_STD)[:, None, None] * 255, 0.0
    for path in paths:
        with Image.open(path) as image:
            theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        worst = max(worst, ((vit.preprocess(open_photo(path)) - theirs) * levels).abs().max().item())
    print(f"\n{len(paths)} photos: within {worst:.1e} grey levels of transformers' CLIP processor")
    assert worst < 1e-3


def folder_with(path, folder):
    """A folder that holds LLaMA's tokenizer.model, as transformers wants it."""
    (folder / "tokenizer.model").write_bytes(path.read_bytes())
    return folder


def test_tokens_of_real_titles(tmp_path):
    path = SHARED / "data" / "llama-tokenizer.model"
    if not path.is_file():
        pytest.skip("LLaMA's tokenizer is not here")
    pytest.importorskip("google.protobuf", reason="transformers needs protobuf to read a tokenizer.model")
    ours, peer = Tokenizer(path), transformers.LlamaTokenizer.from_pretrained(folder_with(path, tmp_path))
    some = titles()[::1 if FULL else 50]
    for title in some:
        # As data.py reads them.  Of two blanks SentencePiece itself, LLaMA's own tokenizer, makes other pieces than
        # transformers 5 makes after converting it.
        title = " ".join(title.split())
        assert ours.encode(title) == peer(title, add_special_tokens=False)["input_ids"], title
    print(f"\n{len(some):,} titles: the same ids")
