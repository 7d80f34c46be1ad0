"""Products, few labels, questions and answers, and Learning-by-Comparison (section 2.3 and figure 3).

A data set is a folder ROOT/NAME/ with train.tsv, val.tsv and test.tsv, and photos in ROOT/images/.
Nothing here knows of models: a tokenizer is anything with `encode` and `eos_id`.
"""

import csv
import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from console import UserError
from weights import check_file

COLUMNS = ("id", "images", "category", "texts", "attribute_names", "attribute_values")
STRATEGIES = ("judge_last", "judge_first", "better_instance", "none")


@dataclass(frozen=True, slots=True)
class Product:
    """One line of a data set: a product and one of its attributes.  value is the label, "" where nobody knows it."""

    id: str
    image: str                                          # file name in ROOT/images/
    category: str
    title: str
    attribute: str
    value: str

    @property
    def context(self):
        """C, the text context: title and category."""
        return f"{self.title}, {self.category}" if self.category else self.title


class Example(NamedTuple):
    """A question as text: photos (file names) for I, the prompt for Q and C, and the answer R."""

    photos: tuple
    prompt: str
    answer: str


class Row(NamedTuple):
    """An Example as numbers: photos are places in the batch's features, prompt and answer are ids."""

    photos: tuple
    prompt: list
    answer: list


# ------------------------------------------------------------------------------------------------ reading, sampling


def read_products(path, labelled=True):
    """The products of a TSV file, in its order, as a list; UserError as `iterate_products`, or if there are none."""
    products = list(iterate_products(path, labelled))
    if not products:
        raise UserError(f"{path}: has a header but no products")
    return products


def iterate_products(path, labelled=True):
    """The products of a TSV file, one at a time.  UserError with file and line for what does not fit.

    labelled  whether every line must have a value; without, a missing or empty value is ""
    """
    path = Path(path)
    check_file(path, "a data set's TSV")
    csv.field_size_limit(1 << 24)
    needed = COLUMNS if labelled else COLUMNS[:-1]
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, dialect="excel-tab", strict=True)
        try:
            header = next(lines, [])
            absent = [name for name in needed if name not in header]
            if absent:
                raise UserError(f"{path}, line 1: the header lacks {', '.join(absent)}; it must name the columns "
                                f"{' '.join(needed)}, separated by tabs")
            place = {name: header.index(name) for name in COLUMNS if name in header}
            for cells in lines:
                if not cells:
                    continue
                where = f"{path}, line {lines.line_num}"
                if len(cells) != len(header):
                    raise UserError(f"{where}: has {len(cells)} columns, the header {len(header)}; "
                                    "cells with a tab, a newline or a quote in them must be quoted")
                cell = {name: " ".join(cells[i].split()) for name, i in place.items()}
                empty = [n for n in ("id", "attribute_names", "attribute_values") if n in needed and not cell.get(n)]
                if empty:
                    raise UserError(f"{where}: {empty[0]} is empty")
                yield Product(cell["id"], cell["images"], cell["category"],
                              cell["texts"].removeprefix("[Title]").strip(),
                              cell["attribute_names"], cell.get("attribute_values", ""))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {lines.line_num}: is not UTF-8 text ({error.reason})") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {lines.line_num}: is not a readable TSV ({error}); "
                            "cells with a quote in them must be quoted as Python's csv module does it") from None


def read_split(root, dataset, split):
    """The products of ROOT/DATASET/SPLIT.tsv."""
    folder = Path(root) / dataset
    if not folder.is_dir():
        known = sorted(p.parent.name for p in Path(root).glob("*/train.tsv"))
        raise UserError(f"there is no data set {dataset!r} in {root}: it holds {', '.join(known) or 'none'}. "
                        "A data set is a folder with train.tsv, val.tsv and test.tsv (see README)")
    return read_products(folder / f"{split}.tsv")


def values_of(products):
    """{attribute: its values, sorted}: the answers that a data set knows."""
    found = defaultdict(set)
    for product in products:
        found[product.attribute].add(product.value)
    return {attribute: sorted(values) for attribute, values in sorted(found.items())}


def sample_labels(products, labels, seed):
    """`labels` products of each attribute value (all, where there are fewer, or where labels is None), in file order.

    The draw depends on the seed and the value alone, and fewer labels are a part of more labels.
    """
    if labels is None:
        return products
    by_value = defaultdict(list)
    for i, product in enumerate(products):
        by_value[product.attribute, product.value].append(i)
    chosen = []
    for (attribute, value), places in by_value.items():
        random.Random(f"labels {seed} {attribute} {value}").shuffle(places)
        chosen += places[:labels]
    return [products[i] for i in sorted(chosen)]


