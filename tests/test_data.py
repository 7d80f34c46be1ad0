"""The texts of figure 3 letter for letter, epochs, few labels, and files of products."""

import csv
import io
import re
from collections import Counter
from dataclasses import fields, replace

import pytest
from conftest import train_tokenizer

from base.console import UserError
from base.tsv import COLUMNS, read_rows, write_tsv
from data import (Example, Product, base_question, comparison, encode_examples, epoch, fingerprint, hold_out,
                  product_of, read_products, read_split, sample_labels, values_of, without)
from llama import Tokenizer

TEE = Product("A1", "a1.jpg", "Shirts", "Jersey Tee", "Sleeve Style", "Short Sleeve")
GOWN = Product("A2", "a2.jpg", "Dresses", "Evening Gown", "Sleeve Style", "Long Sleeve")
POLO = Product("A3", "a3.jpg", "", "Polo", "Sleeve Style", "Short Sleeve")

# ---------------------------------------------------------------------------------------- figure 3


def test_base():
    question = "Question: What is the Sleeve Style of this product?"
    prompt = f"{question}\nContext: Jersey Tee, Shirts\nAnswer:"
    assert base_question(TEE) == Example(("a1.jpg",), prompt, "Short Sleeve")
    assert base_question(TEE, text=False).prompt == f"{question}\nAnswer:"


@pytest.mark.parametrize("strategy, ask_first, question, different, same", [
    ("judge_last", False, "What is the Sleeve Style of these two products? Are they the same?",
     "First: Long Sleeve; Second: Short Sleeve; No.", "First: Short Sleeve; Second: Short Sleeve; Yes."),
    ("judge_first", False, "Do these two products have the same Sleeve Style? Why?",
     "No; First: Long Sleeve; Second: Short Sleeve.", "Yes; First: Short Sleeve; Second: Short Sleeve."),
    ("better_instance", False, "Which product's Sleeve Style is Short Sleeve?",
     "Second product has Short Sleeve.", "Both products have Short Sleeve."),
    ("better_instance", True, "Which product's Sleeve Style is {}?",
     "First product has Long Sleeve.", "Both products have Short Sleeve."),
])
def test_comparisons(strategy, ask_first, question, different, same):
    for first, answer in ((GOWN, different), (TEE, same)):
        prompt = (f"Question: {question.format(first.value)}\nFirst: {first.title}, {first.category}\n"
                  "Second: Polo\nAnswer:")
        expected = Example((first.image, "a3.jpg"), prompt, answer)
        assert comparison(first, POLO, strategy, ask_first=ask_first) == expected
        assert comparison(first, POLO, strategy, text=False).prompt.count("\n") == 1


# ---------------------------------------------------------------------------------------- epochs


def shoes(n=40):
    """Products, a fourth of them with another attribute."""
    return [Product(f"P{i}", f"{i}.jpg", "", f"title {i}", "Heel" if i % 4 else "Toe", f"v{i % 3}")
            for i in range(n)]


def pairs(examples):
    """The photos of each comparison."""
    return [e.photos for e in examples if len(e.photos) == 2]


@pytest.mark.parametrize("strategy, ratio, comparisons", [
    ("judge_last", 1.0, 40), ("none", 1.0, 0), ("judge_first", 2.5, 100), ("judge_last", 0.19, 8)])
def test_an_epoch_shows_each_product_once_and_compares_it(strategy, ratio, comparisons):
    examples = epoch(shoes(), 0, 0, strategy, ratio)
    base = [e for e in examples if len(e.photos) == 1]
    assert sorted(base) == sorted(map(base_question, shoes()))
    times = Counter(first for first, _ in pairs(examples))
    assert times.total() == comparisons
    assert all(int(ratio) <= times[p.image] <= int(ratio) + 1 or strategy == "none" for p in shoes())


def test_a_partner_is_any_other_product_with_the_attribute():
    """Product 0 has nine: a chi-square test of 200 draws with 8 degrees of freedom, p = 0.001."""
    drawn = [pair for number in range(200) for pair in pairs(epoch(shoes(), 7, number))]
    partners = Counter(second for first, second in drawn if first == "0.jpg")
    assert set(partners) == {f"{i}.jpg" for i in range(4, 40, 4)}
    assert sum((n - 200 / 9) ** 2 / (200 / 9) for n in partners.values()) < 26.1


def test_the_seed_the_epoch_and_the_product_decide_alone():
    """The order, who is compared, and with whom; each draw is one of its own, also that of a repetition."""
    examples = epoch(shoes(), 0, 3)
    assert examples == epoch(shoes(), 0, 3)
    for other in (epoch(shoes(), 0, 4), epoch(shoes(), 1, 3)):
        assert set(pairs(examples)) != set(pairs(other))
        assert [e.photos[0] for e in examples] != [e.photos[0] for e in other]
    half, other = ({first for first, _ in pairs(epoch(shoes(), 0, number, ratio=0.5))} for number in (3, 4))
    assert half != other
    assert len(set(pairs(epoch(shoes(), 0, 0, ratio=2)))) > 70      # of 80: a few were drawn twice


