"""What `python -m dataset build --no-photos` must give, in the plainest way: everything in memory, one thing after the other.

    python -m experiments.naive_build LABELS METADATA ROOT

compares ROOT's files with it, product by product (titles by their words: commas may stand otherwise).  Of the builder it
uses the tables alone - attributes, categories, values.tsv - and the documented order of drawing.
"""

import argparse
import csv
import hashlib
import html
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

from dataset.stats import read_tsv
from dataset.values import ATTRIBUTES, VALUES


def objects(path):
    for line in open(path, "rb"):
        try:
            item = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(item, dict):
            yield item


def key(*what):
    return hashlib.sha256("\t".join(map(str, what)).encode()).digest()[:8]


def plain(raw):                                 # Short-Sleeves -> shortsleeves
    return re.sub(r"[\W_]", "", raw.lower())


def bare(title):
    title = re.sub(r"<style>.*?</style>|<[a-z/][^>]*>", " ", html.unescape(title))
    title = re.sub(r"[\u200b\ud800-\udfff]", "", title).replace("¾", " 3/4 ")
    return title


def spellings():
    """({(data set, attribute, category, plain spelling): value}, {(data set, attribute, value): spellings}) of values.tsv."""
    with open(VALUES, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, dialect="excel-tab"))

    def categories(line, default):
        named = line["category"] or ""
        given = named.removeprefix("not ").split("; ")
        return [name for name in default if (name in given) != named.startswith("not ")] if named else default

    having, value_of, names = {}, {}, defaultdict(list)
    for line in lines:
        where = line["dataset"], line["attribute"], line["value"]
        having.setdefault(where, ATTRIBUTES[where[0]][where[1]])
        if line["raw"] == line["value"]:
            having[where] = categories(line, having[where])
    for line in lines:
        where = line["dataset"], line["attribute"], line["value"]
        names[where].append(line["raw"])
        for raw, said in ((line["raw"], line), (line["value"], {"category": ""})):
            for category in categories(said, having[where]):
                for ending in ("", "s"):
                    value_of.setdefault((*where[:2], category, plain(raw) + ending), line["value"])
    return value_of, names


def naive(labels, metadata, seed=0, more_than=100, at_most=1000):
    """{(data set, id): (split, category words, title words, attribute, value)}"""
    value_of, names = spellings()
    label, product = {}, {}
    for item in objects(labels):
        try:
            found = [(each["key"], [bare(e["value"]).strip() for e in each["evidences"]]) for each in item["attributes"]]
            asin, category = item["id"], item["category"]
        except (KeyError, TypeError):
            continue
        for dataset, attribute, raws in [(d, k, raws) for k, raws in found for d in ATTRIBUTES
                                         if category in ATTRIBUTES[d].get(k, ())]:
            values = {value_of.get((dataset, attribute, category, plain(raw))) for raw in raws} - {None}
            label.setdefault((dataset, asin, attribute), (values, category, raws))
    for item in objects(metadata):
        title = item.get("title")
        if isinstance(title, str) and "getTime" not in title and bare(title).strip() and isinstance(item.get("asin"), str):
            product.setdefault(item["asin"], bare(title))
    of_value = defaultdict(list)
    for (dataset, asin, attribute), (values, *_) in label.items():
        if asin in product and len(values) == 1:
            of_value[dataset, attribute, *values].append(asin)
    drawn = {}
    for _, (dataset, attribute, value) in sorted((len(asins), where) for where, asins in of_value.items()):
        free = [asin for asin in of_value[dataset, attribute, value] if (dataset, asin) not in drawn]
        if len(free) > more_than:
            for asin in sorted(free, key=lambda a: (key(seed, dataset, attribute, value, a), a))[:at_most]:
                drawn[dataset, asin] = (attribute, value)
    result, same, room = {}, defaultdict(list), Counter()
    for (dataset, asin), (attribute, value) in drawn.items():
        _, category, raws = label[dataset, asin, attribute]
        said = sorted({name for raw in [value, *raws, *names[dataset, attribute, value]] for name in [raw.lower()]},
                      key=len, reverse=True)
        pattern = "|".join(r"[\W_]*".join(form(word) for word in re.findall(r"[^\W_]+", name)) for name in said)
        texts = [category, product[asin]]
        for n, text in enumerate(texts):
            while re.search(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", text, re.I):
                text = re.sub(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", " ", text, flags=re.I)
            texts[n] = re.findall(r"[^\W_]+", text)
        if texts[1]:
            result[dataset, asin] = (*texts, attribute, value)
            same[dataset, frozenset(word.lower() for word in texts[1])].append(asin)         # the same words: one split
            room[dataset, attribute, value] += 1
    room = {(part, *value): round(n * 0.15 / 1.05) for value, n in room.items() for part in ("val", "test")}
    for (dataset, _), asins in sorted(same.items(), key=lambda item: key(seed, item[0][0], "split", min(item[1]))):
        needed = Counter((dataset, *result[dataset, asin][2:]) for asin in asins)
        part = next((part for part in ("val", "test") if all(n <= room[part, *value] for value, n in needed.items())), "train")
        for asin in asins:
            result[dataset, asin] = (part, *result[dataset, asin])
        for value, n in needed.items():
            if part != "train":
                room[part, *value] -= n
    return result


def form(word):                                 # a word in the plural, with 's, with -ed
    y = f"|{re.escape(word[:-1])}ies" if word.endswith("y") else ""
    return rf"(?:{re.escape(word)}(?:s|'s|es|ed|d)?{y})"


def differences(labels, metadata, root, **settings):
    """[(what, expected, got)] of the files in `root` against naive(...); prints how many products agree."""
    expected, got, twice = naive(labels, metadata, **settings), {}, Counter()
    for dataset in ATTRIBUTES:
        for part in ("train", "val", "test"):
            for row in read_tsv(Path(root, dataset, f"{part}.tsv"))[0]:
                twice[dataset, row["id"]] += 1
                got[dataset, row["id"]] = (part, re.findall(r"[^\W_]+", row["category"]),
                                           re.findall(r"[^\W_]+", row["texts"].removeprefix("[Title]")),
                                           row["attribute_names"], row["attribute_values"])
    wrong = [(where, expected.get(where), got.get(where)) for where in sorted({*expected, *got})
             if expected.get(where) != got.get(where)]
    wrong += [(where, "once", f"{n} times") for where, n in twice.items() if n > 1]
    print(f"{len(expected):,} products expected, {len(got):,} in the files, {len(wrong):,} differ")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments.naive_build", description=__doc__.split("\n")[0])
    for name in ("labels", "metadata", "root"):
        parser.add_argument(name, type=Path)
    found = differences(**vars(parser.parse_args()))
    for each in found[:10]:
        print(*each, sep="\n    ")
    raise SystemExit(bool(found))
