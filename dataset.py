"""The paper's three data sets (section 3, Table 6, Appendix B): built from their public sources, imported, counted.

    python dataset.py build --labels mave_positives_labels.jsonl --metadata All_Amazon_Meta.json.gz
    python dataset.py import ImplicitAVE
    python dataset.py stats

Each writes or reads ROOT/NAME/{train,val,test}.tsv and ROOT/images/ (ROOT is data/ beside this file).  DATA.md says
where the sources are.  What the paper leaves open is settled here, and said where it is done:
a product has one row in a data set; where it has two values of one attribute, it has no row for that attribute.
"""

import argparse
import contextlib
import csv
import hashlib
import heapq
import io
import json
import os
import shutil
import sqlite3
import sys
from collections import Counter, defaultdict
from functools import partial
from itertools import product
from pathlib import Path

try:
    import resource             # not on Windows
except ImportError:
    resource = None

from console import Progress, UserError, run, whole_file, write_text
from mentions import folded, mentions, without, words
from sources import FORMAT, one_pass, open_source, parse_labels, parse_metadata, store_labels, store_metadata
from stats import COLUMNS, SPLITS, print_table, read_tsv, stats, write_tsv

HERE = Path(__file__).resolve().parent
# Data set -> attribute -> MAVE's categories that it is collected from.  Names and categories are those of the authors'
# release (ImplicitAVE); the paper's Table 6 writes Heel for Heel Height and Dress Length for Length.
_TOPS, _BRIDAL = ["Dresses", "Shirts & Tops"], "Wedding & Bridal Party Dresses"
ATTRIBUTES = {
    "clothing": {"Neckline": _TOPS, "Length": ["Dresses", "Skirts", "Pants"],
                 "Sleeve Style": [*_TOPS, _BRIDAL], "Shoulder Style": [*_TOPS, _BRIDAL]},
    "footwear": {name: ["Shoes"] for name in ("Athletic Shoe Style", "Boot Style", "Shaft Height", "Heel Height",
                                              "Toe Style")},
    "general": {"Pattern": ["Shirts & Tops", "Dresses", "Shoes", "Hats", "Scarves & Shawls", "Socks", "Pants", "Handbags",
                            "Skirts", "Coats & Jackets", "Wallets & Money Clips", "Baby & Toddler Outfits",
                            "Baby & Toddler Dresses", "Underwear", "Baby One-Pieces", "Shorts", "Vests",
                            "Jumpsuits & Rompers", "Belts", "Robes", "Swimwear", "Bras", "Pajamas"],
                "Material": ["Jewelry Holders", "Backpacks", "Messenger Bags", "Briefcases", "Wigs", "Duffel Bags",
                             "Camera Bags & Cases", "Leather & Vinyl"],
                "Shape": ["Charms & Pendants"]},
}
OTHER_KEYS = {"Heel Height": ["Heel"], "Length": ["Dress Length"]}      # accepted in MAVE's place of the names above


# ---- the table of values

