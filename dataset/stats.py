"""Data sets on the disk: reading and writing their files, Table 6 of the paper for them, and a picture of
their values.

Labels are counted as {split: Counter of (attribute, value)}.
"""

from collections import Counter

from PIL import Image, ImageDraw

from base.console import UserError, reading, whole_file
from base.tsv import read_rows, write_tsv

SPLITS = {"train": 0.75, "val": 0.15, "test": 0.15}     # section 3; the sum is 1.05, so each is divided by it
TABLE_6 = {"footwear": (26868, 32, 1000, 229), "clothing": (24664, 30, 1000, 211),
           "general": (16891, 25, 1000, 117)}


def rows_of(path, convert):
    """([convert(row) of each row], [what is wrong with a line or with the file]): it goes on after a bad
    line.

    convert  of {column: cell}; raises ValueError for a row that nobody can use
    """
    rows = []
    problems = []
    try:
        with reading(path, "a data set's TSV"), \
                open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, row in read_rows(file):
                try:
                    if isinstance(row, ValueError):
                        raise row
                    rows.append(convert(row))
                except ValueError as error:
                    problems.append(f"{path}, line {line}: {error}")
    except UserError as error:
        problems.append(str(error))
    if not rows and not problems:
        problems.append(f"{path}: has a header but no products")
    return rows, problems


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
        raise UserError(f"no product is left for {', '.join(empty)}; the counts are above. No split was "
                        "written.")
    for name, parts in data_sets.items():
        for part in parts:  # a kill must not leave an older split beside a newer one
            (root / name / f"{part}.tsv").unlink(missing_ok=True)
        for part, rows in parts.items():
            write_tsv(root / name / f"{part}.tsv", rows)
        (root / name / ".made_by").write_text(maker)


def print_table(name, labels):
    """Print Table 6 for a data set: samples, values, head and tail (products of the commonest and rarest
    value).
    """
    print(f"\n{name}\n{'':8}{'samples':>9}{'values':>8}{'head':>7}{'tail':>7}  attributes")
    for part, n in [*labels.items(), ("all", sum(labels.values(), Counter()))]:
        attributes = ", ".join(sorted({attribute for attribute, _ in n}))
        head = max(n.values(), default=0)
        tail = min(n.values(), default=0)
        print(f"{part:8}{n.total():9,}{len(n):8,}{head:7,}{tail:7,}  {attributes}")
    if name in TABLE_6:
        print("Table 6 {:9,}{:8,}{:7,}{:7,}".format(*TABLE_6[name]))


def draw_histogram(path, data_sets):
    """Write a PNG with a bar for each value: its products.  data_sets: {name: labels}."""
    bars = sorted((", ".join((name, *value)), n) for name, labels in data_sets.items()
                  for value, n in sum(labels.values(), Counter()).items())
    scale = 600 / max(n for _, n in bars)               # pixels for a product
    picture = Image.new("RGB", (1000, 16 * len(bars)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, n) in enumerate(bars):
        pen.rectangle((0, 16 * row, scale * n, 16 * row + 12), "#4878a8")
        pen.text((scale * n + 6, 16 * row), f"{n:,}  {name}", "black")
    with whole_file(path) as partial:
        picture.save(partial, "PNG")