def fingerprint(products):
    """A short hash of products and their order, so that a run can tell that its data changed."""
    digest = hashlib.sha256()
    for p in products:
        digest.update("\t".join((p.id, p.image, p.category, p.title, p.attribute, p.value)).encode() + b"\n")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ figure 3


def base_question(product, text=True):
    """The question that is asked in training, validation and test alike: [I, Q, C] and the value."""
    context = [f"Context: {product.context}"] if text else []
    return example((product,), f"What is the {product.attribute} of this product?", context, product.value)


def comparison(first, second, strategy, text=True, ask_first=False):
    """Learning-by-Comparison, figure 3: [I, I', Q, C, C'] for two products with the same attribute.

    ask_first  better_instance asks for the first product's value rather than the second's
    """
    A, v1, v2 = first.attribute, first.value, second.value
    same = v1 == v2
    if strategy == "judge_last":
        question = f"What is the {A} of these two products? Are they the same?"
        answer = f"First: {v1}; Second: {v2}; {'Yes' if same else 'No'}."
    elif strategy == "judge_first":
        question = f"Do these two products have the same {A}? Why?"
        answer = f"{'Yes' if same else 'No'}; First: {v1}; Second: {v2}."
    elif strategy == "better_instance":
        value = v1 if ask_first else v2
        question = f"Which product's {A} is {value}?"
        answer = f"Both products have {value}." if same else f"{'First' if ask_first else 'Second'} product has {value}."
    else:
        raise ValueError(f"no such comparison: {strategy!r}; there are {', '.join(STRATEGIES[:-1])}")
    context = [f"First: {first.context}", f"Second: {second.context}"] if text else []
    return example((first, second), question, context, answer)


def example(products, question, context, answer):
    """Q, then C, then the mark after which the answer stands."""
    return Example(tuple(p.image for p in products), "\n".join([f"Question: {question}", *context, "Answer:"]), answer)


class Epoch:
    """The examples of one epoch: each product once as base and `ratio` times as the first of a comparison, shuffled.

    Everything depends on (seed, number) and, for a partner, the product: a resumed run meets the same examples.
    A ratio that is no whole number compares a random part of the products once more.
    """

    def __init__(self, products, seed, number, strategy="judge_last", ratio=1.0, text=True):
        self.products, self.seed, self.number, self.strategy, self.text = products, seed, number, strategy, text
        self.peers = defaultdict(list)                  # attribute -> products that have it
        for i, product in enumerate(products):
            self.peers[product.attribute].append(i)
        self.place = {i: k for same in self.peers.values() for k, i in enumerate(same)}
        draw = np.random.default_rng([seed, number])
        lonely = {i for same in self.peers.values() if len(same) == 1 for i in same}    # nothing to compare with
        compared = [] if strategy == "none" else [i for i in draw.permutation(len(products)).tolist() if i not in lonely]
        wanted = round(ratio * len(compared))
        plan = [(i, None) for i in range(len(products))]
        plan += [(compared[n % len(compared)], n // len(compared)) for n in range(wanted)]
        self.plan = [plan[i] for i in draw.permutation(len(plan)).tolist()]

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, n):
        i, repeat = self.plan[n]
        product = self.products[i]
        if repeat is None:
            return base_question(product, self.text)
        draw = random.Random(f"partner {self.seed} {self.number} {product.id} {product.attribute} {repeat}")
        peers = self.peers[product.attribute]
        k = draw.randrange(len(peers) - 1)              # uniform among the others
        partner = self.products[peers[k + (k >= self.place[i])]]
        return comparison(product, partner, self.strategy, self.text, ask_first=draw.random() < 0.5)


# ------------------------------------------------------------------------------------------------ numbers


def answer_ids(answer, tokenizer):
    """R: an answer as ids, with its end token."""
    return tokenizer.encode(answer, new_word=True) + [tokenizer.eos_id]


def rows_of(examples, tokenizer, image=True):
    """(rows, photos): the examples as ids, and the file names of the photos that they mention, each once.

    Prompt and answer are tokenised apart and their ids joined, so that the border between them is where it is said
    to be.  image: whether photos are mentioned at all.
    """
    photos, rows = {}, []
    for e in examples:
        places = tuple(photos.setdefault(name, len(photos)) for name in e.photos) if image else ()
        rows.append(Row(places, tokenizer.encode(e.prompt), answer_ids(e.answer, tokenizer)))
    return rows, list(photos)
