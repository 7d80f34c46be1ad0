"""The rows of a catalogue: TSV or JSONL, packed or not, from a file or from stdin, BLOCK rows at a time."""

import csv
import gzip
import hashlib
import json
import os
import sys
import zlib
from codecs import BOM_UTF8
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from base.checkpoint import check_file
from base.console import Progress, UserError
from base.tsv import COLUMNS, LONGEST
from data import check_header, named_cells, product_of

BLOCK = 256                                             # rows: what an interruption costs at most
NEEDED = ("id", "attribute_names")                      # cells that may not be empty


class Failed(NamedTuple):
    """A row, or one attribute of it, that cannot be answered: a line of failed.tsv."""

    line: int
    id: str
    attribute: str
    reason: str


@dataclass
class Block:
    """BLOCK rows, the last block fewer.

    products  [(number of its line, Product), ...]: those to answer, one for each attribute of a row
    failed    [Failed, ...]
    photos    {name: (key, whether its features are in the cache), or a text that says what is wrong with it}
    answered  [(Product, Answer), ...], once it is answered
    read      what was read of the input up to the end of this block: rows, and bytes with their SHA-256
    share     how much of the input that is: see Rows.share
    """

    products: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    photos: dict = field(default_factory=dict)
    answered: list = field(default_factory=list)
    read: dict = None
    share: float | None = None


class Rows:
    """The rows of a TSV or JSONL file, or of stdin ("-").  First bytes, not names, tell gzip and JSONL.

    UserError for what is wrong with the whole file.  What is wrong with one row is given instead of the row.
    """

    def __init__(self, path):
        self.stdin = str(path) == "-"
        self.path = "stdin" if self.stdin else path
        if not self.stdin:
            check_file(path, "the products of --input")
        if self.stdin and sys.stdin is None:
            raise UserError("--input -: stdin is closed; pipe the products in, or name a file")
        self.file = sys.stdin.buffer if self.stdin else open(path, "rb")
        self.size = None if self.stdin else os.fstat(self.file.fileno()).st_size
        self.stream = gzip.GzipFile(fileobj=self.file) if self.file.peek(2)[:2] == b"\x1f\x8b" else self.file
        self.back = deque()                             # lines to be read again
        self.rows = self.lines = self.bytes = 0         # so far; bytes after unpacking
        self.digest = hashlib.sha256()
        first = self.line()
        if first.startswith(BOM_UTF8):
            self.use(BOM_UTF8)
        start = [first.removeprefix(BOM_UTF8)]
        while start[-1] and not start[-1].strip():      # empty lines
            start.append(self.line())
        self.back.extend(start)
        self.header = None
        if start[-1].lstrip().startswith(b"{"):
            self.parse = json_cells
            return
        self.parse = lambda lines: next(csv.reader(lines, dialect="excel-tab", strict=True), [])
        header = self.record()
        try:
            if isinstance(header, ValueError):
                raise header
            check_header(header, COLUMNS[:-1])
        except ValueError as error:
            raise UserError(f"{self.path}, line 1: {error}") from None
        self.header = header
        if not self.more():
            raise UserError(f"{self.path}: has a header but no products")

    def line(self):
        """The next line, or the next LONGEST bytes of it; b"" at the end."""
        if self.back:
            return self.back.popleft()
        try:
            return self.stream.readline(LONGEST)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}, after line {self.lines:,}: the gzip file is damaged or cut off ({error}); "
                            "make it again") from None

    def more(self):
        """Whether there is another line."""
        line = self.line()
        self.back.appendleft(line)
        return bool(line)

    def use(self, line):
        """Count a line, or a part of one, as read."""
        self.lines += line.endswith(b"\n")
        self.bytes += len(line)
        self.digest.update(line)

    def record(self):
        """The cells of the next record: a list or {column: text}, empty for an empty line; or a ValueError.

        A quote that is never closed makes one record of many lines.  Only its first line fails then, and the others are
        read again.
        """
        taken, line = [], b""

        def lines():
            while line := self.line():
                taken.append(line)
                if len(line) == LONGEST and not line.endswith(b"\n"):
                    raise ValueError(f"has more than {LONGEST:,} bytes")
                yield line.decode()

        try:
            cells = self.parse(lines())
            if cells and self.header:
                cells = named_cells(cells, self.header)
        except (ValueError, csv.Error) as error:
            said = f"is not UTF-8 text ({error.reason})" if isinstance(error, UnicodeError) else str(error)
            if isinstance(error, csv.Error) or len(taken) > 1:
                said = f"is not a readable TSV ({said}); cells with a quote in them must be quoted as Python's csv module does it"
            cells = ValueError(said)
        if isinstance(cells, ValueError):
            self.back.extendleft(reversed(taken[1:]))
            taken = taken[:1]
        for line in taken:
            self.use(line)
        while len(line) == LONGEST and not line.endswith(b"\n") and (line := self.line()):
            self.use(line)                              # the rest of a line that is too long
        return cells

    def block(self):
        """The next Block, or None at the end."""
        block, end = Block(), self.rows + BLOCK
        while self.rows < end and self.more():
            number, cells = self.lines + 1, self.record()
            if not cells:
                continue
            self.rows += 1
            try:
                if isinstance(cells, ValueError):
                    raise cells
                product = product_of(cells, NEEDED)
                attributes = [a.strip() for a in product.attribute.split("|") if a.strip()]
                if not attributes:
                    raise ValueError("attribute_names is empty")
                block.products += [(number, replace(product, attribute=a)) for a in attributes]
            except ValueError as error:
                cells = cells if isinstance(cells, dict) else {}
                block.failed.append(Failed(number, cells.get("id", ""), cells.get("attribute_names", ""), str(error)))
        if self.rows == end - BLOCK:
            return None
        block.read = {"rows": self.rows, "input_bytes": self.bytes, "input": self.digest.hexdigest()}
        block.share = self.share()
        return block

    def share(self):
        """How much of the file was read, 0 to 1; None for stdin."""
        return self.file.tell() / self.size if self.size else None

    def skip(self, read):
        """Read past the rows that are answered; whether they are the same as then.  read: Block.read of the last answered block."""
        with Progress(f"reading past {read['rows']:,} rows that are answered", read["input_bytes"], "bytes") as progress:
            while self.bytes < read["input_bytes"] and (line := self.line()):
                self.use(line)
                progress.step(len(line))
        self.rows = read["rows"]
        return self.digest.hexdigest() == read["input"]


def json_cells(lines):
    """{column: text} of the next line of a JSONL file, {} of an empty one.  A list of texts becomes one with "|" between them."""
    def text(value, name):
        if isinstance(value, list) and name.startswith("attribute_"):
            return "|".join(text(one, name) for one in value)
        if value is None or isinstance(value, (str, int)) and not isinstance(value, bool):
            return "" if value is None else str(value)
        raise ValueError(f"{name} is {str(value)[:40]}, but must be a text")

    line = next(lines)
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object: {\"id\": …, \"attribute_names\": …}")
    cells = {name: text(row.get(name), name) for name in COLUMNS}
    "".join(cells.values()).encode()                    # UnicodeError: JSON can hold halves of characters, and UTF-8 cannot
    return cells
