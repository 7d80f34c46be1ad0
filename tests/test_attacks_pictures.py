"""Attacks with pictures: every format, damaged ones, and some that would cost too much.

    ATTACKS=all python -m pytest tests/test_attacks_pictures.py        every attack, in some minutes; otherwise a seeded sample

The rule: a right result and exit 0, or one line that says what is wrong and exit 2.  Never a traceback, a signal, a hang,
1 GB of memory, a changed input, or an output that a later start cannot use.
"""

import io
import random
import resource
import struct
import subprocess
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import attack, command, held
from PIL import EpsImagePlugin, Image, ImageOps

from base.console import UserError
from base.photo import open_photo
from dataset.photos import NoPhoto, as_jpeg, have_photo
from support.report import thumbnail
from vit import CLIP_STD, preprocess

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
