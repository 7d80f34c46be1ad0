"""Build the three data sets from their public sources, MAVE's labels and Amazon's metadata (section 3 of the paper).

What the paper leaves open is settled here, and said where it is done: a product has one row in a data set; where it has
two values of one attribute, it has no row for that attribute; products that are nearly the same are in one split.
"""

import contextlib
import hashlib
import heapq
import json
import os
import sqlite3
import sys
from collections import Counter, defaultdict
from functools import partial
from itertools import product
from pathlib import Path

try:
    import resource  # not on Windows
except ImportError:
    resource = None

from base.console import Progress, UserError, write_text
from base.duplicates import groups
from base.tsv import COLUMNS, write_tsv
from dataset.mentions import folded, mentions, without
from dataset.sources import FORMAT, one_pass, open_source, parse_labels, parse_metadata, store_labels, store_metadata
from dataset.stats import SPLITS, print_table, remove_splits
from dataset.values import ATTRIBUTES, OTHER_KEYS, VALUES, read_values


def draw(*what):
    """A number drawn for `what`, the same on every machine: products are ordered by it, never by where they stood."""
    return hashlib.sha256("\t".join(map(str, what)).encode()).digest()[:8]


def size_and_time(path):
    """What tells one version of a file from another."""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns]


def print_counts(name, counts):
    for what, n in sorted(counts.items(), key=lambda item: -item[1]):
        if n:
            print(f"{name}: {n:,} {what}")


