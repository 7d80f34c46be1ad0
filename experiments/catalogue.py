"""A long catalogue whose command is killed on the way: are the answers those of one that nothing stopped?

    python -m experiments.catalogue RUN --rows 60000

The products are the demo world's, again and again under new ids, so RUN is a run in the demo world.  Rows a
second and memory are printed, too.  All that is written stays in a temporary folder.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base import console
from base.console import PROJECT
from demo import world


def write_catalogue(path, n):
    """n products of the demo world as a TSV file; the first cell of a line is the id, P0-DEMO00000."""
    source = world.write_dataset() / "general" / "train.tsv"
    header, *lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [f"P{i}-{lines[i % len(lines)]}" for i in range(n)]
    path.write_text("".join([header, *rows]), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", metavar="RUN", help="a run in the demo world")
    parser.add_argument("--rows", type=int, default=60_000, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        products, whole, killed = (Path(folder, name) for name in ("products.tsv", "whole.tsv", "killed.tsv"))

        def answer(output, limit=None):
            """Seconds of the command, which is killed (signal 9) after `limit` seconds."""
            command = [sys.executable, "-m", "tools.catalogue", args.run, "--input", products]
            start = time.monotonic()
            subprocess.run([*command, "--output", output], cwd=PROJECT, timeout=limit, check=True)
            return time.monotonic() - start

        for n in (min(4000, args.rows), args.rows):     # the first time, photos are drawn
            write_catalogue(products, n)
            whole.unlink(missing_ok=True)
            seconds = answer(whole)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        print(f"{args.rows / seconds:,.0f} rows/s, loading included; {memory:,.0f} MB at most", flush=True)
        for _ in range(3):
            try:
                answer(killed, 0.3 * seconds)
            except subprocess.TimeoutExpired:
                print(f"killed after {0.3 * seconds:.0f} s", flush=True)
        took = answer(killed)
        same = "the same" if killed.read_bytes() == whole.read_bytes() else "OTHER"
        print(f"finished after {took:.0f} s more; {same} bytes as without the kills")


if __name__ == "__main__":
    console.run(main)
