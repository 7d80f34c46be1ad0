"""The attributes of the three data sets, and the table values.tsv of raw and canonical values (section 3, Table 6)."""

import csv
import io
from collections import defaultdict
from pathlib import Path

from base.console import UserError
from dataset.mentions import folded

VALUES = Path(__file__).with_name("values.tsv")         # the table
HEADER = ["dataset", "attribute", "raw", "value", "category"]
# Data set -> attribute -> MAVE's categories that it is collected from.  Names and categories are those of the authors'
# release (ImplicitAVE); the paper's Table 6 writes Heel for Heel Height and Dress Length for Length.
_TOPS, _BRIDAL = ["Dresses", "Shirts & Tops"], "Wedding & Bridal Party Dresses"
ATTRIBUTES = {
    "clothing": {"Neckline": _TOPS, "Length": ["Dresses", "Skirts", "Pants"],
                 "Sleeve Style": [*_TOPS, _BRIDAL], "Shoulder Style": [*_TOPS, _BRIDAL]},
    "footwear": {name: ["Shoes"] for name in ("Athletic Shoe Style", "Boot Style", "Shaft Height", "Heel Height",
                                              "Toe Style")},
    "general": {"Pattern": ["Shirts & Tops", "Dresses", "Shoes", "Hats", "Scarves & Shawls", "Socks", "Pants", "Handbags",
                            "Skirts", "Coats & Jackets", "Wallets & Money Clips", "Baby & Toddler Outfits",
                            "Baby & Toddler Dresses", "Underwear", "Baby One-Pieces", "Shorts", "Vests",
                            "Jumpsuits & Rompers", "Belts", "Robes", "Swimwear", "Bras", "Pajamas"],
                "Material": ["Jewelry Holders", "Backpacks", "Messenger Bags", "Briefcases", "Wigs", "Duffel Bags",
                             "Camera Bags & Cases", "Leather & Vinyl"],
                "Shape": ["Charms & Pendants"]},
}
OTHER_KEYS = {"Heel Height": ["Heel"], "Length": ["Dress Length"]}      # accepted in MAVE's place of the names above


def read_values(path):
    """values.tsv as two dicts: {(data set, attribute, category): {folded raw spelling: value}}, which maps (a value's own
    name is a spelling of it), and {(data set, attribute, value): [raw spelling, ...]}, which tells its mentions.

    The category column names the categories in which a spelling has this meaning: "Dresses; Skirts", or "not Pants".
    On the line whose raw is the value itself, it names the categories that have this value at all.  Empty: all of those.

    Raises UserError, with the line, for what is not in ATTRIBUTES and for a spelling with two values in one category.
    """
    lines = []                                          # (where, data set, attribute, raw, value, categories or None)
    having = {}                                         # (data set, attribute, value): the categories that have it
    for where, dataset, attribute, raw, value, cell in _read_lines(path):
        if attribute not in ATTRIBUTES.get(dataset, {}):
            raise UserError(f"{where}: no attribute {attribute!r} in data set {dataset!r}. Allowed: "
                            + "; ".join(f"{name}: {', '.join(each)}" for name, each in ATTRIBUTES.items()) + ".")
        categories = _categories(where, cell, dataset, attribute)
        if raw == value and categories:
            if having.setdefault((dataset, attribute, value), categories) != categories:
                raise UserError(f"{where}: {value!r} has other categories on an earlier line. Keep one of the two.")
        lines.append((where, dataset, attribute, raw, value, categories))
    table, names = defaultdict(dict), defaultdict(list)
    for where, dataset, attribute, raw, value, categories in lines:
        names[dataset, attribute, value].append(raw)
        of_value = having.get((dataset, attribute, value), ATTRIBUTES[dataset][attribute])
        if beyond := [name for name in categories or () if name not in of_value]:
            raise UserError(f"{where}: {value!r} does not exist in {beyond[0]!r}. The line whose raw is {value!r} says where it "
                            f"does: {'; '.join(of_value)}.")
        for spelling, its_categories in ((raw, categories or of_value), (value, of_value)):
            if not folded(spelling):
                raise UserError(f"{where}: {spelling!r} holds neither letters nor digits.")
            for category in its_categories:
                known = table[dataset, attribute, category].setdefault(folded(spelling), value)
                if known != value:
                    raise UserError(f"{where}: {spelling!r} means {value!r} here, and {known!r} on an earlier line of "
                                    f"{dataset}, {attribute}, {category}. (Case, hyphens, plural and -ed make no "
                                    "difference.) Keep one of the two, or give them different categories.")
    return dict(table), names


def _read_lines(path):
    """Yield (file and line, the five cells stripped) of values.tsv; the category may be left out."""
    try:
        lines = csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"), newline=""), dialect="excel-tab")
        header = next(lines, None)
        if header not in (HEADER, HEADER[:4]):
            raise UserError(f"{path}, line 1: the header is {header or 'missing'}; it must be {', '.join(HEADER)} "
                            "with tabs between them.")
        for row in lines:
            if not row:
                continue
            where = f"{path}, line {lines.line_num}"
            if len(row) not in (4, 5) or not all(field.strip() for field in row[:4]):
                raise UserError(f"{where}: {len(row)} fields, or an empty one; a line holds {', '.join(HEADER)} with tabs "
                                "between them. Only the category may be empty.")
            yield where, *(field.strip() for field in (*row, "")[:5])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the table of values: {error}") from None


def _categories(where, cell, dataset, attribute):
    """The categories that a cell names, in the order of ATTRIBUTES; None for an empty one."""
    known = ATTRIBUTES[dataset][attribute]
    given = {name.strip() for name in cell.removeprefix("not ").split(";")} - {""}
    if wrong := sorted(given.difference(known)):
        raise UserError(f"{where}: no category {wrong[0]!r} in {dataset}, {attribute}. Allowed: {'; '.join(known)}. Write "
                        "several with semicolons between them, or 'not' before those that are left out.")
    if cell.startswith("not "):
        given = set(known) - given
    return [name for name in known if name in given] or None
