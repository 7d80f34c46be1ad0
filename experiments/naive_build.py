"""What `python -m dataset build --no-photos` must give, in the plainest way: everything in memory, one thing after the other.

    python -m experiments.naive_build LABELS METADATA ROOT

compares ROOT's files with it, product by product (titles by their words: commas may stand otherwise).  Of the builder it
uses the table alone - attributes, categories, spellings - and the documented order of drawing.
"""

import hashlib
import html
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from dataset.stats import read_tsv
from dataset.values import ATTRIBUTES, VALUES, read_values


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


def naive(labels, metadata, seed=0, more_than=100, at_most=1000):
    """{(data set, id): (split, category words, title words, attribute, value)}"""
    names, value_of = read_values(VALUES)[1], {}
    for (dataset, attribute, value), raws in names.items():
        for raw in [value, *raws]:
            for ending in ("", "s"):
                value_of.setdefault((dataset, attribute, plain(raw) + ending), value)
    label, product = {}, {}
    for item in objects(labels):
        try:
            found = [(each["key"], [bare(e["value"]).strip() for e in each["evidences"]]) for each in item["attributes"]]
            asin, category = item["id"], item["category"]
        except (KeyError, TypeError):
            continue
        for dataset, attribute, raws in [(d, k, raws) for k, raws in found for d in ATTRIBUTES
                                         if category in ATTRIBUTES[d].get(k, ())]:
            values = {value_of.get((dataset, attribute, plain(raw))) for raw in raws} - {None}
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
    result, same = {}, defaultdict(list)
    for (dataset, asin), (attribute, value) in drawn.items():
        _, category, raws = label[dataset, asin, attribute]
        said = sorted({name for raw in [value, *raws, *names[dataset, attribute, value]] for name in [raw.lower()]},
                      key=len, reverse=True)
        pattern = "|".join(r"[\W_]*".join(re.escape(word) + r"(?:s|es|ed|d)?" for word in re.findall(r"[^\W_]+", name))
                           for name in said)
        texts = [category, product[asin]]
        for n, text in enumerate(texts):
            while re.search(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", text, re.I):
                text = re.sub(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", " ", text, flags=re.I)
            texts[n] = re.findall(r"[^\W_]+", text)
        if texts[1]:
            result[dataset, asin] = (*texts, attribute, value)
            same[dataset, attribute, value].append(asin)
    for (dataset, *_), asins in same.items():
        asins.sort(key=lambda asin: key(seed, dataset, "split", asin))
        n = round(len(asins) * 0.15 / 1.05)
        for place, asin in enumerate(asins):
            part = "val" if place < n else "test" if place < 2 * n else "train"
            result[dataset, asin] = (part, *result[dataset, asin])
    return result


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
    found = differences(*sys.argv[1:4])
    for each in found[:10]:
        print(*each, sep="\n    ")
    raise SystemExit(bool(found))
