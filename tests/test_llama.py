"""LLaMA against transformers (or files recorded from it) and itself: batched, cached, in 8 and 16 bits."""

import dataclasses
import json
import re
import weakref

import pytest
import torch
from conftest import train_tokenizer
from make_golden import GOLDEN, VARIANTS
from random_weights import write_llama
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

import llama
from base import linear
from base.checkpoint import load_strict
from base.console import UserError
from base.packing import next_tokens, pack
from llama import LLAMA_7B, LLaMA, Tokenizer, load_llama, read_config

# Lengths from 1 to 44; the third begins the first, and the last equals it.
ROWS = [[5, 9, 17, 3], [5, 9, 17, 3] + [8] * 40, [5, 9], [44], [5, 9, 17, 3]]


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def read(model, rows):
    """All rows in one pass: tokens, their embeddings, and the logits (T, vocab) of each row."""
    lengths = [len(row) for row in rows]
    tokens = pack(rows, lengths)
    x = model.embed(tokens.ids).requires_grad_()
    return tokens, x, model.logits(model(x, tokens)).split(lengths)


# ---------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_recorded_from_transformers(name):
    """The files are those of tests/make_golden.py."""
    tensors = load_file(GOLDEN / f"llama-{name}.safetensors")
    ids = [tensors.pop(f"ids.{b}").tolist() for b in range(2)]
    expected = [tensors.pop(f"logits.{b}") for b in range(2)]
    with torch.device("meta"):
        model = LLaMA(VARIANTS[name])
    load_strict(model, tensors, name, llama.official_name)
    assert not tensors                                  # each was given back before the next was read
    for ours, theirs in zip(read(model, ids)[2], expected, strict=True):
        close(ours, theirs)


