"""Learning-by-Comparison: how much of its gain is comparing, and how much is additional steps?

    python -m experiments.paper_tables --rows full no-lbc no-lbc-twice --labels 10 20 --runs RUNS

An epoch with comparisons shows twice as many examples, so it has twice as many steps.  The control is
training without comparisons for as many steps (row no-lbc-twice).  This command trains the three arms, and
then compares them, with the same seeds and the same test products.

For each difference: its mean, and a 95 % interval from 10,000 bootstrap samples over seeds and products.  It
is significant if the interval does not contain 0.  Errors are also counted apart: inside a family of values
that look alike, and outside, for data sets whose values are grouped in FAMILIES.
"""

import itertools

import numpy as np

from base.tsv import read_tsv
from data import read_products
from demo import world

ARMS = ("no-lbc", "no-lbc-twice", "full", "judge-first", "better-instance")
SAMPLES = 10_000
COLUMNS = ("", "micro-F1", "errors inside a family", "errors outside", "micro-F1, seed by seed")

# Values that look alike.  Footwear's were grouped by shape, before any result.
FAMILIES = [set(family.split(", ")) for family in (
    "Cycling, Golf, Soccer; Basketball, Skateboarding Shoe, Tennis, Volleyball; "
    "Running Shoe, Training Shoe, Walking; Climbing Shoe, Hiking Boot; Combat, Motorcycle; "
    "Rain Boots, Snow Boots; Chelsea, Western/Cowboy; Flat, Low Heel; Mid Heel, High Heel; "
    "Ankle Boot, Bootie; Mid Calf, Knee High, Over The Knee").split("; ")]
FAMILIES += [set(values) for families in world.FAMILIES.values() for _, values in families]


def predictions(run):
    """The products of a run's test split, and its answers."""
    path = run / "predictions.tsv"
    return read_products(path), [row["prediction"] for _, row in read_tsv(path, "a run's predictions")]


def outcomes(run):
    """(products, 3): right, wrong inside the family, wrong outside."""
    rows = []
    for p, answer in zip(*predictions(run)):
        pair = {p.value, answer}
        alike = any(pair <= family for family in FAMILIES)
        rows.append(np.eye(3)[0 if len(pair) == 1 else 1 if alike else 2])
    return np.stack(rows)


def interval(difference, draw):
    """Mean and 95 % bootstrap interval of a matrix (seeds, products), in per cent, over both."""
    S, P = difference.shape
    seeds = draw.multinomial(S, np.full(S, 1 / S), SAMPLES) / S                 # (samples, S) weights
    products = draw.multinomial(P, np.full(P, 1 / P), SAMPLES) / P              # (samples, P)
    means = 100 * ((seeds @ difference) * products).sum(1)
    return 100 * difference.mean(), *np.percentile(means, (2.5, 97.5))


def compare(arms):
    """Each difference of two arms as cells, in points.  arms: {arm: [the run of each seed]}"""
    draw = np.random.default_rng(0)
    of_arm = {arm: np.stack([outcomes(run) for run in runs]) for arm, runs in arms.items()}
    rows = []
    for b, a in itertools.combinations(arms, 2):
        # (seeds, products, 3).  Without empty answers micro-F1 is the share of right answers.
        difference = of_arm[a] - of_arm[b]
        cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(difference[..., k], draw)) for k in range(3)]
        by_seed = " ".join(f"{100 * gain:+.2f}" for gain in difference[..., 0].mean(1))
        rows.append([f"{a} - {b}", *cells, by_seed])
    return rows
