"""A shop's table as a data set: a row is a product, and some of its columns are attributes."""

import io
import os
import re
import zipfile
from collections import defaultdict
from decimal import Decimal
from shlex import quote
from xml.etree import ElementTree

from base.console import UserError, reading, what_is
from base.tsv import SEPARATORS, normal_names, read_rows, separator_of, tsv_line, write_tsv
from dataset.build import split
from dataset.check import examine, print_findings, training_command
from dataset.mentions import clean, mentions, without
from dataset.stats import write_splits


def table(file, id, attributes, out, title, photo, category, skip_value, hide_answers, seed):
    """Write the data set `out` (ROOT/NAME) from a table, and rest.tsv: the products and attributes without a
    value.  Print what `check` would say.

    id, attributes, title, photo, category   names of columns
    skip_value    words for "does not apply": such a cell is neither trained on nor answered
    hide_answers  remove each value from its own title and category, as section 3 of the paper does
    """
    if any(out.glob("*")):
        raise UserError(f"--out {out}: is there already, and not empty; name a new folder ROOT/NAME, or "
                        "delete an older data set there (photos are in ROOT/images)")
    if "|" in "".join(attributes) or len({name.casefold() for name in attributes}) < len(attributes):
        raise UserError("--attributes: names a column twice, or one with '|' in its name, which separates "
                        "names in rest.tsv; leave it out, or rename it")
    out = out.resolve()
    images = out.parent / "images"
    products = read_products(file, (id, photo, category, title), attributes, images)
    skipped = {"", *(word.casefold() for word in skip_value)}
    labelled = []
    rest = []
    for product, values in products:
        for attribute, value in values.items():
            texts = product[2:]
            if hide_answers:
                texts = [without(clean(text), mentions((value,))) for text in texts]
            if value.casefold() not in skipped:
                labelled.append([*product[:2], *texts, attribute, value])
        empty = [attribute for attribute, value in values.items() if not value]
        if empty:
            rest.append([*product, "|".join(empty), ""])
    parts = split(labelled, images, seed, out.name)
    print(f"\n{len(products):,} products with {len(labelled):,} values.  Without a value of some attribute: "
          f"{len(rest):,}, in rest.tsv")
    if labelled:                                        # else they are products for a run that is there
        learnt = {row[4] for row in labelled}
        for attribute in attributes:
            if attribute not in learnt:
                print(f"note: no product has a value of {attribute}: it can be neither learnt nor answered")
        write_splits(out.parent, {out.name: parts}, "table")
    write_tsv(out / "rest.tsv", rest)
    if labelled:
        refused = examine(out, 10, image=bool(photo))
        condition = ", if only missing photos are REFUSED" * refused
        print(f"\nNext{condition}:  {training_command(out, 'all')}{' --no-image' * (not photo)}"
              f"{' --no-text' * (not title)}{' --skip-missing-photos' * refused}")
    if rest:
        print(f"Then:  python -m tools.catalogue RUN --input {quote(str(out / 'rest.tsv'))} "
              "--output answers.csv --wide --constrain")


def read_products(path, columns, attributes, images):
    """[([id, photo, category, title], {attribute: value})] of the rows of a table; prints what is odd in
    them.

    columns  the names of the first four columns, or None
    """
    names = [name for name in (*columns, *attributes) if name]
    key = dict(zip(names, normal_names(names)))
    lines, separator = read_lines(path, key.values())
    try:
        rows = list(read_rows(lines, key.values(), separator))
    except ValueError as error:                         # the header
        raise UserError(f"{path}: {error}") from None
    products = {}
    cells = {}                                          # {name of a photo: the first cell that named it}
    notes = defaultdict(list)                           # {"what: what was done": [example]}
    for number, row in rows:
        if isinstance(row, ValueError):
            notes["rows that cannot be read: left out"].append(f"row {number} {row}")
            continue
        if not any(row.values()):
            continue
        id, photo, *texts = (row[key[name]].strip() if name else "" for name in columns)
        if not id or id in products:
            notes["rows without an id, or with an earlier row's: left out"].append(f"row {number}: {id}")
            continue
        # of several photos the first
        cell = photo = re.sub(r"^(.+?\.\w{3,4}(?:\?\S*?)?)\s*[;,|\n](?s:.*)", r"\1", photo)
        if os.path.isabs(photo) or ".." in photo or not os.path.isfile(images / photo):     # also a URL
            photo = re.split(r"[/\\]", photo.split("?")[0])[-1]
        if cells.setdefault(photo, cell) != cell:
            notes["photos of several folders with one name: taken for one photo"].append(f"{id}: {cell}")
        values = {name: " ".join(row[key[name]].split()) for name in attributes}
        if errors := [value for value in values.values() if re.fullmatch("#[A-Z/0]+[!?A]", value)]:
            notes["cells with an error: a value like others"].append(f"{id}: {errors[0]}")
        products[id] = [id, photo, *(" ".join(text.split()) for text in texts)], values
    print_findings([("NOTES on the table", note, examples) for note, examples in notes.items()])
    if not products:
        raise UserError(f"{path}: holds no product below its header")
    return list(products.values())


