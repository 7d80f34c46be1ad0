"""Products that stand twice in the data: said once, before the training, with counts."""

import sys

import numpy as np

from base.console import Progress


def note_doubles(splits):
    """Print a line to stderr for each way in which products of {split: products} stand twice.

    The same id and attribute twice in one split counts a product twice.  The same id, or the same title and photo, in two
    splits lets a model see in training what it is tested on.  Memory holds three hashes of 8 bytes for each product.
    """
    hashes = {}
    for split, products in splits.items():
        found = np.empty((3, len(products)), np.int64)
        with Progress(f"doubles in {split}", len(products), "products") as progress:
            for i, p in enumerate(products):
                found[:, i] = hash((p.id, p.attribute)), hash(p.id), hash((p.title, p.image))
                progress.step()
        hashes[split] = found
    for split, (keys, _, _) in hashes.items():
        _, first = np.unique(keys, return_index=True)
        again = np.setdiff1d(np.arange(len(keys)), first)
        note(f"{len(again):,} of {len(keys):,} products of {split} repeat the id and attribute of another", again, splits[split])
    names = list(splits)
    for a, b in ((a, b) for k, a in enumerate(names) for b in names[k + 1:]):
        for row, what in ((1, "the id"), (2, "the title and photo")):
            shared = np.flatnonzero(np.isin(hashes[b][row], hashes[a][row]))
            note(f"{len(shared):,} of {len(splits[b]):,} products of {b} have {what} of a product of {a}", shared, splits[b])


def note(text, places, products):
    if len(places):
        print(f"note: {text}, e.g. {products[int(places[0])].id!r}", file=sys.stderr)
