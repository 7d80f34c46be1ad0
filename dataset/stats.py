"""Data sets on the disk: reading and writing their files, Table 6 of the paper for them, and what is wrong with them."""

import os
from collections import Counter, defaultdict
from pathlib import Path

from base.console import UserError, whole_file
from base.duplicates import across
from base.tsv import COLUMNS, Reader
from dataset.mentions import clean, find, mentions

SPLITS = {"train": 0.75, "val": 0.15, "test": 0.15}     # section 3; the sum is 1.05, so each is divided by it
TABLE_6 = {"footwear": (26868, 32, 1000, 229), "clothing": (24664, 30, 1000, 211), "general": (16891, 25, 1000, 117)}


def read_tsv(path):
    """([row as a dict], [what is wrong with a line]) of a data set's file; UserError where it is none."""
    rows, problems = [], []
    try:
        with open(path, "rb") as file:
            lines = Reader(file, path)
            header = next(lines.cells, None)
            if header != list(COLUMNS):
                raise UserError(f"{path}, line 1: the header is {header}; it must be {' '.join(COLUMNS)}, tabs between.")
            for cells in lines.cells:
                if len(cells) != len(COLUMNS):
                    problems.append(f"{lines.where()}: {len(cells)} fields, not {len(COLUMNS)}")
                    continue
                row = dict(zip(COLUMNS, cells))
                empty = [name for name in COLUMNS if name != "category" and not row[name].strip()]
                if empty:
                    problems.append(f"{lines.where()}: nothing under {', '.join(empty)}")
                elif not plain_name(row["images"]):
                    problems.append(f"{lines.where()}: {row['images']!r} is no plain file name")
                else:
                    if not row["texts"].startswith("[Title] "):
                        problems.append(f"{lines.where()}: texts does not begin with '[Title] '")
                    rows.append(row)
    except UserError as error:
        if "not a readable TSV" not in str(error):
            raise
        problems.append(f"{error}; the rest of the file was not read")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); python -m dataset build and import write "
                        "train.tsv, val.tsv and test.tsv.") from None
    return rows, problems


def plain_name(name):
    """Whether `name` stays within the folder that it is looked for in."""
    return name == os.path.basename(name) and "\\" not in name and "\0" not in name and not name.startswith(".")


def remove_splits(folder):
    """Before new ones are written: a kill in between must not leave one split of an older draw beside another of a newer."""
    for name in SPLITS:
        (folder / f"{name}.tsv").unlink(missing_ok=True)


def print_table(name, parts):
    """Print Table 6 for a data set: samples, values, head and tail (products of the commonest and rarest value)."""
    print(f"\n{name}\n{'':8}{'samples':>9}{'values':>8}{'head':>7}{'tail':>7}  attributes")
    for part, rows in [*parts.items(), ("all", [row for rows in parts.values() for row in rows])]:
        n = Counter((row["attribute_names"], row["attribute_values"]) for row in rows)
        print(f"{part:8}{len(rows):9,}{len(n):8,}{max(n.values(), default=0):7,}{min(n.values(), default=0):7,}  "
              + ", ".join(sorted({attribute for attribute, _ in n})))
    if name in TABLE_6:
        print(f"{'Table 6':8}" + "".join(f"{n:{width},}" for n, width in zip(TABLE_6[name], (9, 8, 7, 7))))


def find_problems(name, parts, images, names):
    """[(what, how many, examples)] of a data set: each row here is one that training or testing could trip over.

    names  {(data set, attribute, value): raw spellings}, from values.tsv
    """
    from dataset.photos import have_photo
    rows = [(part, row) for part, each in parts.items() for row in each]
    places = defaultdict(list)
    for part, row in rows:
        places[row["id"]].append(part)
    found = [("ids twice in a split", [asin for asin, at in places.items() if len(at) > len(set(at))]),
             ("ids in two splits", [f"{asin} ({', '.join(sorted(set(at)))})" for asin, at in places.items()
                                    if len(set(at)) > 1])]
    for part, each in parts.items():
        found.append((f"photos missing in {part}", [row["images"] for row in each
                                                    if not (images / row["images"]).is_file()]))
    found.append(("files in images that are no photo", sorted(
        {row["images"] for _, row in rows
         if (images / row["images"]).is_file() and not have_photo(images / row["images"])})))
    named, spelt = [], []
    for part, row in rows:
        value = row["attribute_values"]
        title = clean(row["texts"].removeprefix("[Title]"))
        said = f"{row['id']} ({part}, {value}): {title}"
        if find(title, mentions((value,))):
            named.append(said)
        elif find(title, mentions(tuple(names.get((name, row["attribute_names"], value), ())))):
            spelt.append(said)
    found += [("titles that still name their value", named),
              ("titles that still hold another spelling of their value (values.tsv)", spelt)]
    trained = {label(row) for row in parts.get("train", ())}
    found.append(("values in test that train does not have", sorted(
        {" = ".join(label(row)) for row in parts.get("test", ()) if label(row) not in trained})))
    return [(what, len(each), each[:3]) for what, each in found if each]


