"""The data sets: what counts as a mention, the build against the naive one, kills."""

import contextlib
import gzip
import json
import random
import re
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import FEW, contents

from base.console import UserError
from dataset import build, sources, stats
from dataset.mentions import clean, folded, mentions, without
from dataset.values import ATTRIBUTES, VALUES, read_values
from experiments import naive_build

HERE = Path(__file__).resolve().parent
REAL = HERE.parents[1] / "shared" / "data" / "implicitave"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the authors' data are not here")


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
