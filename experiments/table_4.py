"""The paper's Table 4 as measured facts: what can EIVEN answer that it was not trained for?

    python -m experiments.table_4                                            the demo world
    python -m experiments.table_4 --dataset footwear --data ROOT --llama DIR --no-image --seeds 0

Three kinds of products are answered:

implicit values    the test split
unseen values      test products whose value was held out of the training, one of each attribute
new attributes     test products of an attribute that was left out of the training; the mean over attributes

The scores are micro-F1 of the answers, and of guessing, which chooses one of the attribute's values at
random; and "canonical", the share of answers that are a value of the attribute, to the letter.
"""

import statistics
from dataclasses import astuple

from base import console
from base.tsv import write_tsv
from data import read_split
from evaluate import load, score
from experiments.paper_tables import cell, do_run, markdown, new_parser, same_flags
from support.answering import answers, prepare_photos

ROWS = ("implicit values", "unseen values", "new attributes")
SCORES = ("EIVEN", "guessing", "canonical")


def measure(run, products, values):
    """SCORES of a run's answers to the products, in per cent.  values: {attribute: its values}"""
    prepare_photos(run, products)
    texts = [answer.value for answer in answers(run, products)]
    guessing = statistics.mean(1 / len(values[p.attribute]) for p in products)
    canonical = statistics.mean(text in ("", *values[p.attribute]) for p, text in zip(products, texts))
    return [score(products, texts)["micro_f1"], 100 * guessing, 100 * canonical]


def write_without(attribute, root, images, dataset, splits):
    """A data set in `root` whose train and val do not have the attribute, and whose test has nothing else."""
    for split, products in splits.items():
        rows = [astuple(p) for p in products if (p.attribute == attribute) == (split == "test")]
        write_tsv(root / dataset / f"{split}.tsv", rows)
    if not (root / "images").is_symlink():
        (root / "images").symlink_to(images)


def main():
    parser = new_parser(__doc__, "table-4")
    parser.epilog = "Other flags go to train.py as they are."
    args, passed_on = parser.parse_known_args()
    [count] = args.labels
    labels = str(count or "all")
    same_flags(args.runs, labels, *passed_on)

    def trained(name, seed, *flags):
        folder = args.runs / f"{name}-{seed}".replace(" ", "-")
        do_run(folder, ["--labels", labels, "--seed", str(seed), *passed_on, *flags])
        return load(folder, data_needed=True)

    results = []                                        # for each seed, SCORES of each of ROWS
    for seed in args.seeds:
        run = trained("full", seed)
        held_out = trained("held-out", seed, "--holdout-values", "1")
        data, dataset = run.sources.data, run.config.dataset
        splits = {split: read_split(data, dataset, split) for split in ("train", "val", "test")}
        test = splits["test"]
        unseen = [p for p in test if p.value in held_out.held_out.get(p.attribute, ())]
        weights = ["--llama", run.config.llama, "--vit", run.config.vit or ""]
        new = []
        for attribute in run.values:
            root = args.runs / f"data without {attribute}"
            write_without(attribute, root, data / "images", dataset, splits)
            run_without = trained(f"without {attribute}", seed, "--data", str(root), *weights)
            new.append(measure(run_without, [p for p in test if p.attribute == attribute], run.values))
        results.append([measure(run, test, run.values), measure(held_out, unseen, run.values),
                        [statistics.mean(column) for column in zip(*new)]])
    print(f"micro-F1 in per cent, test split (n = {len(test)}), {labels} labels for each value: mean ± "
          "standard deviation (how many seeds)\n")
    rows = [[name, *map(cell, zip(*scores))] for name, scores in zip(ROWS, zip(*results))]
    print("\n".join(markdown(["", *SCORES], rows)))


if __name__ == "__main__":
    console.run(main)
