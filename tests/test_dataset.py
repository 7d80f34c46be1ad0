"""The data sets: what counts as a mention, the build against the naive one, kills, bad servers, import, stats, errors."""

import contextlib
import csv
import email.utils
import gzip
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import conftest
import numpy as np
import pytest
from PIL import Image

from base.console import UserError
from base.tsv import write_tsv
from dataset import build, photos, release, sources, stats
from dataset.mentions import clean, folded, mentions, without
from dataset.values import ATTRIBUTES, VALUES, read_values
from experiments import make_mave, naive_build

HERE = Path(__file__).resolve().parent
REAL = HERE.parents[1] / "shared" / "data" / "implicitave"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the authors' data are not here")
ROUGH = dict(timeout=0.4, deadline=1.2, tries=2, pause=0.01)        # seconds: impatient, for tests


# ---- words

@pytest.mark.parametrize("raws", [
    ("Short Sleeve", "short sleeves", "Short-Sleeve", "SHORT SLEEVED", "shortsleeve", "short_sleeved", "Short  Sleeves"),
    ("Polka Dot", "polka dots", "Polka-Dotted", "polkadot"), ("Stripe", "striped", "STRIPES"), ("V-Neck", "v neck", "Vneck"), ("deep v", "Deep-Vs"),
    ("Crew Neck", "crew necks", "crew-necked"), ("Rain Boots", "rain boot", "rainboots"), ("Cross", "crosses", "crossed"),
    ("3/4 Sleeve", "3/4 Sleeves", "¾ sleeve"), ("Pointed Toe", "point toe"), ("Capri", "capris"), ("Tennis", "tennis")])
def test_spellings_of_one_value_fold_to_one(raws):
    assert len({folded(raw) for raw in raws}) == 1, [folded(raw) for raw in raws]


@pytest.mark.parametrize("names, title, left", [
    (["Round"], "Surround Sound Round Pendant", "Surround Sound Pendant"),
    (["Round"], "ROUND-cut, rounded (round) Disc's", "cut, Disc's"),
    (["Short Sleeve"], "Men's Short-Sleeved Tee, short sleeves", "Men's Tee"),
    (["Short Sleeve"], "Short Short Sleeve Sleeve Tee", "Tee"),
    (["V-Neck"], "Deep V Neck VNeck v—neck Top (V-NECK)", "Deep Top"),
    (["Polka Dot"], "Polkadot & polka-dotted Dress", "Dress"),
    (["Stripe", "striped"], "Striped/Plaid Scarf - Stripes", "Plaid Scarf"),
    (["Golf"], "Nike Golf's Best Goldfish golfer", "Nike Best Goldfish golfer"),
    (["Camo & More"], "A camo & More hat", "A hat"),
    (["Canvas"], "Two Canvases bag", "Two bag"),
    (["Galaxy"], "Galaxies & galaxy dress", "dress"),
    (["Leather"], "Leatherette Amerileather Bag", "Leatherette Amerileather Bag"),
    (["Floral"], "Été FLORAL naïve ® 夏", "Été naïve ® 夏"),
    (["Heart"], "Heart", ""),
    (["???"], "Nothing ??? to find", "Nothing ??? to find")])
def test_every_mention_goes_and_nothing_else(names, title, left):
    assert without(title, mentions(tuple(names))) == left


@pytest.mark.parametrize("names, title, left", [
    (["Flat"], "ﬂat shoe, Ｆｌａｔ, ﬂat’s", "shoe"),                                         # a ligature, full width
    (["V-Neck"], "Ｖ－Ｎｅｃｋ Top", "Top"),
    (["3/4 Sleeve"], "Top ¾ Sleeve 3⁄4 sleeves ３／４ Sleeve", "Top"),
    (["Polka Dot"], "Pol\u00adka\u200b Dot, Polka\u00a0Dots, Polka&nbsp;Dot & P\ufe0folka-D\u034fotted Dress", "Dress"),
    (["Stripe"], "&amp;lt;b&amp;gt;Striped&amp;lt;/b&amp;gt; Tee", "Tee"),                       # escaped twice
    (["A & B"], "A&amp;amp;amp;B Shirt", "Shirt"),
    (["Stiletto"], "Stiletto's, STILETTO’S, Stilettoʼs heel", "heel"),
    (["Galaxy"], "Galaxies Galaxy's galaxy-printed", "printed"),
    (["Bootie"], "Booties, Booty & bootie's", ""),
    (["Camouflage"], "Camouflaged camouflages hat", "hat"),
    (["Square Neck"], "Squared-Neck, squarenecked, Squarely", "Squarely"),
    (["Round Toe"], "Round-Toed Toe", "Toe"),
    (["Cap"], "Cape Caps capped escape", "Cape escape"),                                    # a cape is no cap
    (["Naïve"], "nai\u0308ve NAÏVE naive", "naive"),
    (["Heart"], "Nike™ heart℠ Ⓗeart", "Nike"),
    (["Leopard"], "<b title='leopard'>Cat</b> &lt;i&gt;Leopard&lt;/i&gt;", "Cat"),
    (["Short Sleeve"], "short_sleeve short – sleeve short. sleeved short....sleeve", "short....sleeve")])
def test_nasty_titles(names, title, left):
    assert without(clean(title), mentions(tuple(names))) == left


def test_a_raw_value_means_what_its_mention_means():
    """Whatever goes from a title as a mention of a value is mapped to it when it stands alone, and the other way round."""
    for (name, attribute, value), raws in read_values(VALUES)[1].items():
        for raw in (value, *raws):
            for form in (raw, raw.upper(), raw + "s", raw + "'s", raw.replace(" ", "-"), raw.replace(" ", "")):
                left = without(clean(form), mentions((value, *raws)))
                assert (folded(clean(form)) in {folded(each) for each in (value, *raws)}) == (left == ""), (form, value)


def test_titles_are_cleaned():
    assert clean("<span class='a'>A &amp; B</span><style>.x{}</style>") == "A & B"
    assert clean("I <3 you, 5 < 6 &lt;b&gt;x&lt;/b&gt;") == "I <3 you, 5 < 6 x"
    assert clean("a\u00a0b\u200bc\u00add\ud83d\te\n") == "a bcd e"
    clean("x" * 10 + "<" * 20_000)              # no pattern that takes for ever


def test_the_table_reads_and_holds_only_values_of_the_paper_s_attributes():
    table, _ = read_values(VALUES)
    assert {dataset_: {a for d, a, _ in table if d == dataset_} for dataset_, *_ in table} == {
        name: set(attributes) for name, attributes in ATTRIBUTES.items()}
    assert table["clothing", "Sleeve Style", "Dresses"][folded("short sleeved")] == "Short Sleeve"
    assert table["clothing", "Sleeve Style", "Dresses"][folded("Short-Sleeves")] == "Short Sleeve"


@real
def test_the_table_s_values_are_the_authors():
    for name in ATTRIBUTES:
        rows = [row for part in stats.SPLITS for row in stats.read_tsv(REAL / name / f"{part}.tsv")[0]]
        theirs = {(name, row["attribute_names"], row["attribute_values"]) for row in rows}
        assert theirs == {key for key in read_values(VALUES)[1] if key[0] == name}
        assert {row["category"] for row in rows} <= {c for each in ATTRIBUTES[name].values() for c in each}


