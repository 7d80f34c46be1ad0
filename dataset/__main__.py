"""The paper's three data sets: built from their public sources, imported, counted; and one's own products:
checked.

    python -m dataset build --labels mave_positives_labels.jsonl --metadata All_Amazon_Meta.json.gz
    python -m dataset import ImplicitAVE
    python -m dataset stats
    python -m dataset check FOLDER

Each of the first three writes or reads ROOT/NAME/{train,val,test}.tsv and ROOT/images/ (ROOT: data/ in the
project's folder).  docs/data.md says where the sources are.
"""

import argparse

from base.console import PROJECT, run, user_path
from dataset.build import build
from dataset.check import check, stats
from dataset.release import import_release
from dataset.values import ATTRIBUTES, VALUES


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv=None):
    parser = argparse.ArgumentParser("python -m dataset", description="The paper's data sets: build, import, "
                                     "stats; own products: check (docs/data.md).")
    commands = parser.add_subparsers(required=True)

    def command(name, function, what):
        flags = commands.add_parser(name, help=what, description=what,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        flags.set_defaults(function=function)
        if name != "check":
            flags.add_argument("--data", metavar="ROOT", default=PROJECT / "data", type=user_path,
                               help="folder of the data sets")
        return flags.add_argument

    flag = command("build", build, "Build Clothing, Footwear and General from MAVE's labels and "
                   "Amazon's metadata.")
    flag("--labels", required=True, type=user_path, help="mave_positives_labels.jsonl, plain or gzip")
    flag("--metadata", required=True, nargs="+", type=user_path,
         help="All_Amazon_Meta.json, plain or gzip; or several such files, as those by category")
    flag("--dataset", nargs="+", choices=list(ATTRIBUTES), default=list(ATTRIBUTES), help="which to build")
    flag("--values", type=user_path, default=VALUES, help="the table of raw and canonical values")
    flag("--more-than", type=int, default=100, help="a value needs more products than this")
    flag("--at-most", type=positive, default=1000, help="products drawn for a value")
    flag("--seed", type=int, default=0, help="of the draw and of the split")
    flag("--no-photos", action="store_true", help="download none and keep products without one")
    flag("--connections", type=positive, default=8, help="photos fetched at once")
    flag("--timeout", type=positive, default=20, help="seconds to wait for a sign of a server's life")
    flag = command("import", import_release, "Turn the authors' ImplicitAVE folder into data sets.")
    flag("folder", type=user_path, help="a clone of github.com/HenryPengZou/ImplicitAVE")
    flag("--images", nargs="+", type=user_path, default=[], metavar="DIR", help="more folders with photos")
    flag("--with-photos-only", action="store_true", help="leave rows without a photo out")
    flag = command("stats", stats, "Print Table 6 and what is wrong for data sets on disk.")
    flag("dataset", nargs="*", help="names in ROOT, or folders (default: all in ROOT)")
    flag("--plot", type=user_path, metavar="FILE.png", help="write the values' histogram")
    flag = command("check", check, "Say what train.py would refuse in a folder of products, and what "
                   "would spoil its result.")
    flag("folder", type=user_path,
         help="ROOT/NAME with train.tsv, val.tsv and test.tsv; photos in ROOT/images/")
    flag("--labels", type=positive, default=10, help="labels that a value should have for training")
    flag("--llama", type=user_path, metavar="DIR",
         help="count tokens, too, with this LLaMA's tokenizer.model")
    flag("--no-image", action="store_true", help="leave the photos out, as train.py --no-image does")
    flag("--all", action="store_true", help="show all examples, not three of each kind")
    flags = vars(parser.parse_args(argv))
    flags.pop("function")(**flags)


if __name__ == "__main__":
    run(main, "python -m dataset")
