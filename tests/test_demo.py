"""The demo world: its texts, photos and backbones are what docs/demo.md says; no split knows another."""

import filecmp
import hashlib
import random
import re
import shutil

import numpy as np
import pytest

import llama
import vit
from demo import pretrain, world

# id, photo, category, text, attribute, value
ROWS = [row for rows in world.make_splits().values() for row in rows]


def test_the_world_stays_the_same():
    """The backbones and all printed figures rest on it.  Of photos the mean brightness is compared."""
    text = "".join("\t".join(row) for row in ROWS)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("24cb8294e7b127f2")
    brightness = [np.mean(world.photo_of(f"DEMO{number:05d}")) for number in range(22)]
    of_each_value = "198 176 139 155 222 149 192 184 151 141 160 138 158 216 163 155 145 189 144 171 180 159"
    assert brightness == pytest.approx(list(map(int, of_each_value.split())), abs=1)


def test_no_title_or_category_holds_its_value():
    for _, _, category, text, _, value in ROWS:
        assert not re.search(rf"\b{value}s?\b", f"{text}, {category}", re.IGNORECASE)


def test_the_prose_holds_no_title_of_the_data_set():
    rng = random.Random(1)
    for _ in range(9000):
        *_, context = pretrain.prose_product(rng)
        assert context.split(", ")[0] not in pretrain.TITLES


def test_picture_and_text_together_leave_one_value():
    for attribute, value in world.ALL_VALUES:
        [alike] = [values for _, values in world.FAMILIES[attribute] if value in values]
        occasions = [values for _, values in world.OCCASIONS[attribute] if value in values]
        assert occasions and all(set(alike) & set(values) == {value} for values in occasions)
        assert min(map(len, [alike, *occasions])) > 1           # neither alone is enough


def test_the_llama_knows_its_world(capsys):
    """Products described in words, which no training has seen: all are answered rightly."""
    pretrain.probe_llama(documents=30)
    assert "questions in words: 100.0 % right" in capsys.readouterr().out


def test_pretraining_runs(tmp_path):
    """One step of each round.  The prose is the same, and so is the tokenizer."""
    demo = shutil.copytree(world.LLAMA.parent, tmp_path / "demo")
    pretrain.pretrain_vit(demo / "vit", drawings=64, steps=1, caption_steps=1)
    pretrain.pretrain_llama(demo / "llama", steps=1)
    assert vit.load_vit(demo / "vit").config == vit.load_vit(world.VIT).config
    llama.load_llama(demo / "llama")
    assert filecmp.cmp(demo / "llama" / "tokenizer.model", world.LLAMA / "tokenizer.model", shallow=False)
