"""One's own products: from a table to a data set, which can be checked; and the paper's three data sets.

    python -m dataset table products.xlsx --id SKU --title Name --attributes Heel Toe --out ROOT/NAME
    python -m dataset check ROOT/NAME
    python -m dataset build --labels mave_positives_labels.jsonl --metadata All_Amazon_Meta.json.gz
    python -m dataset import ImplicitAVE
    python -m dataset stats

A data set is ROOT/NAME/{train,val,test}.tsv with photos in ROOT/images/.  For the last three ROOT is data/ in
the project's folder.  docs/own-products.md and docs/data.md say more.
"""

import argparse

from base.console import PROJECT, run, user_path
from dataset.build import build
from dataset.check import check, stats
from dataset.release import import_release
from dataset.table import table
from dataset.values import ATTRIBUTES, VALUES


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv=None):
    parser = argparse.ArgumentParser("python -m dataset", description="Own products: table, check "
                                     "(docs/own-products.md).  The paper's: build, import, stats "
                                     "(docs/data.md).")
    commands = parser.add_subparsers(required=True)

    def command(name, function, what):
        flags = commands.add_parser(name, help=what, description=what,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        flags.set_defaults(function=function)
        if name in ("build", "import", "stats"):
            flags.add_argument("--data", metavar="ROOT", default=PROJECT / "data", type=user_path,
                               help="folder of the data sets")
        return flags.add_argument

    flag = command("table", table, "Make a data set from a shop's table: a row is a product, "
                   "some columns are attributes.")
    flag("file", type=user_path, help=".xlsx, or text with tabs, semicolons or commas between the cells")
    flag("--id", required=True, metavar="COLUMN", help="the column that names a product")
    flag("--attributes", required=True, nargs="+", metavar="COLUMN", help="the columns to be filled")
    for name in ("title", "photo", "category"):
        flag(f"--{name}", metavar="COLUMN", help=f"the column of the {name}")
    flag("--out", required=True, type=user_path, metavar="ROOT/NAME",
         help="a new folder; photos are in ROOT/images/")
    flag("--skip-value", nargs="+", default=[], metavar="WORD", help='words that mean "does not apply"')
    flag("--hide-answers", action="store_true", help="remove each value from its title and category")
    flag("--seed", type=int, default=0, help="of the split")
    flag = command("build", build, "Build Clothing, Footwear and General from MAVE's labels and "
                   "Amazon's metadata.")
    flag("--labels", required=True, type=user_path, help="mave_positives_labels.jsonl, plain or gzip")
    flag("--metadata", required=True, nargs="+", type=user_path,
         help="All_Amazon_Meta.json, plain or gzip; or several such files, as those by category")
    flag("--dataset", nargs="+", choices=ATTRIBUTES, default=list(ATTRIBUTES), help="which to build")
    flag("--values", type=user_path, default=VALUES, help="the table of raw and canonical values")
    flag("--more-than", type=int, default=100, help="a value needs more products than this")
    flag("--at-most", type=positive, default=1000, help="products drawn for a value")
    flag("--seed", type=int, default=0, help="of the draw and of the split")
    flag("--no-photos", action="store_true", help="download none and keep products without one")
    flag("--connections", type=positive, default=8, help="photos fetched at once")
    flag = command("import", import_release, "Turn the authors' ImplicitAVE folder into data sets.")
    flag("folder", type=user_path, help="a clone of github.com/HenryPengZou/ImplicitAVE")
    flag("--images", nargs="+", type=user_path, default=[], metavar="DIR", help="more folders with photos")
    flag = command("stats", stats, "Print Table 6, the values and what is wrong for data sets on disk.")
    flag("dataset", nargs="*", help="names in ROOT (default: all)")
    flag = command("check", check, "Say what train.py would refuse in a folder of products, and what "
                   "would spoil its result.")
    flag("folder", type=user_path,
         help="ROOT/NAME with train.tsv, val.tsv and test.tsv; photos in ROOT/images/")
    flag("--labels", type=positive, default=10, help="labels that a value should have for training")
    flag("--no-image", action="store_true", help="leave the photos out, as train.py --no-image does")
    flag("--all", action="store_true", help="show all examples, not three of each kind")
    flags = vars(parser.parse_args(argv))
    flags.pop("function")(**flags)


if __name__ == "__main__":
    run(main, "python -m dataset")
