"""The two public sources, read once each; what the data sets need of them goes to one file.

Labels    MAVE's mave_positives_labels.jsonl: id, category, attributes[key, evidences[value, pid, begin, end]]
Metadata  Amazon Reviews 2018's All_Amazon_Meta.json(.gz): asin, title, imageURL, imageURLHighRes and more; or
          several files by category
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from sys import intern

from base.console import Progress, UserError, reading, whole_file
from dataset.mentions import clean
from dataset.values import ATTRIBUTES, OTHER_KEYS

ASIN = re.compile("[A-Z0-9]{10}")                       # nothing else becomes a file name
FORMAT = 4                      # of the file written here; counted up when it changes


def objects(path, what):
    """Yield the JSON objects in the lines of a file: plain, gzip, or gzip in gzip, told by the content.  A
    broken line is {}.
    """
    with reading(path, what), open(path, "rb") as raw, \
            Progress(what, path.stat().st_size // 10**6, "MB") as progress:
        file = raw
        try:
            while file.peek(2)[:2] == b"\x1f\x8b":  # All_Amazon_Meta.json.gz has been served compressed twice
                file = gzip.open(file)
            for line in file:
                progress.step(raw.tell() // 10**6 - progress.done)
                try:
                    item = json.loads(line.decode())
                except (ValueError, RecursionError):    # bad JSON, bad UTF-8, a number of 5,000 digits
                    item = None
                yield item if isinstance(item, dict) else {}
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: the gzip file is damaged or breaks off ({error}). Download "
                            "it again.") from None


def read_labels(path):
    """{id: {(data set, attribute): (category, [raw value])}} of MAVE's labels; of each the first."""
    labels = {}
    broken = 0
    for item in objects(path, "MAVE's labels"):
        raws = defaultdict(list)                        # two names of one attribute are one
        try:
            asin = ASIN.fullmatch(item["id"])[0]
            category = item["category"]
            for attribute in item["attributes"]:
                key = OTHER_KEYS.get(attribute["key"], attribute["key"])
                for dataset, attributes in ATTRIBUTES.items():
                    if category in attributes.get(key, ()):
                        raws[dataset, key] += [intern(clean(each["value"]))
                                               for each in attribute["evidences"]]
        except (KeyError, TypeError, AttributeError):
            broken += 1
            continue
        for where, values in raws.items():
            labels.setdefault(asin, {}).setdefault(where, (intern(category), values))
    print(f"labels: {len(labels):,} products; left out: {broken:,} lines that are broken, or whose id is no "
          "ASIN")
    return labels


def collect(labels_path, metadata, target):
    """Write the labelled products of both sources to `target`, unless it holds them: a JSON line for each.

    The line: [id, title, [photo URL], [[data set, attribute, category, [raw value]]]].  The first line tells
    what the sources were.  The first usable title of a product counts.
    """
    paths = [labels_path, *metadata]
    mark = json.dumps([FORMAT, [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]]) + "\n"
    if target.exists() and open(target).readline() == mark:
        print("sources: read before")
        return
    labels = read_labels(labels_path)
    found = 0
    with whole_file(target) as partial, open(partial, "w") as file:
        file.write(mark)
        for path in metadata:
            for item in objects(path, "Amazon's metadata"):
                asin = str(item.get("asin"))
                title = item.get("title")
                # Amazon's own page calls titles with getTime unformatted: they are scripts, not names.
                if asin in labels and isinstance(title, str) and "getTime" not in title and clean(title):
                    found += 1
                    # Some of the files say image.
                    urls = [re.search(r"https?://[^\s'\"]+", str(item.get(key)), re.IGNORECASE)
                            for key in ("imageURLHighRes", "imageURL", "image")]
                    urls = list(dict.fromkeys(url[0] for url in urls if url))
                    its_labels = [[*where, *label] for where, label in labels.pop(asin).items()]
                    file.write(json.dumps([asin, clean(title), urls, its_labels]) + "\n")
        print(f"metadata: {found:,} of these products have a usable title")
        if not found:
            raise UserError("no product has both a label and a title. Are --labels and --metadata the right "
                            "way round, and the files of docs/data.md? Nothing was written.")


def collected(target):
    """Yield the [id, title, urls, labels] that `collect` has written."""
    with open(target) as file:
        next(file)
        yield from map(json.loads, file)