def read_values(path):
    """values.tsv as two dicts: {(data set, attribute): {folded raw spelling: value}}, which maps (a value's own name is
    a spelling of it), and {(data set, attribute, value): [raw spelling, ...]}, which tells its mentions.

    Raises UserError, with the line, for what is not in ATTRIBUTES and for a spelling that is given two values.
    """
    table, names = defaultdict(dict), defaultdict(list)
    try:
        lines = csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"), newline=""), dialect="excel-tab")
        header = next(lines, None)
        if header != ["dataset", "attribute", "raw", "value"]:
            raise UserError(f"{path}, line 1: the header is {header or 'missing'}; it must be "
                            "dataset, attribute, raw, value with tabs between them.")
        for row in lines:
            if not row:
                continue
            where = f"{path}, line {lines.line_num}"
            if len(row) != 4 or not all(field.strip() for field in row):
                raise UserError(f"{where}: {len(row)} fields, or an empty one; "
                                "a line holds dataset, attribute, raw and value with tabs between them.")
            dataset, attribute, raw, value = (field.strip() for field in row)
            if attribute not in ATTRIBUTES.get(dataset, {}):
                raise UserError(f"{where}: no attribute {attribute!r} in data set {dataset!r}. Allowed: "
                                + "; ".join(f"{name}: {', '.join(each)}" for name, each in ATTRIBUTES.items()) + ".")
            names[dataset, attribute, value].append(raw)
            fold = table[dataset, attribute]
            for spelling in (raw, value):
                if not folded(spelling):
                    raise UserError(f"{where}: {spelling!r} holds neither letters nor digits.")
                if fold.setdefault(folded(spelling), value) != value:
                    raise UserError(f"{where}: {spelling!r} means {value!r} here, and {fold[folded(spelling)]!r} on an "
                                    f"earlier line of {dataset}, {attribute}. (Case, hyphens, plural and -ed make no "
                                    "difference.) Keep one of the two.")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the table of values: {error}") from None
    return dict(table), names


