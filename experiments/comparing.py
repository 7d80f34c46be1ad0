"""Learning-by-Comparison: how much of its gain is comparing, and how much is additional steps?

    python -m experiments.paper_tables --rows full no-lbc no-lbc-twice --labels 10 20 --runs RUNS
    python -m experiments.comparing RUNS

An epoch with comparisons shows twice as many examples, so it has twice as many steps.  The control is
training without comparisons for as many steps (row no-lbc-twice).  The first command trains the three arms;
this one compares them, with the same seeds and the same test products.

For each difference: its mean, and a 95 % interval from 10,000 bootstrap samples over seeds and products.  It
is significant if the interval does not contain 0.  Errors are also counted apart: inside a family of values
that look alike, and outside, for data sets whose values are grouped in FAMILIES.  The arms' own scores are in
RUNS/tables.md.
"""

import argparse
import itertools
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from base import console
from base.console import UserError
from base.tsv import read_tsv
from demo import world
from experiments.paper_tables import markdown

ARMS = ("no-lbc", "no-lbc-twice", "full", "judge-first", "better-instance")
NAME = re.compile(rf"(.+-(?:\d+|all))-({'|'.join(ARMS)})-seed(\d+)")
SAMPLES = 10_000
COLUMNS = ("micro-F1", "errors inside a family", "errors outside")

# Values that look alike.  Footwear's were grouped by shape, before any result.
FAMILIES = [set(family.split(", ")) for family in (
    "Cycling, Golf, Soccer; Basketball, Skateboarding Shoe, Tennis, Volleyball; "
    "Running Shoe, Training Shoe, Walking; Climbing Shoe, Hiking Boot; Combat, Motorcycle; "
    "Rain Boots, Snow Boots; Chelsea, Western/Cowboy; Flat, Low Heel; Mid Heel, High Heel; "
    "Ankle Boot, Bootie; Mid Calf, Knee High, Over The Knee").split("; ")]
FAMILIES += [set(values) for families in world.FAMILIES.values() for _, values in families]


def read_run(folder):
    """Outcomes (products, 3): right, wrong inside the family, wrong outside."""
    outcomes = []
    for _, row in read_tsv(folder / "predictions.tsv", "a run's predictions"):
        pair = {row["attribute_values"], row["prediction"]}
        alike = any(pair <= family for family in FAMILIES)
        outcomes.append(np.eye(3)[0 if len(pair) == 1 else 1 if alike else 2])
    return np.stack(outcomes)


def interval(difference, draw):
    """Mean and 95 % bootstrap interval of a matrix (seeds, products), in per cent, over both."""
    S, P = difference.shape
    seeds = draw.multinomial(S, np.full(S, 1 / S), SAMPLES) / S                 # (samples, S) weights
    products = draw.multinomial(P, np.full(P, 1 / P), SAMPLES) / P              # (samples, P)
    means = 100 * ((seeds @ difference) * products).sum(1)
    return 100 * difference.mean(), *np.percentile(means, (2.5, 97.5))


def compare(name, runs):
    """Markdown for one data set and number of labels.  runs: {arm: {seed: what read_run gives}}"""
    rows = []
    draw = np.random.default_rng(0)
    for b, a in itertools.combinations(runs, 2):
        seeds = runs[a].keys() & runs[b].keys()
        if len(seeds) > 1:
            # (seeds, products, 3).  Without empty answers micro-F1 is the share of right answers.
            difference = np.stack([runs[a][seed] - runs[b][seed] for seed in sorted(seeds)])
            cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(difference[..., k], draw))
                     for k in range(3)]
            by_seed = " ".join(f"{100 * gain:+.2f}" for gain in difference[..., 0].mean(1))
            rows.append([f"{a} - {b}", *cells, by_seed])
    return "\n".join([f"**{name} labels, test split**: differences in points (95 % interval)", "",
                      *markdown(["paired by seed", *COLUMNS, "micro-F1, seed by seed"], rows), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of experiments.paper_tables' runs")
    runs = parser.parse_args().runs
    groups = defaultdict(lambda: {arm: {} for arm in ARMS})
    for path in sorted(runs.glob("*/metrics.json")):
        if match := NAME.fullmatch(path.parent.name):
            name, arm, seed = match.groups()
            groups[name][arm][seed] = read_run(path.parent)
    if not groups:
        raise UserError(f"{runs}: holds no finished run of experiments.paper_tables, row {', '.join(ARMS)}")
    for name, by_arm in groups.items():
        print(compare(name, {arm: by_seed for arm, by_seed in by_arm.items() if by_seed}))


if __name__ == "__main__":
    console.run(main)