def label(row):
    return row["attribute_names"], row["attribute_values"]


def print_duplicates(parts, images):
    """Print how many products of val and test stand in train, too: how far their score measures memory."""
    for part, signs in across(parts, images if images.is_dir() else None).items():
        for sign, pairs in signs.items():
            same = sum(label(row) == label(other) for row, other in pairs)
            row, other = pairs[0]
            print(f"  {part}: {len(pairs):,} of {len(parts[part]):,} ({100 * len(pairs) / len(parts[part]):.1f} %) are in train "
                  f"with {sign}, {same:,} of them with the same label; e.g. {row['id']} and {other['id']}")


def stats(root, given, names, plot=None):
    """Print Table 6 and every problem of the data sets `given` (names in root, or folders), or of all in root.

    names  {(data set, attribute, value): raw spellings}, from values.tsv
    """
    root = Path(root)
    folders = [Path(each) if Path(each).is_dir() else root / each for each in given] or sorted(
        path.parent for path in root.glob("*/train.tsv"))
    if not folders:
        raise UserError(f"{root} holds no data set, a folder with train.tsv, val.tsv and test.tsv. "
                        "Build or import one (docs/data.md), or give another folder with --data.")
    counted = {}
    for folder in folders:
        parts, problems = {}, []
        if not folder.is_dir():
            raise UserError(f"no data set {folder}. In {root}: "
                            f"{', '.join(sorted(path.parent.name for path in root.glob('*/train.tsv'))) or 'none'}.")
        for part in SPLITS:
            try:
                parts[part], wrong = read_tsv(folder / f"{part}.tsv")
                problems += wrong
            except UserError as error:          # the other files are still worth reading
                problems.append(str(error))
        if not parts:
            print(f"\n{folder}: no data set")
            for problem in problems:
                print(f"  {problem}")
            continue
        name = folder.resolve().name
        print_table(name, parts)
        counted[name] = {part: Counter((row["attribute_names"], row["attribute_values"]) for row in rows)
                         for part, rows in parts.items()}
        if len(problems) > 20:
            problems[20:] = [f"... and {len(problems) - 20:,} more lines like these"]
        images = folder.resolve().parent / "images"
        found = [*((what, 1, []) for what in problems), *find_problems(name, parts, images, names)]
        print("problems: none" if not found else "problems:")
        for what, n, examples in found:
            print(f"  {what}" + (f": {n:,}" if examples else ""))
            for example in examples:
                print(f"      {example}")
        print("duplicates:")
        print_duplicates(parts, images)
    if not counted:
        raise UserError("no data set among: " + ", ".join(map(str, folders)) + ". A data set is a folder with train.tsv, "
                        "val.tsv and test.tsv.")
    if plot:
        draw_histogram(plot, counted)
        print(f"\nvalues and their products: {plot}")


def draw_histogram(path, counted):
    """Write a PNG with a bar a value: products in train, val and test.  counted: {data set: {split: Counter}}."""
    from PIL import Image, ImageDraw, ImageFont
    font, line, left, width = ImageFont.load_default(13), 18, 330, 640
    colours = {"train": "#4878a8", "val": "#e0a040", "test": "#b04848"}
    bars = [(name, values) for name, parts in counted.items() for values in
            [None, *sorted(set().union(*parts.values()), key=lambda v: (v[0], -sum(n[v] for n in parts.values()), v))]]
    longest = max((sum(n[v] for n in counted[name].values()) for name, v in bars if v), default=1)
    picture = Image.new("RGB", (left + width + 80, line * (len(bars) + 2)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, value) in enumerate(bars):
        y = line * (row + 1)
        if value is None:
            pen.text((10, y), name, fill="black", font=font)
            for place, (part, colour) in enumerate(colours.items()):
                pen.rectangle([left + 90 * place, y + 3, left + 90 * place + 10, y + 13], fill=colour)
                pen.text((left + 90 * place + 16, y), part, fill="black", font=font)
            continue
        pen.text((left - 10, y), f"{value[0]}: {value[1]}", fill="black", font=font, anchor="ra")
        x = left
        for part, n in counted[name].items():
            pen.rectangle([x, y + 2, (x := x + n[value] * width / longest), y + line - 4], fill=colours[part])
        pen.text((x + 6, y), f"{sum(n[value] for n in counted[name].values()):,}", fill="black", font=font)
    with whole_file(path) as partial:
        picture.save(partial, "PNG")
