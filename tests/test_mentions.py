"""What counts as a mention of a value, and the table of values."""

import re
from pathlib import Path

import pytest

from base.console import UserError
from dataset import stats
from dataset.mentions import clean, folded, mentions, without
from dataset.values import ATTRIBUTES, VALUES, read_values

HERE = Path(__file__).resolve().parent
REAL = HERE.parents[1] / "shared" / "data" / "implicitave"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the authors' data are not here")


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
