"""The attributes of the three data sets, attributes.json, and the table values.tsv of raw and canonical
values (section 3, Table 6).
"""

from collections import defaultdict
from pathlib import Path

from base.console import UserError, read_json
from base.tsv import read_tsv
from dataset.mentions import folded

VALUES = Path(__file__).with_name("values.tsv")         # the table
COLUMNS = "dataset", "attribute", "raw", "value", "category"           # of the table
# {data set: {attribute: MAVE's categories that it is collected from}}.  Names and categories are those of the
# authors' release (ImplicitAVE); the paper's Table 6 writes Heel for Heel Height and Dress Length for Length.
ATTRIBUTES = read_json(Path(__file__).with_name("attributes.json"), "the attributes")
# Other names of attributes in MAVE's file.
OTHER_KEYS = {"Heel": "Heel Height", "Dress Length": "Length"}


def read_values(path):
    """values.tsv as two dicts.

    {(data set, attribute, category): {folded raw spelling: value}} maps; a value's own name is a spelling of
    it. {(data set, attribute, value): [raw spelling, ...]} tells its mentions.

    The category column names the categories in which a spelling has this meaning: "Dresses; Skirts", or
    "not Pants".  On the line whose raw is the value itself, it names the categories that have this value at
    all.  Empty: all of those.
    Errors  UserError, with the line: for what is not in ATTRIBUTES, and for a spelling with two values in one
            category
    """
    table = defaultdict(dict)
    names = defaultdict(list)
    lines = list(read_tsv(path, "the table of values", COLUMNS))
    of_value = {(row["dataset"], row["attribute"], row["value"]): row["category"]
                for _, row in lines if row["raw"] == row["value"]}
    for line, row in lines:
        dataset, attribute, raw, value, cell = map(row.get, COLUMNS)
        names[dataset, attribute, value].append(raw)
        try:
            known = ATTRIBUTES.get(dataset, {}).get(attribute, ())
            having = categories(of_value.get((dataset, attribute, value), ""), known)
            named = having if raw == value else categories(cell, having)
            for spelling, places in ((raw, named), (value, having)):
                for category in places:
                    other = table[dataset, attribute, category].setdefault(folded(spelling), value)
                    if other != value:
                        raise ValueError(f"{spelling!r} means {value!r} here, and {other!r} on an earlier "
                                         f"line of {category}")
        except ValueError as error:
            raise UserError(f"{path}, line {line}, {dataset}, {attribute}: {error}") from None
    return table, names


def categories(cell, known):
    """Those of the categories `known` that a cell names, in their order."""
    names = {name.strip() for name in cell.removeprefix("not ").split(";")} - {""}
    if not known or not names <= set(known):
        raise ValueError(f"no such attribute, or not categories of it or of the value: {cell!r}; there are "
                         f"{'; '.join(known) or 'none'}. Write several with semicolons between them, or "
                         "'not' before those left out")
    return [name for name in known if not names or (name in names) != cell.startswith("not ")]