def test_greedy_tokens_are_those_of_transformers(llama_dir, tiny):
    """One token at a time, with the KV cache."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    for row in ROWS[:2]:
        theirs = peer.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert llama.greedy_continuation(tiny[0], row, 12) == theirs[0, len(row):].tolist()


# ---------------------------------------------------------------------------------------- formulas


def test_rotary_turns_each_pair_by_its_angle():
    """By complex numbers: the pair (i, i + d/2) is one, and is multiplied by e^(i angle)."""
    x = torch.randn(5, 2, 6)
    position = torch.tensor([0, 1, 9, 100, 1999])
    angle = position[:, None, None] * 5000.0 ** (-torch.arange(0, 6, 2).double() / 6)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * angle)
    ours = llama.apply_rotary(x, *llama.rotary_table(position, 6, 5000.0))
    close(ours, torch.cat((turned.real, turned.imag), -1).float(), 5e-4)


def test_rms_norm_in_fp16():
    """The squares of 300 are too large for fp16."""
    norm = llama.RMSNorm(64, eps=0.5)
    norm.weight.data = torch.randn(64)
    x = (torch.tensor([[0.1], [300]]) * torch.randn(2, 64)).half()
    rms = (x.double().pow(2).mean(-1, keepdim=True) + 0.5).sqrt()
    close(norm(x), (x / rms * norm.weight).half(), 0.02)


def test_sizes_at_7b():
    with torch.device("meta"):
        model = LLaMA(LLAMA_7B)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------- packing, cache


def test_packing_by_hand():
    """The drawing of base/packing.py."""
    tokens = pack([[1, 5, 6], [1, 5, 7], [1, 8]], n_needed=[1, 2, 1])
    assert tokens.ids.tolist() == [1, 5, 6, 7, 8]
    assert tokens.position.tolist() == [0, 1, 2, 2, 1]
    assert tokens.table.tolist() == [0, 1, 2, 0, 1, 3, 0, 4, 0] and tokens.buckets == [(3, 3)]
    assert tokens.needed.tolist() == [2, 1, 3, 4]
    x = torch.randn(5, 4, 2)
    [padded] = tokens.pad(x)
    rows = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 0]])
    assert padded.equal(x[rows].transpose(1, 2))        # (B, heads, T, d)
    assert tokens.unpad([padded]).equal(x.flatten(1))


def test_buckets_by_hand():
    """Two short sequences, and a long one that begins as one of them.  One length is one bucket."""
    tokens = pack([[7, 8, 9, 10, 11], [1, 2], [7, 8]], bucketed=True)
    assert tokens.buckets == [(2, 2), (1, 5)]
    assert tokens.table.tolist() == [5, 6, 0, 1, 0, 1, 2, 3, 4]
    x = torch.randn(7, 3, 2)
    assert tokens.unpad(tokens.pad(x)).equal(x.flatten(1))
    assert pack([[1, 2], [3, 4]], bucketed=True).buckets == [(2, 2)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_batched_is_single(tiny, checkpointed):
    """Logits row for row; a shared token gets the sum of the gradients.  Checkpointing runs layers twice."""
    model, _ = tiny
    sizes = []                                          # of what these modules read
    for module in (model.layers[1], model.layers[2], model.norm):
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.grad_checkpoint = checkpointed
    tokens, x, together = read(model, ROWS)
    [grad] = torch.autograd.grad(torch.cat(together).square().sum(), x)
    N, M = 4 + 40 + 0 + 1 + 0, 4 + 44 + 2 + 1 + 4
    assert sizes == [N, N, M] + [N, N] * checkpointed
    model.grad_checkpoint = False
    expected = torch.zeros_like(x)
    for row, path, ours in zip(ROWS, tokens.table.view(len(ROWS), -1), together):
        _, alone, [logits] = read(model, [row])
        close(ours, logits)
        expected.index_add_(0, path[:len(row)], torch.autograd.grad(logits.square().sum(), alone)[0])
    close(grad, expected, 1e-3)


@torch.no_grad()
def test_cached_is_full_at_every_step(tiny):
    """Sequences of different lengths are read together and continued."""
    model, _ = tiny
    model.grad_checkpoint = True                        # for training alone: it would pass by the cache
    full = [[5, 9, 17, 3, 10, 11, 12], [8, 2, 20, 21, 22], [44, 45, 46, 47, 48, 49, 30, 31, 32]]
    tokens = pack([row[:-3] for row in full], [1, 1, 1])
    cache = model.new_cache()
    for step in range(4):
        logits = model.logits(model(model.embed(tokens.ids), tokens, cache))
        for ours, row in zip(logits, full, strict=True):
            close(ours, read(model, [row])[2][0][step - 4])
        if step < 3:
            ids = torch.tensor([row[step - 3] for row in full])
            tokens = next_tokens(ids, [len(row) - 3 for row in full], step)


# ---------------------------------------------------------------------------------------- 8 and 16 bits


@pytest.mark.parametrize("large, few_rows", [(0, 5), (0, 4), (99, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_frozen_linear(dtype, large, few_rows, monkeypatch):
    """Value and gradient of x @ W.T, W in strips of 3 of its 8 rows; the backward pass keeps no x and no copy
    of W.

    Without a gradient, oneDNN multiplies few rows by a large W.
    """
    calls, onednn = [], linear.ONEDNN
    monkeypatch.setattr(linear, "ONEDNN", onednn and (lambda *inputs: calls.append(1) or onednn(*inputs)))
    monkeypatch.setattr(linear, "LARGE", large)
    monkeypatch.setattr(linear, "FEW_ROWS", few_rows)
    monkeypatch.setattr(linear, "STRIP", 3)
    x, weight, scale = torch.randn(5, 7, requires_grad=True), torch.randn(8, 7), None
    if dtype == torch.int8:
        weight, scale = linear.quantize(weight)
    weight = weight.to(dtype)
    wide = weight.float() * (1 if scale is None else scale[:, None])
    kept, h = [], x * 1
    alive = weakref.ref(h)
    with saved_tensors_hooks(kept.append, lambda _: weight.T):
        y = linear.frozen_linear(h, weight, scale)
    del h
    assert alive() is None and {tensor.data_ptr() for tensor in kept} <= {weight.data_ptr()}
    close(y, x @ wide.T)
    assert not calls
    close(linear.frozen_linear(x.detach(), weight, scale), y)
    assert bool(calls) == (onednn is not None and (large, few_rows) == (0, 5))
    close(torch.autograd.grad(y.square().sum(), x)[0], 2 * y @ wide)


def test_quantize_by_hand(monkeypatch):
    """Scales are a 127th of each row's largest value; halves are rounded to the even neighbour."""
    monkeypatch.setattr(linear, "STRIP", 2)
    rounded, scale = linear.quantize(torch.tensor([[1.27, -0.504, 0.0049], [0, 0, 0], [-254, 3, 5.1]]))
    close(scale, torch.tensor([0.01, 0, 2]))
    assert rounded.dtype == torch.int8 and rounded.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 2, 3]]