# ---- build: which products, without the mentions, with their photos, into which split

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
        db.executemany("INSERT INTO unmapped VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                       [(*key, n) for key, n in unmapped.items()])
        valued.clear()
        unmapped.clear()

    with db, Progress("values", db.execute("SELECT count(*) FROM label").fetchone()[0], "labels") as progress:
        db.execute("BEGIN")
        db.execute("DROP TABLE IF EXISTS valued")
        db.execute("CREATE TABLE valued (dataset, attribute, value, id, PRIMARY KEY (dataset, attribute, value, id)) "
                   "WITHOUT ROWID")
        db.execute("DROP TABLE IF EXISTS unmapped")
        db.execute("CREATE TABLE unmapped (dataset, attribute, raw, n, PRIMARY KEY (dataset, attribute, raw)) WITHOUT ROWID")
        for asin, dataset, attribute, evidences in db.execute("SELECT id, dataset, attribute, evidences FROM label"):
            fold, raws = table.get((dataset, attribute), {}), json.loads(evidences)
            values = {fold[folded(raw)] for raw in raws if folded(raw) in fold}
            unmapped.update((dataset, attribute, raw) for raw in raws if folded(raw) not in fold)
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


def rows_of(db, dataset, chosen, names):
    """[(row of the TSV, photo URLs)] for `chosen`, with every mention of the value out of title and category."""
    rows = []
    for asin, (attribute, value) in chosen.items():
        category, evidences, title, urls = db.execute(
            "SELECT category, evidences, title, urls FROM label JOIN product USING (id) "
            "WHERE dataset = ? AND id = ? AND attribute = ?", [dataset, asin, attribute]).fetchone()
        said = (value, *json.loads(evidences), *names[dataset, attribute, value])
        pattern = mentions(tuple(sorted({" ".join(words(name)) for name in said})))
        title = without(title, pattern)
        if title:
            row = [asin, f"{asin}.jpg", without(category, pattern), f"[Title] {title}", attribute, value]
            rows.append((row, json.loads(urls)))
    return rows


def split(rows, seed, dataset):
    """{split: rows}: each value's products 0.75 : 0.15 : 0.15, in an order drawn for (seed, product)."""
    by_value, parts = defaultdict(list), {name: [] for name in SPLITS}
    for row in rows:
        by_value[row[4], row[5]].append(row)
    share = SPLITS["val"] / sum(SPLITS.values())
    for same in by_value.values():
        same.sort(key=lambda row: draw(seed, dataset, "split", row[0]))
        n = round(len(same) * share)
        parts["val"] += same[:n]
        parts["test"] += same[n: 2 * n]
        parts["train"] += same[2 * n:]
    for part in parts.values():
        part.sort(key=lambda row: draw(seed, dataset, "order", row[0]))
    return parts


def remove_splits(folder):
    """Before new ones are written: a kill in between must not leave one split of an older draw beside another of a newer."""
    for name in SPLITS:
        (folder / f"{name}.tsv").unlink(missing_ok=True)


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


def build(labels, metadata, root, values=HERE / "values.tsv", datasets=tuple(ATTRIBUTES), seed=0, more_than=100,
          at_most=1000, photos=True, jobs=None, **web):
    """Build `datasets` in `root` from MAVE's labels and Amazon's metadata; section 3 of the paper.

    web  connections, timeout, deadline, tries, pause of photos.download
    What is read goes to root/.build; a start after a kill, or with another seed or table, goes on from there.
    """
    root = Path(root)
    table, names = read_values(values)
    wanted = defaultdict(list)
    for dataset, attributes in ATTRIBUTES.items():
        for attribute, categories in attributes.items():
            for category, key in product(categories, (attribute, *OTHER_KEYS.get(attribute, ()))):
                wanted[category, key].append((dataset, attribute))
    for path in (labels, metadata):             # before hours of work, not after
        open_source(path)[1].close()
    ours = root / ".build" / "written.json"             # the data sets that were built here
    built = json.loads(ours.read_text()) if ours.exists() else []
    foreign = [str(root / name) for name in datasets if (root / name / "train.tsv").exists() and name not in built]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: there already, and not built here. Move it away, or give another --data.")
    label_mark = json.dumps([FORMAT, size_and_time(labels), sorted(wanted.items())])
    metadata_mark = json.dumps([size_and_time(metadata), label_mark])
    jobs = jobs or min(2, os.cpu_count() or 1)
    work = root / ".build"
    with only_one(work), contextlib.closing(sqlite3.connect(work / "sources.sqlite", timeout=60)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA cache_size = -64000")        # kilobytes
        for folder in (root, *(root / name for name in datasets)):
            for litter in folder.glob(".*.partial"):    # of a start that was killed
                litter.unlink()
        for name, path, mark, parse, store in (
                ("labels", labels, label_mark, partial(parse_labels, dict(wanted)), store_labels),
                ("metadata", metadata, metadata_mark, partial(parse_metadata, str(work / "sources.sqlite")), store_metadata)):
            print_counts(name, one_pass(db, name, path, mark, parse, store, jobs))
        print_counts("labels", map_values(db, table))
        write_tsv(root / "unmapped.tsv", db.execute(
            "SELECT dataset, attribute, raw, n FROM (SELECT *, row_number() OVER (PARTITION BY dataset, attribute "
            "ORDER BY n DESC, raw) AS place FROM unmapped) WHERE place <= 200 ORDER BY dataset, attribute, place"),
            ["dataset", "attribute", "raw", "products"])
        print(f"raw values that {Path(values).name} does not map, the commonest first: {root / 'unmapped.tsv'}")
        chosen = {}
        for dataset in datasets:
            ids = choose(db, dataset, seed, more_than, at_most, photos)
            chosen[dataset] = rows_of(db, dataset, ids, names)
            print(f"{dataset}: {len(ids):,} products drawn"
                  + (f", {len(ids) - len(chosen[dataset]):,} dropped: their title is nothing but the value"
                     if len(ids) > len(chosen[dataset]) else ""))
    failed = {}
    if photos:
        from photos import download             # here, so that everything else starts without Pillow
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
        remove_splits(root / dataset)
        parts = split([row for row, _ in rows if row[0] not in failed], seed, dataset)
        for name, part in parts.items():
            write_tsv(root / dataset / f"{name}.tsv", part)
        print_table(dataset, {name: [dict(zip(COLUMNS, row)) for row in part] for name, part in parts.items()})
    if resource:
        unit = 1 if sys.platform == "darwin" else 1024
        own, each = (resource.getrusage(who).ru_maxrss * unit // 10**6 for who in (resource.RUSAGE_SELF,
                                                                                  resource.RUSAGE_CHILDREN))
        print(f"\nmemory: at most {own + jobs * each} MB ({own} MB here, {each} MB in each of {jobs} parsing processes)"
              if each else f"\nmemory: at most {own} MB")


# ---- import

def find_photos(places):
    """({file name: [paths]} of the photos under the folders `places`, the number of '._' files, [zip files])."""
    found, litter, zips = defaultdict(list), 0, []
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"{place} is not a folder. Give the folder that the photos were unpacked into.")
        for inside, folders, files in os.walk(place):
            folders[:] = sorted(name for name in folders if name not in (".git", "__MACOSX"))
            for name in sorted(files):
                if name.lower().endswith(".zip"):
                    zips.append(Path(inside, name))
                elif name.startswith("._"):     # what macOS leaves beside each file in an archive
                    litter += 1
                elif name.lower().endswith((".jpg", ".jpeg", ".png")):
                    found[name].append(Path(inside, name))
    return found, litter, zips


