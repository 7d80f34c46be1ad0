"""One's own products before training: what train.py refuses, and what spoils a result although it runs."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from base.console import Progress, UserError
from base.duplicates import across
from base.photo import open_photo
from base.tsv import COLUMNS
from data import Products, base_question, comparison, encode_examples
from dataset.mentions import clean, find, folded, mentions
from dataset.stats import SPLITS

EXAMPLES = 3                    # shown of each finding


class Page:
    """What was found: refused and spoils hold (finding, examples), fine what was looked for in vain."""

    def __init__(self):
        self.refused, self.spoils, self.fine = [], [], []

    def note(self, where, finding, examples, fine):
        """Note a finding ("what: why it matters") under `where`, with its examples; without any, `fine`."""
        if examples:
            what, colon, why = finding.partition(": ")
            where.append((f"{what}: {len(examples):,}" + (f" ({why})" if colon else ""), examples))
        elif fine:
            self.fine.append(fine)

    def print(self):
        for title, found in (("REFUSED: train.py stops with an error", self.refused),
                             ("SPOILS the result: train.py runs, but its score or its answers are worth less", self.spoils)):
            if found:
                print(f"\n{title}")
            for finding, examples in found:
                print(f"  {finding}")
                for example in examples[:EXAMPLES]:
                    print(f"      {example}")
                if len(examples) > EXAMPLES:
                    print("      ...")
        if self.fine:
            print("\nFINE\n  " + "\n  ".join(self.fine))


def check(folder, labels=10, llama=None):
    """Print one page about the data set in `folder` (ROOT/NAME); UserError at the end if train.py would refuse it.

    labels  how many labels train.tsv should have for each value
    llama   folder with config.json and tokenizer.model: also count tokens
    """
    folder, page = Path(folder), Page()
    products = read_parts(page, folder)
    print(f"{folder}: " + ", ".join(f"{name} {len(each):,}" for name, each in products.items()))
    values = defaultdict(Counter)
    for p in (p for each in products.values() for p in each):
        values[p.attribute][p.value] += 1
    for attribute, n in sorted(values.items()):
        print(f"  {attribute}: {len(n)} values, {n.total():,} labels; {', '.join(v for v, _ in n.most_common(6))}"
              + (", ..." if len(n) > 6 else ""))
    check_photos(page, folder, products)
    check_titles(page, products)
    check_values(page, products, values, labels)
    check_duplicates(page, folder, products)
    if llama:
        check_tokens(page, products, Path(llama))
    page.print()
    if page.refused:
        raise UserError(f"{folder}: train.py would refuse it; see REFUSED above, mend that and check again.")
    print(f"\nIt can be trained:  python train.py --data {folder.resolve().parent} --dataset {folder.resolve().name} "
          f"--labels {labels}")


def read_parts(page, folder):
    """{name: [Product]} of the splits in a folder, or of whatever other TSV files are there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that holds train.tsv, val.tsv and test.tsv, or products.tsv.")
    files = [folder / f"{name}.tsv" for name in SPLITS if (folder / f"{name}.tsv").exists()] or sorted(folder.glob("*.tsv"))
    if not files:
        inside = sorted({path.parent.name for path in folder.glob("*/*.tsv")})
        raise UserError(f"{folder} holds no TSV file of products (docs/data.md says how one looks)."
                        + (f" Its folders {', '.join(inside)} do: give one of them." if inside else ""))
    parts = {}
    for path in files:
        try:
            parts[path.stem] = list(Products(path))
        except UserError as error:
            parts[path.stem] = []
            page.refused.append((str(error), []))
    if missing := [f"{name}.tsv" for name in SPLITS if name not in parts]:
        page.refused.append((f"{', '.join(missing)} missing. Divide the lines of {', '.join(path.name for path in files)} into "
                             "train.tsv, val.tsv and test.tsv, about 5 : 1 : 1, each value in all three", []))
    return parts


def check_photos(page, folder, products):
    """Photos that train.py will not find, or not read."""
    images, absent, broken = folder.resolve().parent / "images", [], []
    with Progress("photos", sum(map(len, products.values())), "photos") as progress:
        for image, part in {p.image: part for part, each in products.items() for p in each}.items():
            if not image or not (images / image).is_file():
                absent.append(f"{image or 'no file name'} ({part}.tsv)")
            else:
                try:
                    open_photo(images / image)
                except UserError as error:
                    broken.append(str(error))
            progress.step()
    elsewhere = next((place for place in (folder / "images", folder) if absent and any(
        (place / p.image).is_file() for each in products.values() for p in each if p.image)), None)
    page.note(page.refused, f"photos that are not in {images}: " + (f"some are in {elsewhere}, move them" if elsewhere else
                                                                  "train with --no-image if there are none"), absent, "")
    page.note(page.refused, "files that are no photos", broken, "" if absent else "every photo is there and can be read")


