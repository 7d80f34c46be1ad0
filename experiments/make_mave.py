"""Sources of the true schema and of any size, with the dirt of the real ones, to build the data sets from in a test.

    python -m experiments.make_mave FOLDER --labels 2000000 --metadata 2000000 [--gzip] [--photos http://127.0.0.1:8000]

writes FOLDER/labels.jsonl and FOLDER/metadata.json.  Product i is the same in both files, and whatever the number of
lines; the metadata stand in another order.  The dirt: HTML and scripts in titles, missing and mistyped fields, ASINs
given twice, several evidences of one value and of two, unicode, broken JSON, bytes that are no UTF-8.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

from dataset.values import ATTRIBUTES, VALUES, read_values

OTHER = ["Guitar Strings", "Coffee", "Sofas", "Watches", "Mattresses", "Vitamins & Supplements", "Desk Lamps"]
FILLER = ("women men girls casual summer classic comfort premium soft vintage fashion outdoor party black white navy red "
          "surround background crossword goldfish flatter leatherette-look new size XL 2-pack été naïve Größe ® café 夏").split()
BRANDS = ["Acme", "Nordwind", "L'Étoile", "B&B Bros.", "Zoë <3", "Kaiyō", "Ünique"]
SLOTS = []                                                  # (category, [(attribute, [raws of a value])])


def slots():
    names = read_values(VALUES)[1]
    by_category = {}
    for (dataset, attribute, value), raws in names.items():
        for category in ATTRIBUTES[dataset][attribute]:
            by_category.setdefault(category, {}).setdefault(attribute, []).append([value.lower(), *raws])
    return [(category, list(attributes.items())) for category, attributes in by_category.items()]


def variant(rng, raw):
    """A raw spelling as sellers write it: capitals, hyphens, plural."""
    kind = rng.randrange(8)
    if kind == 0:
        return raw.upper()
    if kind == 1:
        return raw.replace(" ", "-")
    if kind == 2 and raw[-1] not in "sdy":
        return raw + "s"
    return raw.title() if kind < 5 else raw


def product(i):
    """(asin, category, [(attribute, [evidence values])], [words of the title]) of product i."""
    rng = random.Random(i)
    asin = "B0" + "".join("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i * 7919 // 36 ** k % 36] for k in range(7, -1, -1))
    words = [rng.choice(BRANDS), *rng.choices(FILLER, k=rng.randrange(3, 8))]
    if rng.random() < 0.6:
        category, found = rng.choice(OTHER), [("Color", ["Black"])]
    else:
        category, attributes = SLOTS[int(len(SLOTS) * rng.random() ** 2)]
        found = []
        for attribute, values in rng.sample(attributes, k=min(len(attributes), rng.choice((1, 1, 1, 2)))):
            raws = values[int(len(values) * rng.random() ** 3)]
            said = [variant(rng, rng.choice(raws)) for _ in range(rng.choice((1, 1, 2)))]
            if rng.random() < 0.03:
                said.append(rng.choice(rng.choice(values)))             # perhaps another value
            if rng.random() < 0.05:
                said = [*said, "zigzag & more"] if rng.random() < 0.5 else ["zigzag & more"]
            found.append((attribute, said))
            for each in said * rng.choice((0, 1, 1, 1, 2)):
                words.insert(rng.randrange(1, len(words) + 1), each)
    return asin, category, found, words


def label_line(i):
    rng = random.Random(-i - 1)
    dirt = rng.random()
    if dirt < 0.002 and i > 100:
        i -= 100                                                        # given before
    asin, category, found, words = product(i)
    item = {"id": asin, "category": category, "attributes": [
        {"key": attribute, "evidences": [{"value": value, "pid": n, "begin": 4 * n, "end": 4 * n + len(value)}
                                         for n, value in enumerate(said)]} for attribute, said in found]}
    if 0.002 < dirt < 0.003:
        del item[rng.choice(["id", "category", "attributes"])]
    if 0.003 < dirt < 0.004:
        item["attributes"] = [{"key": found[0][0]}] if rng.random() < 0.5 else None
    line = json.dumps(item, ensure_ascii=rng.random() < 0.5).encode()
    return line[:len(line) // 2] if 0.004 < dirt < 0.006 else line


def metadata_line(i, photos):
    rng = random.Random((i << 32) + 1)
    dirt = rng.random()
    again = 0.02 < dirt < 0.03 and i > 1000
    asin, category, _, words = product(i - 1000 if again else i)
    title = " ".join(words) + (" again" if again else "")
    if dirt < 0.01:
        title = "<span class='a-size'>" + title.replace("&", "&amp;") + "</span><style>.x{color:red}</style>"
    elif dirt < 0.015:
        title = "var aPageStart = (new Date()).getTime(); " + title
    elif dirt < 0.02:
        title = title.replace(" ", "\u00a0", 1) + "\u200b \ud83d"       # half of a surrogate pair
    url = f"{photos}/{asin}"
    item = {"category": ["Clothing, Shoes & Jewelry", category], "tech1": "", "description": [
        "A long text about this product, of the kind that fills most of the real file. " * rng.randrange(2, 10)],
        "fit": "", "title": title, "also_buy": ["B0" + "%08d" % rng.randrange(10**8) for _ in range(rng.randrange(12))],
        "tech2": "", "brand": words[0], "feature": ["Imported", "Machine wash", title.lower()], "rank": "1,234 in Shoes",
        "also_view": [], "main_cat": "<img src='x.png' alt='Fashion'/>", "similar_item": "", "date": "June 1, 2016",
        "price": "$1%d.99" % rng.randrange(10), "asin": asin, "imageURL": [f"{url}._SS40_.jpg", f"{url}.2._SS40_.jpg"],
        "imageURLHighRes": [f"{url}.jpg", f"{url}.2.jpg"]}
    if 0.03 < dirt < 0.06:
        item["imageURL"] = item["imageURLHighRes"] = []
    elif 0.06 < dirt < 0.08:
        del item["imageURLHighRes"]
    elif 0.08 < dirt < 0.085:
        item["imageURL"], item["imageURLHighRes"] = f"{url}.jpg", None
    elif 0.085 < dirt < 0.095:
        del item[rng.choice(["title", "asin"])]
    elif 0.095 < dirt < 0.1:
        item["title"] = rng.choice([None, 7, "", "  ", ["a", "list"]])
    elif 0.1 < dirt < 0.101:
        return b'["not", "an", "object"]'
    line = json.dumps(item, ensure_ascii=title.isascii() or dirt < 0.5).encode("utf-8", "surrogatepass")
    if 0.101 < dirt < 0.102:
        return line[:300]
    return b"\xff\xfe" + line if 0.102 < dirt < 0.103 else line


def make(folder, labels, metadata, compress=False, photos="https://images-na.ssl-images-amazon.com/images/I"):
    """Write the two sources; returns their paths."""
    SLOTS[:] = SLOTS or slots()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / (name + ".gz" * compress) for name in ("labels.jsonl", "metadata.json")]
    for path, n in zip(paths, (labels, metadata)):
        if not n:
            continue
        with gzip.open(path, "wb", 3) if compress else open(path, "wb") as file:
            for k in range(n):
                i = k if path is paths[0] else k * 1_000_003 % n        # a prime step: every product, in another order
                file.write((label_line(i) if path is paths[0] else metadata_line(i, photos)) + b"\n")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--labels", type=int, default=2_000_000)
    parser.add_argument("--metadata", type=int, default=2_000_000)
    parser.add_argument("--gzip", action="store_true")
    parser.add_argument("--photos", default="https://images-na.ssl-images-amazon.com/images/I", help="where photos are said to be")
    given = parser.parse_args()
    make(given.folder, given.labels, given.metadata, given.gzip, given.photos)
