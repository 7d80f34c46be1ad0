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


def build_flags(labels, metadata, root, *more):
    flags = ["build", "--labels", labels, "--metadata", metadata, "--data", root, "--more-than", 2,
             "--at-most", 20, *more]
    return [*map(str, flags)]


def build(labels, metadata, root, *more):
    main(build_flags(labels, metadata, root, "--no-photos", *more))


def contents(root):
    """{path: bytes} of all that a build leaves for people: not its working folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two small sources, and what a build makes of them."""
    folder = tmp_path_factory.mktemp("sources")
    made = *mave.make(folder, 3000), folder / "root"
    build(*made)
    return made


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


def test_the_seed_alone_decides_what_is_drawn(made, tmp_path, capsys):
    """From sources that were read before."""
    root = shutil.copytree(made[2], tmp_path / "root")
    for seed in (1, 0):
        build(*made[:2], root, "--seed", seed)
        assert (contents(root) == contents(made[2])) == (seed == 0)
        assert "read before" in capsys.readouterr().out


def test_another_table_of_values(made, tmp_path):
    table = tmp_path / "v.tsv"
    table.write_text("dataset\tattribute\traw\tvalue\tcategory\ngeneral\tPattern\tzigzag & more\tFloral\t\n")
    build(*made[:2], tmp_path / "root", "--values", table, "--dataset", "general")
    assert {row[5] for row in rows(tmp_path / "root/general/train.tsv")} == {"Floral"}
    assert "clothing\tNeckline" in (tmp_path / "root/unmapped.tsv").read_text()


def test_other_forms_of_the_metadata_give_the_same_bytes(made, tmp_path):
    """Several files, one of them compressed twice; also where another source was read before."""
    lines = made[1].read_bytes().splitlines(keepends=True)
    paths = [tmp_path / "m0", tmp_path / "m1"]
    paths[0].write_bytes(b"".join(lines[:1000]))
    build(made[0], paths[0], tmp_path / "root")
    paths[1].write_bytes(gzip.compress(gzip.compress(b"".join(lines[1000:]))))
    build(made[0], paths[0], tmp_path / "root", "--metadata", *paths)
    assert contents(tmp_path / "root") == contents(made[2])


def test_which_lines_count(tmp_path):
    """The first label of an attribute, also under its other name; the first usable title; the larger photo;
    no id that is no ASIN, since it would name a file."""
    asin = "B000000001"
    labels = [mave.label(asin, "Shoes", [("Toe Style", ["round toe"]), ("Heel", ["flat"])]),
              mave.label(asin, "Shoes", [("Toe Style", ["pointed toe"]), ("Heel Height", ["high"])]),
              *(mave.label(bad, "Shoes", [("Toe Style", ["round toe"])]) for bad in ("../../evil", 7))]
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

    def refused(says, labels, metadata, *more):
        with pytest.raises(UserError, match=says):
            build(labels, metadata, tmp_path / "root", *more)
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
    refused("no product is left", labels, metadata, "--more-than", 100)         # a small extract
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


def test_import_of_the_authors_layout(tmp_path, capsys):
    """What a person has made is not written over."""
    theirs, ours, drive = tmp_path / "ImplicitAVE", tmp_path / "data", tmp_path / "drive"
    bad_name = a_row(1, image="../../evil.jpg")
    for part, its in (("train", [*map(a_row, range(6)), bad_name]), ("val", [a_row(6)]),
                      ("test", [a_row(7, 'Quoted "name"')])):
        write_tsv(theirs / f"data/training_data/texts/Jewlery_and_General_Apparel/{part}.tsv", its)
    for n, folder in (0, theirs / "data/a"), (7, theirs / "data/a"), (5, drive):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"B{n:09}.jpg").write_bytes(jpeg())
    (drive / "B000000003.jpg").write_text("<html>")
    secret = jpeg()
    (tmp_path / "secret.jpg").write_bytes(secret)
    (drive / "B000000004.jpg").symlink_to(tmp_path / "secret.jpg")             # leads out: not there
    (ours / "images").mkdir(parents=True)
    (ours / "images/B000000000.jpg").symlink_to(tmp_path / "secret.jpg")        # not written through
    command = ["import", str(theirs), "--data", str(ours), "--images", str(drive)]
    write_tsv(ours / "general/train.tsv", [a_row(1)])
    with pytest.raises(UserError, match="general: there already, and not made by"):
        main(command)
    (ours / "general/train.tsv").unlink()
    main(command)
    assert "3 of 9 photos are there" in capsys.readouterr().out
    assert {path.name for path in (ours / "images").iterdir() if not path.is_symlink()} == {
        f"B{n:09}.jpg" for n in (0, 5, 7)}              # not the page, nor what a link or a name leads to
    assert rows(ours / "general/test.tsv") == [a_row(7, 'Quoted "name"')]
    assert (tmp_path / "secret.jpg").read_bytes() == secret


# ---------------------------------------------------------------------------------------- stats


def test_stats_count_values(made, capsys):
    its = [row for path in (made[2] / "general").glob("*.tsv") for row in rows(path)]
    main(["stats", "--data", str(made[2]), "general"])
    labels = Counter(row[5] for row in its)
    n = labels.values()
    out = capsys.readouterr().out
    assert f"all {len(its)} {len(n)} {max(n)} {min(n)}".split() in [line.split() for line in out.splitlines()]
    assert all(f"{value} {count}" in out for value, count in labels.items())
