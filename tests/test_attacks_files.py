"""Attacks with files: pictures, names from data, outputs, and no space left.

    ATTACKS=all python -m pytest tests/test_attacks_files.py        every attack, in some minutes; otherwise a seeded sample

The rule: a right result and exit 0, or one line that says what is wrong and exit 2.  Never a traceback, a signal, a hang,
1 GB of memory, a changed input, or an output that a later start cannot use.
"""

import contextlib
import csv
import filecmp
import hashlib
import io
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRODUCTS, command, held
from PIL import EpsImagePlugin, Image, ImageOps

import train
from base.console import UserError
from base.photo import open_photo
from dataset.photos import NoPhoto, as_jpeg, have_photo
from experiments import make_mave
from support import config, run_folder
from support.report import thumbnail
from vit import CLIP_STD, preprocess

ALL = os.environ.get("ATTACKS") == "all"


@pytest.fixture(scope="module")
def tally(request):
    """Lines on how many attacks of each kind held, printed at the end."""
    lines, start = [], time.monotonic()
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, f"attacks with files took {time.monotonic() - start:.0f} s", sep="\n")


def attack(tally, kind, judge, always=(), more=(), sample=0):
    """Judge the cases `always`, and a sample of `more` (all of it with ATTACKS=all); fail with those that did not hold.

    A case is (name, argument, ...); judge(argument, ...) returns None if it held, else what was wrong.
    """
    more = list(more)
    cases = [*always, *(more if ALL else random.Random(kind).sample(more, min(sample, len(more))))]
    start, broken = time.monotonic(), {}
    for name, *arguments in cases:
        try:
            wrong = judge(*arguments)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            broken[name] = " ".join(wrong.split())[:300]
    tally.append(f"{kind}: {len(cases) - len(broken)} of {len(cases)} attacks held "
                 f"(there are {len(always) + len(more)}), {time.monotonic() - start:.1f} s")
    assert not broken, f"{len(broken)} of {len(cases)} did not hold:\n" + "\n".join(f"{n}: {w}" for n, w in broken.items())


def judged(done, right, wrong="not as it should be"):
    """None if a command (its Outcome) kept the rule and left the right result."""
    return held(done) or (None if right else f"{wrong}: exit {done.code}: {done.err or done.out}")


# ------------------------------------------------------------------------------------------------ pictures


SIZES = [(1, 1), (1, 7), (7, 1), (1, 100), (100, 1), (13, 9), (300, 200)]      # width, height


