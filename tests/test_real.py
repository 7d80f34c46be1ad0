"""Real weights, titles and photos against transformers; skipped where they or transformers are absent.

    python -m experiments.smollm2 weights/smollm2   the weights; or SMOLLM2=FOLDER
    python -m pytest tests/test_real.py -s          a part of each, a minute
    FULL=1 python -m pytest tests/test_real.py -s   2,000 tokens, 20 x 64 greedy tokens, every photo and title

Prints the figures that it checks.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, SHARED
from PIL import Image

import vit
from base.packing import pack
from base.photo import open_photo
from data import read_products
from random_weights import write_vit
from llama import Tokenizer, greedy_continuation, load_llama

transformers = pytest.importorskip("transformers")
FULL = bool(os.environ.get("FULL"))
DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not (DATA / "implicitave").is_dir(), reason="the real data are not here")


def titles():
    """Every real title, with white space collapsed."""
    return [p.title for path in sorted(DATA.glob("implicitave/*/*.tsv")) for p in read_products(path)]


@pytest.fixture(scope="module")
def smol():
    """SmolLM2-135M, real pretrained weights in the official layout."""
    folder = Path(os.environ.get("SMOLLM2", PROJECT / "weights" / "smollm2"))
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not here: python -m experiments.smollm2 weights/smollm2")
    return folder


@pytest.fixture(scope="module")
def peer(smol):
    return transformers.LlamaForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()


def test_smollm2_knows_what_comes_next(smol):
    """Rows of q and k in another order, or a tokenizer with other ids, would give nonsense."""
    model, tokenizer = load_llama(smol, torch.float32)
    for text, expected in (("The capital of France is", " Paris"),
                           ("Monday, Tuesday, Wednesday, Thursday,", " Friday, Saturday,")):
        ids = greedy_continuation(model, tokenizer.encode(text), len(tokenizer.encode(expected)))
        assert tokenizer.decode(ids) == expected


@needs_data
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_on_real_titles(smol, peer, dtype):
    """The checkpoint has 16 bits, so bf16 weights give the logits of fp32, too: a CPU computes in fp32."""
    model, tokenizer = load_llama(smol, dtype)
    ids = [i for title in titles()[::97] for i in tokenizer.encode(title + "\n")][:2000 if FULL else 600]
    sequences = [ids[:90], ids[90:400], ids[400:]]
    tokens = pack(sequences, [len(sequence) for sequence in sequences])
    ours = model.logits(model(model.embed(tokens.ids), tokens))
    theirs = torch.cat([peer(torch.tensor([sequence])).logits[0] for sequence in sequences])
    worst = (ours - theirs).abs().max().item()
    assert worst < 1e-4 and ours.argmax(-1).equal(theirs.argmax(-1))
    print(f"\n{dtype}, {len(ours):,} tokens: logits within {worst:.1e}; every argmax is equal")


@needs_data
def test_greedy_tokens_on_real_prompts(smol, peer):
    model, tokenizer = load_llama(smol, torch.float32)
    prompts, n = (20, 64) if FULL else (3, 16)
    for title in titles()[::400][:prompts]:
        ids = tokenizer.encode(f"Question: What is the style of this product?\nContext: {title}\nAnswer:")
        theirs = peer.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=None)
        assert greedy_continuation(model, ids, n) == theirs[0, len(ids):].tolist(), title
    print(f"\n{prompts} prompts: the same {n} greedy tokens")


def test_vit_b_16_at_full_size(tmp_path):
    """Random weights.  (The other layouts are in test_vit.py.)"""
    write_vit(tmp_path, std=0.05)
    peer = transformers.CLIPVisionModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    states = peer(pixels, output_hidden_states=True).hidden_states
    expected = torch.stack([states[depth][:, 0] for depth in (3, 6, 9, 12)], dim=1)
    model = vit.load_vit(tmp_path)
    assert model.config == vit.ViTConfig()
    difference = (model(pixels, (3, 6, 9, 12)) - expected).norm(dim=-1) / expected.norm(dim=-1)
    print(f"\n[cls] after layers 3, 6, 9, 12 within {difference.max():.1e}, relative")
    assert difference.max() < 1e-5


@needs_data
def test_preprocessing_of_real_photos():
    processor = transformers.CLIPImageProcessorPil()
    paths = sorted(DATA.glob("implicitave/images/*.jpg"))[::1 if FULL else 20]
    worst = 0.0
    for path in paths:
        with Image.open(path) as image:
            theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        worst = max(worst, (vit.preprocess(open_photo(path)) - theirs).abs().max().item())
    assert worst < 1e-5
    print(f"\n{len(paths)} photos: within {worst:.1e} of transformers' CLIP processor")


@needs_data
def test_tokens_of_real_titles(tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers needs protobuf to read a tokenizer.model")
    shutil.copy(DATA / "llama-tokenizer.model", tmp_path / "tokenizer.model")
    ours = Tokenizer(tmp_path / "tokenizer.model")
    peer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    part = titles()[::1 if FULL else 50]
    assert list(map(ours.encode, part)) == peer(part, add_special_tokens=False)["input_ids"]
    print(f"\n{len(part):,} titles: the same ids")
