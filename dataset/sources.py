"""The two public sources, read once each: what the data sets need of them, in a database on the disk.

Labels    MAVE's mave_positives_labels.jsonl: id, category, attributes[key, evidences[value, pid, begin, end]]
Metadata  Amazon Reviews 2018's All_Amazon_Meta.json(.gz): asin, title, imageURL, imageURLHighRes and more; or several files
          by category, also those of 2014, whose lines are Python dicts

Memory is flat whatever their size: rows go to the disk, and only a few chunks are in memory.
"""

import ast
import contextlib
import gzip
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sqlite3
import threading
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache

from base.console import Progress, UserError
from dataset.mentions import clean

ASIN = re.compile(r"[A-Z0-9]{10}", re.ASCII)            # nothing else becomes a file name
FORMAT = 3                      # counted up when a pass stores something else: what older code has read is then read again
CHUNK = 2_000_000               # bytes read at a time, and the work of one process at a time
LONGEST_LINE = 16_000_000       # bytes; a longer line is broken
LONGEST_DICT = 200_000          # bytes of a Python dict: parsing one takes a hundred times its size
WORTH_PROCESSES = 50_000_000    # bytes of source from which a second process pays


def open_source(path):
    """(the lines' bytes, the file they come from): plain, gzip, or gzip in gzip, told by the content; else UserError."""
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}). docs/data.md says where the sources are.") from None
    file = raw
    try:
        while (head := file.read(64))[:2] == b"\x1f\x8b":   # All_Amazon_Meta.json.gz has been served compressed twice
            file.seek(0)
            file = io.BufferedReader(gzip.GzipFile(fileobj=file, mode="rb"), CHUNK)
        file.seek(0)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}). Download it again.") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-LFS pointer, not the file itself. In the clone that it comes from, run "
                        "git lfs pull, or download the file from its page (docs/data.md).")
    if head[:2] == b"PK" or head.lstrip()[:1] == b"<":
        raise UserError(f"{path} is a {'zip archive' if head[:2] == b'PK' else 'web page'}, not JSON lines (plain or gzip).")
    return file, raw


