"""The demo world: its texts, photos and backbones are what its page says, and nothing leaks between the splits."""

import csv
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

import llama
import vit
from base.console import UserError
from demo import pretrain, world
from experiments import paper_tables

SPLITS = world.make_splits()
ROWS = [row for rows in SPLITS.values() for row in rows]


def test_sizes():
    for split, least in (("train", 150), ("val", 10), ("test", 20)):
        counts = Counter((row["attribute_names"], row["attribute_values"]) for row in SPLITS[split])
        assert set(counts) == set(world.ALL_VALUES) and min(counts.values()) >= least
    assert len(SPLITS["test"]) >= 500
    assert 20 <= len(world.ALL_VALUES) <= 25 and set(world.VALUES) == {"Pattern", "Material", "Shape"}


def test_no_title_or_category_holds_its_value():
    for row in ROWS:
        assert not re.search(rf"\b{row['attribute_values']}s?\b", f"{row['texts']}, {row['category']}", re.IGNORECASE), row


def test_no_title_and_no_product_occurs_twice():
    assert len({row["texts"] for row in ROWS}) == len({row["id"] for row in ROWS}) == len(ROWS)


def test_the_prose_holds_no_title_of_the_data_set():
    titles = {row["texts"].removeprefix("[Title] ") for row in ROWS}
    rng, met = random.Random(1), 0
    for _ in range(3000):
        text = " ".join(pretrain.prose(rng))
        for part in text.replace("\n", ", ").replace(": ", ", ").replace(" of ", ", ").split(", "):
            met += part.split(" ")[0] in world.BRANDS            # a title begins with a brand
            assert part not in titles
    assert met > 1000


def test_no_picture_of_the_test_split_occurs_elsewhere():
    assert len(ROWS) < pretrain.OTHER_SEEDS                # products' seeds are their numbers
    chosen = [rows[i]["id"] for rows in SPLITS.values() for i in range(12)]
    pictures = [world.photo_of(product).tobytes() for product in chosen]
    pictures += [pretrain.drawing(number)[0].tobytes() for number in range(12)]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("attribute", world.VALUES)
def test_picture_and_text_together_leave_one_value(attribute):
    for value in world.VALUES[attribute]:
        [alike] = [values for _, values in world.FAMILIES[attribute] if value in values]
        occasions = [values for _, values in world.OCCASIONS[attribute] if value in values]
        assert occasions and all(set(alike) & set(values) == {value} for values in occasions)
        assert all(len(values) > 1 for values in [alike, *occasions])       # neither alone is enough
    phrases = [p for _, telling in world.VALUES[attribute].values() for p in telling]
    assert len(set(phrases)) == len(phrases)                    # a telling circumstance tells one value


def test_photos_follow_from_their_id_alone(tmp_path):
    world.draw_photos(tmp_path, ["DEMO00003.jpg", "DEMO00004.jpg"])
    first = {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir()}
    (tmp_path / "images" / "DEMO00003.jpg").unlink()
    world.draw_photos(tmp_path, ["DEMO00003.jpg"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir()} == first and len(first) == 2


def test_the_data_set_is_written_once_and_again_for_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "ROOT", tmp_path)
    assert world.write_dataset() == tmp_path
    test = tmp_path / "general" / "test.tsv"
    with open(test, encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file, dialect="excel-tab")) == SPLITS["test"]
    test.write_text("kept")
    world.write_dataset()
    assert test.read_text() == "kept"
    monkeypatch.setattr(world, "VERSION", "999")
    world.write_dataset()
    assert test.read_text() != "kept"


def test_the_backbones_are_small_and_the_loaders_read_them():
    files = [p for folder in (world.LLAMA, world.VIT) for p in folder.iterdir()]
    assert sum(p.stat().st_size for p in files) < 12e6
    tower = vit.load_vit(world.VIT)
    assert tower.config.num_hidden_layers == 12 and tower.config.image_size == pretrain.VIT.image_size
    pixels = vit.preprocess(world.photo_of("DEMO00001"), tower.config.image_size)[None]
    tokens = tower(pixels, (3, 6, 9, 12))
    assert tokens.shape == (1, 4, tower.config.hidden_size) and np.isfinite(tokens.numpy()).all()