# Which values the authors' release shows in which categories, written down from its files.
RELEASE = """
Length | Dresses | Long Dress/Gown, Midi, Mini/Short
Length | Skirts | Midi, Mini/Short
Length | Pants | Capri
Neckline | Dresses | Cowl Neck, Crew Neck, Halter, Scoop Neck, Square Neck, Strapless, Turtleneck, V-Neck
Sleeve Style | Shirts & Tops | 3/4 Sleeve, Long Sleeve, Short Sleeve, Sleeveless
Sleeve Style | Wedding & Bridal Party Dresses | 3/4 Sleeve, Long Sleeve, Short Sleeve, Sleeveless
Shoulder Style | Wedding & Bridal Party Dresses | Off Shoulder, One Shoulder
Material | Wigs | Synthetic
Material | Jewelry Holders | Leather, Metal, Wooden
Material | Backpacks | Canvas, Leather, Synthetic
Pattern | Socks | Argyle, Camouflage, Emoji, Floral, Galaxy, Paisley, Plaid, Polka Dot, Stripe
Pattern | Hats | Argyle, Camouflage, Emoji, Floral, Galaxy, Leopard, Paisley, Plaid, Polka Dot
"""
RELEASE = {(attribute, category): set(values.split(", "))
           for attribute, category, values in (line.split(" | ") for line in RELEASE.strip().splitlines())}


def values_by_category(root):
    """{(attribute, category): values} of the data sets in a folder."""
    found = {}
    for name in ATTRIBUTES:
        for part in stats.SPLITS:
            for row in stats.read_tsv(root / name / f"{part}.tsv")[0]:
                found.setdefault((row["attribute_names"], row["category"]), set()).add(row["attribute_values"])
    return found


def test_a_category_gets_no_value_that_the_release_does_not_show_there(made):
    """The sources give every value in every category: long pants, argyle handbags."""
    built = values_by_category(made[2])
    expected = values_by_category(REAL) if REAL.is_dir() else RELEASE
    for where, values in built.items():
        assert values <= expected.get(where, values), (where, values - expected[where])
    assert len(built) > 15 and built["Length", "Pants"] == {"Capri"}


@real
def test_the_copy_of_the_release_s_categories_is_right():
    theirs = values_by_category(REAL)
    assert {where: theirs[where] for where in RELEASE} == RELEASE


@pytest.mark.parametrize("category, raw, value", [
    ("Pants", "long", None), ("Dresses", "Long", "Long Dress/Gown"), ("Skirts", "long", None), ("Pants", "Short", None),
    ("Skirts", "short", "Mini/Short"), ("Dresses", "capris", None), ("Pants", "Capris", "Capri"), ("Pants", "3/4", "Capri"),
    ("Pants", "mid-calf", "Capri"), ("Skirts", "mid-calf", "Midi")])
def test_a_spelling_means_a_value_in_its_categories(category, raw, value):
    assert read_values(VALUES)[0]["clothing", "Length", category].get(folded(raw)) == value


@pytest.mark.parametrize("dataset_, attribute, category, raw, value", [
    ("general", "Pattern", "Shirts & Tops", "check", "Plaid"), ("general", "Pattern", "Shoes", "Checkered", "Plaid"),
    ("clothing", "Sleeve Style", "Dresses", "3/4", "3/4 Sleeve"), ("clothing", "Sleeve Style", "Dresses", "¾", "3/4 Sleeve"),
    ("footwear", "Heel Height", "Shoes", "high heels", "High Heel"), ("footwear", "Heel Height", "Shoes", "High", "High Heel"),
    ("footwear", "Heel Height", "Shoes", "stiletto's", "High Heel"), ("footwear", "Heel Height", "Shoes", "low", "Low Heel"),
    ("general", "Pattern", "Dresses", "Galaxies", "Galaxy"), ("general", "Pattern", "Dresses", "ﬂoral", "Floral"),
    ("footwear", "Toe Style", "Shoes", "round-toed", "Round Toe"), ("footwear", "Shaft Height", "Shoes", "Bootie's", "Bootie")])
def test_spellings_of_the_trade(dataset_, attribute, category, raw, value):
    assert read_values(VALUES)[0][dataset_, attribute, category][folded(clean(raw))] == value


TABLE = "dataset\tattribute\traw\tvalue\tcategory\n"


@pytest.mark.parametrize("text, says", [
    ("clothing\tLength\tCapri\tCapri\tTrousers\n",
     "v.tsv, line 2: no category 'Trousers' in clothing, Length. Allowed: Dresses;"),
    ("clothing\tLength\tCapri\tCapri\tPants\n\nclothing\tLength\tcropped\tCapri\tDresses\n",
     "v.tsv, line 4: 'Capri' does not exist in 'Dresses'"),
    ("clothing\tLength\tlong\tMaxi\tDresses\nclothing\tLength\tLong\tMidi\tnot Pants\n",
     "v.tsv, line 3: 'Long' means 'Midi' here, and 'Maxi' on an earlier line of clothing, Length, Dresses"),
    ("clothing\tLength\tCapri\tCapri\tPants\nclothing\tLength\tCapri\tCapri\tSkirts\n",
     "v.tsv, line 3: 'Capri' has other categories on an earlier line"),
    ("clothing\tLength\tlong\tMaxi\tDresses\tSkirts\n", "v.tsv, line 2: 6 fields")])
def test_a_bad_category_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "v.tsv").write_text(TABLE + text)
    with pytest.raises(UserError, match=re.escape(says)):
        read_values(tmp_path / "v.tsv")


def test_one_spelling_may_mean_different_values_in_different_categories(tmp_path):
    (tmp_path / "v.tsv").write_text(TABLE + "clothing\tLength\tlong\tMaxi\tDresses; Skirts\n"
                                            "clothing\tLength\tlong\tFull\tnot Dresses; Skirts\n")
    table, names = read_values(tmp_path / "v.tsv")
    assert {category: table["clothing", "Length", category]["long"] for category in ("Dresses", "Skirts", "Pants")} == {
        "Dresses": "Maxi", "Skirts": "Maxi", "Pants": "Full"}
    assert names == {("clothing", "Length", "Maxi"): ["long"], ("clothing", "Length", "Full"): ["long"]}


@pytest.mark.parametrize("text, says", [
    ("dataset\tattribute\traw\n", "line 1: the header"),
    ("", "header is missing"),
    ("dataset\tattribute\traw\tvalue\nclothing\tNeckline\tcrew\n", "line 2: 3 fields"),
    ("dataset\tattribute\traw\tvalue\nclothing\tNeckline\t\tCrew Neck\n", "or an empty one"),
    ("dataset\tattribute\traw\tvalue\nclothing\tColor\tred\tRed\n", "line 2: no attribute 'Color'"),
    ("dataset\tattribute\traw\tvalue\nclothing\tNeckline\t--\tCrew Neck\n", "neither letters nor digits"),
    ("dataset\tattribute\traw\tvalue\nclothing\tNeckline\tcrew\tCrew Neck\n\nclothing\tNeckline\tCREWS\tHenley\n",
     "line 4: 'CREWS' means 'Henley' here, and 'Crew Neck'")])
def test_a_bad_table_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "v.tsv").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)):
        read_values(tmp_path / "v.tsv")


# ---- build

