"""Learning-by-Comparison: how much of its gain is comparing, and how much is additional steps?

    python -m experiments.paper_tables --rows full no-lbc no-lbc-twice --labels 10 20 --seeds 100 101 102 --runs RUNS
    python -m experiments.comparing RUNS

An epoch with comparisons shows twice as many examples, so it has twice as many steps.  The control is training without
comparisons for as many steps (row no-lbc-twice).  The first command trains the three arms; this one compares them, with the
same seeds and the same test products.

For each difference: its mean, and a 95 % interval from 10,000 bootstrap samples over seeds and products.  It is "significant" if
the interval does not contain 0.  Errors are also counted apart: inside a family of values that look alike, and outside, for data
sets whose values are grouped in FAMILIES.
"""

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from base import console
from base.checkpoint import check_fields, read_json
from base.console import UserError
from demo import world

ARMS = {"no-lbc": "no comparisons", "no-lbc-twice": "no comparisons, as many steps", "full": "judge_last",
        "judge-first": "judge_first", "better-instance": "better_instance"}
DIFFERENCES = [("no-lbc-twice", "no-lbc"), ("full", "no-lbc-twice"), ("full", "no-lbc"), ("judge-first", "no-lbc-twice"),
               ("better-instance", "no-lbc-twice")]
SAMPLES = 10_000

# Values that look alike.  Those of the demo world are drawn so; those of footwear were grouped by shape, before any result.
FAMILIES = {attribute: [values for _, values in families] for attribute, families in world.FAMILIES.items()} | {
    "Athletic Shoe Style": [("Cycling", "Golf", "Soccer"), ("Basketball", "Skateboarding Shoe", "Tennis", "Volleyball"),
                            ("Running Shoe", "Training Shoe", "Walking"), ("Climbing Shoe", "Hiking Boot")],
    "Boot Style": [("Combat", "Motorcycle"), ("Rain Boots", "Snow Boots"), ("Chelsea", "Western/Cowboy")],
    "Heel Height": [("Flat", "Low Heel"), ("Mid Heel", "High Heel")],
    "Shaft Height": [("Ankle Boot", "Bootie"), ("Mid Calf", "Knee High", "Over The Knee")],
    "Toe Style": [("Pointed Toe",), ("Round Toe",)],
}


def look_alike(attribute, a, b):
    return any(a in family and b in family for family in FAMILIES.get(attribute, ()))


def read_run(folder):
    """{(id, attribute): (right, wrong inside the family, wrong outside)} of the test split, and the number of steps."""
    outcome = {}
    with open(folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, dialect="excel-tab"):
            attribute, gold, said = row["attribute_names"], row["attribute_values"], row["prediction"].strip()
            inside = said != gold and look_alike(attribute, gold, said)
            outcome[row["id"], attribute] = said == gold, inside, said != gold and not inside
    return outcome, len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines())


def interval(difference, draw):
    """Mean and 95 % bootstrap interval of a matrix (seeds, products), in per cent, over both."""
    S, P = difference.shape
    seeds = draw.multinomial(S, np.full(S, 1 / S), SAMPLES) / S                 # (samples, S) weights
    products = draw.multinomial(P, np.full(P, 1 / P), SAMPLES) / P              # (samples, P)
    means = 100 * ((seeds @ difference) * products).sum(1)
    return 100 * difference.mean(), *np.percentile(means, (2.5, 97.5))


def compare(name, labels, arms):
    """Markdown for one data set and number of labels.  arms: {arm: {seed: folder}}"""
    runs = {arm: {seed: read_run(folder) for seed, folder in sorted(found.items())} for arm, found in arms.items()}
    products = sorted(next(iter(next(iter(runs.values())).values()))[0])
    columns = 3 if any(attribute in FAMILIES for _, attribute in products) else 1       # without families micro-F1 alone
    lines = [f"**{name}, {labels} labels, test split, n = {len(products)}**: micro-F1 in per cent, mean ± standard deviation", "",
             "| arm | steps | seeds | micro-F1 | errors inside a family | errors outside |", "|---|---|---|---|---|---|"]
    table = {}
    for arm in (a for a in ARMS if a in runs):
        # (seeds, products, 3).  Without empty answers micro-F1 is the share of right answers.
        each = np.array([[run[p] for p in products] for run, _ in runs[arm].values()], dtype=float)
        table[arm] = dict(zip(runs[arm], each))
        f1 = 100 * each[:, :, 0].mean(1)
        steps = {steps for _, steps in runs[arm].values()}
        errors = [f"{100 * each[:, :, k].mean():.1f}" if k < columns else "-" for k in (1, 2)]
        lines.append(f"| {ARMS[arm]} | {', '.join(map(str, sorted(steps)))} | {len(f1)} | {f1.mean():.1f} ± "
                     f"{f1.std(ddof=1) if len(f1) > 1 else 0:.1f} | {' | '.join(errors)} |")
    lines += ["", "| difference, paired by seed | seeds | micro-F1 | errors inside a family | errors outside |",
              "|---|---|---|---|---|"]
    draw = np.random.default_rng(0)
    for a, b in DIFFERENCES:
        seeds = sorted(table.get(a, {}).keys() & table.get(b, {}).keys())
        if len(seeds) < 2:
            continue
        difference = np.stack([table[a][seed] - table[b][seed] for seed in seeds])
        cells = []
        for k in range(columns):
            mean, low, high = interval(difference[:, :, k], draw)
            cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), {'significant' if low * high > 0 else 'not significant'}")
        lines.append(f"| {ARMS[a]} - {ARMS[b]} | {len(seeds)} | {' | '.join(cells + ['-'] * (3 - columns))} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.comparing", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of the runs of experiments.paper_tables")
    runs = parser.parse_args().runs
    groups = defaultdict(lambda: defaultdict(dict))
    for path in sorted(runs.glob("*/metrics.json")):
        found = re.fullmatch(r"(.+)-(\d+|all)-(" + "|".join(ARMS) + r")-seed(\d+)", path.parent.name)
        if found:
            name, labels, arm, seed = found.groups()
            if check_fields(read_json(path, "a run's scores"), {"answered": (int, (0, 10 ** 12))}, path)["answered"]:
                groups[name, labels][arm][int(seed)] = path.parent
    if not groups:
        raise UserError(f"{runs}: holds no finished run of experiments.paper_tables with one of the rows {', '.join(ARMS)}")
    for (name, labels), arms in groups.items():
        print(compare(name, labels, arms))


if __name__ == "__main__":
    console.run(main)
