"""Lists of values: read from a file, held out of the training, and the answers that stand in no list."""

import random
from collections import Counter

from base.checkpoint import check_file
from base.console import UserError
from base.tsv import Reader


def read_values(path):
    """{attribute: its values, each once} from a file with one `attribute<TAB>value` a line and no header.

    UserError with file and line for every other line, and for a file without values.
    """
    check_file(path, "a list of values (attribute, tab, value)")
    values = {}
    with open(path, "rb") as file:
        lines = Reader(file, path)
        for cells in lines.cells:
            cells = [" ".join(cell.split()) for cell in cells]
            if not any(cells):                          # an empty line
                continue
            if len(cells) != 2 or not all(cells):
                given = "\t".join(cells)[:80]
                raise UserError(f"{lines.where()}: {given!r} should be an attribute, one tab and a value")
            attribute, value = cells
            values.setdefault(attribute, {})[value] = None
    if not values:
        raise UserError(f"{path}: holds no values; it needs one attribute, a tab and a value a line")
    return {attribute: list(several) for attribute, several in values.items()}


def hold_out(values, n, seed):
    """{attribute: n of its values}: those that --holdout-values keeps out of the training.

    The draw depends only on the seed and the attribute.  At least two values of each attribute are left to train on, so
    an attribute may have fewer held out, or none; then it is absent.  UserError if n is given and no attribute has any.
    """
    chosen = {}
    for attribute, several in values.items():
        shuffled = random.Random(f"held out {seed} {attribute}").sample(several, len(several))
        chosen[attribute] = sorted(shuffled[:max(0, min(n, len(several) - 2))])
    if n and not any(chosen.values()):
        raise UserError(f"--holdout-values {n}: each attribute of the training data has two values or fewer, and those stay; "
                        "leave the flag out")
    return {attribute: several for attribute, several in chosen.items() if several}


def without(products, held_out):
    """The products whose value is not held out, in order."""
    if not held_out:
        return products
    return [p for p in products if p.value not in held_out.get(p.attribute, ())]


def outside(products, answers, values):
    """{attribute: {answer: how often}} of the answers that are not among the attribute's values, most frequent first."""
    counts = Counter((p.attribute, a.value) for p, a in zip(products, answers)
                     if a.value and a.value not in values.get(p.attribute, ()))
    found = {}
    for (attribute, answer), count in counts.most_common():
        found.setdefault(attribute, {})[answer] = count
    return found