FEW = dict(more_than=5, at_most=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two small sources, and what an uninterrupted build makes of them."""
    folder = tmp_path_factory.mktemp("sources")
    labels, metadata = make_mave.make(folder, 6000, 6000)
    build.build(labels, metadata, folder / "root", photos=False, **FEW)
    return labels, metadata, folder / "root"


def contents(root):
    """{path: bytes} of all that a build leaves for people: not its working folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


def test_the_build_is_the_naive_build(made):
    labels, metadata, root = made
    assert naive_build.differences(labels, metadata, root, **FEW) == []


def test_what_the_paper_says_of_the_data_sets(made):
    for name in ATTRIBUTES:
        parts = {part: stats.read_tsv(made[2] / name / f"{part}.tsv")[0] for part in stats.SPLITS}
        ids = [row["id"] for rows in parts.values() for row in rows]
        assert len(ids) == len(set(ids)) > 30                              # no product twice, none in two splits
        n = {part: Counter((row["attribute_names"], row["attribute_values"]) for row in rows)
             for part, rows in parts.items()}
        for value in n["train"]:
            total = sum(n[part][value] for part in parts)
            assert 5 < total <= 30
            assert n["val"][value] == n["test"][value] == round(total * 0.15 / 1.05)
        assert stats.find_problems(name, {}, made[2] / "images", {}) == []
        names = read_values(VALUES)[1]
        problems = [what for what, *_ in stats.find_problems(name, parts, made[2] / "images", names)]
        assert [what for what in problems if "titles" in what or "ids" in what] == []
        assert all(row["texts"].startswith("[Title] ") and row["images"] == row["id"] + ".jpg"
                   for rows in parts.values() for row in rows)


def test_no_raw_evidence_is_left_in_a_text(made):
    evidence = {}
    for line in made[0].read_bytes().split(b"\n"):
        try:
            item = json.loads(line.decode())
            evidence.setdefault(item["id"], [(each["key"], [e["value"] for e in each["evidences"]])
                                             for each in item["attributes"]])
        except (ValueError, KeyError, TypeError):
            pass
    for name in ATTRIBUTES:
        for part in stats.SPLITS:
            for row in stats.read_tsv(made[2] / name / f"{part}.tsv")[0]:
                for key, raws in evidence[row["id"]]:
                    for raw in raws * (key == row["attribute_names"]):
                        assert not re.search(rf"\b{re.escape(raw)}\b", row["texts"], re.IGNORECASE), (raw, row)


def test_another_seed_another_draw_and_the_sources_are_not_read_again(made, capsys):
    labels, metadata, root = made
    before = contents(root)
    build.build(labels, metadata, root, photos=False, seed=1, **FEW)
    assert capsys.readouterr().out.count("read before") == 2
    assert contents(root) != before
    build.build(labels, metadata, root, photos=False, **FEW)
    assert contents(root) == before


def test_editing_the_table_does_not_read_the_sources_again(made, tmp_path, capsys):
    labels, metadata, root = made
    (tmp_path / "v.tsv").write_text("dataset\tattribute\traw\tvalue\ngeneral\tPattern\tzigzag & more\tFloral\n")
    build.build(labels, metadata, root, values=tmp_path / "v.tsv", datasets=["general"], photos=False, **FEW)
    rows = stats.read_tsv(root / "general" / "train.tsv")[0]
    assert capsys.readouterr().out.count("read before") == 2 and {row["attribute_values"] for row in rows} == {"Floral"}
    assert "clothing\tNeckline" in (root / "unmapped.tsv").read_text()
    build.build(labels, metadata, root, photos=False, **FEW)              # as the other tests expect it


@pytest.mark.parametrize("times", [1, 2])
def test_gzip_and_gzip_in_gzip_give_the_same_bytes(made, tmp_path, times):
    paths = []
    for source in made[:2]:
        content = source.read_bytes()
        for _ in range(times):
            content = gzip.compress(content, 1)
        paths.append(tmp_path / (source.name + ".gz"))
        paths[-1].write_bytes(content)
    build.build(*paths, tmp_path / "root", photos=False, **FEW)
    assert contents(tmp_path / "root") == contents(made[2])


def test_two_processes_give_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(sources, "CHUNK", 300_000)
    build.build(*made[:2], tmp_path, photos=False, jobs=2, **FEW)
    assert contents(tmp_path) == contents(made[2])


@pytest.mark.parametrize("compress", [False, True])
def test_interrupted_after_any_chunk_it_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, compress):
    paths = made[:2]
    if compress:
        paths = [tmp_path / "l.gz", tmp_path / "m.gz"]
        for source, path in zip(made[:2], paths):
            path.write_bytes(gzip.compress(source.read_bytes(), 1))
    monkeypatch.setattr(sources, "CHUNK", 200_000)
    left = [0]

    def interrupted(store):
        def once(db, result):
            counts = store(db, result)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt                 # after the rows, before the commit
            return counts
        return once

    with monkeypatch.context() as patch:
        for name in ("store_labels", "store_metadata"):
            patch.setattr(build, name, interrupted(getattr(build, name)))
        starts = 0
        while True:
            left[0] = random.Random(starts).randrange(1, 8)
            starts += 1
            try:
                build.build(*paths, tmp_path / "root", photos=False, **FEW)
                break
            except KeyboardInterrupt:
                pass
    assert starts > 5 and contents(tmp_path / "root") == contents(made[2])


