"""A long catalogue with kill -9 on the way: rows a second, memory, and whether the bytes are those of a command that nothing
stopped.

    python -m experiments.catalogue RUN --rows 60000
    python -m experiments.catalogue RUN --rows 30000 --no-feature-cache

The products are the demo world's, again and again under new ids, so RUN is a run in the demo world.  All that is written
stays in a temporary folder.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base import console
from base.console import PROJECT, duration
from base.tsv import COLUMNS, write_tsv
from demo import world

KILLS = (0.2, 0.5, 0.8)                                 # where the command is killed, as parts of the answers; each drawn +- 0.1


def write_catalogue(path, rows):
    """The demo world's products in turn, each with one attribute, as many as asked."""
    world.write_dataset()
    with open(world.ROOT / "general" / "train.tsv", encoding="utf-8", newline="") as file:
        products = list(csv.DictReader(file, dialect="excel-tab"))
    world.draw_photos(world.ROOT, [p["images"] for p in products])
    write_tsv(path, ([f"P{i}", *(products[i % len(products)][name] for name in COLUMNS[1:])] for i in range(rows)))


def follow(command, watched, size, kill_at=None):
    """Run a command; (exit code, seconds, memory of its main process in MB at a tenth of `size` bytes and at the end).

    watched   the file of answers; it is followed until it has this size
    kill_at   the command is killed (signal 9) when the file has so many bytes
    """
    process, start, early, memory = subprocess.Popen(command, stdout=subprocess.DEVNULL), time.monotonic(), None, 0.0
    while process.poll() is None:
        time.sleep(0.2)
        written = watched.stat().st_size if watched.exists() else 0
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):                   # it has ended meanwhile
            continue
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6 or memory
        if early is None and written >= size / 10:
            early = memory
        if kill_at is not None and written >= kill_at:
            process.send_signal(signal.SIGKILL)
    return process.returncode, time.monotonic() - start, early or 0.0, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run in the demo world")
    parser.add_argument("--rows", type=int, default=60_000, help="default: %(default)s")
    parser.add_argument("--no-feature-cache", action="store_true", help="passed on to evaluate.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given, whole, killed = (Path(folder) / name for name in ("products.tsv", "whole.tsv", "killed.tsv"))
        write_catalogue(given, args.rows)
        command = [sys.executable, str(PROJECT / "evaluate.py"), args.run, "--input", str(given), "--output"]
        more = ["--no-feature-cache"] if args.no_feature_cache else []
        size = given.stat().st_size * 1.08              # of the answers, about: the input and two columns more
        code, seconds, early, late = follow([*command, str(whole), *more], Path(f"{whole}.partial"), size)
        print(f"{args.rows:,} rows in {duration(seconds)}: {args.rows / seconds:,.0f} rows/s, loading included; exit code {code}")
        print(f"resident memory: {early:,.0f} MB at 10 % of the rows, {late:,.0f} MB at the end", flush=True)
        draw, size = random.Random(0), whole.stat().st_size
        for part in KILLS:
            at = (part + draw.uniform(-0.1, 0.1)) * size
            code, seconds, *_ = follow([*command, str(killed), *more], Path(f"{killed}.partial"), size, kill_at=at)
            print(f"killed at {at / size:.0%} of the bytes, after {duration(seconds)}: exit code {code}", flush=True)
        code, seconds, *_ = follow([*command, str(killed), *more], Path(f"{killed}.partial"), size)
        same = "the same" if killed.read_bytes() == whole.read_bytes() else "OTHER"
        print(f"finished after {duration(seconds)}: exit code {code}; {same} bytes as without the kills")


if __name__ == "__main__":
    console.run(main)