def check_titles(page, products):
    """Answers in the question, and ids that stand for two products."""
    named, twice, labels = [], [], defaultdict(set)
    for part, each in products.items():
        seen = Counter((p.id, p.attribute) for p in each)
        twice += [f"{asin}, {attribute} ({part}.tsv)" for (asin, attribute), n in seen.items() if n > 1]
        for p in each:
            labels[p.id, p.attribute].add(p.value)
            text = clean(p.context)
            if find(text, mentions((p.value,))):
                named.append(f"{p.id} ({part}.tsv) {p.attribute} = {p.value}: {text[:100]}")
    contradictory = [f"{asin}, {attribute}: {', '.join(sorted(known))}" for (asin, attribute), known in labels.items()
                     if len(known) > 1]
    page.note(page.spoils, "titles or categories that hold their answer: the model learns to copy", named,
              "no title or category holds its answer")
    page.note(page.spoils, "ids that stand twice in a file for one attribute", twice,
              "every id stands once in a file for an attribute")
    page.note(page.spoils, "ids with two values of one attribute", contradictory, "no id has two values of one attribute")


def check_values(page, products, values, labels):
    """Values with few labels, with twins, without a test or without training."""
    train = Counter((p.attribute, p.value) for p in products.get("train", next(iter(products.values()), ())))
    few = [f"{attribute} = {value}: {n:,}" for (attribute, value), n in reversed(train.most_common()) if n < labels]
    page.note(page.spoils, f"values with fewer than {labels} labels to train on", few, f"every value has {labels} labels or more")
    page.note(page.spoils, "attributes with one value alone: there is nothing to learn",
              [f"{attribute} = {', '.join(n)}" for attribute, n in values.items() if len(n) == 1],
              "every attribute has two values or more")
    twins = []
    for attribute, n in values.items():
        alike = defaultdict(list)
        for value in n:
            alike[folded(value) or value].append(value)
        twins += [f"{attribute}: " + ", ".join(f"{value!r} {n[value]:,}" for value in same)
                  for same in alike.values() if len(same) > 1]
    page.note(page.spoils, "values that differ only in case, plural or hyphens: an exact match takes them for two", twins,
              "no two values differ only in case, plural or hyphens")
    if "train" in products:
        for part in ("val", "test"):
            unknown = Counter((p.attribute, p.value) for p in products.get(part, ()) if (p.attribute, p.value) not in train)
            page.note(page.spoils, f"values of {part}.tsv that train.tsv does not have: no answer to them can be right",
                      [f"{attribute} = {value}: {n:,} products" for (attribute, value), n in unknown.items()],
                      f"train.tsv has every value of {part}.tsv")


def check_duplicates(page, folder, products):
    """Products of val and test that training has shown."""
    if "train" not in products:
        return
    images = folder.resolve().parent / "images"
    rows = {part: [dict(zip(COLUMNS, (p.id, p.image or "-", p.category, p.title, p.attribute, p.value))) for p in each]
            for part, each in products.items()}
    for part, signs in across(rows, images if images.is_dir() else None).items():
        for sign, pairs in signs.items():
            page.note(page.spoils, f"products of {part}.tsv with {sign} as one of train.tsv: their score measures memory",
                      [f"{row['id']} as {other['id']}: {row['texts'][:100]}" for row, other in pairs], "")
        if not signs:
            page.fine.append(f"no product of {part}.tsv has the title or the photo of one in train.tsv")


def check_tokens(page, products, llama):
    """Questions that are longer than LLaMA can read; train.py refuses them."""
    from llama import Tokenizer, read_config  # here, because it loads torch
    most, tokenizer = read_config(llama / "config.json").max_position_embeddings, Tokenizer(llama / "tokenizer.model")
    too_long, lengths = [], []
    with Progress("tokens", sum(map(len, products.values())), "products") as progress:
        for part, each in products.items():
            for p in each:
                # As train.py counts: BOS, 4 visual tokens per photo, question, answer; in training, two products.
                pair = part == "train"
                question = comparison(p, p, "judge_last") if pair else base_question(p)
                [encoded], _ = encode_examples([question], tokenizer, image=False)
                lengths.append(1 + 4 * (1 + pair) + len(encoded.prompt) + len(encoded.answer))
                if lengths[-1] > most:
                    too_long.append(f"{p.id} ({part}.tsv): {lengths[-1]:,} tokens; {p.title[:100]}")
                progress.step()
    page.note(page.refused, f"products with more tokens than the {most:,} that this LLaMA reads", too_long, "")
    if lengths and not too_long:
        page.fine.append(f"tokens of a question and its answer: median {np.median(lengths):.0f}, longest {max(lengths):,}, "
                         f"allowed {most:,}")
