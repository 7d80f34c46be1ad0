"""Products that are nearly the same: found by title and photo, kept in one split, left out of a score."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from base.duplicates import MOST_DIFFERENT, average_hash, groups, not_in, photo_key, similar_pairs, title_key
from base.tsv import write_tsv
from dataset import build, stats

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the authors' data are not here")


def photo(seed, size=(320, 240)):
    """A picture of coarse blocks, another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def a_row(n, title, value="Plaid", image=None):
    return [f"B{n:09}", image or f"B{n:09}.jpg", "Shirts & Tops", f"[Title] {title}", "Pattern", value]


@pytest.mark.parametrize("one, other, same", [
    ("Nike Air Shoe", "shoe, AIR nike!", True), ("Shoe shoe", "shoe", True), ("Ｎｉｋｅ", "nike", True),
    ("Shoe 7", "Shoe 8", False), ("Shoe", "Shoes", False)])
def test_titles_of_the_same_words(one, other, same):
    assert (title_key(one) == title_key(other)) is same


def test_what_has_no_words_or_no_file_has_no_key(tmp_path):
    assert title_key(" - ! ") is None and photo_key(tmp_path / "none") is None and photo_key(tmp_path) is None
    (tmp_path / "x").write_text("<html>")
    Image.new("RGB", (50, 50), "red").save(tmp_path / "red.png")
    assert average_hash(tmp_path / "x") is None and average_hash(tmp_path / "red.png") is None


def test_an_average_hash_by_hand(tmp_path):
    """Left half black, right half white: each of 32 rows is 16 zeros and 16 ones."""
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    assert average_hash(tmp_path / "half.png").tobytes() == bytes([0, 0, 255, 255]) * 32


def test_one_photo_in_other_sizes_looks_the_same_and_other_photos_do_not(tmp_path):
    for seed in range(12):
        photo(seed).save(tmp_path / f"{seed}.jpg", quality=95)
        photo(seed).resize((200, 150), Image.Resampling.BICUBIC).save(tmp_path / f"{seed}-small.jpg", quality=60)
    names = sorted(path.name for path in tmp_path.iterdir())
    pairs = similar_pairs(np.stack([average_hash(tmp_path / name) for name in names]))
    assert {(names[i], names[j]) for i, j in pairs} == {(f"{n}-small.jpg", f"{n}.jpg") for n in range(12)}


def test_every_pair_within_the_threshold_is_found_and_no_other():
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**63, (700, 16)).astype(np.uint64)
    for n in range(0, 600, 2):                          # a neighbour with 0 to 40 other bits
        bits = draw.permutation(1024)[:draw.integers(0, 41)]
        flipped = np.unpackbits(hashes[n].view(np.uint8))
        flipped[bits] ^= 1
        hashes[n + 1] = np.packbits(flipped).view(np.uint64)
    plain = [(i, j) for i in range(700) for j in range(i + 1, 700)
             if np.bitwise_count(hashes[i] ^ hashes[j]).sum() <= MOST_DIFFERENT]
    assert len(plain) > 100 and sorted(similar_pairs(hashes)) == plain


def test_groups_join_in_a_chain(tmp_path):
    """0 and 1 have one title, 1 and 2 the same photo, 2 and 3 photos that look the same; 4 and 5 stand alone."""
    photo(1).save(tmp_path / "a.jpg")
    photo(2).save(tmp_path / "b.jpg")
    photo(2, (640, 480)).save(tmp_path / "c.jpg")
    photo(3).save(tmp_path / "d.jpg")
    files = [tmp_path / f"{name}.jpg" for name in ("a", "b", "b", "c", "d", "missing")]
    titles = ["red shoe", "Shoe, red", "boot", "sandal", "clog", "slipper"]
    assert groups(titles, files) == [0, 0, 0, 0, 1, 2]
    assert groups(titles) == [0, 0, 1, 2, 3, 4]


def test_the_split_keeps_groups_together_and_the_shares():
    draw = random.Random(0)
    rows = [a_row(n, f"title {draw.randrange(400)}", draw.choice(("Plaid", "Stripe", "Floral"))) for n in range(900)]
    parts = build.split(rows, groups([row[3] for row in rows]), 0, "general")
    where = {}
    for part, each in parts.items():
        for row in each:
            assert where.setdefault(row[3], part) == part, row
    total = Counter(row[5] for row in rows)
    for value, n in total.items():
        counts = Counter(row[5] for row in parts["val"])[value], Counter(row[5] for row in parts["test"])[value]
        assert counts == (round(n / 7), round(n / 7))
    assert sum(map(len, parts.values())) == 900
    assert {row[0] for each in parts.values() for row in each} == {row[0] for row in rows}


def test_a_photo_that_says_nothing_groups_nobody():
    """A shop's "photo not available" stands for 60 of 100 products: they are drawn as if each had its own."""
    rows = [a_row(n, f"title {n}") for n in range(100)]
    parts = build.split(rows, build.without_giants([min(n, 40) for n in range(100)]), 0, "general")
    assert [len(parts[part]) for part in ("train", "val", "test")] == [72, 14, 14]


