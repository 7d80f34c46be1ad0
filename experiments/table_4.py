"""The paper's Table 4 as measured facts: what can EIVEN answer that it was not trained for?

    python -m experiments.table_4                                            the demo world
    python -m experiments.table_4 --dataset footwear --data ROOT --llama DIR --no-image --seeds 0

Implicit values    micro-F1 on the test split, and the share of test products whose text contains the value
Canonical values   the share of free answers that are a value of the attribute, to the letter
Unseen values      micro-F1 on values that were held out of the training, one of each attribute (--holdout-values 1)
New attributes     micro-F1 on an attribute that was left out of the training, the mean over all attributes

"Free" answers are written token by token, "constrained" ones are chosen from all values of the attribute.  Guessing chooses one
of these at random.
"""

import argparse
import statistics
from pathlib import Path

from base import console
from base.console import UserError
from base.tsv import write_tsv
from data import read_split, values_of
from demo import world
from evaluate import load, micro_f1
from experiments.baselines import extractive_ceiling
from experiments.paper_tables import cell, do_run, run_folder
from support.answering import answers, prepare_photos
from support.config import PROJECT, Config, add_flags, describe, find_sources
from support.values import outside


def finished(folder, flags):
    """Train a run, if it is not finished yet; the loaded Run."""
    if not (folder / "metrics.json").exists():
        do_run(folder, flags, threads=1)
    return load(folder)


def measure(run, products, values):
    """micro-F1 of (free answers, constrained answers, guessing), and the share of free answers that are in the list; per cent."""
    prepare_photos(run, products)
    free, chosen = list(answers(run, products)), list(answers(run, products, values))
    f1 = [micro_f1([(a.value, p.value) for p, a in zip(products, found)])["micro_f1"] for found in (free, chosen)]
    guessing = 100 * statistics.mean(1 / len(values[p.attribute]) for p in products)
    other = sum(sum(counts.values()) for counts in outside(products, free, values).values())
    return *f1, guessing, 100 - 100 * other / len(products)


def without_attribute(root, sources, dataset, attribute, splits):
    """A data set in `root` whose train and val do not have the attribute, and whose test has nothing else."""
    (root / dataset).mkdir(parents=True, exist_ok=True)
    if not (root / "images").is_symlink():
        (root / "images").symlink_to(sources.data / "images")
    for split, products in splits.items():
        rows = ([p.id, p.image, p.category, p.title, p.attribute, p.value] for p in products
                if (p.attribute == attribute) == (split == "test"))
        write_tsv(root / dataset / f"{split}.tsv", rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.table_4", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--labels", default="10", metavar="N|all", help="labelled products for each value (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "table-4", help="folder of the runs")
    add_flags(parser, ("dataset", "data", "llama", "vit", "demo", "lbc", "image"))
    given = vars(parser.parse_args())
    labels, seeds, runs = given.pop("labels"), given.pop("seeds"), given.pop("runs")
    config = Config(**given)
    sources = find_sources(config)
    print(describe(config, sources))
    splits = {split: list(read_split(sources.data, config.dataset, split)) for split in ("train", "val", "test")}
    test, values = splits["test"], values_of(splits["train"])
    if sources.data == world.ROOT:
        world.draw_photos(sources.data, [p.image for products in splits.values() for p in products])
    flags = ["--dataset", config.dataset, "--labels", labels, "--lbc", config.lbc, "--llama", str(sources.llama),
             *(["--vit", str(sources.vit)] if config.image else ["--no-image"])]

    def trained(row, seed, *further, data=sources.data):
        return finished(run_folder(runs, config.dataset, row, labels, seed),
                        [*flags, "--seed", str(seed), "--data", str(data), *further])

    table = {"implicit values": [], "unseen values": [], "new attributes": []}
    unseen_n, in_list = set(), []
    for seed in seeds:
        *found, canonical = measure(trained("full", seed), test, values)
        table["implicit values"].append(found)
        in_list.append(canonical)
        run = trained("held-out", seed, "--holdout-values", "1")
        unseen = [p for p in test if p.value in run.held_out.get(p.attribute, ())]
        if not unseen:
            raise UserError(f"{run.folder}: no test product has a value that was held out")
        table["unseen values"].append(measure(run, unseen, values)[:3])
        unseen_n.add(len(unseen))
        each = []
        for attribute in values:
            root = runs / f"without {attribute}"
            without_attribute(root, sources, config.dataset, attribute, splits)
            some = [p for p in test if p.attribute == attribute]
            each.append(measure(trained(f"without-{attribute.replace(' ', '-')}", seed, data=root), some, values)[:3])
        table["new attributes"].append([statistics.mean(column) for column in zip(*each)])
    print(f"\nmicro-F1 in per cent, test split, mean ± standard deviation over seeds (how many), {labels} labels per value\n\n"
          "| | n | free | constrained | guessing |\n|---|---|---|---|---|")
    for name, rows in table.items():
        n = " to ".join(map(str, sorted(unseen_n)[:1] + sorted(unseen_n)[1:][-1:])) if name == "unseen values" else len(test)
        print(f"| {name} | {n} | {' | '.join(cell(list(column)) for column in zip(*rows))} |")
    print(f"\nimplicit: {extractive_ceiling(test):.2f} % of {len(test)} test products have their value in the text (the ceiling of "
          f"every extractive method)\ncanonical: {cell(in_list)} % of the free answers are a value of the attribute, to the letter")


if __name__ == "__main__":
    console.run(main)
