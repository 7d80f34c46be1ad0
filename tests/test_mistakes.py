"""What a user can give that is broken or misspelt, and the one line that says so.

A row of FILES: the file that is damaged (its folder names the reader), how, and words of the line.
The damage is the new content, a number of bytes to keep, changed fields of JSON, or a function of the path.
A row of FLAGS: the command, its flags, and words of the line.
The exit code is 2; or 0 where the words are None, because the input is right.
More rows of this kind stand beside what they are about: in test_llama.py, test_vit.py, test_data.py.
"""

import gzip
import io
import os
import random
import re
import shutil
import struct
import zlib
from dataclasses import fields
from functools import partial

import pytest
import torch
from conftest import Outcome, held, jpeg
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import train
from base import console
from base.photo import open_photo
from base.tsv import read_tsv, write_tsv
from data import read_products
from dataset.__main__ import main as dataset
from random_weights import write_llama
from llama import LlamaConfig, load_llama
from support.run import read_values
from tools import answer, catalogue, explain, export
from vit import load_vit

# ---------------------------------------------------------------------------------------- damages


def edit(path, how):
    """Damage a file as a row says."""
    if callable(how):
        how(path)
    elif how is None:
        path.unlink()
    elif isinstance(how, int):
        path.write_bytes(path.read_bytes()[:how])
    elif isinstance(how, dict):
        console.write_json(path, console.read_json(path, "JSON") | how)
    else:
        path.write_bytes(how if isinstance(how, bytes) else how.encode())


def tensors(**changes):
    """Replace tensors by others, or leave them out (None); "__" stands for a dot."""
    def change(path):
        changed = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    return change


def pickled(change):
    """Write change({name: tensor}) in the place of a state dict."""
    return lambda path: torch.save(change(torch.load(path)), path)


def renamed(prefix):
    return pickled(lambda state: {prefix + name: tensor for name, tensor in state.items()})


def link(target):
    """In the place of a file is a link."""
    def change(path):
        path.unlink()
        path.symlink_to(target)
    return change


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def more_rows(path):
    """A checkpoint whose embeddings have a row more than the tokenizer has pieces."""
    edit(path.with_name("config.json"), {"vocab_size": 401})
    rows = {"model.embed_tokens.weight": torch.ones(401, 32), "lm_head.weight": torch.ones(401, 32)}
    save_file(load_file(path) | rows, path)


def png(name, content, checksum=0):
    """A PNG of noise with one chunk more."""
    data = jpeg(kind="PNG")
    crc = zlib.crc32(name + content) ^ checksum
    return data[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc) + data[33:]


