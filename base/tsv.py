"""TSV files: the one reader and the one writer.

The format is Python's csv dialect "excel-tab" in UTF-8: tabs between cells; a cell that holds a tab, a
newline or a quote is quoted, and a quote in it is doubled.  The reader also knows other separators.
"""

import csv
import io

from base.console import UserError, did_you_mean, reading, write_text

COLUMNS = ("id", "images", "category", "texts", "attribute_names", "attribute_values")     # of a data set
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas"}


def read_rows(lines, required=COLUMNS, separator="\t"):
    """Yield (number of its first line, {column: cell}) of each row; instead of the dict a ValueError that
    says what is wrong.

    lines      of the file, as text with their line ends; bytes that are no UTF-8 as surrogates
    required   columns that the header must name, in lower case
    separator  of cells; one of SEPARATORS
    Errors     ValueError: the header does not fit

    A quote that is never closed would swallow the rows after it.  So where a line that a quoted cell goes on
    in is by itself a row, the row in which the quote opened is wrong, and the lines after it are read again.
    (With commas only where three lines look like rows, no blank after a comma: texts have commas, too.)
    """
    lines, again, number = iter(lines), [], 0
    header = None
    while line := again.pop() if again else next(lines, ""):
        taken = [line]
        first, cells = number + 1, None
        while cells is None:
            try:
                cells = next(csv.reader(taken, delimiter=separator, strict=True), [])
                "".join(cells).encode()
            except UnicodeEncodeError:
                cells = ValueError("is not UTF-8 text; save the file as UTF-8")
            except csv.Error as error:                  # a quoted cell may go on in the next line
                line = again.pop() if again else next(lines, "")
                # Before the end of a first cell of several lines there is no separator.
                is_row = header and separator in "".join(taken) and line.count(separator) == len(header) - 1
                if separator == ",":
                    alike = len({part.count(",") for part in (*taken, line)}) == 1 < len(taken)
                    is_row = is_row and alike and ", " not in "".join([*taken[1:], line])
                if not line or len(taken) > 1000 or is_row:
                    again += [line, *reversed(taken[1:])]
                    taken = taken[:1]
                    cells = ValueError(f"has a cell that cannot be read ({error}); if it begins with a quote "
                                       "which is not closed, put it in quotes, and write each quote in it "
                                       'twice: """Lumen"" pillow"')
                else:
                    taken.append(line)
        number += len(taken)
        if not cells:                                   # an empty line
            continue
        if header is None:
            header = read_header(cells, required, SEPARATORS[separator])
        elif isinstance(cells, ValueError):
            yield first, cells
        elif len(cells) == len(header):
            yield first, dict(zip(header, cells))
        else:
            yield first, ValueError(f"has {len(cells)} cells, the header {len(header)}")
    if header is None:
        raise ValueError("it has no line, and needs at least the header")


def separator_of(line, names):
    """The separator by which a header has the most of these names (in lower case), or else the most cells."""
    def fit(separator):
        header = normal_names(next(csv.reader([line], delimiter=separator), []))
        return len({*names} & {*header}), len(header)

    return max(SEPARATORS, key=fit)


def normal_names(header):
    """The names of columns in lower case, their white space collapsed."""
    return [" ".join(name.lower().split()) for name in header]


def read_header(cells, required, separators):
    """The names of the columns; ValueError if a required one is not there, or stands there twice."""
    if isinstance(cells, ValueError):
        raise ValueError(f"line 1 {cells}")
    header = normal_names(cells)
    absent = [name + did_you_mean(name, header) for name in required if name not in header]
    twice = [name for name in required if header.count(name) > 1]
    if absent or twice:
        problem = f"lacks {', '.join(absent)}" if absent else f"names {', '.join(twice)} twice"
        raise ValueError(f"line 1, the header {' '.join(map(repr, header))[:200]}, {problem}; it must name "
                         f"{' '.join(required)}, with {separators} between them")
    return header


def read_tsv(path, what="a data set's TSV", required=COLUMNS):
    """Yield (line, {column: cell}) of each row of a file.  UserError, with file and line, for whatever is
    wrong.
    """
    with reading(path, what), open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for line, row in read_rows(file, required):
            if isinstance(row, ValueError):
                raise UserError(f"{path}, line {line}: {row}")
            yield line, row


def tsv_line(cells):
    """A line of a TSV file, with its newline."""
    line = io.StringIO()
    csv.writer(line, "excel-tab").writerow(cells)       # as its lines end with "\r\n", it quotes a lone "\r"
    return line.getvalue()[:-2] + "\n"


def write_tsv(path, rows, header=COLUMNS):
    """Write `header` and then `rows` (an iterable of lists of cells); the file is whole or not there at
    all.
    """
    write_text(path, "".join(map(tsv_line, [header, *rows])))
