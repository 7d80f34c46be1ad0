"""Compare runs on the same products: what they answer differently, and scores side by side.

    python -m tools.compare runs/general-10-1 runs/general-50-1
    python -m tools.compare RUN RUN/scores/test-constrain

Each run is compared with the first one.  Only metrics.json and predictions.tsv are read; no model is loaded.
"""

import argparse
import math
from collections import Counter

from base import console
from base.console import UserError, parse_flags, printable, read_json, reading, user_path
from base.tsv import read_tsv
from evaluate import exact_match
from support.answering import PREDICTED


def read_scores(folder):
    """({attribute: micro-F1}, {(id, attribute, gold value): answer}) of a folder."""
    path, what = folder / "metrics.json", "scores (of a finished RUN, RUN/val or RUN/scores/NAME)"
    metrics = read_json(path, what)
    with reading(path, what):
        rows = metrics["attributes"] | {"all (micro)": metrics}
        scores = {name: f"{m['micro_f1']:.2f}" for name, m in rows.items()}
    return scores, {(row["id"], row["attribute_names"], row["attribute_values"]): row["prediction"]
                    for _, row in read_tsv(folder / "predictions.tsv", "a run's answers", PREDICTED)}


def difference(answers, first):
    """Right answers of a run minus those of the first, in % of all, with a paired 95 % interval, as text.

    What both answer right, or both wrong, adds nothing to the interval.  The answers on one product are not
    independent, so they count together.  Where few products differ the interval would be too narrow; so two
    more are counted, one for each run (after Bonett and Price 2012).
    """
    products = Counter()
    for (id, attribute, gold), answer in answers.items():
        products[id] += exact_match(answer, gold) - exact_match(first[id, attribute, gold], gold)
    more = products.total()
    squares = sum(x * x for x in products.values()) - more * more / len(products)
    d = 100 * more / len(first)
    half = 196 * math.sqrt(squares + 2) / len(first)
    return f"{d:+.2f} ({d - half:+.2f} to {d + half:+.2f})"


def print_table(rows):
    """Print rows of texts with aligned columns; of a long text the first 80 characters."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (f"{printable(cell)[:80]:{min(width, 80)}}" for cell, width in zip(row, widths))
        print("  ".join(cells).rstrip())


def main():
    parser = argparse.ArgumentParser(description="Compare runs on the same products.", allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=user_path,
                        help="RUN, RUN/val or RUN/scores/NAME; the others are compared with the first")
    args = parse_flags(parser)
    names = [str(folder) for folder in args.runs]
    scores, answers = zip(*map(read_scores, args.runs))
    first = answers[0]
    if not first:
        raise UserError(f"{names[0]}: has no predictions; score it again (evaluate.py)")
    table = [["micro-F1", *scores[0], "right, minus the first (95 % interval)"]]
    for name, row, own in zip(names, scores, answers):
        if own.keys() != first.keys():
            raise UserError(f"{name}: its {len(own):,} products or their gold values are not the "
                            f"{len(first):,} of {names[0]}; compare scores of the same data and split")
        table.append([name, *row.values(), "" if own is first else difference(own, first)])
    rows = [[*question, *(own[question] for own in answers)] for question in first]
    different = [row for row in rows if len(set(row[3:])) > 1]
    print_table([["id", "attribute", "gold", *names], *different])
    print(f"different answers: {len(different):,}\n")
    print_table(table)
    print(f"n = {len(first):,}; the 95 % interval is over products: another --seed changes a run, too")


if __name__ == "__main__":
    console.run(main)
