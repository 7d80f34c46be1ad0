"""LLaMA against transformers (or golden files recorded from it), and against itself: batched, cached, checkpointed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llama
from console import UserError
from llama import Cache, FrozenProduct, LlamaConfig, LLaMA, Tokenizer, load_llama, official_name, pack, read_config
from random_weights import write_llama

GOLDEN = Path(__file__).parent / "golden"


def full_logits(model, rows):
    """Logits (T, vocab) of each row, all rows in one pass."""
    lengths = [len(row) for row in rows]
    layout = pack(rows, lengths)
    with torch.no_grad():
        h = model(model.embed(layout.ids), dataclasses.replace(layout, ask=None))
        return model.logits(h[layout.asked]).split(lengths)


VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4, "head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}
IDS = [[5, 9, 17, 3, 3, 120, 44, 8, 71], [5, 9, 17, 60]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, tiny_config, tokenizer_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(tiny_config, **VARIANTS[variant])
    write_llama(tmp_path, config, tokenizer_file, torch.float32, std=0.2)
    model, _ = load_llama(tmp_path)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for row, ours in zip(IDS, full_logits(model, IDS)):
        with torch.no_grad():
            theirs = peer(torch.tensor([row])).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_recorded_from_transformers(variant, tokenizer_file, tmp_path):
    """Where transformers is not installed: files that tests/make_golden.py recorded from it."""
    golden = load_file(GOLDEN / f"llama-{variant}.safetensors")
    config = json.loads((GOLDEN / f"llama-{variant}.json").read_text())
    expected = [golden.pop(f"logits.{b}") for b in range(len(IDS))]
    with torch.device("meta"):
        model = LLaMA(LlamaConfig(**config))
    llama.fill(model, golden, "golden", official_name)
    for ours, theirs in zip(full_logits(model, IDS), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_are_those_of_transformers(llama_dir):
    transformers = pytest.importorskip("transformers")
    model, _ = load_llama(llama_dir)
    peer = transformers.LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    for row in IDS:
        theirs = peer.generate(torch.tensor([row]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        # min_new_tokens forbids the end token there, so it must not be the best one here
        ours = llama.greedy_continuation(model, row, 12)
        assert 2 not in ours and ours == theirs[0, len(row):].tolist()


def test_batched_is_single_and_shared_beginnings_change_nothing(tiny):
    model, _ = tiny
    rows = [[5, 9, 17, 3], [5, 9, 17, 3, 8, 8, 1], [5, 9], [44], [5, 9, 17, 3]]
    assert len(pack(rows).ids) == 4 + 3 + 0 + 1 + 0     # the third row begins the first, the last equals it
    for row, together in zip(rows, full_logits(model, rows)):
        torch.testing.assert_close(together, full_logits(model, [row])[0], rtol=1e-5, atol=1e-5)


def test_layout_by_hand():
    layout = pack([[7, 8], [7, 9, 9], [7, 8, 3, 3, 3, 3]], asked=[1, 2, 3])
    assert layout.ids.tolist() == [7, 8, 9, 9, 3, 3, 3, 3]
    assert layout.position.tolist() == [0, 1, 1, 2, 2, 3, 4, 5]
    assert [table.tolist() for table in layout.rows] == [[[0, 1]], [[0, 2, 3]], [[0, 1, 4, 5, 6, 7]]]
    assert [table.tolist() for table in pack([[7, 8], [7, 9, 9]], groups=False).rows] == [[[0, 1, 0], [0, 2, 3]]]
    assert layout.asked.tolist() == [1, 2, 3, 5, 6, 7]
    assert layout.ask.position.tolist() == [1, 1, 2, 3, 4, 5]
    assert [table.tolist() for table in layout.ask.rows] == [[[0]], [[1, 2]], [[3, 4, 5]]]
    for some in (layout, layout.ask, pack([[7, 8], [7, 9, 9]], [2, 1], groups=False).ask):
        x = torch.arange(2.0 * len(some.ids)).view(-1, 2)
        assert some.to_tokens(some.to_rows(x)).equal(x)


def test_asked_tokens_are_those_of_the_full_pass(tiny):
    model, _ = tiny
    rows = [[5, 9, 17, 3], [5, 9, 60], [5, 9, 17, 3, 8, 8, 8, 8, 8], [5, 9, 17, 3]]      # some of the asked are shared
    every, some = pack(rows), pack(rows, [4, 1, 6, 2])
    with torch.no_grad():
        full = model(model.embed(every.ids), every)
        asked = model(model.embed(some.ids), some)
    assert len(asked) == 4 + 1 + 6 + 2
    torch.testing.assert_close(asked, full[some.asked], rtol=1e-5, atol=1e-5)


def test_cached_is_full_at_every_step(tiny):
    """Rows of different lengths, read together and then continued one token at a time."""
    model, _ = tiny
    rows = [[5, 9, 17, 3], [8, 2], [44, 45, 46, 47, 48, 49]]
    more = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    full = full_logits(model, [row + tail for row, tail in zip(rows, more)])
    layout = pack(rows, [1, 1, 1], groups=False)
    cache = Cache(model.config, len(rows), 6 + 3, torch.float32, "cpu")
    with torch.no_grad():
        h = model(model.embed(layout.ids), layout, cache)
        cache.length = torch.tensor([len(row) for row in rows])
        for step in range(4):
            for b, row in enumerate(rows):
                torch.testing.assert_close(model.logits(h)[b], full[b][len(row) - 1 + step], rtol=1e-5, atol=1e-5)
            if step == 3:
                break
            ids = torch.tensor([tail[step] for tail in more])
            h = model(model.embed(ids), llama.next_tokens(ids, cache.length), cache)
            cache.length = cache.length + 1


def test_16_bit_weights_on_a_cpu_compute_in_fp32(llama_dir):
    """Stored as bf16, widened on the way: the logits are those of fp32 weights rounded to bf16, gradients too."""
    stored, _ = load_llama(llama_dir, torch.bfloat16)
    rounded, _ = load_llama(llama_dir, torch.bfloat16)
    rounded = rounded.float()
    for a, b in zip(full_logits(stored, IDS), full_logits(rounded, IDS)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_product_has_the_gradient_of_the_product(dtype, monkeypatch):
    monkeypatch.setattr(FrozenProduct, "STRIP", 3)
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(8, 7).to(dtype)
    torch.testing.assert_close(FrozenProduct.apply(x, weight), x @ weight.float().T)
    grad = torch.randn(5, 8)
    [ours] = torch.autograd.grad(FrozenProduct.apply(x, weight), x, grad)
    torch.testing.assert_close(ours, grad @ weight.float())


WEIGHT, ANGLE = 0.5 + torch.arange(6) / 6, torch.linspace(0, 3, 21).view(7, 1, 3)


def turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@pytest.mark.parametrize("ours, plain, shapes", [
    (lambda x: llama.Normalize.apply(x, WEIGHT, 1e-5),
     lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT, [(7, 6)]),
    (lambda x: llama.Rotate.apply(x, ANGLE.cos(), ANGLE.sin()), lambda x: turned(x, ANGLE.cos(), ANGLE.sin()), [(7, 2, 6)]),
    (llama.Gated.apply, lambda gate, up: gate * torch.sigmoid(gate) * up, [(7, 6), (7, 6)]),
], ids=["Normalize", "Rotate", "Gated"])
def test_gradients_written_by_hand_are_those_of_autograd(ours, plain, shapes):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]               # the reference is in fp64
    out, reference = ours(*inputs), plain(*wide)
    grad = torch.randn(out.shape)
    out.backward(grad)
    reference.backward(grad.double())
    torch.testing.assert_close(out, reference.float(), rtol=1e-5, atol=1e-6)
    for x, y in zip(inputs, wide):
        torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-5, atol=1e-6)


def test_sizes_at_7b():
    with torch.device("meta"):
        model = LLaMA(LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-6))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert not any(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------ config, tokenizer


def config_with(tmp_path, tiny_config, **more):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **vars(tiny_config), **more}))
    return path


def test_config_is_honoured(tmp_path, tiny_config):
    assert read_config(config_with(tmp_path, tiny_config)) == tiny_config
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rope_theta": None, "head_dim": None,
             "num_key_value_heads": None}
    config = read_config(config_with(tmp_path, tiny_config, **newer))
    assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (5000.0, 8, 4)


@pytest.mark.parametrize("more, said", [
    ({"num_hidden_layers": 4.0}, "must be positive whole numbers"),
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "big"}, "must be positive whole numbers"),
    ({"rope_scaling": "linear"}, "rope scaling 'linear'"),
    ({"num_attention_heads": 0, "head_dim": None}, "must be positive numbers, but are 32 and 0"),
    ({"num_attention_heads": "32", "head_dim": None}, "must be positive numbers, but are 32 and '32'"),
    ({"num_key_value_heads": 3}, "must be a multiple of 3 key/value heads"),
])
def test_what_is_not_supported_is_refused_by_name(tmp_path, tiny_config, more, said):
    path = config_with(tmp_path, tiny_config, **more)
    with pytest.raises(UserError, match=said) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_a_config_without_a_size_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    with pytest.raises(UserError, match="has no 'num_attention_heads'"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{\n"model_type": llama}')
    with pytest.raises(UserError, match="line 2: .* not valid JSON"):
        read_config(tmp_path / "config.json")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny_config, tokenizer_file):
    write_llama(tmp_path, dataclasses.replace(tiny_config, vocab_size=777), tokenizer_file, torch.float32)
    with pytest.raises(UserError, match=r"has \d+ pieces, but the embeddings are for 777"):
        load_llama(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_new_words_begin_with_a_space(tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)               # this one puts the space in front by itself, as LLaMA's does
    assert tokenizer.adds_space
    assert tokenizer.encode("Flat", new_word=True) == tokenizer.encode("Flat")
    tokenizer.adds_space = False
    assert tokenizer.decode(tokenizer.encode("Flat", new_word=True)).strip() == "Flat"