@pytest.mark.parametrize("int8", [False, True])
def test_few_bits_compute_what_their_values_do(int8, tiny_config, tokenizer_file, tmp_path):
    """bf16 as in the files, int8 in each Linear; on a CPU the arithmetic is fp32, and logits always are."""
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True, attention_bias=True)
    write_llama(tmp_path, config, tokenizer_file, torch.bfloat16, std=0.2)
    model, _ = load_llama(tmp_path, int8=int8)
    wide, _ = load_llama(tmp_path, torch.float32)
    for module, other in zip(model.modules(), wide.modules()):
        if int8 and isinstance(module, llama.Linear):
            other.weight.data = module.scale[:, None] * module.weight
    assert model.norm.weight.dtype == torch.bfloat16
    for ours, expected in zip(read(model, ROWS)[2], read(wide, ROWS)[2]):
        close(ours, expected)
    assert model.logits(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32         # as on a GPU


# ---------------------------------------------------------------------------------------- config, files


def config_with(folder, config, **more):
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **vars(config), **more}))
    return path


def test_config_is_honoured(tmp_path, tiny_config):
    other = dataclasses.replace(tiny_config, rope_theta=5e5, attention_bias=True, tie_word_embeddings=True,
                                max_position_embeddings=77)
    assert read_config(config_with(tmp_path, other, rope_scaling=None)) == other
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000}, "rope_theta": None}
    assert read_config(config_with(tmp_path, tiny_config, **newer)).rope_theta == 5000
    older = {"num_key_value_heads": None, "head_dim": None}             # as LLaMA-7B's own config.json
    assert read_config(config_with(tmp_path, LLAMA_7B, **older)) == LLAMA_7B


UNSUPPORTED = """
{"num_hidden_layers": 4.0}                              num_hidden_layers is 4.0
{"model_type": "mistral"}                               'mistral', but only 'llama' is supported
{"rope_scaling": {"type": "linear", "factor": 2.0}}     'linear', but only 'default'
{"rope_scaling": {"rope_type": "llama3"}}               'llama3', but only 'default'
{"hidden_act": "gelu"}                                  'gelu', but only 'silu'
{"head_dim": 13}                                        head_dim even
{"num_hidden_layers": 1001}                             the layers at most 1,000
{"num_key_value_heads": 3}                              must be a multiple of the key/value heads
"""


@pytest.mark.parametrize("more, said", re.findall(r"({.*})  +(.*)", UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name(tmp_path, tiny_config, more, said):
    with pytest.raises(UserError, match=said):
        read_config(config_with(tmp_path, tiny_config, **json.loads(more)))


# ---------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_new_word_begins_with_a_space(tmp_path, adds_space):
    """LLaMA's tokenizer puts one before every text; SmolLM2's does not, and a new word needs one."""
    tokenizer = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=adds_space))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    new_word = tokenizer.encode("Flat", new_word=True)
    assert tokenizer.pieces.id_to_piece(new_word[0]).startswith("\u2581")
    assert (tokenizer.encode("Flat") == new_word) == adds_space
    assert tokenizer.decode(tokenizer.encode("Rain Boots\nété")) == "Rain Boots\nété"


def test_a_file_that_is_no_such_tokenizer_is_refused(tmp_path, tokenizer_file):
    path = tmp_path / "tokenizer.model"
    not_utf8 = tokenizer_file.read_bytes().replace(b"Boot", b"\xffoot", 1)
    without_eos = train_tokenizer(path, eos_id=-1).read_bytes()
    for content, said in ((not_utf8, "SentencePiece"), (without_eos, "no BOS or no EOS")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            Tokenizer(path)