def picture(size, kind="PNG", mode="1"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


# ---------------------------------------------------------------------------------------- files


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9976576392\n"
PAGE = "<!doctype html><title>404</title>"
WORKBOOK = b"PK\3\4\x14\0\6\0[Content_Types].xml"
HEADER = "id\timages\tcategory\ttexts\tattribute_names\tattribute_values\n"
ROW = "B1\ta.jpg\tShoes\t[Title] x\tBoot Style\tFlat\n"
WEIGHTS, CONFIG, PIECES = "llama/model.safetensors", "llama/config.json", "llama/tokenizer.model"
INDEX, SHARD = "shards/model.safetensors.index.json", "shards/model-00001-of-00002.safetensors"
BIN, TABLE, LIST, PHOTO = "clip/pytorch_model.bin", "data/train.tsv", "values/values.tsv", "photo/a.jpg"

FILES = [
    (WEIGHTS, tensors(model__norm__weight=None), "1 tensors do not fit .* model.norm.weight is missing"),
    (WEIGHTS, tensors(model__extra=torch.ones(2)), "model.extra is unexpected"),
    (WEIGHTS, tensors(model__norm__weight=torch.ones(31)), r"norm.weight is \(31,\) .*expected \(32,\)"),
    (WEIGHTS, tensors(model__norm__weight=torch.ones(32, dtype=torch.int8)), "torch.int8, expected"),
    (WEIGHTS, tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(48)), "q_proj.bias is unexpected"),
    (WEIGHTS, tensors(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6)), None),
    (WEIGHTS, more_rows, None),
    (WEIGHTS, POINTER, "a git-LFS pointer"), (WEIGHTS, b"GGUF\3\0\0\0", "a GGUF file"),
    (WEIGHTS, bytes(range(1, 200)), "cannot be read as LLaMA's weights"),
    (WEIGHTS, None, "model.safetensors: does not exist; LLaMA's weights"),
    (WEIGHTS, pipe, "is a pipe or a device"),
    (WEIGHTS, link("model.safetensors"), "does not exist"),
    (CONFIG, {"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
    (CONFIG, {"num_hidden_layers": 2}, "layers.2.input_layernorm.weight is unexpected"),
    (CONFIG, {"num_hidden_layers": 10 ** 9}, "layers at most 1,000"),
    (CONFIG, {"vocab_size": 399}, "has 400 pieces, but config.json has 399"),
    (CONFIG, {"tie_word_embeddings": True}, "ties lm_head to the embeddings, but they differ"),
    (CONFIG, None, "config.json: does not exist"),
    (CONFIG, "[]", "holds a list, not an object"),
    (CONFIG, "[" * 200_000, "cannot be read"),
    (CONFIG, '{"hidden_size": 1' + "0" * 5000 + "}", "cannot be read"),
    (CONFIG, b'{"a": "\xe9"}', "can't decode byte 0xe9"),
    (CONFIG, {"hidden_size": None}, "cannot be read"),
    (CONFIG, {"num_attention_heads": 0}, "num_attention_heads is 0"),
    (PIECES, POINTER, "a git-LFS pointer"),
    (SHARD, None, f"{SHARD}: does not exist"),
    (SHARD, lambda path: shutil.copy(path.with_name("model-00002-of-00002.safetensors"), path), "is missing"),
    (INDEX, "{}", "it has no 'weight_map'"),
    (INDEX, '{"weight_map": {"a": "../x.safetensors"}}', "not in its own folder"),
    (INDEX, '{"weight_map": {}}', "is missing"),

    (BIN, renamed("module."), None), (BIN, renamed("_orig_mod."), None),
    (BIN, renamed("module._orig_mod."), None),
    (BIN, pickled(lambda state: {"state_dict": state, "epoch": 3}), None),
    (BIN, renamed("text_model."), "holds no CLIP vision transformer"),
    (BIN, pickled(lambda state: {"model": state, "epoch": 3}), "something other than tensors"),
    (BIN, pickled(lambda state: [state]), "cannot be read as CLIP's ViT weights"),
    (BIN, pickled(lambda state: torch.nn.Linear(2, 2)), "something other than tensors, or is damaged"),
    (BIN, WORKBOOK, "a zip archive"),
    *[("clip/config.json", {"num_attention_heads": heads}, "do not divide the width 24")
      for heads in (-3, 2.5, "3", True, [1])],
    *[("clip/config.json", {"layer_norm_eps": eps}, "layer_norm_eps is") for eps in (-1, float("nan"), 1e30)],
    ("clip/config.json", {"vision_config": "x"}, "CLIP's config.json"),
    ("clip/config.json", "[]", "holds a list"),
    ("clip/config.json", None, "is taken to have quick-GELU"),

    (TABLE, "\ufeff" + HEADER + ROW, None), (TABLE, (HEADER + ROW).replace("\n", "\r"), None),
    (TABLE, HEADER.upper() + ROW, None), (TABLE, HEADER.replace("id", "id ") + ROW, None),
    *[(TABLE, (HEADER + ROW).replace("\t", mark), "the header .* with tabs between them$") for mark in ";,|"],
    (TABLE, ROW, "the header 'b1' .*it must name id images .* with tabs between them$"),
    (TABLE, '[\n{"id": "B1"}\n]', "with tabs between them$"),

    (TABLE, (HEADER + ROW).encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    (TABLE, WORKBOOK, "an Excel workbook; save"),
    (TABLE, b"\xd0\xcf\x11\xe0\xa1\xb1", "an Excel workbook"),
    (TABLE, gzip.compress(b"x"), "gzip archive; unpack it"),
    (TABLE, b"caf\xe9", "line 1 is not UTF-8 text; save the file as UTF-8"),
    (TABLE, bytes(999), "the header"),
    (TABLE, b"\0\5\x16\7", "a macOS resource fork"), (TABLE, "%PDF-1.4", "a PDF"),
    (TABLE, "Entry not found", "server's error"),
    (TABLE, "\n", "the header"), (TABLE, "", "an empty file"), (TABLE, PAGE, "an HTML"),
    (TABLE, pipe, "is a pipe"),
    (TABLE, link("/dev/zero"), "is a pipe or a device"), (TABLE, folder, "is a folder"),
    (TABLE, None, "does not exist"),
    (TABLE, '"' + HEADER + ROW, "line 1 has a cell .* begins with a quote which is not closed"),
    (TABLE, HEADER + ROW.replace("x", "x" * 200_000), "line 2: .* field limit"),
    (LIST, "Boot Style\tFlat\r\n\nBoot Style\tMule", None),
    (LIST, "Boot Style\tFlat\rBoot Style\tMule\r", None),
    (LIST, "\n", "holds no values"),
    (LIST, "A;b\n", "line 1, 'A;b', should be an attribute, one tab and a value"),
    (LIST, b"A\t\xe9\n", "can't decode byte"),

    *[(PHOTO, png(name, b"a\0\0bad"), None) for name in (b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"XyZz")],
    *[(PHOTO, png(name, b"1"), None) for name in (b"gAMA", b"sRGB", b"cHRM", b"pHYs", b"acTL")],
    (PHOTO, png(b"tEXt", b"a\0b", checksum=1), None),
    (PHOTO, png(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 * 10 ** 7))), None),
    (PHOTO, png(b"tRNS", b"1"), "cannot be read as a photo"),
    (PHOTO, jpeg(kind="PNG")[:-40], "cannot be read as a photo"),
    *[(PHOTO, jpeg(kind=kind), None) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")],
    (PHOTO, picture((20, 20), "JPEG", "CMYK"), None), (PHOTO, picture((20, 20), "TIFF", "LAB"), None),
    *[(PHOTO, picture((20, 20), kind, "RGB"), "cannot be read as a photo")
      for kind in ("EPS", "PPM", "ICO", "TGA", "PCX")],
    (PHOTO, picture((8160, 6144), "JPEG", "L"), None), (PHOTO, picture((20_000, 9_000)), "pixels.* smaller$"),
    (PHOTO, "<svg/>", "an HTML or XML page"),
    (PHOTO, b"\0\0\0\x1cftypheic" + bytes(99), "cannot be read as a photo"), (PHOTO, "", "an empty file"),

    ("run/config.json", {"values": {"Boot Style": []}}, "of another run than the config.json"),
    ("run/adapter.safetensors", None, "its training is not finished"),
    ("run/config.json", {"llama": "/nowhere"}, "--llama: .*/nowhere, which does not exist"),
    ("stopped/state.pt", pickled(lambda state: [state]), "cannot be read as the state of this run"),
]


READERS = {
    "llama": lambda world: load_llama(world / "llama"),
    "shards": lambda world: load_llama(world / "shards"),
    "vit": lambda world: load_vit(world / "vit"),
    "clip": lambda world: load_vit(world / BIN),
    "data": lambda world: read_products(world / TABLE),
    "values": lambda world: read_values(world / LIST),
    "photo": lambda world: open_photo(world / PHOTO),
    "run": lambda world: evaluate.load(world / "run"),
    "stopped": lambda world: train.main(["--resume", str(world / "stopped")]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_dir, vit_dir, run, tiny_config, tokenizer_file):
    """A folder for each of READERS, with the files that it reads."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(llama_dir, world / "llama")
    write_llama(world / "shards", tiny_config, tokenizer_file, torch.float32, shards=2)
    shutil.copytree(vit_dir, world / "vit")
    for name, content in ((TABLE, HEADER + ROW), (LIST, "Boot Style\tFlat\n"), (PHOTO, jpeg()), (BIN, "")):
        (world / name).parent.mkdir()
        edit(world / name, content)
    torch.save(load_file(vit_dir / "model.safetensors"), world / BIN)
    shutil.copy(vit_dir / "config.json", world / "clip")
    shutil.copytree(run, world / "run")
    shutil.copytree(run, world / "stopped")
    (world / "stopped" / "adapter.safetensors").unlink()
    return world


@pytest.fixture
def said(capsys, tmp_path):
    """said(call, code): what call() printed to stderr, run as a command that must end with this code."""
    def run(call, code):
        try:
            console.run(call, "test")
            ended = 0
        except SystemExit as error:
            ended = error.code
        err = capsys.readouterr().err
        assert ended == code and not held(Outcome(ended, 0, "", err)), err
        return err.strip().replace(f"{tmp_path}/", "")
    return run


def damaged(world, tmp_path, file, how):
    """A copy of the damaged file's folder, in tmp_path; a call of its reader."""
    name = file.split("/")[0]
    shutil.copytree(world / name, tmp_path / name)
    edit(tmp_path / file, how)
    return lambda: READERS[name](tmp_path)


@pytest.mark.parametrize("file, how, words", FILES, ids=[f"{n} {row[0]}" for n, row in enumerate(FILES)])
def test_a_broken_file_is_one_line(world, tmp_path, said, file, how, words):
    err = said(damaged(world, tmp_path, file, how), 2 if words else 0)
    assert re.search(words or "^$", err), err


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, PIECES, SHARD, INDEX, "vit/model.safetensors", BIN, PHOTO,
                                  "run/config.json", "run/adapter.safetensors", "stopped/state.pt"])
