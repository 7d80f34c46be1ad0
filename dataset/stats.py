"""Data sets on the disk: reading and writing their files, Table 6 of the paper for them, and their values.

Labels are counted as {split: Counter of (attribute, value)}.
"""

from collections import Counter, defaultdict

from base.console import UserError
from base.photo import open_photo
from base.tsv import write_tsv

SPLITS = {"train": 0.75, "val": 0.15, "test": 0.15}     # section 3; the sum is 1.05, so each is divided by it


def photo_problem(path, folder):
    """Why `path` is no photo in this folder, or None: a link must not lead out of it."""
    try:
        open_photo(path)
    except UserError as error:
        return str(error)
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{path}: is a link that leads out of {folder}"


def check_maker(root, names, maker):
    """UserError where another command, or a person, has made a data set that would be written over."""
    for name in names:
        mark = root / name / ".made_by"
        if (root / name / "train.tsv").exists() and (not mark.exists() or mark.read_text() != maker):
            raise UserError(f"{root / name}: there already, and not made by dataset {maker}. Move it away, "
                            "or give another --data.")


def write_splits(root, data_sets, maker):
    """Write {data set: {split: rows}}; UserError, and nothing is written, where a split would be empty.

    maker  the command, for check_maker
    """
    empty = [f"{name}/{part}" for name, parts in data_sets.items() for part, rows in parts.items()
             if not rows]
    if empty:
        raise UserError(f"no product is left for {', '.join(empty)} (val and test need values of four "
                        "products and more); the counts are above. No split was written.")
    for name, parts in data_sets.items():
        for part in parts:  # a kill must not leave an older split beside a newer one
            (root / name / f"{part}.tsv").unlink(missing_ok=True)
        for part, rows in parts.items():
            write_tsv(root / name / f"{part}.tsv", rows)
        (root / name / ".made_by").write_text(maker)


def print_table(name, labels):
    """Print Table 6 for a data set: samples, values, head and tail (products of the commonest and rarest
    value); then the values of each attribute.
    """
    total = sum(labels.values(), Counter())
    print(f"\n{name}\n{'':8}{'samples':>9}{'values':>8}{'head':>7}{'tail':>7}")
    for part, n in [*labels.items(), ("all", total)]:
        print(f"{part:8}{n.total():9,}{len(n):8,}{max(n.values(), default=0):7,}"
              f"{min(n.values(), default=0):7,}")
    values = defaultdict(list)
    for (attribute, value), n in total.most_common():
        values[attribute].append(f"{value} {n:,}")
    for attribute, its in values.items():
        print(f"{attribute}: {', '.join(its[:50])}{', ...' * (len(its) > 50)}")