def place_photo(target, sources):
    """Put the first photo of `sources` at `target`, linked or else copied; returns why there is none, or None."""
    from photos import NoPhoto, checked, have_photo         # here, so that everything else starts without Pillow
    if have_photo(target):
        return None
    reason = "not found"
    for source in sources:
        try:
            checked(source).close()
        except NoPhoto as error:
            reason = f"{source}: {error}"
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:                         # another disk, or one that knows no links
            with whole_file(target) as partial:
                shutil.copyfile(source, partial)
        return None
    return reason


def import_release(folder, root, more_images=(), with_photos_only=False):
    """Write the authors' release ImplicitAVE, as it lies in `folder`, as data sets in `root`, and say what is missing.

    Their domain Jewlery_and_General_Apparel is the paper's General; others keep their names, in lower case.  Photos are
    looked for by name in all of `folder` and `more_images`.
    """
    folder, root = Path(folder), Path(root)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Clone github.com/HenryPengZou/ImplicitAVE and give the clone.")
    domains = next((found for inside in ("data/training_data/texts", "training_data/texts", "texts", ".")
                    if (found := sorted(path.parent for path in (folder / inside).glob("*/train.tsv")))), None)
    if not domains:
        raise UserError(f"{folder} holds no data/training_data/texts/DOMAIN/train.tsv. Is it the whole of ImplicitAVE?")
    found, litter, zips = find_photos([folder, *more_images])
    release = {}                                # all is read before anything is written
    for domain in domains:
        name = domain.name.lower()
        name = "general" if name in ("jewlery_and_general_apparel", "jewelry_and_general_apparel") else name
        release[name] = {}
        for part in SPLITS:
            release[name][part], problems = read_tsv(domain / f"{part}.tsv")
            print(*(f"note: {problem}\n" for problem in problems), sep="", end="")
        if (root / name / "train.tsv").exists():
            theirs = {row["id"] for rows in release[name].values() for row in rows}
            if any(row["id"] not in theirs for row in read_tsv(root / name / "train.tsv")[0]):
                raise UserError(f"{root / name} holds another data set, with other products. Move it away, or give "
                                "another --data.")
    (root / "images").mkdir(parents=True, exist_ok=True)
    missing = {}                                # photo: why
    for name, parts in release.items():
        wanted = sorted({row["images"] for rows in parts.values() for row in rows})
        with Progress(f"{name} photos", total=len(wanted), unit="photos") as progress:
            for image in wanted:
                if reason := place_photo(root / "images" / image, found.get(image, ())):
                    missing[image] = reason
                progress.step()
        remove_splits(root / name)
        for part, rows in parts.items():
            with_photo = [row for row in rows if row["images"] not in missing]
            kept = with_photo if with_photos_only else rows
            write_tsv(root / name / f"{part}.tsv", [[row[column] for column in COLUMNS] for row in kept])
            print(f"{name}/{part}.tsv: {len(kept):,} rows, {len(with_photo):,} of {len(rows):,} with their photo")
    write_tsv(root / "missing_photos.tsv", sorted(missing.items()), ["images", "reason"])
    bad = sum(reason != "not found" for reason in missing.values())
    print(f"{len(missing):,} photos missing, {bad:,} of them files that are no photo: {root / 'missing_photos.tsv'}"
          + (f"; {litter:,} '._' files of macOS passed over" if litter else ""))
    if missing:
        print("The authors publish the training photos behind the link in data/training_data/images/README.md; unpack them "
              "anywhere and give that folder with --images" + (f" ({zips[0]} is not unpacked)" if zips else "") + ".")


