"""Products, questions and answers, Learning-by-Comparison (section 2.3 and figure 3), few-shot sampling, and data sets.

A data set is a folder ROOT/NAME/ with train.tsv, val.tsv and test.tsv, and photos in ROOT/images/.
This file knows nothing about models: a tokenizer is anything with `encode` and `eos_id`.
"""

import hashlib
import os
import random
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.checkpoint import check_file
from base.console import Progress, UserError
from base.tsv import COLUMNS, Reader, stays_inside

STRATEGIES = ("judge_last", "judge_first", "better_instance", "none")


@dataclass(frozen=True, slots=True)
class Product:
    """One line of a data set: a product and one of its attributes.  value is its label, "" if it has none."""

    id: str
    image: str                                          # file name in ROOT/images/
    category: str
    title: str
    attribute: str
    value: str

    @property
    def context(self):
        """C, the text context: title and category."""
        return ", ".join(part for part in (self.title, self.category) if part)


class Example(NamedTuple):
    """A question as text: photos (file names) for I, the prompt for [Q, C], and the answer R."""

    photos: tuple
    prompt: str
    answer: str


class Encoded(NamedTuple):
    """An Example as numbers: photos are indices into the photos of its batch, prompt and answer are ids."""

    photos: tuple
    prompt: list
    answer: list


# ------------------------------------------------------------------------------------------------ figure 3


def base_question(product, text=True):
    """Figure 3, Base: [I, Q, C], and the value as the answer R.  Used in training, validation and test."""
    context = [f"Context: {product.context}"] if text else []
    return build_example((product,), f"What is the {product.attribute} of this product?", context, product.value)


def comparison(first, second, strategy, text=True, ask_first=False):
    """Learning-by-Comparison, figure 3: [I, I', Q, C, C'] for two products with the same attribute.  Training only.

    ask_first  better_instance asks for the value of the first product, not of the second.  Figure 3 shows only the second;
               if it were always the second, the answer could be given without looking.

    An example of judge_last:
        Question: What is the Boot Style of these two products? Are they the same?
        First: Rubber boot for rainy days, Shoes
        Second: Elastic sided ankle boot, Shoes
        Answer: First: Rain Boots; Second: Chelsea; No.
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
    return build_example((first, second), question, context, answer)


def build_example(products, question, context, answer):
    """The prompt template, which the paper does not give: Q, then C, then the line "Answer:"."""
    return Example(tuple(p.image for p in products), "\n".join([f"Question: {question}", *context, "Answer:"]), answer)


class Epoch:
    """The examples of one epoch, shuffled.  Each product gives one base question and `ratio` comparisons, each with a random
    other product of the same attribute.  With a fractional ratio, a random subset gives one comparison more.

    Everything depends only on the seed, the number of the epoch and the product, so a resumed run sees the same examples.
    """

    def __init__(self, products, seed, number, strategy="judge_last", ratio=1.0, text=True):
        self.products, self.seed, self.number, self.strategy, self.text = products, seed, number, strategy, text
        known = {}                                      # attribute -> its number
        numbers = (known.setdefault(p.attribute, len(known)) for p in products)
        self.attribute = np.fromiter(numbers, np.int32, len(products))
        count = np.bincount(self.attribute)
        self.peers = np.split(np.argsort(self.attribute, kind="stable"), np.cumsum(count)[:-1])    # for each attribute
        self.place = np.empty(len(products), np.int64)  # of a product among its peers
        for same in self.peers:
            self.place[same] = np.arange(len(same))
        draw = np.random.default_rng([seed, number])
        self.compared = np.empty(0, np.int64)
        if strategy != "none":
            shuffled = draw.permutation(len(products))
            self.compared = shuffled[count[self.attribute[shuffled]] > 1]       # only products that have a peer
        self.plan = draw.permutation(len(products) + round(ratio * len(self.compared)))

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, n):
        planned = int(self.plan[n])
        if planned < len(self.products):
            return base_question(self.products[planned], self.text)
        repeat, k = divmod(planned - len(self.products), len(self.compared))
        i = int(self.compared[k])
        product = self.products[i]
        draw = random.Random(f"partner {self.seed} {self.number} {product.id} {product.attribute} {repeat}")
        peers = self.peers[self.attribute[i]]
        j = draw.randrange(len(peers) - 1)              # uniform, without the product itself
        partner = self.products[int(peers[j + (j >= self.place[i])])]
        return comparison(product, partner, self.strategy, self.text, ask_first=draw.random() < 0.5)


# ------------------------------------------------------------------------------------------------ ids


def encode_answer(answer, tokenizer):
    """R: an answer as ids, with EOS."""
    return tokenizer.encode(answer, new_word=True) + [tokenizer.eos_id]


def encode_examples(examples, tokenizer, image=True):
    """(examples as ids, the file names of their photos, each once).

    Prompt and answer are tokenised separately and their ids joined, so the answer starts exactly where the prompt ends.
    image  False: leave the photos out
    """
    photos, encoded = {}, []
    for e in examples:
        indices = tuple(photos.setdefault(name, len(photos)) for name in e.photos) if image else ()
        encoded.append(Encoded(indices, tokenizer.encode(e.prompt), encode_answer(e.answer, tokenizer)))
    return encoded, list(photos)


# ------------------------------------------------------------------------------------------------ few-shot sampling


def sample_labels(products, labels, seed):
    """`labels` products of each attribute value (all of them if there are fewer, or if labels is None), in file order.

    It depends only on the seed and the value; a smaller sample is a subset of a larger one.
    """
    if labels is None:
        return products
    by_value = defaultdict(list)
    for i, product in enumerate(products):
        by_value[product.attribute, product.value].append(i)
    chosen = []
    for (attribute, value), indices in by_value.items():
        random.Random(f"labels {seed} {attribute} {value}").shuffle(indices)
        chosen += indices[:labels]
    return [products[i] for i in sorted(chosen)]


# ------------------------------------------------------------------------------------------------ reading data sets


def read_split(root, dataset, split):
    """The products of ROOT/DATASET/SPLIT.tsv."""
    folder = Path(root) / dataset
    if not folder.is_dir():
        known = sorted(p.parent.name for p in Path(root).glob("*/train.tsv"))
        raise UserError(f"there is no data set {dataset!r} in {root}: it holds {', '.join(known) or 'none'}. "
                        "A data set is a folder with train.tsv, val.tsv and test.tsv (see README)")
    return Products(folder / f"{split}.tsv")


def check_header(header, required=COLUMNS):
    """ValueError if the header of a TSV does not name each required column, or names one of COLUMNS more than once."""
    absent = [name for name in required if name not in header]
    if absent:
        raise ValueError(f"the header lacks {', '.join(absent)}; it must name the columns {' '.join(required)}, "
                         "separated by tabs")
    twice = sorted({name for name in COLUMNS if header.count(name) > 1})
    if twice:
        raise ValueError(f"the header names {', '.join(twice)} more than once; each column must have its own name")


def named_cells(cells, header):
    """{column: text} of a TSV's line; ValueError if it has not as many cells as the header."""
    if len(cells) != len(header):
        raise ValueError(f"has {len(cells)} columns, the header {len(header)}; "
                         "cells with a tab, a newline or a quote in them must be quoted")
    return dict(zip(header, cells))