def test_a_changed_source_is_read_again(made, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    labels.write_bytes(made[0].read_bytes()[:200_000])
    build.build(labels, made[1], tmp_path / "root", photos=False, **FEW)
    labels.write_bytes(made[0].read_bytes())
    build.build(labels, made[1], tmp_path / "root", photos=False, **FEW)
    assert capsys.readouterr().out.count("has changed since the last start") == 2
    assert contents(tmp_path / "root") == contents(made[2])


def test_a_line_that_never_ends_is_one_broken_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CHUNK", 10_000)
    monkeypatch.setattr(sources, "LONGEST_LINE", 20_000)
    metadata = tmp_path / "m.json"
    metadata.write_bytes(b'{"asin": "B000000000", "title": "' + b"x" * 500_000 + b'"}\n' + made[1].read_bytes())
    build.build(made[0], metadata, tmp_path / "root", photos=False, **FEW)
    n = [int(each.replace(",", "")) for each in re.findall(r"metadata: ([\d,]+) broken", capsys.readouterr().out)]
    assert contents(tmp_path / "root") == contents(made[2])
    build.build(*made[:2], made[2], photos=False, **FEW)
    assert n[0] == 1 + int(re.search(r"metadata: ([\d,]+) broken", capsys.readouterr().out).group(1).replace(",", ""))


def test_wrong_sources_are_refused_by_name(made, tmp_path):
    labels, metadata, _ = made

    def refused(says, *paths):
        with pytest.raises(UserError, match=says):
            build.build(*paths, tmp_path / "root", photos=False)

    refused("cannot be opened", tmp_path / "none", metadata)
    refused("the right way round", metadata, labels)
    (bad := tmp_path / "bad").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:23\nsize 744855753\n")
    refused("git-LFS pointer", bad, metadata)
    bad.write_text("<!DOCTYPE html><html>")
    refused("web page", labels, bad)
    bad.write_bytes(b"PK\3\4")
    refused("zip archive", labels, bad)
    bad.write_text("")
    refused("none of its 0 lines", bad, metadata)
    bad.write_bytes(b"\x1f\x8bnot gzip at all")
    refused("damaged gzip", bad, metadata)
    bad.write_bytes(gzip.compress(metadata.read_bytes())[:-100_000])
    refused("breaks off", labels, bad)
    refused("cannot be opened", labels, tmp_path)


def test_what_was_not_built_here_is_not_written_over(made, tmp_path):
    write_tsv(tmp_path / "clothing/train.tsv", [a_row(1)])
    (tmp_path / ".build").mkdir()                       # of a build that came to nothing
    with pytest.raises(UserError, match="clothing: there already, and not built here"):
        build.build(*made[:2], tmp_path, photos=False)
    write_release(tmp_path / "theirs", {"Clothing": {part: [a_row(2)] for part in stats.SPLITS}})
    with pytest.raises(UserError, match="holds another data set"):
        release.import_release(tmp_path / "theirs", tmp_path)
    assert stats.read_tsv(tmp_path / "clothing/train.tsv")[0][0]["id"] == a_row(1)[0]


def test_two_builds_at_once_are_refused(made, tmp_path):
    with build.only_one(tmp_path / ".build"), pytest.raises(UserError, match="Another build is at work"):
        build.build(*made[:2], tmp_path, photos=False)


def test_an_id_that_is_no_asin_goes_nowhere(tmp_path, capsys):
    with open(tmp_path / "l", "w") as labels, open(tmp_path / "m", "w") as metadata:
        for asin in ("../../evil", "B0/../../X", "B00000000\n", "b000000001", "B000000002", "Ｂ000000003"):
            labels.write(json.dumps({"id": asin, "category": "Shoes", "attributes": [
                {"key": "Toe Style", "evidences": [{"value": "round toe", "pid": 0, "begin": 0, "end": 9}]}]}) + "\n")
            metadata.write(json.dumps({"asin": asin, "title": "A shoe, round toe", "imageURL": []}) + "\n")
    build.build(tmp_path / "l", tmp_path / "m", tmp_path / "root", photos=False, more_than=0)
    assert "5 whose id is no ASIN" in capsys.readouterr().out
    rows = [row for part in stats.SPLITS for row in stats.read_tsv(tmp_path / "root" / "footwear" / f"{part}.tsv")[0]]
    assert [(row["id"], row["texts"]) for row in rows] == [("B000000002", "[Title] A shoe")]


def test_several_files_of_metadata_are_one(made, tmp_path, capsys):
    """Cut in two, killed after the first, one of them changed: the same bytes."""
    labels, metadata, root = made
    lines = metadata.read_bytes().splitlines(keepends=True)
    parts = [tmp_path / "a.json", tmp_path / "b.json.gz"]
    parts[0].write_bytes(b"".join(lines[:1000]))
    parts[1].write_bytes(gzip.compress(b"".join(lines[1000:2000])))
    build.build(labels, parts, tmp_path / "root", photos=False, **FEW)
    assert contents(tmp_path / "root") != contents(root)
    parts[1].write_bytes(gzip.compress(b"".join(lines[1000:])))
    build.build(labels, parts, tmp_path / "root", photos=False, **FEW)
    assert contents(tmp_path / "root") == contents(root)
    build.build(labels, parts[:1], tmp_path / "root", photos=False, **FEW)
    capsys.readouterr()
    build.build(labels, parts, tmp_path / "root", photos=False, **FEW)
    assert capsys.readouterr().out.count("read before") == 1               # the labels; all metadata are read again
    assert contents(tmp_path / "root") == contents(root)


def test_metadata_as_python_dicts(made, tmp_path):
    """Amazon's files of 2014 hold repr() of dicts.  Nothing in them is executed, and none of them takes long."""
    labels, metadata, root = made
    lines = []
    for line in metadata.read_bytes().splitlines():
        try:
            lines.append(repr(json.loads(line)).encode())
        except ValueError:
            lines.append(line)
    lines[1:1] = [b"{'asin': __import__('os').mkdir('" + str(tmp_path / "evil").encode() + b"')}", b"{'asin': " + b"[" * 90_000,
                  b"{'asin': " + b"-" * 150_000 + b"1}", b"{'a': " * 30_000,
                  b"{'asin': 'B000000000', 'title': '" + b"x" * 10**6 + b"'}",
                  b"{'asin': {}, 'title': {1: b'x'}}", b"{'asin': 'B000000000', 'title': '\\d\\ud800'}"]
    (tmp_path / "m").write_bytes(b"\n".join(lines))
    start = time.monotonic()
    build.build(labels, tmp_path / "m", tmp_path / "root", photos=False, **FEW)
    assert time.monotonic() - start < 30 and not (tmp_path / "evil").exists()
    assert contents(tmp_path / "root") == contents(root)


def test_which_line_counts_of_a_product_given_twice(tmp_path):
    """Of each attribute the first label; of titles the first that can be used."""
    def label_of(key, value):
        return {"id": "B000000001", "category": "Shoes", "attributes": [
            {"key": key, "evidences": [{"value": value, "pid": 0, "begin": 0, "end": 9}]}]}

    (tmp_path / "l").write_text("\n".join(json.dumps(each) for each in (
        label_of("Toe Style", "round toe"), label_of("Toe Style", "pointed toe"), label_of("Heel Height", "flat"))))
    (tmp_path / "m").write_text("\n".join(json.dumps({"asin": "B000000001", "title": title}) for title in (
        "", "var x = getTime()", "First round shoe", "Second shoe")))
    build.build(tmp_path / "l", tmp_path / "m", tmp_path / "root", photos=False, more_than=0)
    with contextlib.closing(sqlite3.connect(tmp_path / "root/.build/sources.sqlite")) as db:
        assert db.execute("SELECT attribute, value FROM valued ORDER BY attribute").fetchall() == [
            ("Heel Height", "Flat"), ("Toe Style", "Round Toe")]
        assert db.execute("SELECT title FROM product").fetchall() == [("First round shoe",)]


def test_two_names_of_one_attribute_are_one_label(tmp_path, capsys):
    """Heel and Heel Height contradict each other in the first product, and agree in the second."""
    with open(tmp_path / "l", "w") as labels, open(tmp_path / "m", "w") as metadata:
        for asin, values in (("B000000001", ("flat", "high heel")), ("B000000002", ("flat", "flat"))):
            labels.write(json.dumps({"id": asin, "category": "Shoes", "attributes": [
                {"key": key, "evidences": [{"value": value, "pid": 0, "begin": 0, "end": 9}]}
                for key, value in zip(("Heel Height", "Heel"), values)]}) + "\n")
            metadata.write(json.dumps({"asin": asin, "title": "A shoe", "imageURL": []}) + "\n")
    build.build(tmp_path / "l", tmp_path / "m", tmp_path / "root", photos=False, more_than=0)
    rows = [row for part in stats.SPLITS for row in stats.read_tsv(tmp_path / "root" / "footwear" / f"{part}.tsv")[0]]
    assert [(row["id"], row["attribute_names"], row["attribute_values"]) for row in rows] == [("B000000002", "Heel Height", "Flat")]


def test_the_larger_photo_comes_first(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db, db:
        db.execute("CREATE TABLE label (id)")
        db.execute("INSERT INTO label VALUES ('B000000001')")
    item = {"asin": "B000000001", "title": "A shoe", "imageURL": ["http://x/small.jpg"], "imageURLHighRes": ["http://x/large.jpg"]}
    [(_, _, urls)], _ = sources.parse_metadata(str(tmp_path / "db"), json.dumps(item).encode())
    assert json.loads(urls) == ["http://x/large.jpg", "http://x/small.jpg"]


def test_stats_refuse_what_training_refuses(tmp_path):
    write_tsv(tmp_path / "train.tsv", [a_row(1)])
    text = (tmp_path / "train.tsv").read_bytes()
    (tmp_path / "train.tsv").write_bytes(text.replace(b"[Title] ", b"[Title] \xe9 "))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        stats.read_tsv(tmp_path / "train.tsv")
    (tmp_path / "train.tsv").write_bytes(text.replace(b"[Title] ", b'"[Title] "a" b'))
    assert stats.read_tsv(tmp_path / "train.tsv")[1]


# ---- photos

def jpeg(size=(60, 40), kind="JPEG", mode="RGB"):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind)
    return file.getvalue()


GOOD, PNG = jpeg(), jpeg(kind="PNG", mode="LA")
BOMB = b"IHDR" + struct.pack(">IIBBBBB", 65536, 65536, 8, 2, 0, 0, 0)      # a PNG of 4 gigapixels, in 45 bytes
BOMB = (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + BOMB + struct.pack(">I", zlib.crc32(BOMB))
        + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
asked = Counter()


class BadServer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *what):
        pass

    def do_GET(self):
        asked[self.path] += 1
        try:
            self.answer(self.path.strip("/").split("/")[0])
        except OSError:
            pass                                        # the other side has had enough

    def send(self, code, body=b"", kind="image/jpeg", length=None, **headers):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body) if length is None else length),
                            **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self, what):
        first = asked[self.path] == 1
        if what == "good":
            self.send(200, GOOD)
        elif what == "png":
            self.send(200, PNG)
        elif what == "busy-once":
            self.send(*((503,) if first else (200, GOOD)))
        elif what == "cut-once":
            self.send(200, GOOD[:500] if first else GOOD, length=len(GOOD))
        elif what.isdigit():
            self.send(int(what))
        elif what == "to":
            self.send(302, Location={"file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x.jpg", "data": "data:,x",
                                     "good": "/good/redirected", "loop": self.path}[self.path.split("/")[2]])
        elif what == "cut":
            self.send(200, GOOD[:500], length=len(GOOD))
        elif what == "half":
            self.send(200, GOOD[:len(GOOD) // 2])
        elif what == "html":
            self.send(200, b"<html>Robot check</html>")
        elif what == "empty":
            self.send(200)
        elif what == "pixel":
            self.send(200, jpeg((1, 1), "GIF", "P"))
        elif what == "bomb":
            self.send(200, BOMB)
        elif what == "big":
            self.send(200, b"x", length=200_000_000)
        elif what == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(2000):
                self.wfile.write(bytes(100_000))        # 200 MB, unannounced
        elif what == "slow":
            time.sleep(1)
            self.send(200, GOOD)
        elif what == "trickle":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.2)
        elif what == "headers":
            for _ in range(30):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                time.sleep(0.2)
        elif what == "nonsense":
            self.wfile.write(b"\0\1\2 not http\r\n\r\n")


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


BAD = {"404": "HTTP 404", "500": "HTTP 500 (2 times)", "to/file": "redirected from http to file",
       "to/ftp": "redirected from http to ftp", "to/data": "redirected from http to data", "to/loop": "HTTP 302",
       "cut": "ended after 500 of", "half": "a broken picture", "html": "a web page, not a photo",
       "empty": "an empty file", "pixel": "a picture of 1 x 1 pixels", "bomb": "pixels", "big": "200,000,000 bytes",
       "endless": "more than 10,000,000 bytes", "slow": "no answer for 0.4 s (2 times)", "trickle": "not done in 1.2 s",
       "headers": "not done in 1.2 s", "nonsense": ""}


def test_a_server_that_misbehaves(server, tmp_path):
    wanted = {"GOOD000000": [f"{server}/good/0"]}               # there from an earlier start: this server is known to work
    assert photos.download(wanted, tmp_path / "images", **ROUGH) == {}
    asked.clear()
    wanted |= {f"BAD{n:07}": [f"{server}/{path}"] for n, path in enumerate(BAD)}
    wanted |= {"GOOD000001": [f"{server}/good/1"], "GOOD000002": [f"{server}/busy-once"], "GOOD000003": [f"{server}/cut-once"],
               "GOOD000004": [f"{server}/to/good"], "GOOD000005": [f"{server}/404/5", f"{server}/good/5"],
               "GOOD000006": [f"{server}/png"]}
    wanted |= {"EVIL000001": ["file:///etc/passwd"], "EVIL000002": ["ftp://127.0.0.1/x"], "EVIL000003": [],
               "EVIL000004": ["http://[broken/x"], "EVIL000005": ["http://127.0.0.1:1/x"], "EVIL000006": [f"{server}/a b\r\nX: y"],
               "EVIL000007": ["http://"], "EVIL000008": [f"{server}/é"]}
    start = time.monotonic()
    failed = photos.download(wanted, tmp_path / "images", connections=8, **ROUGH)
    assert time.monotonic() - start < 20
    assert sorted(failed) == sorted(name for name in wanted if not name.startswith("GOOD"))
    for name, says in zip(sorted(name for name in wanted if name.startswith("BAD")), BAD.values()):
        (url, reason), = failed[name]
        assert url == wanted[name][0] and says in reason, (url, reason)
    assert failed["EVIL000001"] == [("file:///etc/passwd", "not an http(s) URL")]
    assert failed["EVIL000003"] == [("", "no http(s) URL")]
    there = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert there == [f"images/GOOD{n:06}.jpg" for n in range(7)]            # nothing else, nowhere else, nothing half
    assert (tmp_path / "images/GOOD000002.jpg").read_bytes() == GOOD
    with Image.open(tmp_path / "images/GOOD000006.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (60, 40)
    assert asked["/404"] == 1 and 1 <= asked["/500"] <= 2           # what will not change is not asked again; a busy machine may time out
    asked.clear()
    again = photos.download({name: urls for name, urls in wanted.items() if name.startswith("GOOD")},
                            tmp_path / "images", **ROUGH)
    assert again == {} and not asked                                        # what is there is not fetched again


def test_concurrency_is_bounded_and_other_names_are_refused(server, tmp_path, monkeypatch):
    now, most, lock = [0], [0], threading.Lock()

    def fetch(url, *_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    assert photos.download({f"P{n}": ["http://x/"] for n in range(60)}, tmp_path, connections=4) == {}
    assert most[0] <= 4 and len(list(tmp_path.iterdir())) == 60
    for name in ("../x", "a/b", ".x"):
        with pytest.raises(ValueError, match="plain file name"):
            photos.download({name: ["http://x/"]}, tmp_path)


def test_without_a_network_it_ends_soon(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(photos, "fetch", lambda url, *_: asked.append(url) or (_ for _ in ()).throw(photos.NoPhoto("no route")))
    with pytest.raises(UserError, match="the first [5-9][0-9] photos all failed, P.* with 'no route' at http"):
        photos.download({f"P{n}": ["http://x/"] for n in range(9000)}, tmp_path)
    assert len(asked) < 200
    (tmp_path / "P0.jpg").write_bytes(GOOD)             # a later start
    with pytest.raises(UserError, match="photos all failed"):
        photos.download({f"P{n}": ["http://x/"] for n in range(9000)}, tmp_path)
    monkeypatch.setattr(photos, "fetch", lambda url, *_: (_ for _ in ()).throw(photos.NoPhoto("HTTP 404")))
    assert len(photos.download({f"P{n}": ["http://x/"] for n in range(200)}, tmp_path)) == 199      # gone, but the server answers


@pytest.fixture
def patient(monkeypatch):
    """Pauses of less than a second in all."""
    monkeypatch.setattr(photos, "PAUSES", (0.02, 0.04, 0.08, 0.16))
    return dict(tries=3, pause=0.005)


OUTAGES = [photos.NoPhoto("[Errno 111] Connection refused", again=True), photos.NoPhoto("no answer for 20 s", again=True),
           photos.NoPhoto("[Errno 101] Network is unreachable", again=True), photos.NoPhoto("HTTP 503", again=True),
           photos.NoPhoto("HTTP 429", again=True), photos.NoPhoto("a web page, not a photo", again=True)]


@pytest.mark.parametrize("outage", OUTAGES, ids=str)
def test_a_server_that_stops_answering_stops_the_download(outage, patient, monkeypatch, tmp_path):
    """After 101 of 360 photos: it is asked a few times more, not 259 times, and the next start has all."""
    asked, down = Counter(), [True]

    def fetch(url, *_):
        asked[url] += 1
        if down[0] and len(asked) > 101:
            raise outage
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    wanted = {f"P{n:04}": [f"http://x/{n}"] for n in range(360)}
    with pytest.raises(UserError, match=r"x has stopped answering \(.*Start the same command again"):
        photos.download(wanted, tmp_path, **patient)
    there = len(list(tmp_path.iterdir()))
    assert 85 < there <= 110 and asked.total() < there + 60
    down[0] = False
    assert photos.download(wanted, tmp_path, **patient) == {} and len(list(tmp_path.iterdir())) == 360


@pytest.mark.parametrize("outage", OUTAGES, ids=str)
def test_a_server_that_comes_back_has_lost_nothing(outage, patient, monkeypatch, tmp_path):
    """Away for a while after 60 and after 200 requests, with every fifth photo gone for good and one that always fails."""
    lock, asked, back = threading.Lock(), [0], [0.0]

    def fetch(url, *_):
        n = int(url.rpartition("/")[2])
        with lock:
            asked[0] += 1
            if asked[0] in (60, 200):
                back[0] = time.monotonic() + 0.12
            if time.monotonic() < back[0]:
                raise outage
        if n % 5 == 0:
            raise photos.NoPhoto("HTTP 404")
        if n == 7:
            raise outage
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    failed = photos.download({f"P{n:04}": [f"http://x/{n}"] for n in range(500)}, tmp_path, connections=4, **patient)
    assert sorted(failed) == sorted({f"P{n:04}" for n in range(0, 500, 5)} | {"P0007"})
    assert asked[0] < 600


def test_a_server_that_is_away_before_it_gave_any_photo(patient, monkeypatch, tmp_path):
    """The first answer is that there is no photo; then it is away for the next ten, of which one never comes."""
    asked = []

    def fetch(url, *_):
        asked.append(url)
        if url.endswith("/0"):
            raise photos.NoPhoto("HTTP 404")
        if len(asked) < 30 or url.endswith("/5"):
            raise OUTAGES[0]
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    failed = photos.download({f"P{n:03}": [f"http://x/{n}"] for n in range(40)}, tmp_path, connections=1, **patient)
    assert sorted(failed) == ["P000", "P005"]


def test_another_server_that_never_answers(patient, monkeypatch, tmp_path):
    """A few photos on a dead server are listed; with many, the data set would be another one."""
    def fetch(url, *_):
        if "dead" in url:
            raise photos.NoPhoto("[Errno -2] Name or service not known", again=True)
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    wanted = {f"P{n:04}": [f"http://{'dead' if n % 50 == 1 else 'x'}/{n}"] for n in range(200)}
    failed = photos.download(wanted, tmp_path, **patient)
    assert len(failed) == 4 and any("dead does not answer" in reason for [(_, reason)] in failed.values())
    with pytest.raises(UserError, match="20 of 200 photos are on servers that do not answer: dead "):
        photos.download({f"Q{n:04}": [f"http://{'dead' if n % 10 == 1 else 'x'}/{n}"] for n in range(200)}, tmp_path, **patient)


def test_no_split_is_written_without_the_photos(made, server, patient, monkeypatch, tmp_path):
    labels, metadata = make_mave.make(tmp_path, 1500, 1500, photos=f"{server}/good")
    settings = dict(more_than=2, at_most=20, datasets=["clothing"], **patient)
    real_fetch, left = photos.fetch, [20]

    def fetch(*what):
        left[0] -= 1
        if left[0] < 0:
            raise photos.NoPhoto("[Errno 111] Connection refused", again=True)
        return real_fetch(*what)

    with monkeypatch.context() as patch:
        patch.setattr(photos, "fetch", fetch)
        with pytest.raises(UserError, match="has stopped answering"):
            build.build(labels, metadata, tmp_path / "root", **settings)
    assert not (tmp_path / "root/clothing").exists() and not (tmp_path / "root/failed.tsv").exists()
    build.build(labels, metadata, tmp_path / "root", **settings)
    build.build(labels, metadata, tmp_path / "whole", **settings)
    assert contents(tmp_path / "root") == contents(tmp_path / "whole")


def test_retry_after_is_a_number_or_a_date():
    assert [photos.retry_after(text) for text in ("", "7", "-7", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "²",
                                                         "Mon, 01 Jan 0001 00:00:00 +2359")] == [0, 7, 0, 0, 0, 0, 0]
    in_a_minute = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 58 <= photos.retry_after(in_a_minute) <= 60


def test_a_wait_that_the_server_asks_for_holds_for_all(monkeypatch, tmp_path):
    """Once told to wait, no thread asks before the time; a wait of hours is not waited for."""
    asked, start = [], time.monotonic()

    def fetch(url, *_):
        asked.append(time.monotonic() - start)
        if len(asked) == 1:
            raise photos.NoPhoto("HTTP 429", again=True, after=0.5)
        time.sleep(0.01)
        return GOOD

    monkeypatch.setattr(photos, "fetch", fetch)
    assert photos.download({f"P{n}": [f"http://x/{n}"] for n in range(30)}, tmp_path, connections=4, pause=0.01) == {}
    assert sum(0.05 < when < 0.45 for when in asked) == 0 and len(asked) == 31
    monkeypatch.setattr(photos, "fetch", lambda *_: (_ for _ in ()).throw(photos.NoPhoto("HTTP 429", again=True, after=7200)))
    with pytest.raises(UserError, match="HTTP 429: it asks to wait 2 h 00 min"):
        photos.download({f"P{n}": [f"http://x/{n}"] for n in range(40)}, tmp_path, pause=0.01)


def test_numbers_in_headers():
    assert [photos.plain_number(x) for x in ("12", "", "²", "-1", "9" * 5000)] == [True, False, False, False, False]


def test_back_off_doubles_and_obeys_the_server(monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds: waits.append(seconds))
    monkeypatch.setattr(photos, "time", types.SimpleNamespace(monotonic=lambda: sum(waits)))
    monkeypatch.setattr(photos, "fetch", lambda *_: (_ for _ in ()).throw(photos.NoPhoto("busy", again=True, after=3)))
    photos.one_photo("X", ["http://x/"], tmp_path, 1, 1, 4, 1, threading.Event(), {"x": photos.Host("x")})
    assert waits == [3, 3, 4]


def test_a_build_with_photos(made, server, tmp_path, capsys):
    """Photos from a server that loses some: those products are dropped, counted and listed, and a new start finds them."""
    labels, metadata = make_mave.make(tmp_path, 1500, 1500, photos=f"{server}/good")
    lost = re.sub(rb"/good/(B0\w*[05]\.jpg|B0\w*[05]\._SS40_\.jpg)", rb"/404/\1", metadata.read_bytes())
    metadata.write_bytes(lost)
    settings = dict(more_than=2, at_most=20, datasets=["clothing"], pause=0.01)
    build.build(labels, metadata, tmp_path / "root", **settings)
    out = capsys.readouterr().out
    rows = [row for part in stats.SPLITS for row in stats.read_tsv(tmp_path / "root" / "clothing" / f"{part}.tsv")[0]]
    assert rows and all((tmp_path / "root" / "images" / row["images"]).read_bytes() == GOOD for row in rows)
    with open(tmp_path / "root" / "failed.tsv", newline="") as file:
        failed = list(csv.DictReader(file, dialect="excel-tab"))
    ids = {row["id"] for row in failed}
    assert ids and all(row["reason"] == "HTTP 404" and row["id"][-1] in "05" for row in failed)
    assert not ids & {row["id"] for row in rows}
    found = re.search(r"photos: ([\d,]+) of ([\d,]+) \([\d.]+ %\); ([\d,]+) products dropped", out)
    assert [int(n) for n in found.groups()] == [len(rows), len(rows) + len(ids), len(ids)]
    before = contents(tmp_path / "root")
    build.build(labels, metadata, tmp_path / "root", **settings)
    assert contents(tmp_path / "root") == before


def read_so_far(root):
    """How many of the two sources a build has read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{(root / '.build/sources.sqlite').as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM pass WHERE done").fetchone()[0]
    except sqlite3.OperationalError:            # killed before there was a table
        return 0


def test_killed_at_random_moments_it_gives_the_same_bytes(server, tmp_path):
    """SIGKILL from the first import to the last photo.  More of it: KILLS=10 LINES=300000 in the environment."""
    lines, kills = (int(os.environ.get(name, n)) for name, n in (("LINES", 6000), ("KILLS", 3)))
    labels, metadata = make_mave.make(tmp_path, lines, lines, photos=f"{server}/good")

    def command(root):
        return [sys.executable, "-m", "dataset", "build", "--labels", labels, "--metadata", metadata,
                "--data", tmp_path / root, "--more-than", "5", "--at-most", "30", "--connections", "4"]

    start = time.monotonic()
    whole = subprocess.run(command("whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    needs, stages = time.monotonic() - start, Counter()
    for n in range(kills):
        build = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.05, 0.4) * needs)
        build.send_signal(signal.SIGKILL)
        assert build.wait() in (-signal.SIGKILL, 0)
        done = read_so_far(tmp_path / "killed")
        stages[("in the labels", "in the metadata", "after the sources")[done]] += 1
    done = subprocess.run(command("killed"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    print(f"{kills} kills {dict(stages)}; then {len(contents(tmp_path / 'whole')):,} files with the same bytes")


class OwnPhotos(http.server.BaseHTTPRequestHandler):
    """Gives each path a photo of its own, in a hundredth of a second."""

    def log_message(self, *what):
        pass

    def do_GET(self):
        self.server.asked += 1
        time.sleep(0.005)
        blocks = np.random.default_rng(zlib.crc32(self.path.encode())).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize((80, 60)).save(file, "JPEG")
        with contextlib.suppress(OSError):              # whoever asked was killed
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.getvalue())


@contextlib.contextmanager
def own_photos(port=0, gone_after=None, away=0):
    """The port of a server of OwnPhotos that ends with the block.  It goes once, after so many requests, for `away` seconds:
    connections are refused then."""
    over = threading.Event()

    def listen(port):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), OwnPhotos)
        server.daemon_threads, server.block_on_close, server.asked = True, False, 0
        return server

    def serve(server, most):
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        while not over.wait(0.02) and (most is None or server.asked < most):
            pass
        server.shutdown()
        server.server_close()

    def life(server):
        if gone_after is not None:
            serve(server, gone_after)
            over.wait(away)
            server = listen(port)
        serve(server, None)

    server = listen(port)
    port = server.server_port
    thread = threading.Thread(target=life, args=[server])
    thread.start()
    try:
        yield port
    finally:
        over.set()
        thread.join()


def test_killed_while_photos_come_and_the_server_goes(tmp_path):
    """Killed before, while and after the server is away, again and again: the same bytes as undisturbed.

    More of it: KILLS=10 AWAY=60 (seconds) in the environment.
    """
    kills, away = int(os.environ.get("KILLS", 3)), float(os.environ.get("AWAY", 1))
    images = tmp_path / "killed/images"

    def fetched():
        return len(list(images.glob("[!.]*.jpg")))

    def start(root, ends=None):
        """Run a build; ends: (photos, seconds) it kills itself so many seconds after it has so many photos."""
        def kill():
            while fetched() < ends[0]:
                time.sleep(0.01)
            time.sleep(ends[1])
            os.kill(os.getpid(), signal.SIGKILL)

        def before():
            photos.PAUSES = [away * share for share in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)]     # in all 3 times as long as `away`
            os.closerange(3, 1000)                              # the server's socket: a child would keep it open
            if ends:
                threading.Thread(target=kill, daemon=True).start()

        return conftest.command("-m dataset", ["build", "--labels", str(labels), "--metadata", str(metadata), "--data",
                                               str(tmp_path / root), "--more-than", "5", "--at-most", "30", "--connections", "2"],
                                tmp_path, 120 + 10 * math.ceil(away), before)

    with own_photos() as port:
        labels, metadata = make_mave.make(tmp_path, 6000, 6000, photos=f"http://127.0.0.1:{port}/photo")
        whole = start("whole")
    assert whole.code == 0, whole.err
    slice_n, progress = len(list((tmp_path / "whole/images").iterdir())) // (kills + 1), []
    for n in range(kills + 1):                                  # the last one is not killed
        ends = (fetched() + slice_n // 2, away * random.choice((0, 0.5, 1.2))) if n < kills else None
        with own_photos(port, slice_n // 2, away):
            outcome = start("killed", ends)
        assert outcome.signal == signal.SIGKILL if ends else outcome.code == 0 and outcome.seconds > away, outcome.err
        progress.append(fetched())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    print(f"{kills} kills with {progress[:-1]} photos; then {len(contents(tmp_path / 'whole')):,} files with the same bytes")


# ---- import and stats

def write_release(folder, data_sets):
    """The authors' layout, {domain: {split: rows}}."""
    for domain, parts in data_sets.items():
        for part, rows in parts.items():
            write_tsv(folder / "data/training_data/texts" / domain / f"{part}.tsv", rows)
            write_tsv(folder / "data/training_data/texts" / domain / "train_and_val.tsv", rows)


def a_row(n, value="Plaid", title="A shirt", image=None):
    return [f"B{n:09}", image or f"B{n:09}.jpg", "Shirts & Tops", f"[Title] {title}", "Pattern", value]


def test_import_of_the_authors_layout(tmp_path, capsys):
    theirs, ours = tmp_path / "ImplicitAVE", tmp_path / "data"
    write_release(theirs, {"Jewlery_and_General_Apparel": {"train": [a_row(n) for n in range(6)], "val": [a_row(6)],
                                                           "test": [a_row(7, title='Quoted "name"')]},
                           "Home": {part: [a_row(8)] for part in stats.SPLITS}})
    for place, ids in (("evaluation_data/images", [7, 8]), ("training_data/images/part1", [0, 1]),
                       ("training_data/images/part2/deeper", [2])):
        for n in ids:
            path = theirs / "data" / place / f"B{n:09}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(GOOD)
            path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (theirs / "data/training_data/images/B000000003.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (theirs / "data/training_data/images/B000000004.jpg").write_text("<html>")
    (theirs / "data/training_data/images/more.zip").write_bytes(b"PK")
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive/B000000005.jpg").write_bytes(GOOD)
    release.import_release(theirs, ours, [tmp_path / "drive"])
    out = capsys.readouterr().out
    assert "general/train.tsv: 6 rows, 4 of 6 with their photo" in out and "home/test.tsv: 1 rows, 1 of 1" in out
    assert "3 photos missing, 2 of them files that are no photo" in out and "5 '._' files" in out and "more.zip" in out
    missing = (ours / "missing_photos.tsv").read_text()
    assert "git-LFS pointer" in missing and "a web page" in missing and "B000000006.jpg\tnot found" in missing
    assert sorted(path.name for path in (ours / "images").iterdir()) == [f"B{n:09}.jpg" for n in (0, 1, 2, 5, 7, 8)]
    assert stats.read_tsv(ours / "general/test.tsv")[0][0]["texts"] == '[Title] Quoted "name"'
    before = contents(ours)
    release.import_release(theirs, ours, [tmp_path / "drive"])
    assert contents(ours) == before
    with pytest.raises(UserError, match="--with-photos-only leaves no row in general/val: "):
        release.import_release(theirs, ours, [tmp_path / "drive"], with_photos_only=True)
    assert contents(ours) == before                     # nothing is written of a data set that nobody could train on
    (tmp_path / "drive/B000000006.jpg").write_bytes(GOOD)
    release.import_release(theirs, ours, [tmp_path / "drive"], with_photos_only=True)
    assert len(stats.read_tsv(ours / "general/train.tsv")[0]) == 4 and len(stats.read_tsv(ours / "general/val.tsv")[0]) == 1


def test_import_never_leaves_the_images_folder(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    write_release(theirs, {"Clothing": {part: [a_row(1), a_row(2, image="../../evil.jpg"), a_row(3, image="/etc/passwd")]
                                        for part in stats.SPLITS}})
    release.import_release(theirs, tmp_path / "data")
    assert "'../../evil.jpg' is no plain file name" in capsys.readouterr().out
    assert len(stats.read_tsv(tmp_path / "data/clothing/train.tsv")[0]) == 1


def test_import_errors(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        release.import_release(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="holds no data/training_data"):
        release.import_release(tmp_path, tmp_path)
    write_tsv(tmp_path / "Clothing/train.tsv", [a_row(1)])
    with pytest.raises(UserError, match="val.tsv cannot be read"):
        release.import_release(tmp_path, tmp_path / "data")
    with pytest.raises(UserError, match="unpacked"):
        release.import_release(tmp_path, tmp_path / "data", [tmp_path / "none"])


@real
def test_import_of_the_real_release(tmp_path, capsys):
    """The authors' layout, rebuilt from their texts and photos, comes back as it was."""
    theirs = tmp_path / "ImplicitAVE"
    domains = {"clothing": "Clothing", "footwear": "Footwear", "general": "Jewlery_and_General_Apparel"}
    for name, domain in domains.items():
        folder = theirs / "data/training_data/texts" / domain
        folder.mkdir(parents=True)
        for part in stats.SPLITS:
            os.symlink(REAL / name / f"{part}.tsv", folder / f"{part}.tsv")
    (theirs / "data/evaluation_data").mkdir()
    (theirs / "data/evaluation_data/images").mkdir()
    for photo in (REAL / "images").glob("*.jpg"):
        shutil.copyfile(photo, theirs / "data/evaluation_data/images" / photo.name)     # a link out of the clone is not used
    release.import_release(theirs, tmp_path / "data")
    out = capsys.readouterr().out
    for name, (n, test) in {"clothing": (15132, 226), "footwear": (17091, 317), "general": (10473, 220)}.items():
        assert f"{name}/train.tsv: {n:,} rows" in out and f"{name}/test.tsv: {test} rows, {test} of {test} with" in out
        for part in stats.SPLITS:
            assert stats.read_tsv(REAL / name / f"{part}.tsv") == stats.read_tsv(tmp_path / "data" / name / f"{part}.tsv")


@real
def test_stats_of_the_real_release(capsys):
    stats.stats(REAL, [], read_values(VALUES)[1])
    out = capsys.readouterr().out
    for n, values in (("19,094", 23), ("21,759", 29), ("13,281", 20)):
        assert re.search(rf"all +{n} +{values} ", out)
    assert "photos missing in test" not in out and "ids in two splits" not in out
    assert "titles that still name their value: 6" in out and "Table 6    24,664      30  1,000    211" in out


def test_stats_finds_what_is_wrong(tmp_path, capsys):
    folder = tmp_path / "general"
    write_tsv(folder / "train.tsv", [a_row(1), a_row(1), a_row(2, title="A plaid shirt"), a_row(3, title="Tartan!"),
                                           a_row(5, image="../x.jpg"), ["too", "few"], a_row(6)[:5] + [""]])
    write_tsv(folder / "test.tsv", [a_row(2, title="Fine"), a_row(4, value="Argyle")])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/B000000001.jpg").write_bytes(GOOD)
    (tmp_path / "images/B000000002.jpg").write_text("<html>")
    stats.stats(tmp_path, ["general"], read_values(VALUES)[1], tmp_path / "plot.png")
    out = capsys.readouterr().out
    for says in ("train           4       1      4      4  Pattern", "all             6       2      5      1",
                 "line 6: '../x.jpg' is no plain file name", "line 7: 2 fields, not 6",
                 "line 8: nothing under attribute_values", "val.tsv cannot be read", "ids twice in a split: 1",
                 "ids in two splits: 1", "B000000002 (test, train)", "photos missing in train: 1", "photos missing in test: 1",
                 "files in images that are no photo: 1", "titles that still name their value: 1",
                 "another spelling of their value (values.tsv): 1", "values in test that train does not have: 1",
                 "Pattern = Argyle"):
        assert says in out, (says, out)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and len(picture.getcolors(1 << 20)) > 4


def test_stats_errors(tmp_path):
    with pytest.raises(UserError, match="holds no data set"):
        stats.stats(tmp_path, [], {})
    with pytest.raises(UserError, match="no data set .*footwear. In .*: none"):
        stats.stats(tmp_path, ["footwear"], {})
    (tmp_path / "x").mkdir()
    (tmp_path / "x/train.tsv").write_text("id\tname\n")
    with pytest.raises(UserError, match="no data set among"):
        stats.stats(tmp_path, ["x"], {})


# ---- the commands

def command(*arguments):
    return subprocess.run([sys.executable, "-m", "dataset", *map(str, arguments)], capture_output=True, text=True, cwd=HERE.parent)


def test_mistakes_end_with_one_line_and_code_2(tmp_path):
    for arguments, says in ((["build", "--labels", tmp_path / "l", "--metadata", tmp_path / "m"], "cannot be opened"),
                            (["import", tmp_path / "none", "--data", tmp_path], "is not a folder"),
                            (["stats", "--data", tmp_path], "holds no data set"),
                            (["build", "--at-most", "0"], "is not a whole number from 1 on"),
                            (["build"], "required: --labels, --metadata"), ([], "required: command")):
        done = command(*arguments)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "python -m dataset: error: " in done.stderr or "usage: python -m dataset" in done.stderr
    (tmp_path / "file").write_text("")
    (tmp_path / "l").write_text(json.dumps({"id": "B000000001", "category": "Shoes", "attributes": []}))
    done = command("build", "--labels", tmp_path / "l", "--metadata", tmp_path / "l", "--data", tmp_path / "file")
    assert done.returncode == 2 and "leave to write" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_and_a_quick_start():
    for name in ("build", "import", "stats"):
        assert "--data ROOT" in command(name, "--help").stdout
    assert "--llama DIR" in command("check", "--help").stdout
    seen = subprocess.run([sys.executable, "-c", "import dataset.__main__, sys; print('torch' in sys.modules, 'PIL' in sys.modules)"],
                          capture_output=True, text=True, cwd=HERE.parent).stdout
    assert seen == "False False\n"