def test_a_file_that_was_cut_is_never_read(world, tmp_path, said, file):
    draw = random.Random(file)
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        call = damaged(world, tmp_path / str(number), file, draw.randrange((world / file).stat().st_size - 9))
        assert file.split("/")[0] in said(call, 2)


def test_no_size_of_a_llama_is_taken_unseen(world, tmp_path, said):
    for field in fields(LlamaConfig):
        for number, value in enumerate(["abc", -1, [], {"a": 1}, float("nan"), 10 ** 30]):
            (tmp_path / f"{field.name}{number}").mkdir()
            call = damaged(world, tmp_path / f"{field.name}{number}", CONFIG, {field.name: value})
            assert field.name in said(call, 2)


# ---------------------------------------------------------------------------------------- flags


COMMANDS = {"train": train.main, "evaluate": evaluate.main, "answer": answer.main, "export": export.main,
            "catalogue": catalogue.main, "explain": explain.main, "dataset": dataset}
FLAGS = [
    ("train", "--labels 0", "must be a whole number from 1 to 1,000,000,000 or 'all', but is '0'"),
    ("train", "--labels ten", "but is 'ten'"),
    ("train", "--lr -1", "expected one|must be a number from 1e-12 to 100"),
    ("train", "--lr nan", "but is 'nan'"), ("train", "--seed 1e3", "a whole number from 0"),
    ("train", "--label 3", "--label 3"),
    ("train", "--epochs 1" + "0" * 5000, "a whole number from 1 to 1,000,000"),
    ("train", "--lbc-ratio 1e300", "from 0 to 100"),
    ("train", "--lbc judge", "invalid choice: 'judge'"),
    ("train", "--adapter-dim 3", "--adapter-dim 3: a RepAdapter has 2 groups"),
    ("train", "--dataset boots", "no data set 'boots'.* shoes"),
    ("train", "--dataset caf\udce9", r"'caf\\udce9'"),
    *[("train", f"--device {name}", f"--device {name}: cannot be used here")
      for name in ("meta", "tpu9", "cuda:99")],
    *[("train", f"--{name} nowhere", f"--{name}: .* should be in .*nowhere, which does not exist")
      for name in ("data", "llama", "vit")],
    ("train", "--vit /dev/null", "is a pipe or a device"),
    ("train", "--llama /dev/null", "/dev/null/config.json"),
    ("train", "--out WORLD/run", "is not empty"), ("train", "--out /dev/null", "is a file; name a folder"),
    ("evaluate", "WORLD", "WORLD/config.json: does not exist"),
    ("evaluate", "WORLD/run --split dev", "invalid choice: 'dev'"),
    ("evaluate", "WORLD/run --temperature inf", "from 0 to 1,000, but is 'inf'"),
    ("evaluate", "WORLD/run --values nowhere", "nowhere: does not exist"),
    ("evaluate", "WORLD/run --data nowhere", "nowhere"),
    ("evaluate", "WORLD/run --input x", "unrecognized arguments"),
    ("evaluate", "WORLD/run --llama WORLD/shards", "another llama"),
    ("answer", "WORLD/run --text x --attribute Heel", "give --image"),
    ("answer", "WORLD/run --text caf\udce9 --attribute Heel", r"is not UTF-8 text: 'caf\\udce9', 'Heel'"),
    ("answer", "WORLD/run --image gone.jpg --text x --attribute Heel", "gone.jpg: does not exist"),
    ("answer", "WORLD/run --image /dev/zero --text x --attribute Heel", "is a pipe or a device"),
    ("answer", "WORLD/run --image WORLD --text x --attribute Heel", "is a folder"),
    ("catalogue", "WORLD/run --output x.tsv", "required: --input"),
    ("catalogue", "WORLD/run --input gone --output x.tsv", "gone"),
    ("catalogue", "WORLD/run --input WORLD/pipe --output x.tsv", "is a pipe"),
    ("explain", "WORLD/run NIX", "'NIX'"),
    ("export", "WORLD/run WORLD/data", "is not empty"),
    ("export", "WORLD", "the following arguments are required"),
    ("dataset", "check WORLD/pipe", "train.tsv"),
    ("dataset", "stats --data WORLD/llama", "holds no data set"),
    ("dataset", "import WORLD/pipe", "WORLD/pipe"),
    ("dataset", "build --labels WORLD/pipe --metadata WORLD/pipe --data WORLD/new", "is a pipe or a device"),
    ("dataset", "build --labels /dev/zero --metadata /dev/zero --data WORLD/new", "is a pipe or a device"),
]


