"""What the commands in tools/ share.  Those of answering have flags and loading of evaluate.py."""

import argparse

from base.console import user_path
from support.config import add_flags


def run_parser(description):
    """A parser for RUN and the flags of its data and weights, for evaluate.load_run."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=user_path, help="run folder that train.py wrote")
    parser.set_defaults(values=None, constrain=False, merge=False)
    add_flags(parser, ("data", "llama", "vit", "device", "dtype", "threads"))
    return parser


def parse_product(parser):
    """The command line with the flags of one product."""
    parser.add_argument("--image", metavar="FILE", help="photo of the product")
    parser.add_argument("--text", metavar="TEXT", help='"title, category"')
    parser.add_argument("--attribute", metavar="NAME", default="", help="what to answer")
    return parser.parse_args()
