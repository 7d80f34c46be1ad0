"""LLaMA against transformers (or golden files recorded from it), and against itself: batched, cached, checkpointed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import at_once, train_tokenizer
from safetensors.torch import load_file

import llama
from base.checkpoint import load_strict
from base.console import UserError
from base.packing import KVCache, next_tokens, pack
from experiments.random_weights import IDS, VARIANTS, write_llama
from llama import LLaMA, LlamaConfig, Tokenizer, load_llama, official_name, read_config

GOLDEN = Path(__file__).parent / "golden"


def full_logits(model, sequences):
    """Logits (T, vocab) of each sequence, all sequences in one pass."""
    lengths = [len(sequence) for sequence in sequences]
    needed = pack(sequences, lengths).needed_index      # the tokens of each sequence, shared ones more than once
    tokens = pack(sequences)
    with torch.no_grad():
        return model.logits(model(model.embed(tokens.ids), tokens)[needed]).split(lengths)


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
    """Where transformers is not installed: files that experiments/make_golden.py recorded from it."""
    golden = load_file(GOLDEN / f"llama-{variant}.safetensors")
    config = json.loads((GOLDEN / f"llama-{variant}.json").read_text())
    expected = [golden.pop(f"logits.{b}") for b in range(len(IDS))]
    with torch.device("meta"):
        model = LLaMA(LlamaConfig(**config))
    load_strict(model, golden, "golden", official_name)
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


def test_packing_by_hand():
    tokens = pack([[7, 8], [7, 9, 9], [7, 8, 3, 3, 3, 3]], needed=[1, 2, 3])
    assert tokens.ids.tolist() == [7, 8, 9, 9, 3, 3, 3, 3]
    assert tokens.position.tolist() == [0, 1, 1, 2, 2, 3, 4, 5]
    assert [table.tolist() for table in tokens.groups.tables] == [[[0, 1]], [[0, 2, 3]], [[0, 1, 4, 5, 6, 7]]]
    one_group = pack([[7, 8], [7, 9, 9]], cache=object())
    assert [table.tolist() for table in one_group.groups.tables] == [[[0, 1, 0], [0, 2, 3]]]
    on_a_gpu = pack([[7, 8], [7, 9, 9], [7, 8, 3, 3, 3, 3]], needed=[1, 2, 3], device="meta")
    assert [table.shape for groups in (on_a_gpu.groups, on_a_gpu.needed_groups) for table in groups.tables] == [(3, 6), (3, 3)]
    assert tokens.needed_index.tolist() == [1, 2, 3, 5, 6, 7]
    assert [table.tolist() for table in tokens.needed_groups.tables] == [[[0]], [[1, 2]], [[3, 4, 5]]]
    assert [mask[0, 0].int().tolist() for mask in tokens.needed_groups.masks] == [
        [[1, 1]], [[1, 1, 0], [1, 1, 1]], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]]
    for groups, n in ((tokens.groups, 8), (tokens.needed_groups, 6), (one_group.groups, 4)):
        x = torch.arange(2.0 * n).view(-1, 2)
        assert groups.unpad(groups.pad(x)).equal(x)
    layer = tokens.at_layer(0, None, None, last=True)
    assert layer.needed(torch.arange(8)).tolist() == [1, 2, 3, 5, 6, 7]
    assert tokens.at_layer(0, None, None, last=False).needed(torch.arange(8)).tolist() == list(range(8))
    assert pack([[7, 8]]).at_layer(0, None, None, last=True).needed(torch.arange(2)).tolist() == [0, 1]     # all are needed


def test_needed_tokens_are_those_of_the_full_pass(tiny):
    model, _ = tiny
    sequences = [[5, 9, 17, 3], [5, 9, 60], [5, 9, 17, 3, 8, 8, 8, 8, 8], [5, 9, 17, 3]]     # some needed tokens are shared
    every, some = pack(sequences), pack(sequences, [4, 1, 6, 2])
    with torch.no_grad():
        full = model(model.embed(every.ids), every)
        needed = model(model.embed(some.ids), some)
    assert len(needed) == 4 + 1 + 6 + 2
    torch.testing.assert_close(needed, full[some.needed_index], rtol=1e-5, atol=1e-5)


def test_cached_is_full_at_every_step(tiny):
    """Sequences of different lengths, read together and then continued one token at a time."""
    model, _ = tiny
    sequences = [[5, 9, 17, 3], [8, 2], [44, 45, 46, 47, 48, 49]]
    more = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    full = full_logits(model, [sequence + tail for sequence, tail in zip(sequences, more)])
    cache = KVCache(model.config, len(sequences), 6 + 3, torch.float32, "cpu")
    tokens = pack(sequences, [1, 1, 1], cache=cache)
    with torch.no_grad():
        h = model(model.embed(tokens.ids), tokens)
        for step in range(4):
            for b, sequence in enumerate(sequences):
                torch.testing.assert_close(model.logits(h)[b], full[b][len(sequence) - 1 + step], rtol=1e-5, atol=1e-5)
            if step == 3:
                break
            ids = torch.tensor([tail[step] for tail in more])
            h = model(model.embed(ids), next_tokens(ids, [len(sequence) + step for sequence in sequences], cache))


def test_16_bit_weights_on_a_cpu_compute_in_fp32(llama_dir):
    """Stored as bf16, widened on the way: the logits are those of fp32 weights rounded to bf16, gradients too."""
    stored, _ = load_llama(llama_dir, torch.bfloat16)
    rounded, _ = load_llama(llama_dir, torch.bfloat16)
    rounded = rounded.float()
    for a, b in zip(full_logits(stored, IDS), full_logits(rounded, IDS)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def widened(model):
    """The same LLaMA with fp32 weights in the place of its int8 ones."""
    for linear in (m for m in model.modules() if isinstance(m, llama.Linear)):
        linear.weight = torch.nn.Parameter(linear.weight * linear.scale[:, None], requires_grad=False)
        linear.scale = None
    return model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["grouped", "tied", "biased"])
def test_int8_weights_compute_what_their_widened_values_do(variant, dtype, tiny_config, tokenizer_file, tmp_path):
    config = dataclasses.replace(tiny_config, **VARIANTS[variant])
    write_llama(tmp_path, config, tokenizer_file, dtype, shards=2, std=0.2)
    model, _ = load_llama(tmp_path, int8=True)
    files = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    linear = {f"{name}.{leaf}" for name, m in model.named_modules() if isinstance(m, llama.Linear)
              for leaf in ("weight", "scale")}
    assert len(linear) == 2 * (3 * 7 + (variant != "tied"))             # lm_head, where it has a weight of its own, too
    for name, p in model.named_parameters():
        if name not in linear:                          # embeddings, norms and biases are as in the files
            assert torch.equal(p, files[official_name(name)]) and p.dtype == dtype
        else:
            assert p.dtype == (torch.float32 if name.endswith("scale") else torch.int8) and not p.requires_grad
    reference = widened(load_llama(tmp_path, int8=True)[0])
    tokens, grad = pack(IDS), None
    for one in (model, reference):
        x = one.embed(tokens.ids).requires_grad_()
        logits = one.logits(one(x, tokens))
        grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) if grad is None else grad
        logits.backward(grad)
        one.found = logits.detach(), x.grad
    for ours, theirs in zip(model.found, reference.found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    original = load_llama(tmp_path, torch.float32)[0]
    for ours, theirs in zip(full_logits(model, IDS), full_logits(original, IDS)):
        assert 1e-4 < (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def test_memory_of_loading_is_that_of_the_weights(tokenizer_file, tmp_path):
    """200 MB of bf16 in two files.  Mapped pages count, and are given back once a tensor is converted: one file is 101 MB."""
    config = LlamaConfig(Tokenizer(tokenizer_file).vocab_size, 1024, 4096, 6, 8, 8, 128, 1e-6)
    write_llama(tmp_path, config, tokenizer_file, shards=2)

    def memory(name):
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return 1024 * int(line.split()[1])

    def load(**how):
        before = memory("VmRSS")
        model, _ = load_llama(tmp_path, **how)
        return sum(p.nbytes for p in model.parameters()), memory("VmHWM") - before

    for how, size in (({"int8": True}, 102e6), ({"dtype": torch.float16}, 203e6)):
        [(weights, peak)] = at_once([lambda how=how: load(**how)])
        assert weights == pytest.approx(size, rel=0.01)
        assert peak < weights + 80e6, f"{how}: {peak / 1e6:.0f} MB"


def test_logits_are_fp32_where_16_bits_compute(llama_dir):
    """On a GPU hidden states have the dtype of the weights; softmax and loss need fp32."""
    stored, _ = load_llama(llama_dir, torch.bfloat16)
    assert stored.logits(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_gradient_checkpointing_recomputes_every_layer_in_training_alone(tiny, monkeypatch):
    model, _ = tiny
    calls, checkpoint = [], llama.checkpoint
    monkeypatch.setattr(llama, "checkpoint", lambda block, *more, **how: calls.append(block) or checkpoint(block, *more, **how))
    tokens, model.grad_checkpoint = pack([IDS[0]]), True
    model(model.embed(tokens.ids), tokens)
    assert calls == list(model.layers)
    with torch.no_grad():
        model(model.embed(tokens.ids), tokens)
    assert len(calls) == 3


def test_rotary_turns_each_pair_by_its_angle():
    """By complex numbers: the pair (i, i + d/2) is one of them, and is multiplied by e^(i angle)."""
    x, position = torch.randn(7, 2, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 5, 9, 100, 1999])
    angle = position[:, None] * 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    ours = llama.apply_rotary(x.float(), *llama.rotary_table(position, 6, 10000.0))
    torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), -1).float(), rtol=1e-4, atol=5e-4)


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
    ({"num_hidden_layers": 4.0}, "num_hidden_layers is 4.0, but must be a whole number from 1 to 1,000"),
    ({"num_hidden_layers": 10 ** 7}, "num_hidden_layers is 10000000, but must be a whole number"),
    ({"vocab_size": 10 ** 30}, "vocab_size is 1000000000000000000000000000000, but must be"),
    ({"vocab_size": True}, "vocab_size is True, but must be"),
    ({"intermediate_size": -1}, "intermediate_size is -1, but must be"),
    ({"max_position_embeddings": "2048"}, "max_position_embeddings is '2048', but must be"),
    ({"rms_norm_eps": "abc"}, "rms_norm_eps is 'abc', but must be a number from 1e-30 to 1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, but must be"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, but must be"),
    ({"attention_bias": "no"}, "attention_bias is 'no', but only False or True is supported"),
    ({"model_type": "mistral"}, "model_type is 'mistral', but only 'llama' is supported"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\], but only 'llama' is supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3', but only 'default' is supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear', but only 'default' is supported"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn', but only 'default' is supported"),
    ({"rope_parameters": {"rope_theta": "abc"}}, "rope_theta is 'abc', but must be"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu' is supported"),
    ({"mlp_bias": True}, "mlp_bias is True, but only False is supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, but only null is supported"),
    ({"sliding_window": 4096}, "sliding_window is 4096, but only null is supported"),
    ({"hidden_size": "big"}, "hidden_size is 'big', but must be a whole number"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', but must be an object"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, but must be a whole number"),
    ({"num_attention_heads": "32", "head_dim": None}, "num_attention_heads is '32', but must be a whole number"),
    ({"num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": None}, "head_dim 0 even"),
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
    for text, said in (('{"model_type": ' + "1" * 5000 + "}", "cannot be read as JSON .*4300"),
                       ("[" * 200_000 + "]" * 200_000, "cannot be read as JSON"),
                       ("[1]", "should be a JSON object, but is a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_config(tmp_path / "config.json")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny_config, tokenizer_file):
    write_llama(tmp_path, dataclasses.replace(tiny_config, vocab_size=777), tokenizer_file, torch.float32)
    with pytest.raises(UserError, match=r"has \d+ pieces, but the embeddings are for 777"):
        load_llama(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_a_tokenizer_with_a_piece_that_is_no_text_is_refused(tmp_path, tokenizer_file):
    data = tokenizer_file.read_bytes()
    place = data.index(b"Boot")
    (tmp_path / "tokenizer.model").write_bytes(data[:place] + b"\xff" + data[place + 1:])
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_new_words_begin_with_a_space(tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)               # this one puts the space in front by itself, as LLaMA's does
    assert tokenizer.adds_space
    assert tokenizer.encode("Flat", new_word=True) == tokenizer.encode("Flat")
    tokenizer.adds_space = False
    assert tokenizer.decode(tokenizer.encode("Flat", new_word=True)).strip() == "Flat"


def test_only_new_words_get_a_space_where_the_tokenizer_adds_none(tmp_path):
    """As SmolLM2's: a prompt begins without a space, an answer after it with one."""
    tokenizer = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=False))
    assert not tokenizer.adds_space
    assert tokenizer.decode(tokenizer.encode("Flat")) == "Flat"
    assert tokenizer.decode(tokenizer.encode("Flat", new_word=True)) == " Flat"


@pytest.mark.parametrize("absent", ["bos_id", "eos_id"])
def test_a_tokenizer_without_begin_or_end_token_is_refused(tmp_path, absent):
    with pytest.raises(UserError, match="has no BOS or no EOS token"):
        Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", **{absent: -1}))