def png(size, depth, colour, transparent=False, orientation=1):
    """A PNG of noise by hand, since Pillow does not write every depth.  colour: PNG's colour type."""
    (width, height), draw = size, np.random.default_rng(depth + colour)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    noise = draw.integers(0, 256, (height, -(-width * channels * depth // 8)), dtype=np.uint8)
    if transparent and colour != 3:
        noise[:, :noise.shape[1] // 2] = 0              # the transparent colour is 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"eXIf", exif.tobytes()[6:])]
    if colour == 3:
        chunks.append((b"PLTE", draw.integers(0, 256, 3 * 2 ** depth, dtype=np.uint8).tobytes()))
    if transparent:
        chunks.append((b"tRNS", draw.integers(0, 256, 2 ** depth, dtype=np.uint8).tobytes() if colour == 3 else
                       bytes(2 * channels)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
                                           for name, body in chunks)


def saved(size, kind, mode, orientation=1, **how):
    """A picture of noise as Pillow writes it."""
    draw, file = np.random.default_rng(7), io.BytesIO()
    picture = Image.frombytes("RGBA", size, draw.integers(0, 256, 4 * size[0] * size[1], dtype=np.uint8).tobytes())
    if mode == "I;16":
        picture = Image.fromarray(draw.integers(0, 65536, size[::-1], dtype=np.uint16))
    elif mode == "LAB":
        picture = Image.frombytes("LAB", size, picture.convert("RGB").tobytes())
    elif mode != "RGBA":
        picture = picture.convert("RGB").convert(mode) if mode not in ("LA", "La") else picture.convert("LA").convert(mode)
    if kind in ("JPEG", "WEBP", "TIFF"):
        how["exif"] = Image.Exif()
        how["exif"][0x0112] = orientation
    if how.get("save_all"):
        how["append_images"] = [ImageOps.invert(picture.convert("L")).convert(mode)]
    picture.save(file, kind, **how)
    return file.getvalue()


KINDS = {f"png {colour} {depth} bits{' transparent' * transparent}": (png, depth, colour, transparent)
         for colour, depths in ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16)))
         for depth in depths for transparent in (False, True) if not transparent or colour in (0, 2, 3)}
KINDS |= {f"{kind} {mode} {' '.join(f'{k}={v}' for k, v in how.items())}": (saved, kind, mode, how) for kind, mode, how in (
    [("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")] + [("JPEG", "RGB", {"progressive": True})]
    + [("GIF", mode, {}) for mode in ("1", "L", "P")] + [("GIF", "P", {"transparency": 3}), ("GIF", "P", {"save_all": True})]
    + [("WEBP", mode, {"lossless": True}) for mode in ("RGB", "RGBA")]
    + [("WEBP", "RGBA", {}), ("WEBP", "RGB", {"save_all": True})]
    + [("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")]
    + [("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")]
    + [("TIFF", mode, {"compression": how}) for mode in ("L", "RGB", "RGBA")
       for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits")])}
REFUSED = ("I", "F")                                    # modes that Pillow turns into nonsense


def picture_of(kind, size, orientation=1):
    write, *how = KINDS[kind]
    return png(size, *how, orientation) if write is png else saved(size, *how[:2], orientation, **how[2])


@pytest.fixture(scope="module")
def clip():
    """transformers' CLIP processor on Pillow: what it makes of a file's pixels, or None if it must be refused."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil()

    def call(path):
        with Image.open(path) as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        if upright.mode in REFUSED or upright.mode.startswith("I;16") and "transparency" in upright.info:
            return None
        if upright.mode.startswith("I;16"):             # which the processor makes white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return torch.as_tensor(np.asarray(processor(upright)["pixel_values"][0]))
    return call


def test_every_kind_of_picture_is_as_clip_reads_it(tally, clip, tmp_path):
    levels = torch.tensor(CLIP_STD)[:, None, None] * 255

    def judge(kind, size, orientation):
        path = tmp_path / "picture.jpg"
        path.write_bytes(picture_of(kind, size, orientation))
        expected = clip(path)
        try:
            pixels = preprocess(open_photo(path))
        except UserError as error:
            return None if expected is None and "\n" not in str(error) else f"refused: {error}"
        if expected is None:
            return "not refused"
        worst = ((pixels - expected) * levels).abs().max().item()
        return f"differs by {worst:.1f} grey levels" if worst > 1e-3 else None

    cases = [(f"{kind}, {size}, orientation {orientation}", kind, size, orientation)
             for kind in KINDS for size in SIZES for orientation in range(1, 9)]
    always = [case for case in cases if "(13, 9), orientation 6" in case[0]]
    attack(tally, "pictures against CLIP's processor", judge, always, [c for c in cases if c not in always], 200)


def damages(content, seed):
    """(what, damaged bytes): cut, flipped, zeroed, swapped, doubled, with noise in the middle."""
    draw, n = random.Random(seed), len(content)
    a, b = sorted(draw.sample(range(n + 1), 2))
    yield "cut", content[:a]
    yield "hole", content[:a] + content[b:]
    yield "zeroed", content[:a] + bytes(b - a) + content[b:]
    yield "doubled", content[:b] + content[a:]
    yield "swapped", content[b:] + content[a:b] + content[:a]
    yield "noise", content[:a] + draw.randbytes(64) + content[a:]
    for what, reach in (("header", min(64, n)), ("anywhere", n)):
        flipped = bytearray(content)
        for _ in range(draw.choice((1, 4, 16))):
            flipped[draw.randrange(reach)] ^= 1 << draw.randrange(8)
        yield what, bytes(flipped)


def test_damaged_pictures(tally, tmp_path):
    def judge(content):
        path = tmp_path / "picture.jpg"
        path.write_bytes(content)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                picture = open_photo(path)
                preprocess(picture)
                wrong = None if picture.mode == "RGB" else picture.mode
            except UserError as error:
                wrong = "two lines" if "\n" in str(error) else None
        if time.monotonic() - start > 20 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 1e6:
            return "took too much time or memory"
        return wrong or (f"warned: {said[0].message}" if said else None)

    cases = [(f"{kind}, {what} {seed}", content) for kind in KINDS for seed in range(10)
             for what, content in damages(picture_of(kind, (40, 30)), f"{kind} {seed}")]
    attack(tally, "damaged pictures", judge, more=cases, sample=300)


def other_formats():
    """(name, bytes): what is no photo of a shop, some of it read by Pillow with the help of other programs."""
    for kind in ("EPS", "PDF", "ICO", "PPM", "TGA", "PCX", "SGI", "ICNS", "DDS", "SPIDER", "JPEG2000", "AVIF", "QOI"):
        file = io.BytesIO()
        try:
            Image.new("F" if kind == "SPIDER" else "RGB", (64, 64), "red" if kind != "SPIDER" else 1.0).save(file, kind)
        except (KeyError, OSError, ValueError):         # this Pillow does not write it
            continue
        yield kind, file.getvalue()
    yield "PSD", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(12) + bytes(2 + 3 * 64)
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "script", b"#!/bin/sh\necho\n"
    yield "zip", b"PK\3\4" + bytes(60)


def test_no_other_format_is_opened_and_no_program_started(tally, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *a, **k: started.append(a) or (_ for _ in ()).throw(OSError()))
    path = tmp_path / "photo.jpg"

    def open_here(where, content):
        path.write_bytes(content)
        if where == "report":
            return "no photo" not in thumbnail(path)
        try:
            {"open_photo": open_photo, "download": lambda p: as_jpeg(p.read_bytes()),
             "have_photo": lambda p: have_photo(p) or (_ for _ in ()).throw(NoPhoto("none"))}[where](path)
        except (UserError, NoPhoto):
            return False
        return True

    def judge(where, content):
        started.clear()
        if open_here(where, content):
            return "was opened"
        return f"started {started}" if started else None

    cases = [(f"{kind} in {where}", where, content) for kind, content in other_formats()
             for where in ("open_photo", "report", "download", "have_photo")]
    attack(tally, "other formats", judge, cases)


def test_downloaded_pictures_keep_their_pixels():
    """What is no JPEG is stored as one: 16-bit grey, transparent and turned pictures as open_photo reads them."""
    def stored(picture, kind="PNG", **how):
        file = io.BytesIO()
        picture.save(file, kind, **how)
        with Image.open(io.BytesIO(as_jpeg(file.getvalue()))) as jpeg:
            return np.asarray(jpeg.convert("RGB")).astype(int)

    assert abs(stored(Image.fromarray(np.full((40, 20), 0x8000, dtype=np.uint16))) - 0x80).max() <= 2
    assert stored(Image.new("RGBA", (40, 20), (0, 0, 0, 0))).min() >= 253
    exif = Image.Exif()
    exif[0x0112] = 6
    assert stored(Image.new("RGB", (40, 20)), exif=exif).shape == (40, 20, 3)
    with pytest.raises(NoPhoto, match="32 bits a pixel"):
        stored(Image.new("F", (40, 20)), "TIFF")


def sized(kind, width, height):
    """A small file whose header promises width x height."""
    if kind == "PNG":
        body = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
        data = zlib.compress(bytes(1000))
        return head + struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    if kind == "GIF":
        head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
        return head + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\1D\0;"
    if kind == "BMP":
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return Image.new("L", (width, height)).tobytes() and saved((width, height), kind, "L")


def test_pictures_that_cost_too_much(tally, world, tmp_path):
    def judge(content):
        path = tmp_path / "photo.jpg"
        path.write_bytes(content)
        done = command("evaluate.py", world.one_product(path), tmp_path)
        if done.code != 2 or "Warning" in done.err:
            return f"exit {done.code}: {done.err[-200:]}"
        return held(done)

    sizes = [(1, 20_000), (20_000, 1), (30_000, 30_000), (60_000, 60_000), (10_000, 9_000), (1, 65_000)]
    cases = [(f"{kind} {size}", sized(kind, *size)) for kind in ("PNG", "GIF", "BMP") for size in sizes]
    attack(tally, "pictures that cost too much", judge, cases[:2] + [("TIFF", sized("TIFF", 1, 20_000))], cases[2:], 4)


# ------------------------------------------------------------------------------------------------ a world to attack


class World:
    """A data set, small weights, and a finished run of them; and how to start another one."""

    def __init__(self, folder, data_root, llama_dir, vit_dir):
        self.folder, self.data = folder, data_root
        self.weights = ["--llama", str(llama_dir), "--vit", str(vit_dir), "--device", "cpu"]
        self.run, self.export = folder / "run", folder / "export"
        train.main(self.flags(self.run))

    def flags(self, out, data=None):
        return ["--data", str(data or self.data), "--dataset", "shoes", *self.weights, "--labels", "1", "--epochs", "2",
                "--batch-size", "8", "--out", str(out)]

    def one_product(self, photo):
        return [str(self.run), "--image", str(photo), "--text", "x", "--attribute", "Boot Style"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_root, llama_dir, vit_dir):
    folder, before = tmp_path_factory.mktemp("world"), config.FEATURE_CACHE
    config.FEATURE_CACHE = folder / "features.sqlite"
    yield World(folder, data_root, llama_dir, vit_dir)
    config.FEATURE_CACHE = before


def files_in(folder):
    """{relative path: digest} of all files below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in Path(folder).rglob("*") if p.is_file()}


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


# ------------------------------------------------------------------------------------------------ names from data


NASTY = ["../x", "../../etc/passwd", "..", ".", "/etc/passwd", "a/b", "a//b/", "C:\\x", "..\\x", "%00", "\\0", "\0", "a\0b",
         '"', '""', '"open', "'", "<b>&amp;</b>", "<script>alert(1)</script>", "' onload='x", "\u202eabc\u202c", "\u200f",
         "a" * 300, "a" * 250, "质" * 100, "👟" * 70, "e\u0301", "=1+1", "+1", "-1", "@x", "  ", "\u00a0", "\u2028", "{}",
         "{attribute}", "%s", "$HOME", "`id`", "a\tb", "a\nb", "a\r\nb", "a\rb", "\ufeff", "\x1b[31m", "\x07", "NUL", "con",
         "~", "--help", "*", "?", "(other)", "First: x; Second: y; No.", "…", ".hidden", "-", "train.tsv", "a.tsv/../b"]
ALIKE = ["A/B", "A-B", "a b", "a-b", "A B", "a/b", "A\\B", "Ä/B", "a" * 299 + "b", "a" * 299 + "c", "质" * 99 + "地",
         "质" * 99 + "量"]


def write_data(root, world, rows):
    """ROOT/shoes with these rows (of cells) in each split, and the photos of the world."""
    (root / "shoes").mkdir(parents=True)
    shutil.copytree(world.data / "images", root / "images", copy_function=os.link)
    for split in ("train", "val", "test"):
        with open(root / "shoes" / f"{split}.tsv", "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, dialect="excel-tab", quoting=csv.QUOTE_ALL)
            lines.writerow("id images category texts attribute_names attribute_values".split())
            lines.writerows(rows)
    return root


def test_names_in_a_data_set(tally, world, tmp_path_factory):
    def judge(rows):
        folder = tmp_path_factory.mktemp("names")
        root, out = write_data(folder / "data", world, rows), folder / "out"
        before = files_in(root)
        done = command("train.py", world.flags(out, root), folder)
        if wrong := held(done):
            return wrong
        if {p.name for p in folder.iterdir()} - {"data", "out", "stdout.txt", "stderr.txt"} or files_in(root) != before:
            return "wrote somewhere else"
        if done.code == 2:
            return None if ", line 2: " in done.err and done.err.count("\n") == 1 else done.err
        expected = [[" ".join(cell.split()) for cell in row] for row in rows]
        found = [[row[name] for name in "id images category texts attribute_names attribute_values".split()] for row in
                 rows_of(out / "predictions.tsv")]
        if [row[:3] + row[4:] for row in found] != [row[:3] + row[4:] for row in expected]:
            return "predictions.tsv does not hold what the data set does"
        attributes = {row[4] for row in expected}
        pictures = list(out.glob("confusion-*.png"))
        if len(pictures) != len(attributes) or not (out / "report.html").exists():
            return f"{len(pictures)} confusion matrices of {len(attributes)} attributes"
        return None

    row = ["B1", "B0001.jpg", "Shoes", "[Title] black shoe", "Boot Style", "Flat"]
    cases = [(f"{text!r:.60} as {place}", [[text if i == column else cell for i, cell in enumerate(row)], ["B2", *row[1:]]])
             for column, place in ((0, "id"), (2, "category"), (3, "title"), (4, "attribute"), (5, "value")) for text in NASTY]
    always = [("attributes that are alike", [[f"B{i}", *row[1:4], name, "Flat"] for i, name in enumerate(ALIKE)]),
              *(case for case in cases if "as attribute" in case[0] and ("aaaa" in case[0] or "质" in case[0]))]
    attack(tally, "names in a data set", judge, always, [case for case in cases if case not in always], 12)


def test_photos_that_leave_their_folder(tally, world, tmp_path_factory):
    """An absolute name, or one with .., is refused with file and line by each command that reads it."""
    def judge(name, script):
        folder = tmp_path_factory.mktemp("leave")
        rows = [["B1", name, "Shoes", "[Title] black shoe", "Boot Style", "Flat"]]
        if script == "import":
            source = folder / "release"
            write_data(source / "data" / "training_data" / "texts", world, rows)
            (source / "data" / "training_data" / "texts" / "shoes").rename(source / "data" / "training_data" / "texts" / "Shoes")
            done = command("-m dataset", ["import", str(source), "--data", str(folder / "root")], folder)
            return judged(done, f"{name!r}" in done.out and "line 2" in done.out and not list((folder / "root").rglob("*.jpg")))
        root = write_data(folder / "data", world, rows)
        (folder / "secret.jpg").write_bytes((world.data / "images" / "B0001.jpg").read_bytes())
        if script == "stats":
            done = command("-m dataset", ["stats", "--data", str(root)], folder)
            return judged(done, f"{name!r}" in done.out and "line 2" in done.out)
        arguments = world.flags(folder / "out", root) if script == "train.py" else [
            str(world.run), "--strict", "--input", str(root / "shoes" / "test.tsv"), "--output", str(folder / "out.tsv")]
        done = command(script, arguments, folder)
        return judged(done, done.code == 2 and ".tsv, line 2: images is " in done.err)

    secret = "../../secret.jpg"
    cases = [(f"{name} in {script}", name, script) for name in
             (secret, "sub/../../../secret.jpg", "..", str(world.data / "images" / "B0001.jpg"), "/etc/passwd", "../B0001.jpg")
             for script in ("train.py", "evaluate.py", "stats", "import")]
    attack(tally, "photos that leave their folder", judge, cases[:4], cases[4:], 6)


def test_import_takes_no_file_from_outside(world, tmp_path):
    """A link in the release that leads out of it is neither linked nor copied; one that stays inside is."""
    release = tmp_path / "release"
    texts = release / "data" / "training_data" / "texts"
    write_data(texts, world, [["B1", "in.jpg", "Shoes", "[Title] a", "Boot Style", "Flat"],
                              ["B2", "out.jpg", "Shoes", "[Title] b", "Boot Style", "Flat"],
                              ["B3", "loop.jpg", "Shoes", "[Title] c", "Boot Style", "Flat"]])
    (tmp_path / "secret.jpg").write_bytes((world.data / "images" / "B0001.jpg").read_bytes())
    (release / "photos").mkdir()
    (release / "photos" / "real.jpg").write_bytes((world.data / "images" / "B0002.jpg").read_bytes())
    (release / "photos" / "in.jpg").symlink_to("real.jpg")
    (release / "photos" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (release / "photos" / "loop.jpg").symlink_to("loop.jpg")
    done = command("-m dataset", ["import", str(release), "--data", str(tmp_path / "root")], tmp_path)
    assert not held(done) and done.code == 0, done.err
    assert {p.name for p in (tmp_path / "root" / "images").iterdir()} == {"in.jpg"}
    assert "out.jpg leads to" in done.out and "secret.jpg, outside of the folders given" in done.out


# ------------------------------------------------------------------------------------------------ outputs


def outputs(folder, device=False):
    """(name, path, how): how is "holds" the answers afterwards, "sink" for what keeps nothing, or "refused"."""
    folder.mkdir()
    (folder / "folder").mkdir()
    for name in ("file.tsv", "target.tsv", "hard.tsv"):
        (folder / name).write_text("old\n")
    os.link(folder / "hard.tsv", folder / "hard2.tsv")
    for name, target in (("link.tsv", "target.tsv"), ("dangling.tsv", "new.tsv"), ("loop.tsv", "loop.tsv"), ("null", "/dev/null"),
                         ("to-folder", "folder"), ("full", "/dev/full"), ("stdout", "/proc/self/fd/1")):
        (folder / name).symlink_to(target)
    yield "a new file", folder / "new-file.tsv", "holds"
    yield "a new folder", folder / "deep" / "er" / "out.tsv", "holds"
    yield "an old file", folder / "file.tsv", "holds"
    yield "a file with two names", folder / "hard.tsv", "holds"
    yield "a link to a file", folder / "link.tsv", "holds"
    yield "a link to nothing yet", folder / "dangling.tsv", "holds"
    yield "a link to itself", folder / "loop.tsv", "refused"
    yield "a link to /dev/null", folder / "null", "sink"
    yield "a link to stdout", folder / "stdout", "stdout"
    yield "/dev/full", folder / "full", "refused"
    yield "a folder", folder / "folder", "refused"
    yield "a link to a folder", folder / "to-folder", "refused"
    yield "in a file", folder / "file.tsv" / "out.tsv", "refused"
    yield "a name of 250 bytes", folder / ("a" * 246 + ".tsv"), "holds"
    yield "a name of 300 bytes", folder / ("a" * 296 + ".tsv"), "refused"
    yield "in /proc", Path("/proc/out.tsv"), "refused"
    yield "in /sys", Path("/sys/out.tsv"), "refused"
    yield "bytes that are no text", folder / os.fsdecode(b"caf\xe9.tsv"), "holds"
    with contextlib.suppress(PermissionError):          # only root can make a device
        os.mknod(folder / "device", 0o600 | 0o020000, os.makedev(1, 3))
        yield "a device", folder / "device", "sink"


def test_output_goes_where_it_is_sent(tally, world, tmp_path):
    given = world.data / "shoes" / "test.tsv"
    right = (world.run / "predictions.tsv").read_text(encoding="utf-8")

    def judge(path, how):
        kind = path.lstat().st_mode if os.path.lexists(path) and not os.path.isfile(path) else None
        link = os.readlink(path) if os.path.islink(path) else None
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(path)], tmp_path)
        if wrong := held(done):
            return wrong
        if link and (not path.is_symlink() or os.readlink(path) != link) or kind and path.lstat().st_mode != kind:
            return "was replaced"
        if (done.code == 2) != (how == "refused"):
            return f"exit {done.code}: {done.err}"
        if how == "holds" and path.read_text(encoding="utf-8") != right:
            return "does not hold the answers"
        if how == "stdout" and done.out != right:
            return f"stdout is not the answers: {done.out[:100]!r}"
        left = [p.name for p in tmp_path.rglob("*.partial")]
        return f"left {left}" if left else None

    attack(tally, "outputs", judge, list(outputs(tmp_path / "outputs")))


def test_output_to_a_pipe_and_to_our_own_stdout(tally, world, tmp_path):
    given = world.data / "shoes" / "test.tsv"
    right = (world.run / "predictions.tsv").read_bytes()

    def fifo():
        os.mkfifo(tmp_path / "fifo")
        read = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()), daemon=True)
        reader.start()
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(tmp_path / "fifo")], tmp_path)
        reader.join(5)
        return judged(done, read == [right] and (tmp_path / "fifo").is_fifo(), "the reader did not get the answers")

    def file():
        """As `> out.tsv` does, and --output /dev/stdout: the file is the same one, and holds the answers alone."""
        (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
        target = os.open(tmp_path / "out.tsv", os.O_WRONLY | os.O_CREAT)
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(tmp_path / "stdout")], tmp_path,
                       before=lambda: os.dup2(target, 1))
        same = os.fstat(target).st_ino == (tmp_path / "out.tsv").stat().st_ino
        os.close(target)
        return judged(done, same and (tmp_path / "out.tsv").read_bytes() == right, "out.tsv does not hold the answers alone")

    def full(arguments):
        target = os.open("/dev/full", os.O_WRONLY)
        done = command(arguments[0], arguments[1:], tmp_path, before=lambda: os.dup2(target, 1))
        os.close(target)
        return judged(done, done.code == 2)

    def given_itself(path):
        before = given.read_bytes()
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(path)], tmp_path)
        return judged(done, done.code == 2 and given.read_bytes() == before)

    def not_a_file(flag):
        if not (tmp_path / "pipe").exists():
            os.mkfifo(tmp_path / "pipe")
        arguments = world.one_product(tmp_path / "pipe") if flag == "--image" else [
            str(world.run), "--input", str(tmp_path / "pipe"), "--output", str(tmp_path / "x.tsv")]
        done = command("evaluate.py", arguments, tmp_path)
        return judged(done, done.code == 2 and "pipe or a device" in done.err)

    (tmp_path / "input.tsv").symlink_to(given)
    run = str(world.run)
    attack(tally, "pipes, stdout, the input", lambda do, *a: do(*a), [
        ("a pipe", fifo), ("stdout in a file", file), ("scores to /dev/full", full, ["evaluate.py", run]),
        ("an answer to /dev/full", full, ["evaluate.py", *world.one_product(world.data / "images" / "B0001.jpg")]),
        ("the input", given_itself, given), ("a link to the input", given_itself, tmp_path / "input.tsv"),
        ("a pipe as --input", not_a_file, "--input"), ("a pipe as --image", not_a_file, "--image")])