def arguments():
    parser = argparse.ArgumentParser(description="The paper's data sets: build, import, stats (DATA.md).")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, what):
        each = commands.add_parser(name, help=what, description=what,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        each.add_argument("--data", metavar="ROOT", default=HERE / "data", type=Path, help="folder of the data sets")
        return each

    def at_least(least):
        def number(text):
            if not text.isascii() or not text.isdigit() or int(text) < least:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
            return int(text)
        return number

    each = command("build", "Build Clothing, Footwear and General from MAVE's labels and Amazon's metadata.")
    each.add_argument("--labels", required=True, type=Path, help="mave_positives_labels.jsonl, plain or gzip")
    each.add_argument("--metadata", required=True, type=Path, help="All_Amazon_Meta.json, plain or gzip")
    each.add_argument("--dataset", nargs="+", choices=list(ATTRIBUTES), default=list(ATTRIBUTES), help="which to build")
    each.add_argument("--values", type=Path, default=HERE / "values.tsv", help="the table of raw and canonical values")
    each.add_argument("--more-than", type=at_least(0), default=100, help="a value needs more products than this")
    each.add_argument("--at-most", type=at_least(1), default=1000, help="products drawn for a value")
    each.add_argument("--seed", type=at_least(0), default=0, help="of the draw and of the split")
    each.add_argument("--jobs", type=at_least(1), help="processes that parse (default: 2, or 1 on one core)")
    each.add_argument("--no-photos", action="store_true", help="download none and keep products without one")
    each.add_argument("--connections", type=at_least(1), default=8, help="photos fetched at once")
    each.add_argument("--timeout", type=at_least(1), default=20, help="seconds to wait for a sign of a server's life")
    each = command("import", "Turn the authors' ImplicitAVE folder into data sets.")
    each.add_argument("folder", type=Path, help="a clone of github.com/HenryPengZou/ImplicitAVE")
    each.add_argument("--images", nargs="+", type=Path, default=[], metavar="DIR", help="more folders with photos")
    each.add_argument("--with-photos-only", action="store_true", help="leave rows without a photo out")
    each = command("stats", "Print Table 6 and what is wrong for data sets on disk.")
    each.add_argument("dataset", nargs="*", help="names in ROOT, or folders (default: all in ROOT)")
    each.add_argument("--values", type=Path, default=HERE / "values.tsv", help="the table of raw and canonical values")
    each.add_argument("--plot", type=Path, metavar="FILE.png", help="write the values' histogram")
    return parser.parse_args()


def main():
    given = arguments()
    try:
        run_command(given)
    except BrokenPipeError:
        raise
    except (OSError, sqlite3.Error) as error:   # no room, no permission: nothing that a traceback would explain
        raise UserError(f"{error}. Is there room on the disk, and leave to write in {given.data}?") from None


def run_command(given):
    if given.command == "build":
        build(given.labels, given.metadata, given.data, given.values, given.dataset, given.seed, given.more_than,
              given.at_most, not given.no_photos, given.jobs, connections=given.connections, timeout=given.timeout)
    elif given.command == "import":
        import_release(given.folder, given.data, given.images, given.with_photos_only)
    else:
        stats(given.data, given.dataset, read_values(given.values)[1], given.plot)


if __name__ == "__main__":
    run(main)