def product_of(cells, needed):
    """The Product of {column: text}.  White space is collapsed; a column that is absent is "".

    ValueError if a needed cell is empty, or if the photo would not be inside the images' folder.
    """
    id, image, category, title, attribute, value = (" ".join(cells.get(name, "").split()) for name in COLUMNS)
    empty = [name for name in needed if not cells.get(name, "").strip()]
    if empty:
        raise ValueError(f"{empty[0]} is empty")
    if not stays_inside(image):
        raise ValueError(f"images is {image!r}, but must name a file inside ROOT/images/")
    return Product(id, image, category, title.removeprefix("[Title]").strip(), attribute, value)


class Products(Sequence):
    """The products of a TSV file, in file order.  Only the offset of each line is kept in memory, and a line is read when it
    is used, so a million products need little more memory than a thousand.

    Every line is read and checked once at the start.  UserError with file and line for a bad line, or if there are none.
    """

    def __init__(self, path):
        self.path = Path(path)
        check_file(self.path, "a data set's TSV")
        self.file = open(self.path, "rb")
        self.version = file_version(self.file)
        lines = Reader(self.file, self.path)
        self.header = next(lines.cells, [])
        try:
            check_header(self.header)
        except ValueError as error:
            raise UserError(f"{self.path}, line 1: {error}") from None
        self.starts = array("q")                        # byte offset of each product's line
        self.first = start = lines.end
        with Progress(f"reading {self.path.name}", unit="products") as progress:
            for cells in lines.cells:
                if cells:
                    self.product(cells, lines.where)
                    self.starts.append(start)
                    progress.step()
                start = lines.end
        if not self.starts:
            raise UserError(f"{self.path}: has a header but no products")

    def product(self, cells, where):
        """The Product of a line's cells."""
        try:
            return product_of(named_cells(cells, self.header), needed=("id", "attribute_names", "attribute_values"))
        except ValueError as error:
            raise UserError(f"{where()}: {error}") from None

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        with open(self.path, "rb") as file:             # its own file handle, so that loops can be nested
            self.check_unchanged(file)
            file.seek(self.first)
            lines = Reader(file, self.path)
            yield from (self.product(cells, lines.where) for cells in lines.cells if cells)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        self.check_unchanged(self.file)
        self.file.seek(self.starts[i])
        lines = Reader(self.file, self.path)
        return self.product(next(lines.cells), lines.where)

    def check_unchanged(self, file):
        """UserError if the file changed since the start: the offsets would be wrong."""
        if file_version(file) != self.version:
            raise UserError(f"{self.path}: was changed while it is in use; start again")


def file_version(file):
    """Identifies the content of an open file without reading it."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def values_of(products):
    """{attribute: its values, sorted}: the label set of a data set."""
    found = defaultdict(set)
    with Progress("values", len(products), "products") as progress:
        for product in products:
            found[product.attribute].add(product.value)
            progress.step()
    return {attribute: sorted(values) for attribute, values in sorted(found.items())}


def fingerprint(products):
    """A short hash of the products and their order: a run can tell that its data changed."""
    digest = hashlib.sha256()
    with Progress("fingerprint", len(products), "products") as progress:
        for p in products:
            digest.update("\t".join((p.id, p.image, p.category, p.title, p.attribute, p.value)).encode() + b"\n")
            progress.step()
    return digest.hexdigest()[:16]
