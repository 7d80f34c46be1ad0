"""Data sets' TSV files: cells and line numbers on the way in, whole files on the way out.

The format is Python's csv dialect "excel-tab" in UTF-8: tabs between cells; a cell with a tab, a newline, a carriage
return or a quote in it is quoted.
"""

import codecs
import csv
import itertools
import os

from base.console import UserError, whole_file

COLUMNS = ("id", "images", "category", "texts", "attribute_names", "attribute_values")     # of a data set
LONGEST = 1 << 24                                       # of a line in bytes, and of a cell in characters
csv.field_size_limit(LONGEST)


class Reader:
    """Reads a TSV from an open binary file, from its current position on.

    cells  iterator over the lines, each a list of cells
    end    byte offset after the line that was read last
    UserError with file and line for what is not UTF-8 or not a TSV.
    """

    def __init__(self, file, path):
        self.file, self.path, self.end = file, path, file.tell()
        self.reader = csv.reader(self._text(), dialect="excel-tab", strict=True)
        self.cells = self._read()

    def _text(self):
        for line in iter(lambda: self.file.readline(LONGEST), b""):
            if len(line) == LONGEST:
                raise UserError(f"{self.path}, line {self.reader.line_num + 1}: has more than {LONGEST:,} bytes; "
                                "is this a TSV file, with one product on a line?")
            if self.end == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            self.end = self.file.tell()
            yield line.decode("utf-8")

    def _read(self):
        try:
            yield from self.reader
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, after line {self.reader.line_num}: is not UTF-8 text ({error.reason})") from None
        except csv.Error as error:
            advice = "cells with a quote in them must be quoted as Python's csv module does it"
            if "field limit" in str(error):
                advice = "a quote that is never closed makes one cell of all that follows"
            raise UserError(f"{self.where()}: is not a readable TSV ({error}); {advice}") from None

    def where(self):
        return f"{self.path}, line {self.reader.line_num}"


def stays_inside(name):
    """Whether a file name from a data set stays within the folder that it is looked for in."""
    return not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def tsv_line(cells):
    """A line of a TSV file, with its newline.  (Python's csv.writer leaves a lone carriage return unquoted.)"""
    def quoted(cell):
        return '"' + cell.replace('"', '""') + '"' if any(mark in cell for mark in '\t\n\r"') else cell

    return "\t".join(quoted(str(cell)) for cell in cells) + "\n"


def write_tsv(path, rows, header=COLUMNS):
    """Write `header` and then `rows` (any iterable of lists of cells); the file is whole or not there at all."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        for row in itertools.chain([header], rows):
            file.write(tsv_line(row))