def test_the_built_data_sets_have_no_title_in_two_splits(tmp_path):
    from experiments import make_mave
    labels, metadata = make_mave.make(tmp_path, 6000, 6000)
    text = metadata.read_text(errors="surrogateescape")
    lines = text.splitlines()
    for n in range(0, len(lines) - 10, 2):              # every second product gets the words of another one in reverse
        try:
            one, two = json.loads(lines[n]), json.loads(lines[n + 10])
            two["title"] = " ".join(reversed(one["title"].split()))
            lines[n + 10] = json.dumps(two)
        except (ValueError, KeyError, AttributeError, TypeError):
            pass
    metadata.write_text("\n".join(lines), errors="surrogateescape")
    build.build(labels, metadata, tmp_path / "root", photos=False, more_than=5, at_most=30)
    twice = 0
    for name in ("clothing", "footwear", "general"):
        where = {}
        for part in stats.SPLITS:
            for row in stats.read_tsv(tmp_path / "root" / name / f"{part}.tsv")[0]:
                key = frozenset(row["texts"].removeprefix("[Title]").lower().split())
                twice += key in where
                assert where.setdefault(key, part) == part
    assert twice > 20


def test_stats_count_duplicates_of_train(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(1, 8):
        photo(n).save(images / f"B{n:09}.jpg")
    (images / "B000000004.jpg").write_bytes((images / "B000000001.jpg").read_bytes())
    photo(2, (640, 480)).save(images / "B000000005.jpg")
    write_tsv(tmp_path / "general/train.tsv", [a_row(1, "Red shirt"), a_row(2, "Blue shirt"), a_row(3, "Green shirt", "Stripe")])
    write_tsv(tmp_path / "general/val.tsv", [a_row(4, "A new one"), a_row(5, "Another")])
    write_tsv(tmp_path / "general/test.tsv", [a_row(6, "SHIRT, red"), a_row(7, "shirt green")])
    with open(tmp_path / "general/train.tsv", "a") as file:
        file.write("B000000009\t9.jpg\tShirts & Tops\t[Title] red shirt\tPattern\tStripe\n")     # another label, after the same
    stats.stats(tmp_path, ["general"], {})
    out = capsys.readouterr().out
    val = "val: 1 of 2 (50.0 %) are in train with"
    assert f"{val} the same photo bytes, 1 of them with the same label; e.g. B000000004 and B000000001" in out
    assert f"{val} a photo that looks the same, 1 of them with the same label; e.g. B000000005" in out
    assert "test: 2 of 2 (100.0 %) are in train with the same title words, 1 of them with the same label" in out


@real
def test_duplicates_of_the_real_release(capsys):
    """Counted otherwise: sets of lower-cased words, by a comparison of every title with every other."""
    from base.duplicates import across
    for name, split, n in (("footwear", "val", 513), ("footwear", "test", 25), ("general", "test", 8)):
        parts = {part: stats.read_tsv(REAL / "implicitave" / name / f"{part}.tsv")[0] for part in ("train", split)}
        assert len(across(parts)[split]["the same title words"]) == n


def test_what_is_not_in_train(tmp_path):
    photo(1).save(tmp_path / "a.jpg")
    photo(2).save(tmp_path / "b.jpg")
    product = lambda title, image: SimpleNamespace(title=title, image=image)                    # noqa: E731
    known = [product("Red boot", "a.jpg"), product("", "missing.jpg")]
    asked = [product("boot RED", "b.jpg"), product("Blue boot", "a.jpg"), product("Blue boot", "b.jpg"),
             product("", "missing.jpg")]
    assert not_in(known, asked, tmp_path) == asked[2:] and not_in(known, asked) == asked[1:]


def test_a_score_without_duplicates(data_root, llama_dir, vit_dir, tmp_path, capsys, monkeypatch):
    """Three products of the test split stand in train: two by their title, one by its photo."""
    monkeypatch.setattr("support.config.FEATURE_CACHE", tmp_path / "features.sqlite")
    root = tmp_path / "data"
    rows = {part: stats.read_tsv(data_root / "shoes" / f"{part}.tsv")[0] for part in stats.SPLITS}
    for n, row in enumerate(row for each in rows.values() for row in each):
        row["texts"] = f"[Title] shoe number {n}"
        (root / "images").mkdir(parents=True, exist_ok=True)
        photo(n).save(root / "images" / row["images"])
    for n, (test, known) in enumerate(zip(rows["test"][4:7], rows["train"])):
        if n < 2:
            test["texts"] = " ".join(reversed(known["texts"].removeprefix("[Title] ").split()))
        else:
            (root / "images" / test["images"]).write_bytes((root / "images" / known["images"]).read_bytes())
    for part, each in rows.items():
        write_tsv(root / "shoes" / f"{part}.tsv", [list(row.values()) for row in each])
    train.main(["--data", str(root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir), "--labels", "1",
                "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    before = (tmp_path / "run/metrics.json").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path / "run"), "--without-duplicates"])
    evaluate.main()
    assert "3 of 15 products left out: their title words or photo bytes are in train" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run/without-duplicates/metrics.json").read_text())
    assert metrics["n"] == 12 and metrics["split"] == "test (without duplicates of train)"
    left = (tmp_path / "run/without-duplicates/predictions.tsv").read_text()
    assert all((row["id"] in left) == (n not in (4, 5, 6)) for n, row in enumerate(rows["test"]))
    assert (tmp_path / "run/metrics.json").read_bytes() == before
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path / "run"), "--without-duplicates", "--split", "train"])
    with pytest.raises(SystemExit):
        evaluate.main()
