"""What train.py refuses in a data set, and what spoils a result although it runs: the commands check and
stats.

A finding is (REFUSED or SPOILS, "what: why it matters", [example]).
"""

import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from shlex import quote

from base.console import Progress, UserError, reading
from base.duplicates import across, signs
from base.tsv import read_rows
from data import product_of
from dataset.mentions import clean, find, folded, mentions
from dataset.stats import SPLITS, photo_problem, print_table

REFUSED = "REFUSED: train.py stops with an error"
SPOILS = "SPOILS the result: train.py runs, but its score or its answers are worth less"
NEEDED = "id", "attribute_names", "attribute_values"


def check(folder, labels, no_image, all):
    """Print one page about the data set in `folder` (ROOT/NAME); UserError at the end if train.py would
    refuse it.

    labels    how many labels train.tsv should have for each value
    no_image  as for train.py --no-image: leave the photos out
    all       show all examples of a finding
    """
    if examine(folder, labels, not no_image, None if all else 3):
        raise UserError(f"{folder}: train.py would refuse it; see REFUSED above, mend that and check again.")
    print(f"\nIt can be trained:  {training_command(folder, labels)}{' --no-image' * no_image}")


def training_command(folder, labels):
    """train.py for the data set in a folder, as a line for a shell."""
    root, name = map(quote, os.path.split(folder.resolve()))
    return f"python train.py --data {root} --dataset {name} --labels {labels}"


def stats(dataset, data):
    """Print Table 6 and what is wrong for data sets, given by their names in the folder `data`; by default
    all there.
    """
    folders = [data / name for name in dataset] or sorted(path.parent for path in data.glob("*/train.tsv"))
    if not folders:
        raise UserError(f"{data} holds no data set, a folder with train.tsv, val.tsv and test.tsv. "
                        "Build or import one (docs/data.md), or give another folder with --data.")
    for folder in folders:
        examine(folder)


def examine(folder, labels=1, image=True, most=3):
    """Print Table 6 and the findings, with `most` examples each, about the data set in a folder; return
    whether train.py refuses it.
    """
    parts = {}                                          # only what could be read: nothing is said of the rest
    problems = []
    for part in SPLITS:
        path = folder / f"{part}.tsv"
        products = []
        try:
            with (reading(path, "a data set's TSV"),
                  open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file):
                for line, row in read_rows(file):
                    try:
                        if isinstance(row, ValueError):
                            raise row
                        products.append(product_of(row, NEEDED))
                    except ValueError as error:
                        problems.append(f"{path}, line {line}: {error}")
            if not products:
                problems.append(f"{path}: has a header but no products")
        except UserError as error:
            problems.append(str(error))
        if products:
            parts[part] = products
    if not parts:
        raise UserError(f"{folder}: no folder with train.tsv, val.tsv and test.tsv: {problems[0]}")
    counts = {part: Counter((p.attribute, p.value) for p in products) for part, products in parts.items()}
    print_table(folder.resolve().name, counts)
    images = folder.resolve().parent / "images" if image else None
    findings = [(REFUSED, "lines or files that cannot be read", problems)]
    if image:
        findings.append(photo_finding(parts, images))
    findings += product_findings(parts)
    if "train" in parts:
        findings += [*value_findings(counts, labels), *duplicate_findings(parts, images)]
    print_findings(findings, most)
    return any(severity == REFUSED and examples for severity, _, examples in findings)


def print_findings(findings, most=3):
    """Print findings that have examples, each with `most` of them (None: all), under headings for what they
    mean.
    """
    heading = None
    for severity, finding, examples in findings:
        if not examples:
            continue
        if severity != heading:
            print(f"\n{severity}")
        heading = severity
        what, _, why = finding.partition(": ")
        print(f"  {what}: {len(examples):,}" + f" ({why})" * bool(why))
        for example in examples[:most]:
            print(f"      {example}")
        if len(examples[:most]) < len(examples):
            print("      ...")


def product_findings(parts):
    """Answers in the question, and ids that stand for two products."""
    named = []
    values = defaultdict(list)                          # {(split, id, attribute): those of its lines}
    for part, products in parts.items():
        for p in products:
            values[part, p.id, p.attribute].append(p.value)
            if any(find(clean(text), mentions((p.value,))) for text in (p.title, p.category)):
                named.append(f"{p.id} ({part}.tsv) {p.attribute} = {p.value}: {p.context[:100]}")
    yield SPOILS, "titles or categories that hold their answer: the model learns to copy", named
    yield (SPOILS, "ids that stand twice in a file for one attribute",
           [f"{id}, {attribute}: {', '.join(its)}" for (_, id, attribute), its in values.items()
            if len(its) > 1])


def value_findings(counts, labels):
    """Values with few labels or none, or with twins."""
    total = sum(counts.values(), Counter())
    yield (SPOILS, f"values with fewer than {labels} labels to train on",
           [f"{' = '.join(value)}: {counts['train'][value]:,}" for value in total
            if counts["train"][value] < labels])
    alike = defaultdict(list)
    for (attribute, value), n in total.items():
        alike[attribute, folded(value) or value].append(f"{value!r} {n:,}")
    yield (SPOILS, "values that differ only in case, plural or hyphens: an exact match takes them for two",
           [f"{attribute}: {', '.join(same)}" for (attribute, _), same in alike.items() if len(same) > 1])


def same_label(one, other):
    return (one.attribute, one.value) == (other.attribute, other.value)


def duplicate_findings(parts, images):
    """Products of val and test that training has shown.  Of several twins there the first with the product's
    own value is named, else the first.
    """
    for part, sign, found in across(parts, {"the same id": lambda p: p.id, **signs(images)}):
        pairs = [(p, max(twins, key=lambda twin: same_label(p, twin))) for p, twins in found]
        same = sum(same_label(*pair) for pair in pairs)
        yield (SPOILS, f"products of {part}.tsv with {sign} as one of train.tsv: of {len(parts[part]):,}, "
               f"{same:,} of them with the same label; their score measures memory",
               [f"{p.id} as {twin.id}: {p.title[:100]}" for p, twin in pairs])


def photo_finding(parts, images):
    """Photos that train.py will not find, or not read."""
    products = [p for products in parts.values() for p in products]
    names = sorted({p.image for p in products} - {""})
    problems = [f"{p.id}: no photo is named" for p in products if not p.image]
    with Progress("photos", len(names), "photos") as progress, ThreadPoolExecutor() as pool:
        for why in pool.map(lambda name: photo_problem(images / name, images), names):
            problems += [why] * bool(why)
            progress.step()
    return (REFUSED, "photos that are missing or cannot be read: --skip-missing-photos trains without "
            "products whose photo is missing, --no-image without photos", problems)
