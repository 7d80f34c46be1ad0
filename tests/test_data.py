"""Products, few labels, and the texts of figure 3, letter for letter."""

import csv
import dataclasses
import os
import tracemalloc
from collections import Counter

import pytest
from conftest import train_tokenizer

from base.console import UserError
from base.duplicates import note_duplicates
from base.tsv import Reader, write_tsv
from data import (
    Epoch,
    Example,
    Product,
    Products,
    base_question,
    comparison,
    encode_answer,
    encode_examples,
    fingerprint,
    product_of,
    read_split,
    sample_labels,
    values_of,
)
from llama import Tokenizer

SHORT = Product("A1", "a1.jpg", "Shirts", "Jersey Tee", "Sleeve Style", "Short Sleeve")
LONG = Product("A2", "a2.jpg", "Dresses", "Evening Gown", "Sleeve Style", "Long Sleeve")
SHORT2 = Product("A3", "a3.jpg", "Shirts", "Polo", "Sleeve Style", "Short Sleeve")

# ------------------------------------------------------------------------------------------------ figure 3


def test_base():
    example = base_question(SHORT)
    assert example.prompt == "Question: What is the Sleeve Style of this product?\nContext: Jersey Tee, Shirts\nAnswer:"
    assert example.answer == "Short Sleeve"
    assert example.photos == ("a1.jpg",)


def test_without_text():
    assert base_question(SHORT, text=False).prompt == "Question: What is the Sleeve Style of this product?\nAnswer:"


@pytest.mark.parametrize("strategy, question, different, same", [
    ("judge_last", "What is the Sleeve Style of these two products? Are they the same?",
     "First: Short Sleeve; Second: Long Sleeve; No.", "First: Short Sleeve; Second: Short Sleeve; Yes."),
    ("judge_first", "Do these two products have the same Sleeve Style? Why?",
     "No; First: Short Sleeve; Second: Long Sleeve.", "Yes; First: Short Sleeve; Second: Short Sleeve."),
    ("better_instance", "Which product's Sleeve Style is {}?",
     "Second product has Long Sleeve.", "Both products have Short Sleeve."),
])
def test_comparisons(strategy, question, different, same):
    for partner, answer in ((LONG, different), (SHORT2, same)):
        example = comparison(SHORT, partner, strategy)
        assert example.answer == answer
        assert example.photos == ("a1.jpg", partner.image)
        assert example.prompt == (f"Question: {question.format(partner.value)}\nFirst: Jersey Tee, Shirts\n"
                                  f"Second: {partner.context}\nAnswer:")


def test_better_instance_of_the_figure():
    """Figure 3 asks for Short Sleeve where the first product has Long Sleeve."""
    example = comparison(LONG, SHORT, "better_instance")
    assert "Which product's Sleeve Style is Short Sleeve?" in example.prompt
    assert example.answer == "Second product has Short Sleeve."
    assert comparison(LONG, SHORT, "better_instance", ask_first=True).answer == "First product has Long Sleeve."


# ------------------------------------------------------------------------------------------------ epochs


def many(n=40):
    return [Product(f"P{i}", f"p{i}.jpg", "Shoes", f"title {i}", "Heel Height" if i % 4 else "Toe Style", f"value {i % 3}")
            for i in range(n)]


@pytest.mark.parametrize("strategy, ratio, comparisons", [("judge_last", 1.0, 40), ("none", 1.0, 0), ("judge_first", 2.5, 100),
                                                          ("better_instance", 0.5, 20), ("judge_last", 0.0, 0),
                                                          ("judge_last", 0.19, 8)])
def test_an_epoch_shows_each_product_once_and_compares_it(strategy, ratio, comparisons):
    epoch = Epoch(many(), 0, 0, strategy, ratio)
    examples = [epoch[i] for i in range(len(epoch))]
    base = [e.photos[0] for e in examples if len(e.photos) == 1]
    assert sorted(base) == sorted(p.image for p in many())
    first = Counter(e.photos[0] for e in examples if len(e.photos) == 2)
    assert sum(first.values()) == comparisons
    if comparisons:
        assert all(int(ratio) <= first[p.image] <= int(ratio + 0.999) for p in many())


