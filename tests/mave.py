"""Sources of the true schema with dirt as in the real ones."""

import json
import random

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


def make(folder, n, photos="https://images-na.ssl-images-amazon.com/images/I"):
    """Write labels and metadata of n products; returns the two paths.  Some have several attributes, or two
    values of one.
    """
    draw = random.Random(n)
    labels = []
    metadata = []
    for i in range(n):
        asin = f"B{i:09}"
        slots = draw.choices(SLOTS, k=4)
        category = draw.choice(ATTRIBUTES[slots[0][0]][slots[0][1]])
        its = [(attribute, draw.choices([value, *SPELLINGS[dataset, attribute, value], "zigzag & more"], k=2))
               for dataset, attribute, value in slots if category in ATTRIBUTES[dataset][attribute]]
        words = draw.choices(FILLER, k=4) + [raws[0] for _, raws in its]
        labels.append(label(asin, category, its))
        metadata.append({"asin": asin, "title": " ".join(words), "imageURL": [f"{photos}/{asin}.jpg"]})
    draw.shuffle(metadata)
    paths = folder / "labels.jsonl", folder / "metadata.json"
    for path, items in zip(paths, (labels, metadata)):
        path.write_bytes(b"\n".join(BROKEN + [json.dumps(item).encode() for item in items]) + b"\n")
    return paths