def test_an_export_goes_to_a_new_folder(tally, world, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")

    def judge(path, code):
        done = command("evaluate.py", [str(world.run), "--export", str(path)], tmp_path)
        left = [p.name for p in tmp_path.rglob("*.partial")]
        return judged(done, done.code == code and not left, f"left {left}")

    attack(tally, "exports", judge, [
        ("a file", tmp_path / "file", 2), ("a pipe", tmp_path / "fifo", 2), ("new", tmp_path / "a" / "b", 0),
        ("in a file", tmp_path / "file" / "x", 2), ("/proc", Path("/proc/x"), 2), ("nothing", "", 2),
        ("a link to nothing yet", tmp_path / "link", 0), ("long", tmp_path / ("a" * 300), 2)])


def test_what_a_killed_process_left_is_removed(world, tmp_path):
    """Of the same file, and only if its process is gone: another live process may be writing there.

    Of --output that is the record of a catalogue; its answers so far stay."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out = tmp_path / "out.tsv"
    for name in (f".out.tsv.partial.json.{gone.pid}.partial", f".other.tsv.{gone.pid}.partial",
                 f".out.tsv.partial.json.{os.getpid()}.partial",
                 ".out.tsv.partial.json.x.partial", ".out.tsv.partial.json.99999999999999999999.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".export.{gone.pid}.partial").mkdir()
    (tmp_path / f".export.{gone.pid}.partial" / "model.safetensors").write_text("half")
    given = world.data / "shoes" / "test.tsv"
    for arguments in (["--input", str(given), "--output", str(out)], ["--export", str(tmp_path / "export")]):
        done = command("evaluate.py", [str(world.run), *arguments], tmp_path)
        assert not held(done) and done.code == 0, done.err
    assert sorted(p.name for p in tmp_path.glob(".*.partial")) == sorted([
        f".other.tsv.{gone.pid}.partial", f".out.tsv.partial.json.{os.getpid()}.partial", ".out.tsv.partial.json.x.partial",
        ".out.tsv.partial.json.99999999999999999999.partial"])


# ------------------------------------------------------------------------------------------------ no space left


def no_space(after, limit=16, save_every=None, cache=None):
    """For `before`: once `after` files have been written whole, no file may grow beyond `limit` bytes."""
    def before():
        written, replace = [], os.replace

        def counted(*arguments):
            replace(*arguments)
            written.append(arguments)
            if len(written) == after:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        os.replace = counted
        if save_every is not None:
            run_folder.SAVE_EVERY = save_every
        if cache:
            config.FEATURE_CACHE = cache
        if not after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return before


def count_writes(arguments, folder):
    """How many files a command writes whole."""
    def before():
        replace = os.replace
        os.replace = lambda *a: os.write(1, b"<written>") and replace(*a)
    done = command(*arguments, folder, before=before)
    assert done.code == 0, done.err
    return done.out.count("<written>")


def test_no_space_in_a_training(tally, world, tmp_path_factory):
    """The training ends with one line, and goes on as if nothing had happened when there is space again."""
    folder = tmp_path_factory.mktemp("space")
    writes = count_writes(("train.py", world.flags(folder / "counted")), folder)
    assert writes == 2 + 1 + 2 * 5                      # config, state, adapter; predictions, metrics, 2 matrices, report

    def judge(after, limit, save_every=None):
        here = tmp_path_factory.mktemp("full")
        out = here / "out"
        done = command("train.py", world.flags(out), here, before=no_space(after, limit, save_every))
        if wrong := held(done):
            return wrong
        if left := list(here.rglob("*.partial")):
            return f"left {left}"
        if done.code == 2:
            if str(out) not in done.err:
                return f"the line names no file: {done.err}"
            again = ["--resume", str(out)] if (out / "config.json").exists() else world.flags(out)
            done = command("train.py", again, here)
            if done.code:
                return f"could not go on: {done.err}"
        for name in ("adapter.safetensors", "predictions.tsv", "val/predictions.tsv"):
            if not filecmp.cmp(out / name, world.run / name, shallow=False):
                return f"{name} is another one after going on"
        return None

    cases = [(f"after {n} files, {limit} bytes", n, limit) for n in range(writes + 1) for limit in (16, 300, 5000)]
    cases += [(f"after {n} files, {limit} bytes, a state after each step", n, limit, -1) for n in range(writes + 1)
              for limit in (16, 20_000)]
    always = [case for case in cases if case[1:] in ((1, 300), (1, 16), (3, 16), (2, 20_000, -1))]
    attack(tally, "no space in a training", judge, always, [case for case in cases if case not in always], 5)


def test_no_space_in_an_evaluation_and_an_export(tally, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(world.run, folder / "run")
    scoring = count_writes(("evaluate.py", [str(folder / "run")]), folder)
    exporting = count_writes(("evaluate.py", [str(folder / "run"), "--export", str(folder / "export")]), folder)

    def score(after, limit):
        here = tmp_path_factory.mktemp("full")
        shutil.copytree(world.run, here / "run")
        done = command("evaluate.py", [str(here / "run")], here, before=no_space(after, limit))
        if wrong := held(done):
            return wrong
        names = {p.name for p in (here / "run").iterdir()}
        if names != {p.name for p in world.run.iterdir()}:
            return f"the folder holds {names}"
        done = command("evaluate.py", [str(here / "run")], here)
        same = filecmp.cmp(here / "run" / "predictions.tsv", world.run / "predictions.tsv", shallow=False)
        return None if done.code == 0 and same else f"could not be scored again: {done.err}"

    def export(after, limit):
        here = tmp_path_factory.mktemp("full")
        done = command("evaluate.py", [str(world.run), "--export", str(here / "out")], here, before=no_space(after, limit))
        if wrong := held(done):
            return wrong
        if done.code == 2 and {p.name for p in here.iterdir()} != {"stdout.txt", "stderr.txt"}:
            return f"left {sorted(p.name for p in here.iterdir())}"
        if done.code == 2:
            done = command("evaluate.py", [str(world.run), "--export", str(here / "out")], here)
        return None if files_in(here / "out") == files_in(folder / "export") else f"another export: {done.err}"

    def output(limit):
        here = tmp_path_factory.mktemp("full")
        (here / "out.tsv").write_text("old")
        done = command("evaluate.py", [str(world.run), "--input", str(world.data / "shoes" / "test.tsv"), "--output",
                                       str(here / "out.tsv")], here, before=no_space(0, limit))
        return judged(done, done.code == 2 and str(here / "out.tsv") in done.err and (here / "out.tsv").read_text() == "old")

    cases = [(f"scores, after {n} files, {limit} bytes", score, n, limit) for n in range(scoring) for limit in (16, 1000)]
    cases += [(f"export, after {n} files, {limit} bytes", export, n, limit)
              for n in range(exporting) for limit in (16, 1000, 50_000)]
    cases += [(f"--output, {limit} bytes", output, limit) for limit in (0, 16, 1000)]
    always = [case for case in cases if case[2:] in ((0, 16), (0,), (0, 50_000))]
    attack(tally, "no space in an evaluation or export", lambda do, *a: do(*a), always,
           [case for case in cases if case not in always], 5)


def test_no_space_for_the_cache_of_features(tally, world, tmp_path_factory):
    def judge(limit):
        here = tmp_path_factory.mktemp("cache")
        arguments = [str(world.run), "--input", str(world.data / "shoes" / "test.tsv"), "--output", str(here / "out.tsv")]
        cache = here / "features.sqlite"
        done = command("evaluate.py", arguments, here, before=no_space(0, limit, cache=cache))
        if wrong := held(done):
            return wrong
        if done.code == 2:
            done = command("evaluate.py", arguments, here, before=lambda: setattr(config, "FEATURE_CACHE", cache))
        same = done.code == 0 and filecmp.cmp(here / "out.tsv", world.run / "predictions.tsv", shallow=False)
        return None if same else f"could not go on: {done.err}"

    limits = [0, 1, 100, 512, 4095, 4096, 8192, 12_000, 16_384, 20_000, 32_000, 32_768, 40_000, 60_000, 100_000]
    cases = [(f"{limit} bytes", limit) for limit in limits]
    attack(tally, "no space for the cache", judge, cases[:1], cases[1:], 3)


def test_no_space_in_a_build(tally, tmp_path_factory):
    """The build of a data set ends with one line, leaves no half split, and gives the same files when there is space again."""
    folder = tmp_path_factory.mktemp("build")
    labels, metadata = make_mave.make(folder, 3000, 3000)

    def build(here):
        return ["build", "--labels", str(labels), "--metadata", str(metadata), "--data", str(here / "data"), "--no-photos",
                "--more-than", "5", "--jobs", "1"]

    def files(here):
        return files_in(here / "data") if (here / "data").exists() else {}

    writes = count_writes(("-m dataset", build(folder)), folder)
    expected = {name: content for name, content in files(folder).items() if not name.startswith(".build")}
    assert writes >= 9 and sum(name.endswith("train.tsv") for name in expected) == 3

    def judge(after, limit):
        here = tmp_path_factory.mktemp("full")
        done = command("-m dataset", build(here), here, before=no_space(after, limit))
        if wrong := held(done):
            return wrong
        if left := [name for name in files(here) if name.endswith(".partial")]:
            return f"left {left}"
        if done.code == 2:
            done = command("-m dataset", build(here), here)
        found = {name: content for name, content in files(here).items() if not name.startswith(".build")}
        return None if done.code == 0 and found == expected else f"could not go on: {done.err[-200:]}"

    cases = [(f"after {n} files, {limit} bytes", n, limit) for n in range(writes + 1) for limit in (0, 16, 5000, 40_000)]
    attack(tally, "no space in a build", judge, cases[:1], cases[1:], 4)


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a disk of its own this many kB; skips where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(kilobytes, *how):
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((*how, f"size={kilobytes}k")), "tmpfs", disk], check=True,
                       capture_output=True)
        return disk

    try:
        mount(16)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk cannot be mounted here")
    yield mount
    subprocess.run(["umount", "--all-targets", "--recursive", disk], check=True)


def test_a_disk_that_is_full(tally, world, small_disk, tmp_path):
    """The real thing: run folder and cache on a disk of some kB, and later on a larger one."""
    def judge(kilobytes):
        subprocess.run(["umount", tmp_path / "disk"], check=True)
        disk = small_disk(kilobytes)
        out, cache = disk / "out", disk / "features.sqlite"
        done = command("train.py", world.flags(out), tmp_path, before=lambda: setattr(config, "FEATURE_CACHE", cache))
        if wrong := held(done):
            return wrong
        small_disk(20_000, "remount")
        if done.code == 2:
            again = ["--resume", str(out)] if (out / "config.json").exists() else world.flags(out)
            done = command("train.py", again, tmp_path, before=lambda: setattr(config, "FEATURE_CACHE", cache))
        same = done.code == 0 and filecmp.cmp(out / "predictions.tsv", world.run / "predictions.tsv", shallow=False)
        return None if same else f"could not go on: {done.err}"

    cases = [(f"{size} kB", size) for size in range(4, 200, 4)]
    attack(tally, "a full disk", judge, more=cases, sample=4)


def test_the_world_has_not_changed(world, data_root):
    """Attacks read the data set, and none of them wrote there."""
    assert {p.name for p in data_root.iterdir()} == {"images", "shoes"}
    assert len(list((data_root / "images").iterdir())) == len(PRODUCTS) * 11
