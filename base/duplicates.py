"""Products that stand twice: with the same title words, with the same photo, or under the same id.

A product that is in train and in test tests memory, not reading.
"""

import hashlib
import re
import sys
import unicodedata
from collections import defaultdict
from functools import cache

from base.console import Progress


def title_key(title):
    """The words of a title: lower-case, sorted, each once.  None for a title without words.

    Words are runs of letters and digits, after Unicode's NFKC.
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", title).lower())
    return " ".join(sorted(set(words))) or None


@cache                                                  # splits and findings both ask
def photo_key(path):
    """The SHA-256 of a photo's bytes.  None if there is no such file, or it cannot be read."""
    try:
        if path.is_file():                              # opening a pipe would wait for ever
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        pass


def signs(images=None):
    """{sign: function that gives a product's key}: products with the same key, not None, are duplicates.

    images  folder of the photos, or None to go by titles alone
    """
    keys = {"the same title words": lambda product: title_key(product.title)}
    if images:
        keys["the same photo bytes"] = lambda product: photo_key(images / product.image)
    return keys


def across(parts, keys):
    """Duplicates of train in the other splits: yields (split, sign, [(product, its twins in train)]).

    parts  {split: products}, with "train" among them;  keys: {sign: function}, as of signs()
    """
    for sign, key in keys.items():
        with Progress(f"looking for {sign}", sum(map(len, parts.values())), "products") as progress:
            in_train = defaultdict(list)
            for product in parts["train"]:
                in_train[key(product)].append(product)
                progress.step()
            in_train.pop(None, None)
            for part, products in parts.items():
                if part != "train":
                    yield part, sign, [(p, in_train[its_key])
                                       for p in products if (its_key := key(p)) in in_train]
                    progress.step(len(products))


def not_in(train, products, images=None):
    """Those of `products` without a twin in `train`: no product there has the same title words or photo."""
    twins = across({"train": train, "others": products}, signs(images))
    known = {product for _, _, pairs in twins for product, _ in pairs}
    return [product for product in products if product not in known]


def note_duplicates(splits):
    """Print a line to stderr for each way in which products of {split: products} are those of train, by name.

    A model then sees in training what it is tested on.
    """
    names = {"id": lambda p: p.id, "title and photo": lambda p: (p.title, p.image)}
    for split, name, pairs in across(splits, names):
        if pairs:
            print(f"note: {len(pairs):,} of {len(splits[split]):,} products of {split} have the {name} "
                  f"of a product of train, e.g. {pairs[0][0].id!r}", file=sys.stderr)