def test_partners_share_the_attribute_are_another_product_and_any_of_them():
    products = many()
    attribute = {p.image: p.attribute for p in products}
    partners = Counter()
    for number in range(200):
        epoch = Epoch(products, 7, number)
        for i in range(len(epoch)):
            photos = epoch[i].photos
            if len(photos) == 2:
                assert attribute[photos[0]] == attribute[photos[1]] and photos[0] != photos[1]
                if photos[0] == "p0.jpg":
                    partners[photos[1]] += 1
    assert set(partners) == {p.image for p in products if p.attribute == "Toe Style"} - {"p0.jpg"}     # nine of them
    assert sum(partners.values()) == 200
    chi_square = sum((n - 200 / 9) ** 2 / (200 / 9) for n in partners.values())
    assert chi_square < 26.1                            # 8 degrees of freedom, p = 0.001


def test_an_epoch_depends_on_seed_and_number_alone():
    def texts(seed, number):
        epoch = Epoch(many(), seed, number)
        return [epoch[i] for i in range(len(epoch))]
    assert texts(0, 3) == texts(0, 3)
    assert texts(0, 3) != texts(0, 4) and texts(0, 3) != texts(1, 3)

    def order(seed, number):                            # of the products alone, whoever their partners are
        return [e.photos[0] for e in texts(seed, number) if len(e.photos) == 1]
    assert order(0, 3) != order(0, 4) and order(0, 3) != order(1, 3)


def test_better_instance_asks_for_either_product_as_often():
    epoch = Epoch(many(400), 0, 0, "better_instance")
    answers = Counter(epoch[i].answer.split()[0] for i in range(len(epoch)) if len(epoch[i].photos) == 2)
    assert 90 < answers["First"] < 180 and 90 < answers["Second"] < 180         # of some 267 pairs with different values


def test_each_partner_is_a_draw_of_its_own():
    """Another seed, epoch, repetition or attribute of the same product gives other partners, whatever the order."""
    products = [Product(f"P{i}", f"{attribute} {i}", "", "t", attribute, f"{i % 3}")
                for attribute in ("A", "B") for i in range(20)]

    def partners(seed, number):
        epoch, found = Epoch(products, seed, number, ratio=2), {}
        for e in (epoch[n] for n in range(len(epoch))):
            if len(e.photos) == 2:
                found.setdefault(e.photos[0], []).append(e.photos[1])
        return {first: sorted(seconds) for first, seconds in found.items()}

    first = partners(0, 0)
    assert first == partners(0, 0) and first != partners(1, 0) and first != partners(0, 1)
    assert sum(a != b for a, b in first.values()) > 30
    assert {n: [s.replace("B", "A") for s in first[f"B {n}"]] for n in range(20)} != {n: first[f"A {n}"] for n in range(20)}


def test_a_product_without_peers_is_not_compared():
    epoch = Epoch([SHORT, Product("B", "b.jpg", "", "t", "Neckline", "Cowl")], 0, 0)
    assert sorted(len(epoch[i].photos) for i in range(len(epoch))) == [1, 1]
    epoch = Epoch([SHORT, LONG], 0, 0)                  # one peer is enough
    assert sorted(len(epoch[i].photos) for i in range(len(epoch))) == [1, 1, 2, 2]


def test_where_some_are_compared_they_are_drawn_for_each_epoch():
    def compared(number):
        epoch = Epoch(many(), 0, number, ratio=0.25)
        return {e.photos[0] for e in (epoch[i] for i in range(len(epoch))) if len(e.photos) == 2}
    assert [len(compared(number)) for number in range(3)] == [10] * 3
    assert compared(0) == compared(0) != compared(1) != compared(2)


# ------------------------------------------------------------------------------------------------ labels, ids


