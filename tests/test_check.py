"""What counts as a mention and as a duplicate, the table of values, and python -m dataset check."""

import re
import shutil

import pytest
from conftest import SHARED, jpeg

from base.console import UserError
from base.duplicates import title_key
from base.tsv import read_tsv, write_tsv
from dataset.__main__ import main
from dataset.build import groups
from dataset.mentions import clean, folded, mentions, without
from dataset.values import ATTRIBUTES, VALUES, read_values

RELEASE = SHARED / "data" / "implicitave"
PARTS = "train", "val", "test"


def table(text):
    """The cells of a table in a text: lines, and " | " between the cells."""
    return [[cell.strip() for cell in line.split(" |")] for line in text.strip().splitlines()]


# ---------------------------------------------------------------------------------------- mentions


@pytest.mark.parametrize("names, title, left", table("""
Round | Surround Sound Round Pendant | Surround Sound Pendant
Round | ROUND-cut, rounded (round) Disc's | cut, Disc's
Short Sleeve | Short Short Sleeve Sleeve Tee | Tee
Short Sleeve | short_sleeve short – sleeve short. sleeved shortsleeve short....sleeve | short....sleeve
V-Neck | Deep V Neck VNeck v—neck Top (V-NECK) | Deep Top
Crew Neck | Crew Necks crew-necked crewneck Top | Top
Stripe + striped | Striped/Plaid Scarf - Stripes | Plaid Scarf
Golf | Nike Golf's Best Goldfish golfer | Nike Best Goldfish golfer
Camo & More | A camo & more hat | A hat
Canvas | Two Canvases bag | Two bag
Leather | Leatherette Amerileather Bag | Leatherette Amerileather Bag
Heart | Heart |
??? | Nothing ??? to find | Nothing ??? to find
Flat | \ufb02at shoe, Ｆｌａｔ, \ufb02at’s | shoe
3/4 Sleeve | Top ¾ Sleeve 3⁄4 sleeves ３／４ Sleeve | Top
Polka Dot | Pol\u00adka\u200b Dot, Polka\u00a0Dots, Polka&nbsp;Dot & P\ufe0folka-D\u034fotted Dress | Dress
Stripe | &amp;lt;b&amp;gt;Striped&amp;lt;/b&amp;gt; Tee | Tee
A & B | A&amp;amp;amp;B Shirt | Shirt
Stiletto | Stiletto's, STILETTO’S, Stilettoʼs heel | heel
Galaxy | Galaxies Galaxy's galaxy-printed | printed
Bootie | Booties, Booty & bootie's |
Camouflage | Camouflaged camouflages hat | hat
Round Toe | Round-Toed Toe | Toe
Square Neck | Squared-Neck, squarenecked, Squarely | Squarely
Cap | Cape Caps capped escape | Cape escape
Naïve | nai\u0308ve NAÏVE naive | naive
Heart | Nike™ heart℠ Ⓗeart | Nike
Leopard | <b title='leopard'>Cat</b> &lt;i&gt;Leopard&lt;/i&gt;<style>.x{}</style> I <3 | Cat I <3
"""))
def test_every_mention_goes_and_nothing_else(names, title, left):
    assert without(clean(title), mentions(tuple(names.split(" + ")))) == left


def test_a_raw_value_means_what_its_mention_means():
    """Whatever goes from a title as a mention of a value is mapped to it when it stands alone, and the other
    way round.
    """
    for (_, _, value), raws in read_values(VALUES)[1].items():
        wanted = mentions((value, *raws))
        for raw in (value, *raws):
            for form in (raw.upper(), raw + "s", raw + "'s", raw.replace(" ", "-"), raw.replace(" ", "")):
                assert (folded(clean(form)) in wanted) == (without(clean(form), wanted) == ""), (form, value)


# ---------------------------------------------------------------------------------------- the table of values


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the authors' data are not here")
def test_the_table_has_the_authors_values_and_categories():
    meanings = read_values(VALUES)[0]
    for dataset in ATTRIBUTES:
        rows = [row for part in PARTS for _, row in read_tsv(RELEASE / dataset / f"{part}.tsv")]
        theirs = {(row["attribute_names"], row["category"], row["attribute_values"]) for row in rows}
        assert theirs == {(attribute, category, value) for (name, attribute, category), of in meanings.items()
                          if name == dataset for value in of.values()}


@pytest.mark.parametrize("dataset, attribute, category, raw, value", table("""
clothing | Length | Pants | long | None
clothing | Length | Dresses | Long | Long Dress/Gown
clothing | Length | Pants | mid-calf | Capri
clothing | Length | Skirts | mid-calf | Midi
clothing | Length | Dresses | capris | None
clothing | Sleeve Style | Dresses | ¾ | 3/4 Sleeve
general | Pattern | Shirts & Tops | check | Plaid
footwear | Heel Height | Shoes | stiletto's | High Heel
"""))
def test_a_spelling_means_a_value_in_its_categories(dataset, attribute, category, raw, value):
    assert str(read_values(VALUES)[0][dataset, attribute, category].get(folded(clean(raw)))) == value


@pytest.mark.parametrize("text, says", [
    ("clothing\tLength\tCapri\tCapri\tTrousers\n", "line 2, clothing, Length: no such attribute, or not"),
    ("clothing\tLength\tCapri\tCapri\tPants\nclothing\tLength\tcropped\tCapri\tDresses\n",
     "line 3, clothing, Length: no such attribute, or not categories of it or of the value: 'Dresses'"),
    ("clothing\tLength\tlong\tMaxi\tDresses\nclothing\tLength\tLong\tMidi\tnot Pants\n",
     "line 3, clothing, Length: 'Long' means 'Midi' here, and 'Maxi' on an earlier line"),
    ("clothing\tColor\tred\tRed\t\n", "line 2, clothing, Color: no such attribute")])