def map_values(db, table):
    """Fill the tables `valued` and `unmapped` from `label`, by the table of values; returns counts.

    A label whose evidences name several values of the attribute gets none: its right answer would be a toss-up.
    All of it in one go, at every start: whoever edits values.tsv need not have the sources read again.
    """
    counts, valued, unmapped = Counter(), [], Counter()

    def flush():
        db.executemany("INSERT INTO valued VALUES (?, ?, ?, ?)", valued)
        db.executemany("INSERT INTO unmapped VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                       [(*key, n) for key, n in unmapped.items()])
        valued.clear()
        unmapped.clear()

    with db, Progress("values", db.execute("SELECT count(*) FROM label").fetchone()[0], "labels") as progress:
        db.execute("BEGIN")
        db.execute("DROP TABLE IF EXISTS valued")
        db.execute("CREATE TABLE valued (dataset, attribute, value, id, PRIMARY KEY (dataset, attribute, value, id)) "
                   "WITHOUT ROWID")
        db.execute("DROP TABLE IF EXISTS unmapped")
        db.execute("CREATE TABLE unmapped (dataset, attribute, category, raw, n, "
                   "PRIMARY KEY (dataset, attribute, category, raw)) WITHOUT ROWID")
        for asin, dataset, attribute, category, evidences in db.execute(
                "SELECT id, dataset, attribute, category, evidences FROM label"):
            fold, raws = table.get((dataset, attribute, category), {}), json.loads(evidences)
            values = {fold[folded(raw)] for raw in raws if folded(raw) in fold}
            unmapped.update((dataset, attribute, category, raw) for raw in raws if folded(raw) not in fold)
            counts["with one value" if len(values) == 1 else "with several values, left out" if values
                   else "with no value in the table, left out"] += 1
            if len(values) == 1:
                valued.append((dataset, attribute, values.pop(), asin))
            if len(valued) + len(unmapped) >= 20_000:
                flush()
            progress.step()
        flush()
    return counts


def choose(db, dataset, seed, more_than, at_most, photos):
    """{id: (attribute, value)} of a data set: values with more than `more_than` products, `at_most` drawn from each.

    A product is drawn once: values choose in turn, the rarest first, from the products that none has drawn before.
    """
    joined = "FROM valued JOIN product USING (id) WHERE dataset = ?" + (" AND urls <> '[]'" if photos else "")
    counted = db.execute(f"SELECT count(*), attribute, value {joined} GROUP BY attribute, value", [dataset])
    chosen = {}
    for n, attribute, value in sorted(counted.fetchall()):
        free = db.execute(f"SELECT id {joined} AND attribute = ? AND value = ?", [dataset, attribute, value])
        seen = 0

        def drawn():
            nonlocal seen
            for (asin,) in free:
                if asin not in chosen:
                    seen += 1
                    yield draw(seed, dataset, attribute, value, asin), asin

        first = heapq.nsmallest(at_most, drawn())
        if seen > more_than:
            chosen.update((asin, (attribute, value)) for _, asin in first)
        else:
            print(f"{dataset}: {attribute} = {value} left out: {seen:,} products, not more than {more_than:,}")
    return chosen


def table_rows(db, dataset, chosen, names):
    """[(row of the TSV, photo URLs)] for `chosen`, with every mention of the value out of title and category."""
    rows = []
    for asin, (attribute, value) in chosen.items():
        category, evidences, title, urls = db.execute(
            "SELECT category, evidences, title, urls FROM label JOIN product USING (id) "
            "WHERE dataset = ? AND id = ? AND attribute = ?", [dataset, asin, attribute]).fetchone()
        said = (value, *json.loads(evidences), *names[dataset, attribute, value])
        wanted = mentions(tuple(sorted(set(said))))
        title = without(title, wanted)
        if title:
            row = [asin, f"{asin}.jpg", without(category, wanted), f"[Title] {title}", attribute, value]
            rows.append((row, json.loads(urls)))
    return rows


def without_giants(group):
    """Group numbers, where the members of a giant group stand alone.

    More than 20 products, and more than a tenth of all, are one group by a photo or a title that says nothing, such as "photo
    not available".
    """
    size, most = Counter(group), max(20, len(group) // 10)
    return [number if size[number] <= most else (number, i) for i, number in enumerate(group)]


def split(rows, group, seed, dataset):
    """{split: rows}: each value's products 0.75 : 0.15 : 0.15, in an order drawn for (seed, product).

    group  a number for each row; rows of one group go to one split, so that the test does not ask what training has shown.
           val takes the first groups that fit into its share of each value, test the next, and train has the rest.
    """
    together = defaultdict(list)
    for number, row in zip(group, rows):
        together[number].append(row)
    share = SPLITS["val"] / sum(SPLITS.values())
    room = {part: {value: round(n * share) for value, n in Counter((row[4], row[5]) for row in rows).items()}
            for part in ("val", "test")}
    parts = {name: [] for name in SPLITS}
    for same in sorted(together.values(), key=lambda same: draw(seed, dataset, "split", min(row[0] for row in same))):
        needed = Counter((row[4], row[5]) for row in same)
        part = next((part for part, free in room.items() if all(n <= free[value] for value, n in needed.items())), "train")
        parts[part] += same
        if part != "train":
            for value, n in needed.items():
                room[part][value] -= n
    for part in parts.values():
        part.sort(key=lambda row: draw(seed, dataset, "order", row[0]))
    return parts


@contextlib.contextmanager
def only_one(folder):
    """Hold `folder` for this process; UserError if another one does.  The lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        raise UserError(f"Another build is at work in {folder.parent}. Wait for it, or give another --data.") from None
    try:
        yield
    finally:
        lock.close()


def build(labels, metadata, root, values=VALUES, datasets=tuple(ATTRIBUTES), seed=0, more_than=100,
          at_most=1000, photos=True, jobs=None, **web):
    """Build `datasets` in `root` from MAVE's labels and Amazon's metadata; section 3 of the paper.

    metadata  one file or several, read one after the other
    web       connections, timeout, deadline, tries, pause of photos.download
    What is read goes to root/.build; a start after a kill, or with another seed or table, goes on from there.
    """
    root = Path(root)
    metadata = [metadata] if isinstance(metadata, str | os.PathLike) else list(metadata)
    table, names = read_values(values)
    wanted = defaultdict(list)
    for dataset, attributes in ATTRIBUTES.items():
        for attribute, categories in attributes.items():
            for category, key in product(categories, (attribute, *OTHER_KEYS.get(attribute, ()))):
                wanted[category, key].append((dataset, attribute))
    for path in (labels, *metadata):            # before hours of work, not after
        open_source(path)[1].close()
    ours = root / ".build" / "written.json"             # the data sets that were built here
    built = json.loads(ours.read_text()) if ours.exists() else []
    foreign = [str(root / name) for name in datasets if (root / name / "train.tsv").exists() and name not in built]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: there already, and not built here. Move it away, or give another --data.")
    label_mark = json.dumps([FORMAT, size_and_time(labels), sorted(wanted.items())])
    metadata_mark = json.dumps([*map(size_and_time, metadata), label_mark])
    jobs = jobs or min(2, os.cpu_count() or 1)
    work = root / ".build"
    with only_one(work), contextlib.closing(sqlite3.connect(work / "sources.sqlite", timeout=60)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA cache_size = -64000")        # kilobytes
        for folder in (root, *(root / name for name in datasets)):
            for litter in folder.glob(".*.partial"):    # of a start that was killed
                litter.unlink()
        parse = partial(parse_metadata, str(work / "sources.sqlite"))
        passes = [("labels", 1, labels, label_mark, partial(parse_labels, dict(wanted)), store_labels),
                  *(("metadata", n, path, metadata_mark, parse, store_metadata) for n, path in enumerate(metadata, 1))]
        for name, *how in passes:
            print_counts(name, one_pass(db, name, *how, jobs))
        print_counts("labels", map_values(db, table))
        write_tsv(root / "unmapped.tsv", db.execute(
            "SELECT dataset, attribute, raw, category, n FROM (SELECT *, row_number() OVER (PARTITION BY dataset, attribute "
            "ORDER BY n DESC, raw, category) AS place FROM unmapped) WHERE place <= 200 ORDER BY dataset, attribute, place"),
            ["dataset", "attribute", "raw", "category", "products"])
        print(f"raw values that {Path(values).name} does not map, the commonest first: {root / 'unmapped.tsv'}")
        chosen = {}
        for dataset in datasets:
            ids = choose(db, dataset, seed, more_than, at_most, photos)
            chosen[dataset] = table_rows(db, dataset, ids, names)
            print(f"{dataset}: {len(ids):,} products drawn"
                  + (f", {len(ids) - len(chosen[dataset]):,} dropped: their title is nothing but the value"
                     if len(ids) > len(chosen[dataset]) else ""))
    failed = {}
    if photos:
        from dataset.photos import download  # here, so that everything else starts without Pillow
        urls = {row[0]: urls for rows in chosen.values() for row, urls in rows}
        failed = download(urls, root / "images", **web)
        write_tsv(root / "failed.tsv", [(asin, *each) for asin in sorted(failed) for each in failed[asin]],
                  ["id", "url", "reason"])
        print(f"photos: {len(urls) - len(failed):,} of {len(urls):,} ({100 * (1 - len(failed) / max(len(urls), 1)):.1f} %); "
              f"{len(failed):,} products dropped, see {root / 'failed.tsv'} (another start tries these again)")
    total = sum(SPLITS.values())
    print("split " + " : ".join(f"{share}" for share in SPLITS.values()) + f" as in the paper; they sum to {total:.2f}, "
          "so " + " : ".join(f"{share / total:.4f}" for share in SPLITS.values()))
    write_text(ours, json.dumps(sorted({*built, *datasets})))
    for dataset, rows in chosen.items():
        rows = [row for row, _ in rows if row[0] not in failed]
        group = without_giants(groups([row[3].removeprefix("[Title]") for row in rows],
                                      [root / "images" / row[1] for row in rows] if photos else None))
        print(f"{dataset}: {sum(n for n in Counter(group).values() if n > 1):,} products are nearly the same as others, and "
              "in one split with them")
        remove_splits(root / dataset)
        parts = split(rows, group, seed, dataset)
        for name, part in parts.items():
            write_tsv(root / dataset / f"{name}.tsv", part)
        print_table(dataset, {name: [dict(zip(COLUMNS, row)) for row in part] for name, part in parts.items()})
    if resource:
        unit = 1 if sys.platform == "darwin" else 1024
        own, each = (resource.getrusage(who).ru_maxrss * unit // 10**6 for who in (resource.RUSAGE_SELF,
                                                                                  resource.RUSAGE_CHILDREN))
        print(f"\nmemory: at most {own + jobs * each} MB ({own} MB here, {each} MB in each of {jobs} parsing processes)"
              if each else f"\nmemory: at most {own} MB")