def test_few_labels_are_so_many_a_value_and_a_part_of_more():
    products = many(60)
    ten, five = sample_labels(products, 10, seed=1), sample_labels(products, 5, seed=1)
    counts = Counter((p.attribute, p.value) for p in five)
    assert set(counts.values()) == {5} and len(counts) == 6
    assert set(five) < set(ten) and [p for p in products if p in five] == five
    assert sample_labels(products, 5, seed=2) != five
    assert sample_labels(products, None, 0) == products
    assert len(sample_labels(products, 1000, 0)) == 60


def test_rows_join_prompt_and_answer_where_they_were_cut(tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    examples = [base_question(SHORT), comparison(SHORT, LONG, "judge_last"), base_question(LONG)]
    rows, photos = encode_examples(examples, tokenizer)
    assert photos == ["a1.jpg", "a2.jpg"]
    assert [row.photos for row in rows] == [(0,), (0, 1), (1,)]
    for row, example in zip(rows, examples):
        assert tokenizer.decode(row.prompt) == example.prompt
        assert tokenizer.decode(row.answer[:-1]) == example.answer
        assert row.answer[-1] == tokenizer.eos_id and len(row.answer) > 1
    assert encode_examples(examples, tokenizer, image=False)[0][0].photos == ()


def test_an_answer_is_a_new_word_after_its_prompt(tmp_path):
    """With a tokenizer that adds no space by itself, as SmolLM2's: else the answer would read "Answer:Flat"."""
    tokenizer = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=False))
    assert not tokenizer.adds_space
    ids = encode_answer("Flat", tokenizer)
    assert tokenizer.decode(tokenizer.encode("Answer:") + ids[:-1]) == "Answer: Flat"
    assert ids == tokenizer.encode(" Flat") + [tokenizer.eos_id]


def test_a_context_is_title_and_category_as_far_as_there_are():
    assert SHORT.context == "Jersey Tee, Shirts"
    assert dataclasses.replace(SHORT, title="").context == "Shirts"
    assert dataclasses.replace(SHORT, category="").context == "Jersey Tee"


@pytest.mark.parametrize("field", ["id", "image", "category", "title", "attribute", "value"])
def test_a_fingerprint_depends_on_every_field(field):
    assert fingerprint([dataclasses.replace(SHORT, **{field: "other"})]) != fingerprint([SHORT])


def test_values_and_fingerprint():
    assert values_of([LONG, SHORT, SHORT2]) == {"Sleeve Style": ["Long Sleeve", "Short Sleeve"]}
    assert fingerprint([LONG, SHORT]) != fingerprint([SHORT, LONG])


# ------------------------------------------------------------------------------------------------ reading

HEADER = "id\timages\tcategory\ttexts\tattribute_names\tattribute_values\n"
LINE = "B1\tB1.jpg\tShoes\t[Title] A  \"\"quoted\"\" shoe\tBoot Style\tChelsea\n"