def test_the_llama_knows_its_world():
    """Products described in words, which no training has seen: most of them are answered rightly."""
    model, tokenizer = llama.load_llama(world.LLAMA)
    rng, right = random.Random(7), 0
    for _ in range(30):
        seen, asked, said = pretrain.question(rng)
        answer = tokenizer.encode(said) + [tokenizer.eos_id]
        ids = [tokenizer.bos_id, *tokenizer.encode(seen), *tokenizer.encode(asked)]
        right += llama.greedy_continuation(model, ids, len(answer)) == answer
    assert right >= 24


def test_pretraining_gives_every_weight_a_gradient(tiny_config):
    """LLaMA's own Linear and RMSNorm are for frozen weights: they have no gradient, silently."""
    model = pretrain.trainable(llama.LLaMA(tiny_config))
    pretrain.logits_of(model, torch.arange(12).view(2, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_tables_stand_beside_the_papers(tmp_path):
    as_answered = {"merged": False, "constrained": False, "temperature": 0.1, "top_p": 0.75}
    for seed, f1 in ((0, 80.0), (1, 90.0)):
        for row in ("full", "base"):
            folder = paper_tables.run_folder(tmp_path, "general", row, "50", seed)
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"micro_f1": f1, "n": 550, "sources": "DEMO WORLD", **as_answered}))
    text = paper_tables.markdown(tmp_path, "general", ["50"], [0, 1])
    assert "| EIVEN | 85.0 ± 7.1 (2) | 57.31 / 64.98 |" in text and "n = 550" in text and "DEMO WORLD" in text
    assert "| - MGVF | - | 53.50 / 62.27 |" in text and "paper: General, 50 / 100 labels" in text
    assert "| 50 | - | - | 85.0 ± 7.1 (2) | 57.31 |" in text
    (tmp_path / "general-baselines.json").write_text(json.dumps({"extractive": 0.5, "discriminative": {"50": [60.0, 62.0]}}))
    assert "| 50 | 0.50 | 61.0 ± 1.4 (2) | 85.0 ± 7.1 (2) | 57.31 |" in paper_tables.markdown(tmp_path, "general", ["50"], [0, 1])
    assert paper_tables.papers(paper_tables.PAPER["base"], "footwear") == "64.14 / 73.46"
    assert paper_tables.papers(paper_tables.PAPER["base"], "other") == "not given"
    path = paper_tables.run_folder(tmp_path, "general", "base", "50", 1) / "metrics.json"
    told = json.loads(path.read_text())
    for sources, fine in (("data X; LLaMA Y; ViT Z.", True), ("data X; LLaMA Y; no photos.", True), ("data X; LLaMA 0; ViT Z.", False),
                          ("data X; LLaMA Y; ViT 0.", False), ("data 0; LLaMA Y; no photos.", False)):
        for other in tmp_path.glob("*/metrics.json"):
            other.write_text(json.dumps({**told, "sources": sources if other == path else "data X; LLaMA Y; ViT Z."}))
        if fine:
            paper_tables.markdown(tmp_path, "general", ["50"], [0, 1])
        else:
            with pytest.raises(UserError, match="different data or weights"):
                paper_tables.markdown(tmp_path, "general", ["50"], [0, 1])
    for other_settings in ({"constrained": True}, {"min_confidence": 0.5}):
        path.write_text(json.dumps({**told, "sources": "data X; LLaMA Y; ViT Z.", **other_settings}))
        with pytest.raises(UserError, match="was scored again with other settings"):
            paper_tables.markdown(tmp_path, "general", ["50"], [0, 1])


@pytest.mark.parametrize("flag", ["--seed=5", "--out=x", "--resume", "--lbc", "--epochs=1"])
def test_flags_that_the_tables_set_are_not_taken(flag, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["paper_tables.py", "--runs", str(tmp_path / "runs"), flag])
    with pytest.raises(SystemExit):
        paper_tables.main()
    assert "is set by this command" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_runs_with_other_flags_do_not_enter_the_same_tables(tmp_path):
    paper_tables.same_flags(tmp_path, ["general"])
    paper_tables.same_flags(tmp_path, ["general"])
    with pytest.raises(UserError, match="name another folder with --runs"):
        paper_tables.same_flags(tmp_path, ["general", "--llama", "X"])
