"""Products that are nearly the same, told by their titles and photos alone.

A product that stands in training and in test with the same title, or with the same photo, tests memory and not reading.
Three signs, from the surest to the weakest: the same bytes of the photo, the same words in the title, and photos that look
the same (another size or another compression of one photo).
"""

import hashlib
import re
import sys
import unicodedata
from collections import defaultdict

from base.console import Progress

SIDE = 32                       # pixels: an average hash has SIDE * SIDE bits
# Bits in which the hashes of two photos of one thing may differ.  Chosen on 758 different photos of ImplicitAVE: of the 100
# closest pairs (16 to 53 bits), looked at one by one, the first that shows two different products differs in 27 bits.
MOST_DIFFERENT = 20


def title_key(title):
    """A key that two titles share if they consist of the same words: lower-case, in any order, each counted once.

    Words are runs of letters and digits after Unicode's NFKC.  None for a title without words.
    """
    words = sorted(set(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", title).lower())))
    return hashlib.sha256(" ".join(words).encode("utf-8", "replace")).digest()[:16] if words else None


def photo_key(path):
    """A key that two photo files share if they hold the same bytes.  None if there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()[:16]
    except OSError:
        return None


def average_hash(path):
    """Which of 32 x 32 squares of a photo are brighter than its average: (16,) uint64.

    None if it cannot be read, or shows one colour alone: all such photos would be the same.
    """
    import numpy as np  # here, so that those who go by titles alone need neither numpy nor Pillow
    from PIL import Image

    from base.photo import open_picture
    try:
        with open_picture(path) as photo:
            photo.draft("L", (4 * SIDE, 4 * SIDE))      # a JPEG is decoded at a fraction of its size
            grey = np.asarray(photo.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    except Exception:                                   # Pillow's readers raise a dozen kinds for a damaged file
        return None
    return np.packbits(grey > grey.mean()).view(np.uint64) if np.ptp(grey) > 8 else None


def similar_pairs(hashes, most=MOST_DIFFERENT):
    """[(i, j)] of the average hashes, i < j, that differ in at most `most` bits.  hashes: N of (16,) uint64.

    Every pair is compared, in blocks: first a quarter of the bits, then the rest of the few pairs that are left.
    """
    import numpy as np
    hashes, pairs = np.reshape(hashes, (-1, SIDE * SIDE // 64)), []
    with Progress("photos compared", len(hashes), "photos") as progress:
        for first in range(0, len(hashes), 256):
            block, rest = hashes[first:first + 256], hashes[first:]
            differ = np.zeros((len(block), len(rest)), np.uint16)
            for word in range(6, 10):                   # the middle of the photo: the edges are white in most
                differ += np.bitwise_count(block[:, None, word] ^ rest[None, :, word])
            i, j = np.nonzero(differ <= most)
            i, j = i[i < j], j[i < j]
            near = np.bitwise_count(block[i] ^ rest[j]).sum(1) <= most
            pairs += zip((first + i[near]).tolist(), (first + j[near]).tolist())
            progress.step(len(block))
    return pairs


def groups(titles, photos=None):
    """[a group number for each product]: duplicates, by whatever sign, are in one group, also in a chain.

    titles  the products' titles; photos: their files, or None to go by titles alone
    """
    parent = list(range(len(titles)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(keys):
        first = {}
        for i, key in enumerate(keys):
            if key is not None:
                parent[root(i)] = root(first.setdefault(key, i))
        return first

    join(map(title_key, titles))
    if photos is not None:
        keys, pairs = similar_photos(photos)
        first = join(keys)
        for one, other in pairs:
            parent[root(first[one])] = root(first[other])
    number = {}
    return [number.setdefault(root(i), len(number)) for i in range(len(titles))]


def similar_photos(photos):
    """(each photo's key, [(key, key)] of different photos that look the same).  photos: files; some may be missing"""
    keys, hashes = [], {}
    with Progress("photos read", len(photos), "photos") as progress:
        for photo in photos:
            key = photo_key(photo)
            keys.append(key)
            if key is not None and key not in hashes:
                hashes[key] = average_hash(photo)
            progress.step()
    known = [key for key, each in hashes.items() if each is not None]
    return keys, [(known[i], known[j]) for i, j in similar_pairs([hashes[key] for key in known])]


def keys_of(products, images=None):
    """Yield (title key, photo key) of products, i.e. of anything with .title and .image; the photo key is None without images.

    images  folder of the photos, or None to leave the photos out
    """
    for product in products:
        yield title_key(product.title), photo_key(images / product.image) if images and product.image else None


def not_in(train, products, images=None):
    """Those of `products` that have no duplicate in `train`: no product there has the same title words or photo bytes."""
    with Progress("duplicates", len(train) + len(products), "products") as progress:
        titles, photos, kept = set(), set(), []
        for title, photo in keys_of(train, images):
            titles.add(title)
            photos.add(photo)
            progress.step()
        for product, (title, photo) in zip(products, keys_of(products, images)):
            if not (title and title in titles or photo and photo in photos):
                kept.append(product)
            progress.step()
    return kept


def across(parts, images=None):
    """Duplicates of train in the other splits: {split: {sign: [(row, row of train)]}}, with one row of train for each.

    parts  {split: rows}, rows as dicts of the data set's columns; signs: "the same title words", and with `images` (a folder)
           "the same photo bytes" and "a photo that looks the same" (but has other bytes)
    """
    rows = [(part, row) for part, each in parts.items() for row in each]
    found = {part: defaultdict(list) for part in parts if part != "train"}

    def label(row):
        return row["attribute_names"], row["attribute_values"]

    def look(sign, keys, like=None):
        """Note the rows whose key, or one that is `like` it, stands in train, with a row of the same label if there is one."""
        in_train = defaultdict(list)
        for key, (part, row) in zip(keys, rows):
            if part == "train" and key is not None:
                in_train[key].append(row)
        for key, (part, row) in zip(keys, rows):
            others = [key] if like is None else like.get(key, ())
            if part != "train" and (known := [each for other in others for each in in_train.get(other, ())]):
                found[part][sign].append((row, next((each for each in known if label(each) == label(row)), known[0])))

    look("the same title words", [title_key(row["texts"].removeprefix("[Title]")) for _, row in rows])
    if images:
        keys, pairs = similar_photos([images / row["images"] for _, row in rows])
        like = defaultdict(list)
        for one, other in pairs:
            like[one].append(other)
            like[other].append(one)
        look("the same photo bytes", keys)
        look("a photo that looks the same", keys, like)
    return found


def note_duplicates(splits):
    """Print a line to stderr for each way in which products of {split: products} are duplicates by name.

    The same id and attribute twice in one split counts a product twice.  The same id, or the same title and photo, in two
    splits lets a model see in training what it is tested on.  Memory holds three hashes of 8 bytes for each product.
    """
    import numpy as np
    hashes = {}
    for split, products in splits.items():
        found = np.empty((3, len(products)), np.int64)
        with Progress(f"duplicates in {split}", len(products), "products") as progress:
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
