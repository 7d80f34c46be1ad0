"""What a user can give that is broken or misspelt, and the one line that says so.

A row of FILES: the file that is damaged (its folder names the reader), how, and words of the line.
The damage is the new content, None for no file, changed fields of JSON, or a function of the path.
A line of FLAGS: the command, its flags, and words of the line.
Where the words are None, the input is right.
More rows of this kind stand beside what they are about: in test_llama.py, test_vit.py, test_data.py.
"""

import os
import random
import re
import shutil
from dataclasses import fields

import pytest
import torch
from conftest import Outcome, held, jpeg, resume, train_run
from safetensors.torch import load_file, save_file

import evaluate
import train
from base import console
from base.console import UserError
from base.photo import open_photo
from base.tsv import read_tsv, write_tsv
from data import read_products
from dataset.__main__ import main as dataset
from random_weights import write_llama
from llama import LlamaConfig, load_llama
from support.run import read_values
from tools import answer, catalogue, explain, export
from vit import load_vit


def edit(path, how):
    """Damage a file as a row says."""
    if callable(how):
        how(path)
    elif how is None:
        path.unlink()
    elif isinstance(how, dict):
        console.write_json(path, console.read_json(path, "JSON") | how)
    else:
        path.write_bytes(how if isinstance(how, bytes) else how.encode())


def tensors(changes):
    """Replace or add tensors."""
    return lambda path: save_file(load_file(path) | changes, path)


def link(path):
    """As in a Hugging Face cache: a link to a file that has no suffix, in a folder without config.json."""
    path.symlink_to(path.rename(path.parent.parent / "blob"))


def pickled(change):
    """Write change({name: tensor}) in the place of a state dict."""
    return lambda path: torch.save(change(torch.load(path)), path)


# ---------------------------------------------------------------------------------------- files


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9976576392\n"
HEADER = "id\timages\tcategory\ttexts\tattribute_names\tattribute_values\n"
ROW = "B1\ta.jpg\tShoes\t[Title] x\tBoot Style\tFlat\n"
PNG = jpeg(kind="PNG")
WEIGHTS, CONFIG, PIECES = "llama/model.safetensors", "llama/config.json", "llama/tokenizer.model"
INDEX, SHARD = "shards/model.safetensors.index.json", "shards/model-00001-of-00002.safetensors"
VIT, VIT_CONFIG, BIN = "vit/model.safetensors", "vit/config.json", "clip/pytorch_model.bin"
TABLE, LIST, PHOTO = "data/train.tsv", "values/values.tsv", "photo/a.jpg"