def test_better_instance_asks_for_either_product_as_often():
    answers = Counter(e.answer.split()[0] for e in epoch(shoes(400), 0, 0, "better_instance") if e.photos[1:])
    assert 90 < answers["First"] < 180
    assert 90 < answers["Second"] < 180                 # of some 267 pairs with different values


def test_a_product_without_peers_is_not_compared():
    assert pairs(epoch([TEE, replace(GOWN, attribute="Neckline")], 0, 0)) == []
    assert sorted(pairs(epoch([TEE, GOWN], 0, 0))) == [("a1.jpg", "a2.jpg"), ("a2.jpg", "a1.jpg")]


# ---------------------------------------------------------------------------------------- labels, ids


def test_few_labels_are_so_many_a_value_and_a_part_of_more():
    products = shoes(60)
    five = sample_labels(products, 5, seed=1)
    assert set(Counter((p.attribute, p.value) for p in five).values()) == {5}
    assert five == [p for p in products if p in five]
    assert set(five) < set(sample_labels(products, 10, seed=1))
    assert sample_labels(products, 5, seed=2) != five != products[:len(five)]
    assert sample_labels(products, None, 0) == sample_labels(products, 1000, 0) == products


def test_values_are_held_out_by_seed_and_two_always_stay():
    values = {"A": list("abcdefgh"), "B": list("xyz"), "C": ["one", "two"]}
    held_out = hold_out(values, 3, seed=0)
    assert [(attribute, len(names)) for attribute, names in held_out.items()] == [("A", 3), ("B", 1)]
    assert held_out["A"] != hold_out(values, 3, seed=1)["A"]
    products = [Product("1", "", "", "", attribute, held_out["A"][0]) for attribute in "AB"]
    assert without(products, held_out) == products[1:]  # a value is held out of its own attribute
    with pytest.raises(UserError, match="--holdout-values 1"):
        hold_out({"C": ["one", "two"]}, 1, 0)
    assert values_of([GOWN, TEE, POLO]) == {"Sleeve Style": ["Long Sleeve", "Short Sleeve"]}


def test_prompt_and_answer_are_tokenised_apart(tmp_path):
    """The answer is a new word, also with a tokenizer that adds no space by itself, such as SmolLM2's."""
    tokenizer = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=False))
    examples = [base_question(TEE), comparison(TEE, GOWN, "judge_last"), base_question(GOWN)]
    encoded, photos = encode_examples(examples, tokenizer)
    assert photos == ["a1.jpg", "a2.jpg"]
    assert [e.photos for e in encoded] == [(0,), (0, 1), (1,)]
    for ids, example in zip(encoded, examples, strict=True):
        assert ids.answer[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids.prompt + ids.answer[:-1]) == f"{example.prompt} {example.answer}"
    assert encode_examples(examples, tokenizer, image=False)[1] == []


class Merging:
    """A tokenizer whose colon takes the start of the next word with it."""

    eos_id = "end"

    def encode(self, text, new_word=False):
        return re.findall(r": \w|.", " " + text if new_word else text, re.DOTALL)


def test_an_answer_begins_where_its_prompt_ends():
    """Tokenised together, the first letter of the answer would belong to the prompt, and not be learned."""
    [example], _ = encode_examples([Example((), "Answer:", "Red")], Merging())
    assert example.prompt == list("Answer:")
    assert example.answer == [" ", "R", "e", "d", "end"]


def test_a_fingerprint_depends_on_every_cell_the_order_and_the_photos():
    keys = {"a1.jpg": "x", "a2.jpg": "x"}
    known = {fingerprint([TEE, GOWN], {}), fingerprint([GOWN, TEE], {}), fingerprint([TEE, GOWN], keys)}
    known |= {fingerprint([TEE, replace(GOWN, **{f.name: "x"})], {}) for f in fields(Product)}
    known |= {fingerprint([TEE, GOWN], keys | {"a2.jpg": "y"})}
    assert len(known) == 10
    assert fingerprint([TEE, GOWN], {}) in known


# ---------------------------------------------------------------------------------------- files

HEADER = "\t".join(COLUMNS) + "\n"
LINE = "B1\tB1.jpg\tShoes\t[Title] A shoe\tBoot Style\tChelsea\n"


@pytest.fixture
def tsv(tmp_path):
    """Writes a file of this text; its path."""
    def write(text):
        path = tmp_path / "x.tsv"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return path
    return write


