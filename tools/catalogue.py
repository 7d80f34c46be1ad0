"""Answer a file of products of any length.

    python -m tools.catalogue RUN --input products.tsv.gz --output answers.tsv

The input is read as a stream, BLOCK rows at a time.  The answers to a block are one whole file, a part, in
the folder `.OUTPUT.parts/` beside the output.  Its name holds a hash of the run, the settings and all rows up
to its end.  So after an interruption the same command skips the parts that are there, and never mixes them
with others.  At the end the parts are joined.  Of several processes, each answers its own blocks.
"""

import argparse
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from base.console import (Progress, UserError, locked, read_json, reading, reason, user_path, what_is,
                          whole_file, write_json)
from base.tsv import COLUMNS, read_rows, tsv_line
from data import product_of
from demo import world
from evaluate import add_answering_flags, load_run
from support import processes
from support.answering import PREDICTED, answer_batch, batches, longest_values, prediction, too_long
from support.confidence import temperature_note

BLOCK = 256                                             # rows: what an interruption costs at most
MOST_ATTRIBUTES = 1000                                  # of one row
FAILED = ("line", "id", "attribute", "reason")          # columns of OUTPUT.failed.tsv

# ---------------------------------------------------------------------------------------- input


def read_blocks(path):
    """Yield lists of BLOCK rows of a file ("-": stdin), with progress: in bytes of a file, in rows of a pipe.

    A row is (line, {column: cell}), or has a ValueError in the place of the dict.
    """
    file = sys.stdin.buffer
    if path != "-":
        with reading(path, "products (TSV or JSONL)"):
            file = open(path, "rb")
    content = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    size = os.fstat(file.fileno()).st_size
    text = io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")
    try:
        first = text.readline()
        if first.strip().startswith("[") or first.strip() == "{":
            raise ValueError("it is a JSON array, or has objects over several lines; write one object a line "
                             "(JSONL), for example with: jq -c '.[]'")
        lines = itertools.chain([first], text)          # `text` itself stays: without it the file is closed
        rows = read_rows(lines, COLUMNS[:-1])
        if first.lstrip().startswith("{"):
            rows = ((number, json_cells(line)) for number, line in enumerate(lines, start=1) if line.strip())
        with Progress("answering", size or None, "bytes" if size else "rows") as progress:
            while block := list(itertools.islice(rows, BLOCK)):
                yield block
                progress.step(file.tell() - progress.done if size else len(block))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        kind = what_is(path) if content is file and path != "-" else None
        problem = f"it is {kind}" if kind else reason(error)
        raise UserError(f"{path}: cannot be read as products (TSV or JSONL): {problem}") from None


def json_cells(line):
    """{column: text} of a line of JSONL, or a ValueError.  An id that is a number stays one; a list of
    attributes becomes a text with "|" between them.
    """
    cells = {}
    try:
        row = json.loads(line)
        for name in COLUMNS:
            value = row.get(name)
            if isinstance(value, list) and name.startswith("attribute_"):
                value = "|".join(map(str, value))
            if isinstance(value, bool | float | list | dict):
                raise ValueError(f"{name} is {str(value)[:40]}, but must be a text")
            cells[name] = "" if value is None else value if name == "id" else str(value)
        json.dumps(cells, ensure_ascii=False).encode()  # JSON can hold halves of characters, UTF-8 cannot
        return cells
    except (ValueError, AttributeError, RecursionError) as error:
        return ValueError(f"is not a product as a JSON object: {reason(error)}")


def products_of(cells, run):
    """The Products of a row, one for each attribute that it names; ValueError if it cannot be answered."""
    if isinstance(cells, ValueError):
        raise cells
    product = product_of(cells | {"id": str(cells["id"])}, ("id", "attribute_names"))
    names = [name.strip() for name in product.attribute.split("|")]
    names = dict.fromkeys(run.known_attribute(name) for name in names if name)
    if not 0 < len(names) <= MOST_ATTRIBUTES:
        raise ValueError(f"attribute_names has {len(names):,} names, but may have 1 to {MOST_ATTRIBUTES:,}")
    return [replace(product, id=cells["id"], attribute=name) for name in names]


# ---------------------------------------------------------------------------------------- blocks