# ---------------------------------------------------------------------------------------- reading


def read_lines(path, names):
    """(lines of text, the separator of their cells) of a CSV, TSV or .xlsx file.  Prints how it was read.

    names  of columns that are needed
    """
    with reading(path, "a table (.xlsx or CSV)"):
        kind = what_is(path)
        if zipfile.is_zipfile(path):
            return xlsx_lines(path), "\t"
        if kind and not kind.startswith(("UTF-16", "a zip")):           # a text may well begin with PK
            raise ValueError(f"it is {kind}")
        content = path.read_bytes()
        if content.startswith(b"PK\3\4"):
            raise UserError(f"{path}: is a damaged Excel workbook; save it again")
        encoding = "utf-16" if b"\0" in content[:100] else "utf-8-sig"
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            text = content.decode("cp1252")
            word = re.search(r"\w*[^\x00-\x7f]\w*", text)[0]
            encoding = f"cp1252 (is {word!r} right? If not, save it as UTF-8)"
    lines = io.StringIO(text, newline="").readlines()
    separator = separator_of(next(filter(str.strip, lines), ""), names)
    print(f"{path}: read as {encoding.removesuffix('-sig')}, {SEPARATORS[separator]} between the cells")
    return lines, separator


def xlsx_lines(path):
    """The first sheet of an Excel workbook as the lines of a TSV: line n is row n.  Only columns with a name
    in the header, the first row that is not empty, are there.
    """
    with zipfile.ZipFile(path) as archive:
        def root(name):
            return ElementTree.parse(archive.open(name)).getroot()

        shared = []
        if "xl/sharedStrings.xml" in archive.namelist():
            shared = [plain_text(each) for each in root("xl/sharedStrings.xml")]
        files = {each.get("Id"): each.get("Target") for each in root("xl/_rels/workbook.xml.rels")}
        sheet = root("xl/workbook.xml").find("{*}sheets/{*}sheet")      # the first; its file has any number
        [file] = [files[value] for value in sheet.attrib.values() if value in files]
        lines = []
        header = []                                     # its columns: "A", "B"; 0, 1 where cells name none
        for _, row in ElementTree.iterparse(archive.open("xl/" + file.removeprefix("/xl/"))):
            if row.tag.endswith("}row"):
                cells = {cell.get("r", "").rstrip("0123456789") or n: cell_text(cell, shared)
                         for n, cell in enumerate(row)}
                header = header or [column for column, text in cells.items() if text]
                lines += ["\n"] * (int(row.get("r", 0)) - 1 - len(lines))
                lines.append(tsv_line(cells.get(column, "") for column in header))
                row.clear()                             # a sheet may be large
    print(f"{path}: an Excel workbook; its first sheet, {sheet.get('name')!r}, is read")
    return lines


def cell_text(cell, shared):
    """What a cell of a sheet holds.  shared: the strings of the workbook"""
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return "".join(map(plain_text, cell.findall("{*}is")))
    text = cell.findtext("{*}v", "")
    if kind == "n" and not text and cell.find("{*}f") is not None:
        raise UserError(f"the workbook's cell {cell.get('r')} is a formula without a result; open the file "
                        "in Excel, and save it")
    if kind == "s":
        return shared[int(text)]
    if kind == "b":
        return ("FALSE", "TRUE")[int(text)]
    return format(Decimal(f"{float(text):.15g}"), "f") if kind == "n" and text else text


def plain_text(string):
    """The text of a string, which may have several fonts; not how it is pronounced."""
    texts = [each.text or "" for each in string.findall("{*}t") + string.findall("{*}r/{*}t")]
    return re.sub("_x([0-9A-F]{4})_", lambda code: chr(int(code[1], 16)), "".join(texts))