def go_to(file, raw, place):
    """Go to byte `place` of the decompressed stream: gzip has to be read up to there, quicker than parsing."""
    if file is raw:
        file.seek(place)
        return
    with Progress("finding the place", total=place // 10**6, unit="MB") as progress:
        while (left := place - file.tell()) > 0 and file.read(min(CHUNK, left)):
            progress.step(file.tell() // 10**6 - progress.done)


def chunks(file, raw):
    """Yield (whole lines, where they end in the decompressed stream, where that is in the file) to the end."""
    while blob := file.read(CHUNK):
        last = file.readline(LONGEST_LINE)
        blob += last
        while len(last) == LONGEST_LINE and not last.endswith(b"\n"):
            last = file.readline(LONGEST_LINE)  # thrown away: what was kept of such a line is broken JSON, and counted so
        yield blob, file.tell(), raw.tell()


def _follow_parent():
    """In a worker process: leave Ctrl-C to the parent, and end when it ends, even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parsed(parse, source, jobs):
    """Yield (parse(blob), end, position) for the chunks of `source`, in their order; jobs > 1 parses in other processes."""
    if jobs < 2:
        for blob, end, position in source:
            yield parse(blob), end, position
        return
    fresh = multiprocessing.get_context("spawn")        # a fork would inherit SQLite's open files, which it forbids
    with ProcessPoolExecutor(jobs, fresh, _follow_parent) as pool:
        waiting = deque()
        for blob, end, position in source:
            waiting.append((pool.submit(parse, blob), end, position))
            if len(waiting) > jobs + 1:         # a few ahead, never the file
                first = waiting.popleft()
                yield first[0].result(), *first[1:]
        for result, end, position in waiting:
            yield result.result(), end, position


def json_objects(blob, counts):
    """Yield the JSON objects of the lines in `blob`; what is none is counted as broken."""
    for line in blob.split(b"\n"):
        if not line.strip():
            continue
        counts["lines"] += 1
        try:
            item = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):    # ValueError: bad JSON, bad UTF-8, a number of 5,000 digits
            item = python_dict(line)
        if isinstance(item, dict):
            yield item
        else:
            counts["broken"] += 1


def python_dict(line):
    """The value of a line that is written as a Python dict, as Amazon's metadata of 2014 are; None for anything else."""
    if not line.startswith(b"{'") or len(line) > LONGEST_DICT:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # about backslashes
            return ast.literal_eval(line.decode("utf-8"))       # literals alone: nothing in it is executed
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def parse_labels(wanted, blob):
    """MAVE's lines -> (label rows with their raw values, counts).  wanted: {(category, key): [(data set, attribute)]}"""
    rows, counts = [], Counter()
    categories = {category for category, _ in wanted}
    for item in json_objects(blob, counts):
        asin, category, attributes = item.get("id"), item.get("category"), item.get("attributes")
        if not (isinstance(asin, str) and isinstance(category, str) and isinstance(attributes, list)):
            counts["broken"] += 1
        elif category not in categories:
            counts["of other categories"] += 1
        elif not ASIN.fullmatch(asin):
            counts["whose id is no ASIN"] += 1
        else:
            try:
                found = defaultdict(dict)               # two names of one attribute are one
                for attribute in attributes:
                    for where in wanted.get((category, attribute["key"]), ()):
                        found[where].update({raw: 0 for each in attribute["evidences"] if (raw := clean(each["value"]))})
            except (KeyError, TypeError, AttributeError):
                counts["broken"] += 1
                continue
            rows += [(asin, *where, category, json.dumps(list(raws))) for where, raws in found.items()]
    return rows, counts


@cache
def _reader(database):
    return sqlite3.connect(database, timeout=60)


def parse_metadata(database, blob):
    """Amazon's lines -> (product rows of the ids that have a label, counts)."""
    rows, counts, labelled = [], Counter(), _reader(database).cursor()
    for item in json_objects(blob, counts):
        asin, title = item.get("asin"), item.get("title")
        if not isinstance(asin, str):
            counts["broken"] += 1
            continue
        if not ASIN.fullmatch(asin) or not labelled.execute("SELECT 1 FROM label WHERE id = ?", [asin]).fetchall():
            counts["without a label"] += 1
            continue
        # Amazon's own page calls titles with getTime unformatted: they are scripts, not names
        title = clean(title) if isinstance(title, str) and "getTime" not in title else ""
        if not title:
            counts["without a usable title"] += 1
            continue
        urls = []
        for key in ("imageURLHighRes", "imageURL", "image", "imUrl"):       # the first files of 2018, and 2014, say the last two
            listed = item.get(key)
            listed = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
            first = next((url.strip().encode("utf-8", "ignore").decode() for url in listed if isinstance(url, str)
                          and re.match(r"\s*https?://", url, re.IGNORECASE)), None)
            if first and first not in urls:
                urls.append(first)
        rows.append((asin, title, json.dumps(urls)))
    return rows, counts


def store_labels(db, result):
    rows, counts = result
    before = db.total_changes
    db.executemany("INSERT OR IGNORE INTO label VALUES (?, ?, ?, ?, ?)", rows)
    counts["labels"] = db.total_changes - before
    counts["labels given before, left out"] = len(rows) - counts["labels"]
    return counts


def store_metadata(db, result):
    rows, counts = result
    before = db.total_changes
    db.executemany("INSERT OR IGNORE INTO product VALUES (?, ?, ?)", rows)
    counts["of a product given before, left out"] = len(rows) - (db.total_changes - before)
    counts["products"] = len(rows) - counts["of a product given before, left out"]
    return counts


TABLES = {                      # the first line that gives a key (with a usable title) wins: a place in the file, not chance
    "labels": "label (id, dataset, attribute, category, evidences, PRIMARY KEY (id, dataset, attribute))",
    "metadata": "product (id PRIMARY KEY, title, urls)",
}


def one_pass(db, name, number, path, mark, parse, store, jobs):
    """Read file `number` (from 1 on) of a source into its table, from where the last start came to; returns its counts.

    Rows, counts and the place in the source are committed together, chunk by chunk.  So a kill at any moment leaves
    exactly what the first so many bytes give, and the next start goes on from there.
    """
    key = name if number == 1 else f"{name} {number}"
    db.execute("CREATE TABLE IF NOT EXISTS pass (name PRIMARY KEY, mark, place, position, done, counts)")
    state = db.execute("SELECT mark, place, position, done, counts FROM pass WHERE name = ?", [key]).fetchone()
    if state is None or state[0] != mark:
        if state is not None:
            print(f"{name}: what it reads has changed since the last start; reading from the start")
        with db:
            db.execute("BEGIN")
            if number == 1:                             # a change in any of its files: all of them are read again
                db.execute("DELETE FROM pass WHERE name = ? OR name LIKE ? || ' %'", [name, name])
                db.execute(f"DROP TABLE IF EXISTS {TABLES[name].split()[0]}")
                db.execute(f"CREATE TABLE {TABLES[name]} WITHOUT ROWID")
            db.execute("INSERT INTO pass VALUES (?, ?, 0, 0, 0, '{}')", [key, mark])
        state = (mark, 0, 0, 0, "{}")
    _, place, position, done, counts = state
    counts = Counter(json.loads(counts))
    if done:
        print(f"{name}: read before")
        return counts
    if place:
        print(f"{name}: going on after {counts['lines']:,} lines")
    file, raw = open_source(path)
    size = os.path.getsize(path)
    jobs = jobs if size >= WORTH_PROCESSES else 1
    start, lines_before = time.monotonic(), counts["lines"]
    with raw, contextlib.ExitStack() as stack:
        try:
            if place:
                go_to(file, raw, place)
            progress = stack.enter_context(Progress(name, total=size // 10**6, unit="MB", done=position // 10**6))
            for result, place, position in parsed(parse, chunks(file, raw), jobs):
                with db:
                    counts.update(store(db, result))
                    db.execute("UPDATE pass SET place = ?, position = ?, counts = ? WHERE name = ?",
                               [place, position, json.dumps(counts), key])
                progress.step(position // 10**6 - progress.done, f"{counts['lines']:,} lines, {counts['broken']:,} broken")
        except BrokenProcessPool:
            raise UserError(f"{name}: a process that parses was killed, perhaps for lack of memory. Start again to go on "
                            "from here; --jobs 1 does without such processes.") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: the gzip file breaks off or is damaged after {counts['lines']:,} lines ({error}). "
                            "Download it again (curl -C - goes on with a part).") from None
    if not counts["lines"] or counts["broken"] == counts["lines"]:
        raise UserError(f"{path}: none of its {counts['lines']:,} lines is what --{name} needs: a JSON object with "
                        + ("id, category and attributes" if name == "labels" else "asin and title")
                        + ". Are --labels and --metadata the right way round?")
    with db:
        db.execute("UPDATE pass SET done = 1 WHERE name = ?", [key])
    seconds = max(time.monotonic() - start, 1e-9)
    print(f"{name}: {counts['lines'] - lines_before:,} lines in {seconds:.1f} s "
          f"({(counts['lines'] - lines_before) / seconds:,.0f} lines/s)")
    return counts
