"""Sources of the true schema with dirt as in the real ones, and what a build draws from them, in the plainest
way.

Product i is the same in both files.  The metadata stand in another order.
"""

import hashlib
import json
import random
from collections import defaultdict

from base.tsv import read_tsv
from dataset.mentions import clean, folded, mentions, without
from dataset.values import ATTRIBUTES, VALUES, read_values

FILLER = "Women men girls casual summer Classic L'Étoile black surround crossword goldfish ® 2-pack".split()
TABLE, SPELLINGS = read_values(VALUES)
SLOTS = sorted(SPELLINGS)                               # [(data set, attribute, value)]
BROKEN = [b'{"asin": "B0', b"\xff\xfe{}", b"[7]", b'{"asin": "B000000001"}', b'{"title": "no asin"}',
          b'{"id": "B000000001"}', b'{"asin": "B000000001", "title": "var x = getTime()"}']


def label(asin, category, labels):
    """MAVE's object of a product.  labels: [(attribute, [raw value])]"""
    return {"id": asin, "category": category, "attributes": [
        {"key": attribute, "evidences": [{"value": raw, "pid": 0, "begin": 0, "end": 4} for raw in raws]}
        for attribute, raws in labels]}


def product(i):
    """(asin, category, labels, title) of product i: some have several attributes, or values of one."""
    draw = random.Random(i)
    words = draw.choices(FILLER, k=draw.randrange(5))
    first = SLOTS[int(len(SLOTS) * draw.random() ** 2)]
    category = draw.choice(ATTRIBUTES[first[0]][first[1]])
    labels = []
    for dataset, attribute, value in (first, *draw.choices(SLOTS, k=3)):
        if category in ATTRIBUTES[dataset][attribute]:
            raws = draw.choices([value, *SPELLINGS[dataset, attribute, value], "zigzag & more"], k=2)
            raws[0] = draw.choice((raws[0].upper(), raws[0].replace(" ", "-")))
            labels.append((attribute, raws))
            words.insert(draw.randrange(len(words) + 1), draw.choice(raws))
    return f"B{i:09}", category, labels, " ".join(words)


def make(folder, n, photos="https://images-na.ssl-images-amazon.com/images/I"):
    """Write n lines of labels and of metadata; returns the two paths."""
    labels = []
    metadata = []
    for i in range(n):
        asin, category, its_labels, _ = product(i)
        labels.append(json.dumps(label(asin, category, its_labels)).encode())
        asin, _, _, title = product(i * 1_000_003 % n)  # a prime step: every product, in another order
        urls = [f"{photos}/{asin}.jpg"]
        title = f"<b class='a'>{title}</b>&nbsp;"
        item = {"title": title, "asin": asin, "imageURL": urls, "imageURLHighRes": urls}
        metadata.append(json.dumps(item).encode())
        if i % 50 == 0:
            labels.append(BROKEN[i // 50 % len(BROKEN)])
            metadata += [labels[-1], json.dumps(item | {"title": "given again"}).encode()]
    paths = folder / "labels.jsonl", folder / "metadata.json"
    for path, lines in zip(paths, (labels, metadata)):
        path.write_bytes(b"\n".join(lines) + b"\n")
    return paths


def draw_key(*what):
    return hashlib.sha256("\t".join(map(str, what)).encode()).digest()[:8]


def naive(n, seed, more_than, at_most):
    """{(data set, id): (category, title, attribute, value)} of the products drawn, all in memory."""
    of_value = defaultdict(dict)                        # {(data set, attribute, value): {id: product}}
    for asin, category, labels, title in map(product, range(n)):
        for dataset in ATTRIBUTES:
            raws = defaultdict(list)
            for attribute, evidences in labels:
                raws[attribute] += evidences
            for attribute in raws:
                meaning = TABLE.get((dataset, attribute, category), {})
                values = {meaning.get(folded(raw)) for raw in raws[attribute]} - {None}
                if len(values) == 1 and clean(title):
                    of_value[dataset, attribute, *values][asin] = category, title, raws[attribute]
    drawn = {}
    for _, where in sorted((len(asins), where) for where, asins in of_value.items()):
        free = [asin for asin in of_value[where] if (where[0], asin) not in drawn]
        if len(free) > more_than:
            for asin in sorted(free, key=lambda asin: draw_key(seed, *where, asin))[:at_most]:
                category, title, raws = of_value[where][asin]
                names = mentions((where[2], *raws, *SPELLINGS[where]))
                drawn[where[0], asin] = without(category, names), without(clean(title), names), *where[1:]
    return {key: row for key, row in drawn.items() if row[1]}


def built(root):
    """The same of the files in `root`; each product must be there once."""
    rows = {}
    for dataset in ATTRIBUTES:
        for part in ("train", "val", "test"):
            for _, row in read_tsv(root / dataset / f"{part}.tsv"):
                assert (dataset, row["id"]) not in rows
                _, _, category, title, attribute, value = row.values()
                rows[dataset, row["id"]] = category, title.removeprefix("[Title] "), attribute, value
    return rows
