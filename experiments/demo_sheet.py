"""docs/demo.png: test products of the demo world, the way in which each value is implicit, and a run's answers.

    python train.py --demo --dataset general --labels 50 --out RUN
    python -m experiments.demo_sheet RUN
"""

import argparse
from pathlib import Path

from base import console
from base.console import UserError, whole_file
from data import read_split
from demo import world
from experiments.figures import BLUE, GREY, ORANGE, WAYS, card, predictions, side_by_side
from support.config import PROJECT

EACH = 6                                                # products of each way


def sheet(products, found):
    """A row for each way, of its first products in the order of the test split; then a row of the first wrong answers.

    found  {(id, attribute): answer}
    """
    wrong = [p for p in products if found[p.id, p.attribute] != p.value]
    rows = [[p for p in products if world.describe(p.id)[2] == way] for way in WAYS]
    cards = []
    for p in [p for row in [*rows, wrong] for p in row[:EACH]]:
        answer = found[p.id, p.attribute]
        right = answer == p.value
        cards.append(card(p, world.photo_of(p.id), [
            (f"{p.attribute}: {p.value}", "black"), (f"known from {WAYS[world.describe(p.id)[2]]}", GREY),
            (f"answer: {answer or '(none)'}{'' if right else ' (wrong)'}", BLUE if right else ORANGE)], width=250))
    return side_by_side(cards, f"The demo world: the first {EACH} test products of each way, with their gold value and the run's "
                               f"answer. Last row: the first {EACH} of {len(wrong)} wrong answers (n = {len(products)}).", columns=EACH)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.demo_sheet", description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run on the demo world")
    run = parser.parse_args().run
    if not (run / "predictions.tsv").exists():
        raise UserError(f"{run}: holds no predictions.tsv; train it with: python train.py --demo --out {run}")
    products, found = read_split(world.write_dataset(), "general", "test"), predictions(run)
    if any((p.id, p.attribute) not in found for p in products):
        raise UserError(f"{run}: its predictions are not those of the demo world's test split")
    path = PROJECT / "docs" / "demo.png"
    with whole_file(path) as partial:
        sheet(products, found).convert("P", palette=1, colors=128).save(partial, format="PNG", optimize=True)
    print(f"written: {path}")


if __name__ == "__main__":
    console.run(main)