def answer_block(run, args, values, rows):
    """A part: the answers to rows of `read_blocks`, as {"answers": [{column: cell}, ...], "failed": [cells of
    FAILED, ...], "counts": of rows, answers, empty ones, those to unknown attributes, failed rows}.

    values  {attribute: values} to choose from; None: free answers
    """
    questions, products, failed, problems = [], [], [], {}
    for line, cells in rows:
        try:
            questions += [(line, product) for product in products_of(cells, run)]
        except ValueError as error:
            cells = cells if isinstance(cells, dict) else {}
            failed.append((line, cells.get("id", ""), cells.get("attribute_names", "")[:1000], str(error)))
    if run.photo_features:
        names = [product.image for _, product in questions]
        if run.config.demo and not run.config.data:
            world.draw_photos(run.sources.data, names)
        problems = run.photo_features.prepare(names, skip_bad=True)
    longest = longest_values(run, values)
    for line, product in questions:
        problem = problems.get(product.image) or too_long(run, product, longest)
        if values and product.attribute not in values:
            problem = (f"there are no known values of {product.attribute}; --values and --constrain together "
                       "take those of the file and those of the training")
        if problem:
            failed.append((line, product.id, product.attribute, problem))
        else:
            products.append(product)
    failed.sort(key=lambda cells: cells[0])
    if failed and args.strict:
        raise UserError(f"{args.input}, line {failed[0][0]}: {failed[0][-1]}")
    answered = {}
    for batch in batches(run, products, values):
        answered |= answer_batch(run, products, batch, values, args.temperature, args.top_p)
    if run.photo_features:
        run.photo_features.forget()
    answers = [dict(zip(PREDICTED, prediction(product, answered[i].above(args.min_confidence))))
               for i, product in enumerate(products)]
    counts = {"rows": len(rows), "answers": len(answers), "failed": len(failed),
              "empty": sum(not row["prediction"] for row in answers),
              "unknown": sum(product.attribute not in (values or run.values) for product in products)}
    return {"answers": answers, "failed": failed, "counts": counts}


def answer_blocks(run, args, values, blocks):
    """Answer those blocks that have no part yet; the paths of all parts, in order."""
    settings = [run.id, values, args.temperature, args.top_p, args.min_confidence, args.merge,
                run.config.dtype, run.model.llama.compute_dtype, run.value_temperature,
                run.photo_features and run.photo_features.images.resolve()]
    digest = hashlib.sha256(repr(settings).encode())
    there = {name[:8]: name for name in os.listdir(args.parts)}
    parts = []
    for number, rows in enumerate(blocks):
        digest.update(repr(rows).encode())
        name = f"{number:08}.{digest.hexdigest()[:16]}.json"
        if there.get(name[:8], name) != name:
            raise UserError(f"{args.parts}: was begun with another run, other settings or another input, so "
                            "this command cannot go on with it; delete it to begin again, or name another "
                            "--output")
        parts.append(args.parts / name)
        if name[:8] not in there and number % processes.size() == processes.rank():
            write_json(parts[-1], answer_block(run, args, values, rows))
    return parts


# ---------------------------------------------------------------------------------------- output


def as_text(kind, rows):
    """Answers {column: cell} as lines of a ".csv", a ".jsonl" or else a TSV."""
    if kind == ".csv":
        text = io.StringIO()
        csv.writer(text).writerows(row.values() for row in rows)
        return text.getvalue()
    if kind == ".jsonl":
        numbers = ("probability", "runner_up_probability")
        rows = [row | {name: float(row[name]) if row[name] else None for name in numbers} for row in rows]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(tsv_line(row.values()) for row in rows)


def write_parts(parts, args, out, failed):
    """Write parts to two open files, `out` (binary) and `failed` (text); returns the sums of their counts."""
    counts = Counter()
    header = [] if args.kind == ".jsonl" else [dict(zip(PREDICTED, PREDICTED))]
    for part in parts:
        text = as_text(args.kind, header + part["answers"]).encode()
        header = []
        out.write(gzip.compress(text, mtime=0) if args.output.suffix.lower() == ".gz" else text)
        out.flush()
        failed.writelines(map(tsv_line, part["failed"]))
        counts.update(part["counts"])
    return counts


