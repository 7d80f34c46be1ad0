"""What train.py refuses in a data set, and what spoils a result although it runs: the commands check and
stats.

A finding is (REFUSED or SPOILS, "what: why it matters", [example]).
"""

import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote

from base.console import Progress, UserError
from base.duplicates import across, same_label, signs
from base.tsv import read_tsv
from data import base_question, comparison, encode_answer, encode_examples, product_of
from dataset.mentions import clean, find, folded, mentions
from dataset.stats import SPLITS, photo_problem, print_table

REFUSED = "REFUSED: train.py stops with an error"
SPOILS = "SPOILS the result: train.py runs, but its score or its answers are worth less"
NEEDED = "id", "attribute_names", "attribute_values"


def check(folder, labels, llama, no_image, all):
    """Print one page about the data set in `folder` (ROOT/NAME); UserError at the end if train.py would
    refuse it.

    labels    how many labels train.tsv should have for each value
    llama     folder with config.json and tokenizer.model: also count tokens
    no_image  as for train.py --no-image: leave the photos out
    all       show all examples of a finding
    """
    if examine(folder, labels, llama, not no_image, None if all else 3):
        raise UserError(f"{folder}: train.py would refuse it; see REFUSED above, mend that and check again.")
    print(f"\nIt can be trained:  {training_command(folder, labels)}{' --no-image' * no_image}")


def training_command(folder, labels):
    """train.py for the data set in a folder, as a line for a shell."""
    root, name = map(quote, os.path.split(folder.resolve()))
    return f"python train.py --data {root} --dataset {name} --labels {labels}"


def stats(dataset, data):
    """Print Table 6 and what is wrong for data sets: names in the folder `data`, or folders; by default all
    there.
    """
    folders = [Path(name) if Path(name).is_dir() else data / name for name in dataset]
    folders = folders or sorted(path.parent for path in data.glob("*/train.tsv"))
    if not folders:
        raise UserError(f"{data} holds no data set, a folder with train.tsv, val.tsv and test.tsv. "
                        "Build or import one (docs/data.md), or give another folder with --data.")
    for folder in folders:
        examine(folder)


def examine(folder, labels=0, llama=None, image=True, most=3):
    """Print Table 6 and the findings, with `most` examples each, about the data set in a folder; return
    whether train.py refuses it.
    """
    parts = {}                                          # only what could be read: nothing is said of the rest
    problems = []
    for part in SPLITS:
        path = folder / f"{part}.tsv"
        products = []
        try:
            for line, row in read_tsv(path, problems=problems):
                try:
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
    if llama:
        findings += token_findings(parts, llama, image)
    findings += [*product_findings(parts), *value_findings(counts, labels)]
    if "train" in parts:
        findings += split_findings(parts, counts, images)
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
    """Values with few labels, alone or with twins."""
    yield (SPOILS, f"values with fewer than {labels} labels to train on",
           [f"{' = '.join(value)}: {n:,}" for value, n in counts.get("train", {}).items() if n < labels])
    values = defaultdict(list)
    alike = defaultdict(list)
    for (attribute, value), n in sum(counts.values(), Counter()).items():
        values[attribute].append(value)
        alike[attribute, folded(value) or value].append(f"{value!r} {n:,}")
    yield (SPOILS, "attributes with one value alone: there is nothing to learn",
           [f"{attribute} = {its[0]}" for attribute, its in values.items() if len(its) == 1])
    yield (SPOILS, "values that differ only in case, plural or hyphens: an exact match takes them for two",
           [f"{attribute}: {', '.join(same)}" for (attribute, _), same in alike.items() if len(same) > 1])


def split_findings(parts, counts, images):
    """Values of val and test that training has not shown, and products that it has."""
    for part, count in counts.items():
        yield (SPOILS, f"values of {part}.tsv that train.tsv does not have: no answer to them can be right",
               [f"{' = '.join(value)}: {n:,} products" for value, n in count.items()
                if value not in counts["train"]])
    for part, sign, pairs in across(parts, {"the same id": lambda p: p.id, **signs(images)}):
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


def token_findings(parts, llama, image):
    """Questions that are longer than LLaMA can read; values that its tokenizer changes."""
    from llama import Tokenizer, read_config            # here, because it loads torch
    most = read_config(llama / "config.json").max_position_embeddings
    tokenizer = Tokenizer(llama / "tokenizer.model")
    longest = 0
    too_long = []
    changed = {}
    for part, products in parts.items():
        for p in products:
            question = comparison(p, p, "judge_last") if part == "train" else base_question(p)
            [encoded], _ = encode_examples([question], tokenizer, image)
            # As train.py counts: BOS, 4 visual tokens for each photo, question, answer.
            length = 1 + 4 * len(encoded.photos) + len(encoded.prompt) + len(encoded.answer)
            longest = max(longest, length)
            if length > most:
                too_long.append(f"{p.id} ({part}.tsv): {length:,} tokens; {p.title[:100]}")
            back = tokenizer.decode(encode_answer(p.value, tokenizer)[:-1]).strip()
            if back != p.value:
                changed[f"{p.value!r} comes back as {back!r}"] = p
    print(f"tokens of a question (in training, of two products) and its answer: at most {longest:,}; this "
          f"LLaMA reads {most:,}")
    yield REFUSED, f"products with more tokens than the {most:,} that this LLaMA reads", too_long
    yield SPOILS, "values that this LLaMA's tokenizer changes: no answer can be right", list(changed)
