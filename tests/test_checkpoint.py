"""Broken checkpoints, made here, and the message that each gets.

docs/weights.md shows ten of them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.checkpoint import load_strict
from base.console import UserError
from experiments.random_weights import write_llama
from llama import load_llama

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9976576392\n"
NORM = "model.norm.weight"
PROJECT = Path(__file__).resolve().parent.parent


def test_only_pages_of_files_are_given_back():
    """A tensor that is converted may still be used by its owner."""
    module, weight = torch.nn.Linear(2048, 1024, bias=False), torch.randn(1024, 2048)
    load_strict(module, {"weight": weight}, "here", dtype=torch.bfloat16)
    assert torch.equal(module.weight, weight.bfloat16())


def edit(name, change):
    """A breaker that changes the tensors of one safetensors file."""
    def breaks(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)
    return breaks


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


def config(**changes):
    def breaks(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | changes))
    return breaks


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


ONE, FIRST, INDEX = "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"

# (what is wrong, in one file or two shards, how it is broken, what the message says)
BROKEN = [
    ("a tensor is missing", 1, edit(ONE, lambda t: t.pop(NORM)), "1 missing: model.norm.weight"),
    ("a tensor too many", 1, edit(ONE, lambda t: t.update({"model.extra": torch.ones(2)})), "1 unexpected: model.extra"),
    ("another shape", 1, edit(ONE, lambda t: t.update({NORM: torch.ones(31)})),
     r"1 of another shape: model.norm.weight is \(31,\), expected \(32,\)"),
    ("integers", 1, edit(ONE, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
     "1 not of fp16, bf16 or fp32: model.norm.weight is torch.int8"),
    ("everything wrong at once", 1, edit(ONE, lambda t: (t.pop(NORM), t.update({"x": torch.ones(1), "y": torch.ones(1)}))),
     r"1 missing: model.norm.weight \| 2 unexpected: x; y"),
    ("fewer layers than config.json says", 1, config(num_hidden_layers=4), "9 missing: model.layers.3.input_layernorm.weight"),
    ("more layers than config.json says", 1, config(num_hidden_layers=2), "9 unexpected: model.layers.2.input_layernorm.weight"),
    ("biases that config.json does not promise", 1,
     edit(ONE, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
     "1 unexpected: model.layers.0.self_attn.q_proj.bias"),
    ("tied in config.json, but lm_head differs", 1, config(tie_word_embeddings=True), "lm_head.weight differs"),
    ("a git-LFS pointer for the weights", 1, write(ONE, POINTER), "is a git-LFS pointer"),
    ("an HTML page for the weights", 1, write(ONE, "<!doctype html><title>404</title>"), "is an HTML or XML page"),
    ("an empty file", 1, write(ONE, ""), "is an empty file"),
    ("a download cut short", 1, cut(ONE, 5000), "is not a whole safetensors file .* it has 5,000 bytes"),
    ("a file cut inside its header", 1, cut(ONE, 60), "is not a whole safetensors file"),
    ("noise", 1, write(ONE, bytes(range(1, 200))), "is not a whole safetensors file"),
    ("no weights", 1, remove(ONE), "holds neither model.safetensors nor model.safetensors.index.json"),
    ("another format", 1, lambda f: (f / ONE).rename(f / "pytorch_model.bin"), "It holds pytorch_model.bin, which is another format"),
    ("a shard that is absent", 2, remove(FIRST), f"1 of the 2 files named in {INDEX} are absent: {FIRST}. Finish the download"),
    ("a shard that is a pointer", 2, write(FIRST, POINTER), f"{FIRST}: should be LLaMA weights, but is a git-LFS pointer"),
    ("a shard twice", 2, lambda f: shutil.copy(f / FIRST, f / "model-00002-of-00002.safetensors"), "which another shard holds too"),
    ("an index that is no JSON", 2, write(INDEX, '{"weight_map": {'), "line 1: the index of LLaMA weights is not valid JSON"),
    ("an index without a map", 2, write(INDEX, "{}"), "has no 'weight_map'"),
    ("an index that leaves the folder", 2, write(INDEX, '{"weight_map": {"a": "../other.safetensors"}}'), "names files outside its own folder"),
    ("no config.json", 1, remove("config.json"), "config.json: not found"),
    ("a config.json that is an HTML page", 1, write("config.json", "<html>"), "should be LLaMA's config, but is an HTML"),
    ("no tokenizer", 1, remove("tokenizer.model"), "tokenizer.model: not found"),
    ("a tokenizer that is a pointer", 1, write("tokenizer.model", POINTER), "should be a SentencePiece model .* but is a git-LFS pointer"),
    ("a tokenizer of another model", 1, config(vocab_size=32000), "pieces, but the embeddings are for 32,000"),
]


@pytest.mark.parametrize("what, shards, breaks, said", BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_checkpoint_is_refused_and_named(what, shards, breaks, said, tmp_path, tiny_config, tokenizer_file):
    folder = tmp_path / "llama"
    write_llama(folder, tiny_config, tokenizer_file, torch.float32, shards)
    load_llama(folder)                                  # it was whole before
    breaks(folder)
    with pytest.raises(UserError, match=said) as error:
        load_llama(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_shards_give_the_same_model(tmp_path, tiny_config, tokenizer_file):
    write_llama(tmp_path / "two", tiny_config, tokenizer_file, torch.bfloat16, shards=2)
    tensors = {}
    for path in (tmp_path / "two").glob("*.safetensors"):
        tensors |= load_file(path)
    model, _ = load_llama(tmp_path / "two")
    assert {f"model.{n}" if not n.startswith("lm_head") else n for n, _ in model.named_parameters()} == set(tensors)
    for name, parameter in model.named_parameters():
        official = name if name.startswith("lm_head") else f"model.{name}"
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, tensors[official])


def test_stored_rotary_frequencies_are_skipped_and_equal_ties_accepted(tmp_path, tiny_config, tokenizer_file):
    import dataclasses
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    write_llama(tmp_path, config, tokenizer_file, torch.float32)
    tensors = load_file(tmp_path / ONE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / ONE)
    load_llama(tmp_path)


def test_a_mapped_checkpoint_is_not_copied(tmp_path, tiny_config, tokenizer_file):
    """Without a change of dtype, the parameters are the file's own pages: changing a byte there changes them."""
    write_llama(tmp_path, tiny_config, tokenizer_file, torch.float32)
    model, _ = load_llama(tmp_path)
    before = model.norm.weight.clone()
    path = tmp_path / ONE
    header = int.from_bytes(path.read_bytes()[:8], "little")
    start, _ = json.loads(path.read_bytes()[8:8 + header])[NORM]["data_offsets"]
    with open(path, "rb+") as file:
        file.seek(8 + header + start)
        file.write(torch.tensor([7.0]).numpy().tobytes())
    assert model.norm.weight[0] == 7.0 and before[0] == 1.0


def test_the_messages_in_the_docs_are_the_real_ones(tmp_path, tiny_config, tokenizer_file):
    docs, shown = (PROJECT / "docs" / "weights.md").read_text(encoding="utf-8"), 0
    for what, shards, breaks, _ in BROKEN:
        if f"| {what} | " in docs:
            folder = tmp_path / str(shown) / "LLAMA"
            write_llama(folder, tiny_config, tokenizer_file, torch.float32, shards)
            breaks(folder)
            with pytest.raises(UserError) as error:
                load_llama(folder)
            said = str(error.value).replace(f"{folder.parent}/", "").replace("|", "\\|")
            assert f"| {what} | {said} |" in docs
            shown += 1
    assert shown == 10