FILES = [
    (WEIGHTS, tensors({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "torch.int8, expected"),
    (WEIGHTS, tensors({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}), None),
    (WEIGHTS, POINTER, "a git-LFS pointer"),
    (WEIGHTS, None, "model.safetensors: does not exist; LLaMA's weights"),
    (CONFIG, {"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is absent here"),
    (CONFIG, {"vocab_size": 399}, "has 400 pieces, but config.json has 399"),
    (CONFIG, {"tie_word_embeddings": True}, "ties lm_head to the embeddings, but they differ"),
    (CONFIG, "[]", "holds a list, not an object"),
    (PIECES, POINTER, "a git-LFS pointer"),
    (PIECES, "IQ== 0\nIg== 1\n", r"SentencePiece model \(not tokenizer.json\)"),      # LLaMA 3 has tiktoken's
    (INDEX, '{"weight_map": {"a": "../x.safetensors"}}', "shards/x.safetensors: does not exist"),

    (VIT, link, None),
    (VIT_CONFIG, {"num_attention_heads": True}, "True heads do not divide the width 24"),
    (VIT_CONFIG, {"layer_norm_eps": 1e30}, "layer_norm_eps is 1e"),
    (BIN, pickled(lambda state: {f"module._orig_mod.{name}": state[name] for name in state}), None),
    (BIN, pickled(lambda state: {"code": print}), "something other than tensors, or is damaged"),

    (TABLE, "\ufeff" + (HEADER.upper().replace("ID", "ID ") + ROW).replace("\n", "\r"), None),
    (TABLE, HEADER.replace("\t", ";"), "the header .* with tabs between them$"),
    (TABLE, HEADER.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    (TABLE, b"PK\3\4\x14\0\6\0[Content_Types].xml", "an Excel workbook; save"),
    (TABLE, b"\0\5\x16\7", "a macOS resource fork"),
    (TABLE, "<!doctype html><title>404</title>", "an HTML"), (TABLE, "", "an empty file"),
    (TABLE, '"' + HEADER + ROW, "line 1 has a cell .* begins with a quote which is not closed"),
    (LIST, "\n", "holds no values"),
    (LIST, "\nA\t\n", "line 2, .* should be an attribute, one tab and a value"),

    *[(PHOTO, jpeg(kind=kind), None) for kind in ("WEBP", "GIF", "BMP")],
    (PHOTO, PNG[:33] + b"\0\0\0\3iCCPabc\0\0\0\0" + PNG[33:], None),
    (PHOTO, PNG[:33] + b"\0\0\0\3eXIfbad\x92\xfb\x44\xa8" + PNG[33:], None),
    (PHOTO, b"\0\0\0\x18ftypheic", "an HEIC or AVIF photo"),
    (PHOTO, jpeg(kind="PPM"), "cannot be read as a photo"), (PHOTO, PNG[:-40], "cannot be read as a photo"),
    (PHOTO, PNG[:33] + b"\0\0\0\1tRNS1\x11\x38\xd8\x5c" + PNG[33:], "cannot be read as a photo"),

    ("run/adapter.safetensors", None, "its training is not finished"),
]


READERS = {
    "llama": lambda world: load_llama(world / "llama"),
    "shards": lambda world: load_llama(world / "shards"),
    "vit": lambda world: load_vit(world / VIT),
    "clip": lambda world: load_vit(world / BIN),
    "data": lambda world: read_products(world / TABLE),
    "values": lambda world: read_values(world / LIST),
    "photo": lambda world: open_photo(world / PHOTO),
    "run": lambda world: evaluate.load(world / "run"),
    "stopped": lambda world: resume(world / "stopped"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_dir, vit_dir, run, tiny_config, tokenizer_file):
    """A folder for each of READERS, with the files that it reads."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(llama_dir, world / "llama")
    write_llama(world / "shards", tiny_config, tokenizer_file, torch.float32, shards=2)
    for name in ("vit", "clip"):
        shutil.copytree(vit_dir, world / name)
    torch.save(load_file(world / VIT), world / BIN)
    for name in ("data", "values", "photo"):
        (world / name).mkdir()
    (world / PHOTO).write_bytes(jpeg())
    os.mkfifo(world / "pipe")
    shutil.copytree(run, world / "run")
    shutil.copytree(run, world / "stopped")
    (world / "stopped" / "adapter.safetensors").unlink()
    return world


@pytest.fixture
def said(capsys, tmp_path):
    """said(call): what call() printed to stderr, run as a command, which must end with exit code 2."""
    def run(call):
        with pytest.raises(SystemExit, match="^2$"):
            console.run(call, "test")
        err = capsys.readouterr().err
        assert not held(Outcome(2, 0, "", err)), err
        return err.replace(f"{tmp_path}/", "").strip()
    return run


def damaged(world, tmp_path, file, how):
    """A copy of the damaged file's folder, in tmp_path; a call of its reader."""
    name = file.split("/")[0]
    shutil.copytree(world / name, tmp_path / name)
    edit(tmp_path / file, how)
    return lambda: READERS[name](tmp_path)


@pytest.mark.parametrize("file, how, words", FILES, ids=[f"{n} {row[0]}" for n, row in enumerate(FILES)])
def test_a_broken_file_is_one_line(world, tmp_path, said, file, how, words):
    call = damaged(world, tmp_path, file, how)
    if words:
        assert re.search(words, said(call))
    else:
        call()


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, PIECES, SHARD, INDEX, VIT, BIN, PHOTO, "run/config.json",
                                  "run/adapter.safetensors", "stopped/state.pt"])
def test_a_file_that_was_cut_is_never_read(world, tmp_path, said, file):
    draw = random.Random(file)
    content = (world / file).read_bytes()
    for number in range(8):
        call = damaged(world, tmp_path / str(number), file, content[:draw.randrange(len(content) - 9)])
        assert file.split("/")[0] in said(call)


def test_no_size_of_a_llama_is_taken_unseen(world, tmp_path, said):
    for field in fields(LlamaConfig):
        for number, value in enumerate(["abc", 0, [], {"a": 1}, float("nan"), 10 ** 30]):
            call = damaged(world, tmp_path / f"{field.name}{number}", CONFIG, {field.name: value})
            assert field.name in said(call)


# ---------------------------------------------------------------------------------------- flags


COMMANDS = {"train": train.main, "evaluate": evaluate.main, "answer": answer.main, "export": export.main,
            "catalogue": catalogue.main, "explain": explain.main, "dataset": dataset}
FLAGS = """
train --labels 0                        must be a whole number from 1 to 1,000,000,000 or 'all', but is '0'
train --lr nan                          must be a number from 1e-12 to 100, but is 'nan'
train --seed 1e3                        a whole number from 0
train --adapter-dim 3                   a RepAdapter has 2 groups: .*--adapter-dim 3
train --device meta                     --device meta: cannot be used here
train --device tpu9                     --device tpu9: cannot be used here
train --data nowhere                    no data set 'shoes' in .*nowhere: it holds none
train --llama nowhere                   --llama: .* should be in .*nowhere, which does not exist
train --vit nowhere                     --vit: .* should be in .*nowhere, which does not exist
train --vit /dev/null                   is a pipe or a device
train --out WORLD/run                   is not empty
train --out /dev/null                   is a file; name a folder
evaluate WORLD                          WORLD/config.json: does not exist
evaluate WORLD/run --values nowhere     nowhere: does not exist
evaluate WORLD/run --llama WORLD/shards         another llama
answer WORLD/run --text x --attribute Heel      give --image
answer WORLD/run --text caf\udce9 --attribute Heel      is not UTF-8 text: 'caf.udce9', 'Heel'
answer WORLD/run --image WORLD --text x --attribute Heel        is a folder
answer WORLD/run --image /dev/zero --text x --attribute Heel    is a pipe or a device
catalogue WORLD/run --input WORLD/pipe --output x.tsv           is a pipe
catalogue WORLD/run --input x.tsv --output x.tsv --images x     --images x: is no folder
catalogue WORLD/run --ouput x.tsv       the following arguments are required: --input, --output
export WORLD/run x --devise cpu         --devise cpu .did you mean '--device'
explain WORLD/run NIX                   NIX
export WORLD/run WORLD/llama            is not empty
dataset check WORLD/pipe                train.tsv
dataset stats --data WORLD/llama        holds no data set
dataset import WORLD/pipe               WORLD/pipe
dataset build --labels WORLD/pipe --metadata WORLD/pipe --data WORLD/new        is a pipe or a device
"""


@pytest.mark.parametrize("name, arguments, words", re.findall(r"(\w+) (.*?)  +(.*)", FLAGS))
def test_a_wrong_flag_is_one_line(world, tmp_path, said, flags, monkeypatch, name, arguments, words):
    arguments = arguments.replace("WORLD", str(world)).split()
    arguments = [*flags, "--out", str(tmp_path / "new"), *arguments] if name == "train" else arguments
    monkeypatch.setattr("sys.argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    assert re.search(words, said(COMMANDS[name]).replace(str(world), "WORLD"))
    assert not list(tmp_path.iterdir())                 # nothing half made is left


def test_a_link_to_a_file_keeps_its_name_and_neighbours(vit_dir, flags, tmp_path, said):
    """Each file of a Hugging Face cache is a link to one that has no suffix, and no config.json beside it."""
    shutil.copy(vit_dir / "model.safetensors", tmp_path / "blob")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "model.safetensors").symlink_to(tmp_path / "blob")
    console.write_json(tmp_path / "vit" / "config.json", {"hidden_act": "gelu"})
    path, out = tmp_path / "vit" / "model.safetensors", tmp_path / "run"
    assert "hidden_act is 'gelu'" in said(lambda: train_run(out, flags, "--vit", path))
    assert not out.exists()


# ---------------------------------------------------------------------------------------- data sets


TEXTS = ["../x", "/etc/passwd", "a/b", "A/B", "A-B", "\0", '"', '"open', "<script>", "\u202eabc",
         "\u8d28" * 90, "x" * 260, "x" * 259 + "y", "a\tb", "a\r\nb", "\x1b[31m", "--help", "{attribute}",
         "%s", "\ufeff", "(other)"]


def write_data(root, data_root, rows):
    """The data set ROOT/shoes with these rows in each split, and the photos of data_root."""
    root.mkdir()
    (root / "images").symlink_to(data_root / "images")
    for split in ("train", "val", "test"):
        write_tsv(root / "shoes" / f"{split}.tsv", rows)


def test_any_text_may_stand_in_a_data_set(data_root, flags, tmp_path):
    """All texts come back in predictions.tsv.  Each attribute has a picture of its own, and nothing is
    outside the run folder.
    """
    rows = [[f"{text} {number}", "B0001.jpg", text, f"[Title] {text}", text, f"{text}{number}"]
            for text in TEXTS for number in range(2)]
    write_data(tmp_path / "data", data_root, rows)
    run = train_run(tmp_path / "run", flags, "--epochs", 1, "--data", tmp_path / "data")
    predicted = [row for _, row in read_tsv(run / "predictions.tsv")]
    assert [(row["id"], row["attribute_values"]) for row in predicted] == [
        (row[0], " ".join(row[5].split())) for row in rows]
    assert len(list(run.glob("confusion-*.png"))) == len({row["attribute_names"] for row in predicted})
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run"}


def test_two_titles_that_do_not_fit_together_are_found_before_the_training(data_root, flags, tmp_path):
    rows = [[f"B{n}", "B0001.jpg", "", "black " * 1200 * (n == 1), "Heel", str(n)] for n in range(3)]
    write_data(tmp_path / "data", data_root, rows)
    arguments = [*flags, "--epochs", 1, "--data", tmp_path / "data"]
    with pytest.raises(UserError, match="product 'B1': .* has 2,... tokens .*, more than the 2,048 that"):
        train_run(tmp_path / "run", arguments)
    train_run(tmp_path / "run", arguments, "--lbc", "none")     # alone it fits


def test_the_home_folder_is_the_shells(monkeypatch):
    """A shell leaves --out=~/x as it is."""
    monkeypatch.setenv("HOME", "/elsewhere")
    assert train.parse(["--out=~/x", "--data=~/y"])[0].out == "/elsewhere/x"
