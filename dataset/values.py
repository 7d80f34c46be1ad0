"""The attributes of the three data sets, and the table values.tsv of raw and canonical values (section 3, Table 6)."""

import csv
import io
from collections import defaultdict
from pathlib import Path

from base.console import UserError
from dataset.mentions import folded

VALUES = Path(__file__).with_name("values.tsv")         # the table
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
    """values.tsv as two dicts: {(data set, attribute): {folded raw spelling: value}}, which maps (a value's own name is
    a spelling of it), and {(data set, attribute, value): [raw spelling, ...]}, which tells its mentions.

    Raises UserError, with the line, for what is not in ATTRIBUTES and for a spelling that is given two values.
    """
    table, names = defaultdict(dict), defaultdict(list)
    try:
        lines = csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"), newline=""), dialect="excel-tab")
        header = next(lines, None)
        if header != ["dataset", "attribute", "raw", "value"]:
            raise UserError(f"{path}, line 1: the header is {header or 'missing'}; it must be "
                            "dataset, attribute, raw, value with tabs between them.")
        for row in lines:
            if not row:
                continue
            where = f"{path}, line {lines.line_num}"
            if len(row) != 4 or not all(field.strip() for field in row):
                raise UserError(f"{where}: {len(row)} fields, or an empty one; "
                                "a line holds dataset, attribute, raw and value with tabs between them.")
            dataset, attribute, raw, value = (field.strip() for field in row)
            if attribute not in ATTRIBUTES.get(dataset, {}):
                raise UserError(f"{where}: no attribute {attribute!r} in data set {dataset!r}. Allowed: "
                                + "; ".join(f"{name}: {', '.join(each)}" for name, each in ATTRIBUTES.items()) + ".")
            names[dataset, attribute, value].append(raw)
            fold = table[dataset, attribute]
            for spelling in (raw, value):
                if not folded(spelling):
                    raise UserError(f"{where}: {spelling!r} holds neither letters nor digits.")
                if fold.setdefault(folded(spelling), value) != value:
                    raise UserError(f"{where}: {spelling!r} means {value!r} here, and {fold[folded(spelling)]!r} on an "
                                    f"earlier line of {dataset}, {attribute}. (Case, hyphens, plural and -ed make no "
                                    "difference.) Keep one of the two.")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the table of values: {error}") from None
    return dict(table), names