def tsv(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "x.tsv"
    path.write_bytes(text.encode(encoding))
    return path


def test_a_line_becomes_a_product(tmp_path):
    path = tsv(tmp_path, HEADER + 'B1\tB1.jpg\tShoes\t"[Title] 6""  Heel\tpump"\tBoot Style\tChelsea\n')
    assert list(Products(path)) == [Product("B1", "B1.jpg", "Shoes", '6" Heel pump', "Boot Style", "Chelsea")]


def test_columns_may_stand_in_any_order(tmp_path):
    path = tsv(tmp_path, "attribute_names\tattribute_values\tid\timages\ttexts\tcategory\nBoot Style\tFlat\tB1\t\tA shoe\t\n")
    assert list(Products(path)) == [Product("B1", "", "", "A shoe", "Boot Style", "Flat")]


def test_values_may_be_absent():
    assert product_of({"id": "B1", "texts": " A  shoe", "attribute_names": "Boot Style"}, needed=("id",)) == Product(
        "B1", "", "", "A shoe", "Boot Style", "")


def test_products_are_read_from_the_file_one_by_one(tmp_path):
    """A byte order mark, Windows' line ends, blank lines, and a quoted cell over two lines: any of them by its place."""
    text = (HEADER + LINE + "\n" + 'B2\tB2.jpg\tShoes\t"two\nlines, a ""quote"", größer"\tBoot Style\tChelsea\n'
            + LINE.replace("B1", "B3")).replace("\n", "\r\n")
    products = Products(tsv(tmp_path, text, "utf-8-sig"))
    assert [p.id for p in products] == ["B1", "B2", "B3"] and len(products) == 3
    assert products[1].title == 'two lines, a "quote", größer'
    assert [products[i] for i in (2, 0, 1, -1)] == [list(products)[i] for i in (2, 0, 1, 2)]
    assert products[1:] == list(products)[1:] and list(zip(products, products))[2] == (products[2], products[2])
    assert isinstance(sample_labels(products, 1, 0), list) and sample_labels(products, None, 0) is products


def test_a_file_that_changes_under_a_run_is_an_error(tmp_path):
    path = tsv(tmp_path, HEADER + LINE + LINE)
    products = Products(path)
    path.with_name("new").write_text(HEADER + LINE.replace("B1", "B9") + LINE)
    path.with_name("new").replace(path)                 # another file: places still come from the one that was opened
    assert products[0].id == "B1"
    with pytest.raises(UserError, match="was changed while it is in use"):
        list(products)
    products = Products(path)
    path.write_text(HEADER + LINE)                      # cut off in place
    with pytest.raises(UserError, match="was changed while it is in use"):
        products[1]
    products = Products(path)
    path.write_text(HEADER + LINE.replace("B1", "B2"))  # as long as before
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="was changed while it is in use"):
        products[0]


def test_memory_holds_no_texts(tmp_path):
    """20,000 products with long titles, read, listed by value, and planned for an epoch: a small part of the file."""
    line = "B{0}\tB{0}.jpg\tShoes\t[Title] " + "a long title " * 80 + "\tBoot Style\tChelsea\n"
    path = tsv(tmp_path, HEADER + "".join(line.format(i) for i in range(20_000)))
    tracemalloc.start()
    products = Products(path)
    values_of(products), fingerprint(products)
    epoch = Epoch(products, 0, 0)
    assert len(epoch[5].prompt) > 1000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20e6 and most < 4e6


@pytest.mark.parametrize("cell", ["a\rb", "a\nb", "a\tb", 'a "quoted" word', '"', "", " a", "=1+1", "\0", "\u2028"])
def test_every_cell_is_read_back_as_it_was_written(tmp_path, cell):
    """By our reader, and by Python's csv module."""
    write_tsv(tmp_path / "x.tsv", [[cell, 7, cell]], ["a", "b", "c"])
    with open(tmp_path / "x.tsv", "rb") as file:
        assert list(Reader(file, "x.tsv").cells) == [["a", "b", "c"], [cell, "7", cell]]
    with open(tmp_path / "x.tsv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file, dialect="excel-tab")) == [["a", "b", "c"], [cell, "7", cell]]


@pytest.mark.parametrize("text, said", [
    ("x" * (1 << 24) + "\n", "line 3: has more than 16,777,216 bytes; is this a TSV file, with one product on a line"),
    ('"' + "x\n" * (1 << 23) + "\n", "a quote that is never closed makes one cell of all that follows"),
])
def test_a_cell_of_many_megabytes_is_named(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as caught:
        Products(tsv(tmp_path, HEADER + LINE + text))
    assert "must be quoted" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "..", "/etc/x.jpg", "a\\..\\..\\x.jpg"])
def test_a_photo_outside_of_its_folder_is_named(tmp_path, name):
    with pytest.raises(UserError, match="line 3: images is .*, but must name a file inside ROOT/images/"):
        Products(tsv(tmp_path, HEADER + LINE + f"B2\t{name}\tShoes\t[Title] x\tBoot Style\tChelsea\n"))


@pytest.mark.parametrize("name", ["a/b.jpg", "..a.jpg", "a..jpg", "./a.jpg", ""])
def test_a_photo_inside_its_folder_is_fine(tmp_path, name):
    products = Products(tsv(tmp_path, HEADER + f"B2\t{name}\tShoes\t[Title] x\tBoot Style\tChelsea\n"))
    assert products[0].image == name