@pytest.mark.parametrize("name, arguments, words", FLAGS, ids=[f"{row[0]} {row[1][:40]}" for row in FLAGS])
def test_a_wrong_flag_is_one_line(world, tmp_path, said, flags, monkeypatch, name, arguments, words):
    if not (world / "pipe").exists():
        os.mkfifo(world / "pipe")
    arguments = arguments.replace("WORLD", str(world)).split(" ")
    arguments = [*flags, "--out", str(tmp_path / "new"), *arguments] if name == "train" else arguments
    monkeypatch.setattr("sys.argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    err = said(COMMANDS[name], 2).replace(str(world), "WORLD")
    assert re.search(words, err), err
    assert not list(tmp_path.iterdir())                 # nothing half made is left


def test_a_link_to_a_file_keeps_its_name_and_neighbours(vit_dir, flags, tmp_path, said):
    """Each file of a Hugging Face cache is a link to one that has no suffix, and no config.json beside it."""
    shutil.copy(vit_dir / "model.safetensors", tmp_path / "blob")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "model.safetensors").symlink_to(tmp_path / "blob")
    for activation, code in (("quick_gelu", 0), ("gelu", 2)):
        config = {"hidden_act": activation, "num_attention_heads": 3}
        console.write_json(tmp_path / "vit" / "config.json", config)
        arguments = [*flags, "--epochs", "1", "--vit", str(tmp_path / "vit" / "model.safetensors")]
        err = said(partial(train.main, [*arguments, "--out", str(tmp_path / activation)]), code)
        assert ("hidden_act is 'gelu'" in err) == (code == 2)
        assert (tmp_path / activation).exists() == (code == 0)


