"""The paper's Table 4 as measured facts: what can EIVEN answer that it was not trained for?

    python -m experiments.table_4                                            the demo world
    python -m experiments.table_4 --dataset footwear --data ROOT --llama DIR --no-image --seeds 0

Three kinds of products are answered:

implicit values    the test split
unseen values      test products whose value was held out of the training, one of each attribute
new attributes     test products of an attribute that was left out of the training; the mean over attributes

Guessing chooses one of the attribute's values at random; canonical is the share of answers to the test split
that are a value of the attribute, to the letter.
"""

import statistics
from dataclasses import astuple

from base import console
from base.console import read_json
from base.tsv import write_tsv
from data import read_split
from experiments.paper_tables import cell, do_run, new_parser, same_flags
from support.config import find_sources
from support.run_folder import read_config

ROWS = ("implicit values", "unseen values", "new attributes", "guessing", "canonical")


def write_without(attribute, root, data, dataset):
    """A data set in `root` whose train and val do not have the attribute, and whose test has nothing else."""
    for split in "train", "val", "test":
        rows = [astuple(p) for p in read_split(data, dataset, split)
                if (p.attribute == attribute) == (split == "test")]
        write_tsv(root / dataset / f"{split}.tsv", rows)
    if not (root / "images").is_symlink():
        (root / "images").symlink_to(data / "images")


def measure(runs, seed, flags):
    """The scores of ROWS, in per cent.  runs: the folder of the runs;  flags: of train.py"""
    def trained(name, *more):
        folder = runs / f"{name}-{seed}".replace(" ", "-")
        do_run(folder, [*flags, "--seed", str(seed), "--threads", "1", *more])
        return folder, read_json(folder / "metrics.json", "a run's scores")

    full, metrics = trained("full")
    _, held_out = trained("held-out", "--holdout-values", "1")
    config, record = read_config(full)
    new = []
    for attribute in record["values"]:
        root = runs / f"data without {attribute}"
        write_without(attribute, root, find_sources(config).data, config.dataset)
        _, without = trained(f"without {attribute}", "--data", str(root), "--llama", config.llama, "--vit",
                             config.vit or "")
        new.append(without["micro_f1"])
    guessing = statistics.mean(100 / len(values) for values in record["values"].values())
    canonical = 100 - 100 * sum(metrics["outside"].values()) / metrics["n"]
    unseen = held_out["seen_and_held_out"]["values held out"]
    return metrics["micro_f1"], unseen["micro_f1"], statistics.mean(new), guessing, canonical


def main():
    parser = new_parser(__doc__)
    parser.set_defaults(labels=[10])
    parser.epilog = "Other flags go to train.py as they are."
    args, passed_on = parser.parse_known_args()
    [count] = args.labels
    flags = ["--labels", str(count or "all"), *passed_on]
    runs = args.runs / "table-4"
    same_flags(runs, *flags)
    results = zip(*[measure(runs, seed, flags) for seed in args.seeds])
    print("Per cent: mean ± standard deviation (how many seeds)")
    for row, scores in zip(ROWS, results):
        print(f"{row:16} {cell(scores)}")


if __name__ == "__main__":
    console.run(main)