def answer_file(run, args, values, blocks):
    """Answer all blocks, then join their parts to the output; in process 0 what write_parts returns."""
    with processes.in_process_0(locked(args.parts, "answering a catalogue")):
        try:
            paths = answer_blocks(run, args, values, blocks)
            processes.gather(None)                      # process 0 waits until all blocks are answered
            if processes.rank() > 0:
                return None
            parts = (read_json(path, "the answers to a block") for path in paths)
            with (whole_file(args.failed) as failed_path, whole_file(args.output) as path,
                  open(failed_path, "w", encoding="utf-8", errors="backslashreplace") as failed,
                  open(path, "wb") as out):
                failed.write(tsv_line(FAILED))
                counts = write_parts(parts, args, out, failed)
            if not counts["failed"]:
                args.failed.unlink()
            for path in paths:
                path.unlink()
            return counts
        finally:
            with suppress(OSError):                     # it holds parts
                args.parts.rmdir()
            if args.parts.exists():
                print("\nwhat is answered is kept; the same command goes on from there", file=sys.stderr)


# ---------------------------------------------------------------------------------------- the command


def parse():
    """The command line as a namespace.

    kind    of the output: the ending of its name
    direct  whether it is written to at once, as /dev/stdout: then nothing can go on later
    parts   the folder of its parts
    failed  the list of rows that cannot be answered
    """
    parser = argparse.ArgumentParser(description="Answer a file of products.  After an interruption the same "
                                     "command goes on.", allow_abbrev=False)
    add_answering_flags(parser)
    parser.add_argument("--input", metavar="FILE", required=True, help="TSV or JSONL, also gzip; -: stdin")
    parser.add_argument("--output", metavar="FILE", required=True, type=user_path,
                        help="*.tsv, *.csv or *.jsonl, also *.gz; failed rows go to FILE.failed.tsv")
    parser.add_argument("--images", metavar="DIR", type=user_path,
                        help="folder of photos (default: ROOT/images)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be answered")
    parser.add_argument("--no-feature-cache", action="store_true",
                        help="do not keep the features of the photos (12 kB a photo with ViT-B/16)")
    args = parser.parse_args()
    output = args.output
    args.kind = Path(output.name.lower().removesuffix(".gz")).suffix
    args.direct = str(output).startswith("/dev/") or output.is_fifo()
    args.parts = output.with_name(f".{output.name}.parts")
    args.failed = output.with_name(f"{output.name}.failed.tsv")
    if args.kind not in ("", ".tsv", ".csv", ".jsonl"):
        raise UserError(f"--output {output}: must end in .tsv, .csv or .jsonl, or one of these and .gz")
    if processes.size() > 1 and (args.input == "-" or args.direct):
        raise UserError("--input - and --output /dev/stdout take one process: leave torchrun out")
    for path in (output, args.failed):                  # with parts, a join of them was interrupted
        if path.exists() and not args.parts.exists() and not args.direct:
            raise UserError(f"--output {output}: {path} exists already; delete it, or name another file")
    return args


def main():
    args = parse()
    status = sys.stderr if args.direct else sys.stdout
    blocks = read_blocks(args.input)
    first = next(blocks, None)                          # what is wrong with the file is said before loading
    if first is None:
        raise UserError(f"{args.input}: holds no products")
    blocks = itertools.chain([first], blocks)
    run, values = load_run(args, status, feature_cache=not args.no_feature_cache)
    if args.images and run.photo_features:
        run.photo_features.images = args.images
    if args.direct:
        # Stdout is not opened anew: a file that it leads to would be written over from its beginning.
        out = sys.stdout.buffer if str(args.output) == "/dev/stdout" else open(args.output, "ab")
        parts = (answer_block(run, args, values, rows) for rows in blocks)
        counts = write_parts(parts, args, out, sys.stderr)
    else:
        counts = answer_file(run, args, values, blocks)
    if counts is None:
        return
    if values:
        print(temperature_note(run), file=status)
    notes = f": {args.failed}" if counts["failed"] and not args.direct else ""
    if counts["unknown"]:
        notes += f"; {counts['unknown']:,} answers are to attributes that the training data does not have"
    print(f"{args.output}: {counts['rows']:,} products, {counts['answers']:,} answers, {counts['empty']:,} "
          f"empty, {counts['failed']:,} could not be answered{notes}", file=status)
    if not counts["answers"]:
        raise SystemExit(1)


if __name__ == "__main__":
    processes.run(main)