@pytest.mark.parametrize("text, said", [
    ("id\timages\n", "line 1: the header lacks category, texts, attribute_names, attribute_values"),
    (HEADER.replace("category", "id").replace("texts", "texts\ttexts\tcategory"),
     "line 1: the header names id, texts more than once"),
    ("", "an empty file"),
    (HEADER, "has a header but no products"),
    (HEADER + LINE + "B2\tB2.jpg\tShoes\n", "line 3: has 3 columns, the header 6"),
    (HEADER + LINE + "B2\tB2.jpg\tShoes\t[Title] x\tBoot Style\t \n", "line 3: attribute_values is empty"),
    (HEADER + "\tB2.jpg\tShoes\t[Title] x\tBoot Style\tChelsea\n", "line 2: id is empty"),
    (HEADER + 'B1\tB1.jpg\tShoes\t"[Title] never closed\tBoot Style\tChelsea\n', "line 2: is not a readable TSV"),
    ("<!DOCTYPE html><html>", "an HTML"),
    ("version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
])
def test_what_does_not_fit_is_named_with_its_line(tmp_path, text, said):
    path = tsv(tmp_path, text)
    with pytest.raises(UserError, match=said) as error:
        Products(path)
    assert str(path) in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    assert len(Products(tsv(tmp_path, HEADER + LINE, "utf-8-sig"))) == 1


def test_other_encodings_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not UTF-8"):
        Products(tsv(tmp_path, HEADER + LINE.replace("Shoes", "Schuhe für"), "latin-1"))


def test_an_unknown_data_set_is_named_with_those_there(data_root):
    with pytest.raises(UserError, match="no data set 'boots' in .*: it holds shoes"):
        read_split(data_root, "boots", "train")
    assert len(read_split(data_root, "shoes", "train")) == 30


def test_prompt_and_answer_are_tokenised_apart():
    """A tokenizer whose pieces are two characters long: tokenised together, "abc" and "de" would share a piece."""
    class Pairs:
        eos_id = 2

        def encode(self, text, new_word=False):
            return [hash(text[i:i + 2]) for i in range(0, len(text), 2)]

    [encoded], _ = encode_examples([Example((), "abc", "de")], Pairs())
    assert encoded.prompt == Pairs().encode("abc") and encoded.answer == [*Pairs().encode("de"), 2]


# ------------------------------------------------------------------------------------------------ duplicates


def test_duplicates_are_counted_and_said_once(capsys):
    """By hand: B1 twice in train with one attribute; val has B2 and the title and photo of B3; test has nothing of them."""
    def product(number, attribute="Boot Style", like=None):
        return Product(f"B{number}", f"{like or number}.jpg", "Shoes", f"title {like or number}", attribute, "Chelsea")

    note_duplicates({"train": [product(1), product(2), product(3), product(1), product(1, "Heel Height")],
                  "val": [product(2), product(7, like=3)], "test": [product(8), product(9)]})
    assert capsys.readouterr().err.splitlines() == [
        "note: 1 of 5 products of train repeat the id and attribute of another, e.g. 'B1'",
        "note: 1 of 2 products of val have the id of a product of train, e.g. 'B2'",
        "note: 2 of 2 products of val have the title and photo of a product of train, e.g. 'B2'"]


def test_duplicates_take_little_memory(capsys):
    """20,000 products a split, made as they are read: hashes of 8 bytes are kept, no texts (of 13 MB)."""
    class Many:
        def __init__(self, first):
            self.first = first

        def __len__(self):
            return 20_000

        def __iter__(self):
            return (self[i] for i in range(len(self)))

        def __getitem__(self, i):
            return Product(f"B{self.first + i}", f"{self.first + i}.jpg", "", "a long title " * 50, "Boot Style", "Chelsea")

    tracemalloc.start()
    note_duplicates({"train": Many(0), "test": Many(15_000)})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3e6
    assert "note: 5,000 of 20,000 products of test have the id of a product of train, e.g. 'B15000'" in capsys.readouterr().err