def test_a_bad_table_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "v.tsv").write_text("dataset\tattribute\traw\tvalue\tcategory\n" + text)
    with pytest.raises(UserError, match=re.escape(says)):
        read_values(tmp_path / "v.tsv")


# ---------------------------------------------------------------------------------------- duplicates


def test_titles_are_compared_by_their_words_and_groups_join_in_a_chain():
    """0 and 1 have one title, 1 and 2 the same photo; the others stand alone, also those without both."""
    titles = ["Shoe shoe, AIR nike!", "Ｎｉｋｅ Air Shoe", "Shoe 7", "Shoe 8", " - ! ", ""]
    numbers = groups([*map(title_key, titles)], [1, 2, 2, 3, None, None])
    assert numbers[0] == numbers[1] == numbers[2] and len(set(numbers)) == 4


# ---------------------------------------------------------------------------------------- check


def write_shop(folder, *edits):
    """FOLDER/shop/{train,val,test}.tsv and FOLDER/images/: 3 values of one attribute, 12 + 2 + 2 products
    each.

    edits  (split, row, column, cell) to be written instead
    """
    rows = {part: [] for part in PARTS}
    (folder / "images").mkdir(parents=True)
    for n, part in enumerate(["train"] * 36 + ["val"] * 6 + ["test"] * 6, start=1):
        (folder / f"images/{n}.jpg").write_bytes(jpeg())
        value = ("Chelsea", "Combat", "Rain Boots")[n % 3]
        rows[part].append([f"P{n}", f"{n}.jpg", "Footwear", f"[Title] shoe number {n}", "Boot Style", value])
    for part, row, column, cell in edits:
        rows[part][row][column] = cell
    for part, its in rows.items():
        write_tsv(folder / "shop" / f"{part}.tsv", its)
    return folder / "shop"


@pytest.mark.parametrize("edit, says", [
    (("train", 2, 3, "chelseas for the rain"), """titles or categories that hold their answer: 1 \
(the model learns to copy)
      P3 (train.tsv) Boot Style = Chelsea"""),
    (("test", 1, 5, "Western"), """values with fewer than 12 labels to train on: 1
      Boot Style = Western: 0"""),
    (("test", 0, 3, "5 NUMBER shoe"), """products of test.tsv with the same title words as one of train.tsv: \
1 (of 6, 0 of them with the same label; their score measures memory)
      P43 as P5"""),
    (("val", 1, 1, "2.jpg"),
     "products of val.tsv with the same photo bytes as one of train.tsv: 1 (of 6, 1 of them"),
    (("train", 2, 5, "chelsea's"), """values that differ only in case, plural or hyphens: 1 \
(an exact match takes them for two)
      Boot Style: "chelsea's" 1, 'Chelsea' 15"""),
    (("train", 3, 0, "P1"), """ids that stand twice in a file for one attribute: 1
      P1, Boot Style"""),
    (("val", 1, 0, "P1"), "products of val.tsv with the same id as one of train.tsv: 1")])
def test_what_spoils_a_result_is_named_and_can_be_trained(edit, says, tmp_path, capsys):
    main(["check", str(write_shop(tmp_path, edit)), "--labels", "12"])
    out = capsys.readouterr().out
    assert "REFUSED" not in out and says in out, out


def bad_lines(folder):
    with open(folder / "shop/val.tsv", "a") as file:
        file.write("P99\ttoo few\nP98\t1.jpg\t\tshoe\tBoot Style\t\n")


def link_out(folder):
    (folder / "images/2.jpg").rename(folder / "outside.jpg")
    (folder / "images/2.jpg").symlink_to(folder / "outside.jpg")


@pytest.mark.parametrize("change, says", [
    (lambda folder: (folder / "images/2.jpg").write_text("<!doctype html>"),
     "photos that are missing or cannot be read: 1 (--skip-missing-photos trains without products whose "
     "photo is missing, --no-image without photos)\n      {}/images/2.jpg: "),
    (link_out, "photos that are missing or cannot be read: 1"),
    (bad_lines, "{}/shop/val.tsv, line 8: has 2 cells, the header 6\n      {}/shop/val.tsv, line 9: "
                "attribute_values is empty"),
    (lambda folder: (folder / "shop/train.tsv").unlink(), "{}/shop/train.tsv: does not exist"),
    (lambda folder: write_tsv(folder / "shop/test.tsv", []),
     "{}/shop/test.tsv: has a header but no products")])
def test_what_train_py_refuses_is_refused(change, says, tmp_path, capsys):
    folder = write_shop(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match="train.py would refuse it"):
        main(["check", str(folder)])
    out = capsys.readouterr().out
    assert out.index("REFUSED") < out.index(says.replace("{}", str(tmp_path))), out


def test_what_is_absent_is_listed_unless_there_shall_be_no_image(tmp_path, capsys):
    folder = write_shop(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError):
        main(["check", str(folder), "--all"])           # lists more than three
    out = capsys.readouterr().out
    assert out.count(".jpg: does not exist") == 48 and "SPOILS" not in out
    main(["check", str(folder), "--no-image"])          # else the folder is clean
    out = capsys.readouterr().out
    assert "photo" not in out and "SPOILS" not in out
    assert f"train.py --data {tmp_path} --dataset shop --labels 10 --no-image\n" in out