def test_a_file_of_products(tsv):
    """A byte order mark, Windows' line ends, columns in any order, blank lines, a cell over two lines."""
    text = ("\ufeffAttribute_Names\tattribute_values\tid\timages\tmore\ttexts\tcategory\n\n"
            'Boot  Style\t Flat\t SKU  7\t./..a/\u202f  b...jpg\t\t"[Title] 6""\n heel,\tgrößer"\t\n'
            "Boot Style\tFlat\tSKU 7\t\t\tshoe\tShoes\n")
    assert read_products(tsv(text.replace("\n", "\r\n"))) == [
        Product(" SKU  7", "./..a/\u202f  b...jpg", "", '6" heel, größer', "Boot Style", "Flat"),
        Product("SKU 7", "", "Shoes", "shoe", "Boot Style", "Flat")]
    assert product_of({"texts": "[Title]  x"}, needed=()) == Product("", "", "", "x", "", "")


@pytest.mark.parametrize("text, said", [
    ("id\timages\n", "line 1, the header .* lacks category, texts, attribute_names, attribute_values"),
    (HEADER, "has a header but no products"),
    (HEADER + LINE + "B2\tB2.jpg\tShoes\n", "line 3: has 3 cells, the header 6"),
    (HEADER + LINE + LINE.replace("Chelsea", " "), "line 3: attribute_values is empty"),
    (HEADER + LINE[2:], "line 2: id is empty"),
    (HEADER + LINE + LINE.replace("A shoe", "f\udcfcr"), "line 3: is not UTF-8"),
    (HEADER + LINE.replace("B1.jpg", "a\\..\\x.jpg"), "line 2: images is"),
    (HEADER + LINE.replace("B1.jpg", "/etc/x.jpg"), "line 2: images is"),
])
def test_what_does_not_fit_is_named_with_its_line(tsv, text, said):
    path = tsv(text)
    with pytest.raises(UserError, match=f"^{path}.*{said}"):
        read_products(path)


def test_an_unknown_data_set_is_named_with_those_there(data_root):
    with pytest.raises(UserError, match="no data set 'boots' in .*: it holds shoes"):
        read_split(data_root, "boots", "train")
    assert len(read_split(data_root, "shoes", "test")) == 15


@pytest.mark.parametrize("column", (0, 5))
@pytest.mark.parametrize("cells, wrong", [
    (['"Lumen pillow', "red", 'cushion 18"', "blue"], [1, 0, 0, 0]),
    (["red", '"Lumen" pillow', "blue"], [0, 1, 0]),     # closed too early
    (["red", '"'], [0, 1]),                             # never closed
    (['"Lumen', '"pillow', '18""', "blue"], [1, 1, 0, 0]),
    (['"Lumen\nred', "blue", 'red"'], [1, 0, 0]),
    (['"two\n\nlines"', '6"', '"6""\t"', '""', '"a\n""b"""'], [0] * 5),
])
def test_a_quote_swallows_no_rows(cells, wrong, column):
    """Each row is read, or is an error at the line where its quote opens, whatever column holds the quote."""
    text = HEADER
    first_lines = []
    for cell in cells:
        first_lines.append(text.count("\n") + 1)
        text += "\t".join([*"abcdef"[:column], cell, *"bcdef"[column:]]) + "\n"
    rows = dict(read_rows(text.splitlines(keepends=True)))
    assert ["a quote which is not closed" in str(rows[line]) for line in first_lines] == wrong


def test_with_commas_a_quote_swallows_at_most_one_row():
    """There two lines may well look like rows; and a text of more lines is read."""
    lines = ["id,title,x\n", 'a,"open,1\n', "b,red,2\n", 'c,18",3\n']
    _, *others = dict(read_rows(lines, ["id"], ",")).values()
    assert [row["id"] for row in others] == ["b", "c"]
    text = '"dry\nwarm, soft\nlight, red"'
    [(_, row)] = read_rows(f"id,title\na,{text}\n".splitlines(True), ["id"], ",")
    assert row["title"] == text[1:-1]


@pytest.mark.parametrize("cell", ["a\rb", "a\nb", "a\tb", 'a "quoted" word', '"', "", "\u2028"])
def test_every_cell_is_read_back_as_it_was_written(tmp_path, cell):
    """By our reader, and by Python's csv module."""
    write_tsv(tmp_path / "x.tsv", [[cell, 7, cell]], "abc")
    text = (tmp_path / "x.tsv").read_bytes().decode()
    assert list(csv.reader(io.StringIO(text, ""), "excel-tab"))[1:] == [[cell, "7", cell]]
    assert list(read_rows(io.StringIO(text, ""), "abc")) == [(2, {"a": cell, "b": "7", "c": cell})]