# ---------------------------------------------------------------------------------------- data sets


TEXTS = ["../x", "/etc/passwd", "a/b", "A/B", "A-B", "\0", '"', '"open', "<script>", "\u202eabc",
         "\u8d28" * 20, "a\tb", "a\r\nb", "\x1b[31m", "--help", "{attribute}", "%s", "\ufeff", "(other)"]


def write_data(root, data_root, rows):
    """The data set ROOT/shoes with these rows in each split, and the photos of data_root."""
    root.mkdir()
    (root / "images").symlink_to(data_root / "images")
    for split in ("train", "val", "test"):
        write_tsv(root / "shoes" / f"{split}.tsv", rows)


def test_any_text_may_stand_in_a_data_set(data_root, flags, tmp_path):
    """All texts come back in predictions.tsv, and none of them names a file outside the run folder."""
    rows = [[f"{text} {number}", "B0001.jpg", text, f"[Title] {text}", text, f"{text}{number}"]
            for text in TEXTS for number in range(2)]
    write_data(tmp_path / "data", data_root, rows)
    train.main([*flags, "--epochs", "1", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    predicted = [row for _, row in read_tsv(tmp_path / "run" / "predictions.tsv")]
    assert [(row["id"], row["attribute_values"]) for row in predicted] == [
        (row[0], " ".join(row[5].split())) for row in rows]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run"}
    attributes = {row["attribute_names"] for row in predicted}
    assert len(list((tmp_path / "run").glob("confusion-*.png"))) == len(attributes)


def test_two_titles_that_do_not_fit_together_are_found_before_the_training(data_root, flags, tmp_path, said):
    rows = [[f"B{n}", "B0001.jpg", "", "black " * 1200 * (n == 1), "Heel", str(n)] for n in range(3)]
    write_data(tmp_path / "data", data_root, rows)
    arguments = [*flags, "--epochs", "1", "--data", str(tmp_path / "data"), "--out"]
    err = said(partial(train.main, [*arguments, str(tmp_path / "run")]), 2)
    assert re.search("product 'B1': .* has 2,... tokens .*, more than the 2,048 that", err)
    train.main([*arguments, str(tmp_path / "run"), "--lbc", "none"])    # alone it fits


def test_the_home_folder_is_the_shells(monkeypatch):
    """A shell leaves --out=~/x as it is."""
    monkeypatch.setenv("HOME", "/elsewhere")
    assert train.parse(["--out=~/x", "--data=~/y"])[0].out == "/elsewhere/x"
