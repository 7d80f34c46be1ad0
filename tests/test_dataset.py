"""The data sets: the build against the naive one, wrong sources, the import of the release, stats."""

import gzip
import json
import random
import shutil
from collections import Counter

import mave
import pytest
from conftest import jpeg

from base.console import UserError, locked
from base.tsv import read_tsv, write_tsv
from dataset import sources
from dataset.__main__ import main
from dataset.build import choose, map_values, split, table_rows
from dataset.values import ATTRIBUTES, VALUES, read_values

LINES = 3000
FEW = 2, 20                                             # --more-than, --at-most


def build(labels, metadata, root, *flags, few=FEW):
    main(["build", "--labels", str(labels), "--metadata", *map(str, metadata), "--data", str(root),
          "--no-photos", "--more-than", str(few[0]), "--at-most", str(few[1]), *map(str, flags)])


def contents(root):
    """{path: bytes} of all that a build leaves for people: not its working folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two small sources, and what a build makes of them."""
    folder = tmp_path_factory.mktemp("sources")
    labels, metadata = mave.make(folder, LINES)
    build(labels, [metadata], folder / "root")
    return labels, metadata, folder / "root"


def a_row(n, title="A shirt", value="Plaid", image=None):
    return [f"B{n:09}", image or f"B{n:09}.jpg", "Shirts & Tops", f"[Title] {title}", "Pattern", value]


def rows(path):
    return [list(row.values()) for _, row in read_tsv(path)]


# ---------------------------------------------------------------------------------------- build


