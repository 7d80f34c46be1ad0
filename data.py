"""Products, questions and answers, Learning-by-Comparison (section 2.3 and figure 3), few-shot sampling, and
data sets.

A data set is a folder ROOT/NAME/ with train.tsv, val.tsv and test.tsv, and photos in ROOT/images/.
This file knows nothing about models: a tokenizer is anything with `encode` and `eos_id`.
"""

import hashlib
import random
from collections import defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.console import UserError, did_you_mean
from base.tsv import COLUMNS, read_tsv

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


# ---------------------------------------------------------------------------------------- figure 3


def base_question(product, text=True):
    """Figure 3, Base: [I, Q, C], and the value as the answer R.  Used in training, validation and test."""
    question = f"What is the {product.attribute} of this product?"
    context = [f"Context: {product.context}"] if text else []
    return build_example((product,), question, context, product.value)


def comparison(first, second, strategy, text=True, ask_first=False):
    """Learning-by-Comparison, figure 3: [I, I_2, Q, C, C_2] for two products with the same attribute.
    Training only.

    ask_first  better_instance asks for the value of the first product, not of the second.  Figure 3 shows
               only the second; if it were always the second, the answer could be given without looking.

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
        answer = f"{'First' if ask_first else 'Second'} product has {value}."
        if same:
            answer = f"Both products have {value}."
    else:
        raise ValueError(f"no such comparison: {strategy!r}; there are {', '.join(STRATEGIES[:-1])}")
    context = [f"First: {first.context}", f"Second: {second.context}"] if text else []
    return build_example((first, second), question, context, answer)


def build_example(products, question, context, answer):
    """The prompt template, which the paper does not give: Q, then C, then the line "Answer:"."""
    prompt = "\n".join([f"Question: {question}", *context, "Answer:"])
    return Example(tuple(p.image for p in products), prompt, answer)


def epoch(products, seed, number, strategy="judge_last", ratio=1.0, text=True):
    """The examples of one epoch, shuffled: a list of Example.

    Each product gives one base question and `ratio` comparisons, each with another product of the same
    attribute, drawn uniformly.  With a ratio of 0.5, a random half has one.  All draws depend only on the
    seed, the number of the epoch and the product, so a resumed run sees the same examples.
    """
    shuffle = np.random.default_rng([seed, number])
    examples = [base_question(product, text) for product in products]
    if strategy != "none":
        by_attribute = defaultdict(list)                # the indices of its products, in order
        for i, product in enumerate(products):
            by_attribute[product.attribute].append(i)
        order = shuffle.permutation(len(products))
        compared = [i for i in order if len(by_attribute[products[i].attribute]) > 1]
        for k in range(round(ratio * len(compared))):
            repeat, n = divmod(k, len(compared))
            i = compared[n]
            first = products[i]
            draw = random.Random(f"partner {seed} {number} {first.id} {first.attribute} {repeat}")
            peers = by_attribute[first.attribute]
            j = draw.randrange(len(peers) - 1)
            second = products[peers[j if peers[j] < i else j + 1]]      # never the product itself
            examples.append(comparison(first, second, strategy, text, ask_first=draw.random() < 0.5))
    return [examples[i] for i in shuffle.permutation(len(examples))]


# ---------------------------------------------------------------------------------------- ids


def encode_answer(answer, tokenizer):
    """R: an answer as ids, with EOS."""
    return tokenizer.encode(answer, new_word=True) + [tokenizer.eos_id]


def encode_examples(examples, tokenizer, image=True):
    """(examples as ids, the file names of their photos, each once).

    Prompt and answer are tokenised separately and their ids joined, so the answer starts exactly where the
    prompt ends.
    image  False: leave the photos out
    """
    photos, encoded = {}, []
    for e in examples:
        indices = tuple(photos.setdefault(name, len(photos)) for name in e.photos) if image else ()
        encoded.append(Encoded(indices, tokenizer.encode(e.prompt), encode_answer(e.answer, tokenizer)))
    return encoded, list(photos)


# ---------------------------------------------------------------------------------------- few-shot sampling


def sample_labels(products, labels, seed):
    """`labels` products of each attribute value (all of them if there are fewer, or if labels is None), in
    file order.

    It depends only on the seed and the value; a smaller sample is a subset of a larger one.
    """
    if labels is None:
        return products
    by_value = defaultdict(list)
    for i, product in enumerate(products):
        by_value[product.attribute, product.value].append(i)
    sample = []
    for (attribute, value), indices in by_value.items():
        random.Random(f"labels {seed} {attribute} {value}").shuffle(indices)
        sample += indices[:labels]
    return [products[i] for i in sorted(sample)]


def hold_out(values, count, seed):
    """{attribute: `count` of its values} that --holdout-values keeps out of the training; `values` as from
    values_of.

    The draw depends only on the seed and the attribute.  At least two values of each attribute are left to
    train on, so an attribute may have fewer held out.  UserError if count is not 0 and no attribute has a
    value to spare.
    """
    held_out = {}
    for attribute, names in values.items():
        shuffled = random.Random(f"held out {seed} {attribute}").sample(names, len(names))
        if spare := shuffled[:-2][:count]:
            held_out[attribute] = sorted(spare)
    if count and not held_out:
        raise UserError(f"--holdout-values {count}: each attribute of the training data has at most two "
                        "values, and those stay; leave the flag out")
    return held_out


def without(products, held_out):
    """The products whose value is not held out."""
    return [p for p in products if p.value not in held_out.get(p.attribute, ())]


# ---------------------------------------------------------------------------------------- reading data sets


def read_split(root, dataset, split):
    """The products of ROOT/DATASET/SPLIT.tsv."""
    folder = Path(root) / dataset
    if not folder.is_dir():
        names = sorted(path.parent.name for path in Path(root).glob("*/train.tsv"))
        raise UserError(f"there is no data set {dataset!r}{did_you_mean(dataset, names)} in {root}: it holds "
                        f"{', '.join(names) or 'none'}. A data set is a folder with train.tsv, val.tsv and "
                        "test.tsv: build or import one with python -m dataset (docs/data.md), or name "
                        "another folder with --data. Everything from the demo world: --demo")
    return read_products(folder / f"{split}.tsv")


def read_products(path):
    """The products of a TSV file, in file order.  UserError with file and line for whatever is wrong."""
    products = []
    for line, row in read_tsv(path):
        try:
            products.append(product_of(row, needed=("id", "attribute_names", "attribute_values")))
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    if not products:
        raise UserError(f"{path}: has a header but no products")
    return products


def product_of(row, needed):
    """The Product of a row {column: cell}; a column that is absent is "".

    White space is collapsed, but not in the id and the file name.  ValueError if a needed cell is empty, or
    the photo's name leads out of the folder of photos.
    """
    empty = [name for name in needed if not row.get(name, "").strip()]
    if empty:
        raise ValueError(f"{empty[0]} is empty")
    id, image, *texts = (row.get(name, "") for name in COLUMNS)
    if Path(image).is_absolute() or ".." in image.replace("\\", "/").split("/"):
        raise ValueError(f"images is {image!r}, but must name a file inside ROOT/images/")
    category, title, attribute, value = (" ".join(text.split()) for text in texts)
    return Product(id, image, category, title.removeprefix("[Title]").strip(), attribute, value)


def values_of(products):
    """{attribute: its values, sorted}: the label set of a data set."""
    values = defaultdict(set)
    for product in products:
        values[product.attribute].add(product.value)
    return {attribute: sorted(names) for attribute, names in sorted(values.items())}


def fingerprint(products, photo_keys):
    """A short hash of the products, their order and {photo: its key}: a run can tell that its data
    changed.
    """
    digest = hashlib.sha256()
    for p in products:
        cells = (*astuple(p), photo_keys.get(p.image, ""))
        digest.update("\t".join(cells).encode() + b"\n")
    return digest.hexdigest()[:16]
