"""The paper's three data sets: built from their public sources, imported, counted; and one's own products: checked.

    python -m dataset build --labels mave_positives_labels.jsonl --metadata All_Amazon_Meta.json.gz
    python -m dataset import ImplicitAVE
    python -m dataset stats
    python -m dataset check FOLDER

Each of the first three writes or reads ROOT/NAME/{train,val,test}.tsv and ROOT/images/ (ROOT: data/ in the project's folder).
docs/data.md says where the sources are.
"""

import argparse
import sqlite3
from pathlib import Path

from base.console import UserError, run
from dataset.build import build
from dataset.release import import_release
from dataset.stats import stats
from dataset.values import ATTRIBUTES, VALUES, read_values

DATA = Path(__file__).resolve().parent.parent / "data"


def arguments():
    parser = argparse.ArgumentParser("python -m dataset", description="The paper's data sets: build, import, stats; own "
                                     "products: check (docs/data.md).")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, what):
        each = commands.add_parser(name, help=what, description=what,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        each.add_argument("--data", metavar="ROOT", default=DATA, type=Path, help="folder of the data sets")
        return each

    def at_least(least):
        def number(text):
            if not text.isascii() or not text.isdigit() or int(text) < least:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
            return int(text)
        return number

    each = command("build", "Build Clothing, Footwear and General from MAVE's labels and Amazon's metadata.")
    each.add_argument("--labels", required=True, type=Path, help="mave_positives_labels.jsonl, plain or gzip")
    each.add_argument("--metadata", required=True, nargs="+", type=Path,
                      help="All_Amazon_Meta.json, plain or gzip; or several such files, as those by category")
    each.add_argument("--dataset", nargs="+", choices=list(ATTRIBUTES), default=list(ATTRIBUTES), help="which to build")
    each.add_argument("--values", type=Path, default=VALUES, help="the table of raw and canonical values")
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
    each.add_argument("--values", type=Path, default=VALUES, help="the table of raw and canonical values")
    each.add_argument("--plot", type=Path, metavar="FILE.png", help="write the values' histogram")
    what = "Say what train.py would refuse in a folder of products, and what would spoil its result."
    each = commands.add_parser("check", help=what, description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    each.add_argument("folder", type=Path, help="ROOT/NAME with train.tsv, val.tsv and test.tsv; photos in ROOT/images/")
    each.add_argument("--labels", type=at_least(1), default=10, help="labels that a value should have for training")
    each.add_argument("--llama", type=Path, metavar="DIR", help="count tokens, too, with this LLaMA's tokenizer.model")
    return parser.parse_args()


def main():
    given = arguments()
    try:
        run_command(given)
    except BrokenPipeError:
        raise
    except (OSError, sqlite3.Error) as error:   # no room, no permission: nothing that a traceback would explain
        raise UserError(f"{error}. Is there room on the disk, and leave to write there?") from None


def run_command(given):
    if given.command == "build":
        build(given.labels, given.metadata, given.data, given.values, given.dataset, given.seed, given.more_than,
              given.at_most, not given.no_photos, given.jobs, connections=given.connections, timeout=given.timeout)
    elif given.command == "import":
        import_release(given.folder, given.data, given.images, given.with_photos_only)
    elif given.command == "check":
        from dataset.check import check  # here, because it loads torch
        check(given.folder, given.labels, given.llama)
    else:
        stats(given.data, given.dataset, read_values(given.values)[1], given.plot)


if __name__ == "__main__":
    run(main, "python -m dataset")