def test_what_products_become():
    """Mentions go.  A's raw value is another spelling; B is left without a title; C has two values of one
    attribute; D's rarer value counts; E has no photo.
    """
    top = "Shirts & Tops"

    def product(id, title, *labels):
        return [id, title, ["u"] * (id != "E"),
                [["general" if name == "Pattern" else "clothing", name, top, raws] for name, *raws in labels]]

    products = [product("A", "Blue Checked Shirt", ("Pattern", "check"), ("Sleeve Style", "short sleeves")),
                product("B", "PLAID", ("Pattern", "plaid")),
                product("C", "Plaid or stripes", ("Pattern", "plaid", "stripes")),
                product("D", "V-neck, short sleeve", ("Sleeve Style", "short sleeve"),
                        ("Neckline", "v neck", "zigzag")),
                product("E", "Plaid scarf", ("Pattern", "plaid"))]
    table, spellings = read_values(VALUES)
    ids, unmapped = map_values(products, table, ATTRIBUTES, no_photos=False)
    assert unmapped == [("clothing", "Neckline", "zigzag", top, 1)]
    rows, urls = table_rows(products, choose(ids, 0, more_than=0, at_most=9), spellings)
    assert [row for its in rows.values() for row in its] == [
        ["A", "A.jpg", top, "[Title] Blue Shirt", "Pattern", "Plaid"],
        ["A", "A.jpg", top, "[Title] Blue Checked Shirt", "Sleeve Style", "Short Sleeve"],
        ["D", "D.jpg", top, "[Title] short sleeve", "Neckline", "V-Neck"]]
    assert list(urls) == ["A", "D"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_alone_decides_what_is_drawn(made, tmp_path, capsys, seed):
    """From sources that were read before."""
    root = shutil.copytree(made[2], tmp_path / "root")
    build(*made[:1], made[1:2], root, "--seed", seed)
    assert max(Counter(mave.built(root).values()).values()) == FEW[1]
    assert "read before" in capsys.readouterr().out
    assert (contents(root) == contents(made[2])) == (seed == 0)


def test_another_table_of_values(made, tmp_path):
    table = tmp_path / "v.tsv"
    table.write_text("dataset\tattribute\traw\tvalue\ngeneral\tPattern\tzigzag & more\tFloral\n")
    build(*made[:1], made[1:2], tmp_path / "root", "--values", table, "--dataset", "general")
    assert {row[5] for row in rows(tmp_path / "root/general/train.tsv")} == {"Floral"}
    assert "clothing\tNeckline" in (tmp_path / "root/unmapped.tsv").read_text()


@pytest.mark.parametrize("change", [
    lambda lines: [b"".join(lines[:1000]), gzip.compress(b"".join(lines[1000:]))],
    lambda lines: [gzip.compress(gzip.compress(b"".join(lines)))]])
def test_other_forms_of_the_metadata_give_the_same_bytes(made, tmp_path, change):
    """Also where another source was read before."""
    lines = made[1].read_bytes().splitlines(keepends=True)
    paths = [tmp_path / "m0", tmp_path / "m1"]
    paths[0].write_bytes(b"".join(lines[:-500]))
    build(made[0], paths[:1], tmp_path / "root")
    changed = change(lines)
    for path, content in zip(paths, changed):
        path.write_bytes(content)
    build(made[0], paths[:len(changed)], tmp_path / "root")
    assert contents(tmp_path / "root") == contents(made[2])


def test_which_lines_count(tmp_path):
    """The first label of an attribute, also under its other name; the first usable title; the larger photo;
    no id that is no ASIN, since it would name a file."""
    asin = "B000000001"
    labels = [mave.label(asin, "Shoes", [("Toe Style", ["round toe"]), ("Heel", ["flat"])]),
              mave.label(asin, "Shoes", [("Toe Style", ["pointed toe"]), ("Heel Height", ["high"])]),
              *(mave.label(bad, "Shoes", [("Toe Style", ["round toe"])])
                for bad in ("../../evil", "B00000000\n", "b000000001", "Ｂ000000003", 7, None))]
    metadata = [{"asin": asin, "title": title, "imageURL": ["http://x/small.jpg"],
                 "imageURLHighRes": ["ftp://x/", "http://x/large.jpg", "http://x/2.jpg"]}
                for title in ("", 7, "var x = getTime()", "First", "Second")]
    for name, items in (("l", labels), ("m", metadata)):
        (tmp_path / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    sources.collect(tmp_path / "l", [tmp_path / "m"], tmp_path / "c")
    [product] = sources.collected(tmp_path / "c")
    assert product[:3] == [asin, "First", ["http://x/large.jpg", "http://x/small.jpg"]]
    assert product[3] == [["footwear", "Toe Style", "Shoes", ["round toe"]],
                          ["footwear", "Heel Height", "Shoes", ["flat"]]]


def test_wrong_sources_are_refused_by_name_and_good_splits_stay(made, tmp_path):
    labels, metadata, root = made
    shutil.copytree(root, tmp_path / "root")
    bad = tmp_path / "bad"

    def refused(says, *paths, **few):
        with pytest.raises(UserError, match=says):
            build(paths[0], paths[1:], tmp_path / "root", **few)
        after = contents(tmp_path / "root")
        assert after | {"unmapped.tsv": b""} == contents(root) | {"unmapped.tsv": b""}

    refused("the right way round", metadata, labels)
    for content, says in ((b"\x1f\x8bnot gzip", "gzip file is damaged"),
                          (gzip.compress(metadata.read_bytes())[:-10_000], "breaks off"),
                          (b'{"asin": "B000000001", "reviewText": "good"}\n', "no product has both")):
        bad.write_bytes(content)
        refused(says, labels, bad)
    bad.write_bytes(labels.read_bytes().replace(b'"evidences": [{', b'"evidences": [], "x": [{'))
    refused("no product is left for clothing/train, ", bad, metadata)           # MAVE's negatives
    refused("no product is left", labels, metadata, few=(100, 1000))            # a small extract
    with locked(tmp_path / "root" / ".build", "building"):
        refused("another process is building", labels, metadata)


def test_the_split_keeps_groups_together_and_the_shares():
    draw = random.Random(0)
    table = [a_row(n, f"title {draw.randrange(400)}", draw.choice(("Plaid", "Stripe", "Floral")))
             for n in range(900)]
    parts = split(table, None, 0, "general")
    where = {}
    for part, its in parts.items():
        for row in its:
            assert where.setdefault(row[3], part) == part
    for value, n in Counter(row[5] for row in table).items():
        assert all(Counter(row[5] for row in parts[part])[value] == round(n / 7) for part in ("val", "test"))
    assert sorted(sum(parts.values(), [])) == table


def test_a_photo_that_says_nothing_groups_nobody(tmp_path):
    """A shop's "photo not available" stands for 60 of 100 products: they are drawn as if each had its own."""
    for n in range(40):
        (tmp_path / f"{n}").write_text(f"{n}")
    (tmp_path / "none").write_text("photo not available")
    rows = [a_row(n, f"shirt {n}", image=f"{n}" if n < 40 else "none") for n in range(100)]
    assert [len(its) for its in split(rows, tmp_path, 0, "general").values()] == [72, 14, 14]


# ---------------------------------------------------------------------------------------- import


def write_release(folder, domain, train, val, test):
    """The authors' layout."""
    for part, table in ("train", train), ("val", val), ("test", test):
        write_tsv(folder / "data/training_data/texts" / domain / f"{part}.tsv", table)


def test_import_of_the_authors_layout(tmp_path, capsys):
    theirs, ours, drive = tmp_path / "ImplicitAVE", tmp_path / "data", tmp_path / "drive"
    bad_name = a_row(1, image="../../evil.jpg")
    write_release(theirs, "Jewlery_and_General_Apparel", [*map(a_row, range(6)), bad_name], [a_row(6)],
                  [a_row(7, 'Quoted "name"')])
    for folder, numbers in (theirs / "data/a", (0, 1)), (theirs / "b/c", (2, 7)), (drive, (5,)):
        folder.mkdir(parents=True)
        for n in numbers:
            (folder / f"B{n:09}.jpg").write_bytes(jpeg())
    (drive / "B000000003.jpg").write_text("<html>")
    secret = jpeg()
    (tmp_path / "secret.jpg").write_bytes(secret)
    (drive / "B000000004.jpg").symlink_to(tmp_path / "secret.jpg")             # leads out: not there
    (ours / "images").mkdir(parents=True)
    (ours / "images/B000000000.jpg").symlink_to(tmp_path / "secret.jpg")        # not written through
    main(["import", str(theirs), "--data", str(ours), "--images", str(drive)])
    assert "5 of 9 photos are there" in capsys.readouterr().out
    assert sorted(path.name for path in (ours / "images").iterdir()) == [
        f"B{n:09}.jpg" for n in (0, 1, 2, 5, 7)]        # not the page, nor what a link or a name leads to
    assert rows(ours / "general/test.tsv") == [a_row(7, 'Quoted "name"')]
    assert not (ours / "images/B000000000.jpg").is_symlink()
    assert (tmp_path / "secret.jpg").read_bytes() == secret


def test_what_was_not_made_by_the_command_is_not_written_over(made, tmp_path):
    write_tsv(tmp_path / "clothing/train.tsv", [a_row(1)])
    write_release(tmp_path / "theirs", "Clothing", *[[a_row(2)]] * 3)
    for act in (lambda: build(*made[:1], made[1:2], tmp_path),
                lambda: main(["import", str(tmp_path / "theirs"), "--data", str(tmp_path)])):
        with pytest.raises(UserError, match="clothing: there already, and not made by"):
            act()
    assert rows(tmp_path / "clothing/train.tsv") == [a_row(1)]


# ---------------------------------------------------------------------------------------- stats


def test_stats_count_values(made, capsys):
    main(["stats", "--data", str(made[2]), "general"])
    labels = Counter(row for (dataset, _), row in mave.built(made[2]).items() if dataset == "general")
    n = labels.values()
    out = capsys.readouterr().out
    assert f"all {sum(n)} {len(n)} {max(n)} {min(n)}".split() in [line.split() for line in out.splitlines()]
    assert all(f"{value} {count}" in out for (_, value), count in labels.items())
