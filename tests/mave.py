"""Sources of the true schema with dirt as in the real ones.

Product i is the same in both files.  The metadata stand in another order.
"""

import json
import random

from base.tsv import read_tsv
from dataset.values import ATTRIBUTES, VALUES, read_values

FILLER = "Women men girls casual summer Classic L'Étoile black surround crossword goldfish ® 2-pack".split()
SPELLINGS = read_values(VALUES)[1]
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
    slots = draw.choices(SLOTS, k=4)
    dataset, attribute, _ = slots[0]
    category = draw.choice(ATTRIBUTES[dataset][attribute])
    labels = []
    for dataset, attribute, value in slots:
        if category in ATTRIBUTES[dataset][attribute]:
            raws = draw.choices([value, *SPELLINGS[dataset, attribute, value], "zigzag & more"], k=2)
            labels.append((attribute, raws))
            words += raws[:1]
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


def built(root):
    """{(data set, id): (attribute, value)} of the files in `root`; each product must be there once."""
    rows = {}
    for path in root.glob("*/*.tsv"):
        for _, row in read_tsv(path):
            assert (path.parent.name, row["id"]) not in rows
            rows[path.parent.name, row["id"]] = row["attribute_names"], row["attribute_values"]
    return rows
