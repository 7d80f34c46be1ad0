"""Answer a file of products of any length.

    python -m tools.catalogue RUN --input products.tsv.gz --output answers.tsv

The input is read as a stream, BLOCK rows at a time.  The answers to a block are one whole file, a part, in
the folder `.OUTPUT.parts/` beside the output.  Its name holds a hash of the run, the settings and all rows up
to its end.  So after an interruption the same command skips the parts that are there, and never mixes them
with others.  At the end the parts are joined.  Of several processes, each answers its own blocks.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from base.console import (Progress, UserError, locked, parse_flags, read_json, reading, reason, user_path,
                          what_is, whole_file, write_json)
from base.tsv import COLUMNS, normal_names, read_rows, separator_of, tsv_line
from data import product_of
from evaluate import answer_parser, load_run
from support import processes
from support.answering import (PREDICTED, answer_batches, longest_values, prediction, prepare_photos,
                               problem_of)
from support.confidence import temperature_note

BLOCK = 256                                             # rows: what an interruption costs at most
GIVEN = COLUMNS[:4]                                     # columns that say which product it is
FAILED = ("line", "id", "attribute", "reason")          # columns of OUTPUT.failed.tsv

# ---------------------------------------------------------------------------------------- input


def read_blocks(args):
    """Yield lists of BLOCK rows of --input ("-": stdin), with progress: in bytes of a file, in rows of a
    pipe.

    A row is (line, {column: cell}), or has a ValueError in the place of the dict.  args.names becomes {column
    as in a row: as in the file}.
    """
    path, file, args.names = args.input, sys.stdin and sys.stdin.buffer, {}
    if path != "-":
        with reading(path, "products (TSV, CSV or JSONL)"):
            file = open(path, "rb")
    if file is None:
        raise UserError("--input -: stdin is closed; name a file, or start the command in a pipe")
    content = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    size = os.fstat(file.fileno()).st_size
    text = io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")
    try:
        first = text.readline()
        lines = itertools.chain([first], text)          # `text` itself stays: without it the file is closed
        if first.lstrip().startswith("{"):
            rows = ((number, json_cells(line))
                    for number, line in enumerate(lines, start=1) if line.strip())
        else:
            separator = separator_of(first, COLUMNS[:-1])
            header = next(csv.reader([first], delimiter=separator), [])
            args.names = dict(zip(normal_names(header), map(str.strip, header)))
            rows = read_rows(lines, COLUMNS[:-1], separator)
            if args.keep_columns and len(args.names) < len(header):
                raise ValueError("line 1 names a column twice, or two have no name; remove one, or leave "
                                 "--keep-columns out")
        with Progress("answering", size or None, "bytes" if size else "rows") as progress:
            while block := list(itertools.islice(rows, BLOCK)):
                yield block
                progress.step(file.tell() - progress.done if size else len(block))
    except Exception as error:
        kind = content is file and path != "-" and what_is(path)
        problem = f"it is {kind}" if kind else reason(error)
        raise UserError(f"{path}: cannot be read as products (TSV, CSV, or JSONL with one object a line; "
                        f"python -m dataset table makes one of a spreadsheet): {problem}") from None


def json_cells(line):
    """{column: text} of a line of JSONL, or a ValueError.  An id that is a number stays one; a list, such
    as of attributes, becomes a text with "|" between them; own columns stay as they are.
    """
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"it is a {type(row).__name__}")
        for name in COLUMNS:
            value = row.get(name)
            if isinstance(value, list):
                value = "|".join(str(each) for each in value if each is not None)
            if isinstance(value, bool | float | dict):
                raise ValueError(f"{name} is {str(value)[:40]}, but must be a text")
            row[name] = "" if value is None else value if name == "id" else str(value)
            f"{row[name]}".encode()                     # JSON can hold halves of characters, UTF-8 cannot
        return row
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not a product as a JSON object: {reason(error)}")


def products_of(cells, run):
    """The Products of a row, one for each attribute that it names; ValueError if it cannot be answered."""
    if isinstance(cells, ValueError):
        raise cells
    needed = ["id", "attribute_names"] + ["images"] * run.config.image
    product = product_of(cells | {"id": str(cells["id"])}, needed)
    names = dict.fromkeys(run.known_attribute(name) for name in product.attribute.split("|") if name.strip())
    if not names:
        raise ValueError("attribute_names names none")
    return [replace(product, id=cells["id"], attribute=name) for name in names]


# ---------------------------------------------------------------------------------------- blocks


def answer_block(run, args, values, rows):
    """A part: the answers to rows of `read_blocks`, as {"answers": [[{column: cell} of the product, {column:
    cell} of the answer], ...], "failed": [cells of FAILED, ...], "counts": of rows, answers, empty ones,
    those to unknown attributes, failed ones}.

    values  {attribute: values} to choose from; None: free answers
    """
    questions, asked, failed = [], [], []
    for line, cells in rows:
        try:
            questions += [(line, cells, product) for product in products_of(cells, run)]
        except ValueError as error:
            cells = cells if isinstance(cells, dict) else {}
            failed.append((line, cells.get("id", ""), cells.get("attribute_names", ""), str(error)))
    bad_photos = prepare_photos(run, [product for *_, product in questions], skip_bad=True)
    longest = longest_values(run, values)
    for line, cells, product in questions:
        if problem := bad_photos.get(product.image) or problem_of(run, product, longest):
            failed.append((line, product.id, product.attribute, problem))
        else:
            asked.append((cells, product))
    failed.sort()
    if failed and args.strict:
        raise UserError(f"{args.input}, line {failed[0][0]}: {failed[0][-1]}")
    answered = answer_batches(run, [product for _, product in asked], values, args.temperature, args.top_p)
    if run.photo_features:
        run.photo_features.keys.clear()                 # a catalogue may name millions
    answers = []
    for (cells, product), answer in zip(asked, answered.values()):
        answer = dict(zip(PREDICTED, prediction(product, answer.above(args.min_confidence))))
        given = {name: answer.pop(name) for name in GIVEN}
        if args.keep_columns:
            given |= {args.names.get(name, name): cells[name] for name in cells if name not in COLUMNS}
        answers.append((given, answer))
    counts = {"rows": len(rows), "answers": len(answers), "failed": len(failed),
              "empty": sum(not cells["prediction"] for _, cells in answers),
              "unknown": sum(product.attribute not in run.values for _, product in asked)}
    return {"answers": answers, "failed": failed, "counts": counts}


def answer_blocks(run, args, values, blocks):
    """Answer those blocks that have no part yet; the paths of all parts, in order."""
    settings = [run.id, run.value_temperature, run.model.llama.compute_dtype, values,
                vars(args) | dict.fromkeys(("strict", "run", "input", "output", "parts", "failed"))]
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


def spread(answers):
    """Answers with one row a product: (columns of values and probabilities, rows).

    A product is all rows of the input that are alike but for attribute_names and attribute_values.
    """
    products, columns = {}, {}
    for given, answer in answers:
        attribute = answer["attribute_names"]
        cells = {attribute: answer["prediction"], f"{attribute} probability": answer["probability"]}
        products.setdefault(json.dumps(given), {}).update(cells)
        columns |= cells
    return [*columns], ((json.loads(given), cells) for given, cells in products.items())


def write_rows(rows, header, kind, out):
    """Write rows {column: cell} to an open text file: as a ".csv", a ".jsonl" or else a TSV."""
    if kind == ".jsonl":
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    lines = ([json.dumps(cell, ensure_ascii=False) if isinstance(cell, bool | list | dict) else cell
              for cell in map(row.get, header)] for row in rows)
    lines = itertools.chain([header], lines)
    if kind == ".csv":
        csv.writer(out).writerows(lines)
    else:
        out.writelines(map(tsv_line, lines))


def write_parts(read_parts, args, out, failed):
    """Write parts to two open text files, `out` and `failed`; returns the sums of their counts.

    read_parts  gives the parts; called once, or with --keep-columns twice
    """
    counts = Counter()

    def answers():
        for part in read_parts():
            failed.writelines(map(tsv_line, part["failed"]))
            counts.update(part["counts"])
            yield from part["answers"]

    columns, rows = spread(answers()) if args.wide else (PREDICTED[len(GIVEN):], answers())
    names = dict(zip(GIVEN, GIVEN))                     # {column of a product: its name in the output}
    if args.keep_columns:
        names |= {name: name for part in read_parts() for given, _ in part["answers"] for name in given}
    columns_in_lower_case = [name.lower() for name in columns]          # as Excel compares them
    for name in names:
        while names[name].lower() in columns_in_lower_case or names[name] != name and names[name] in names:
            names[name] = f"input {names[name]}"
    rows = ({names[name]: cell for name, cell in given.items()} | answer for given, answer in rows)
    write_rows(rows, [*names.values(), *columns], args.kind, out)
    return counts


def answer_file(run, args, values, blocks):
    """Answer all blocks, then join their parts to the output; in process 0 what write_parts returns."""
    with processes.in_process_0(locked(args.parts, "answering a catalogue")):
        try:
            parts = answer_blocks(run, args, values, blocks)
            processes.gather()                          # process 0 waits until all blocks are answered
            if processes.rank() > 0:
                return None

            def read_parts():
                with Progress("writing", len(parts), "blocks") as progress:
                    for part in parts:
                        yield read_json(part, "a block's answers")
                        progress.step()

            with (whole_file(args.failed) as failed_path, whole_file(args.output) as path,
                  open(failed_path, "w", encoding="utf-8", errors="backslashreplace") as failed,
                  open(path, "wb") as file):
                failed.write(tsv_line(FAILED))
                if args.output.suffix.lower() == ".gz":
                    file = gzip.GzipFile("", "wb", fileobj=file, mtime=0)       # the same bytes at any time
                encoding = "utf-8-sig" if args.kind == ".csv" else "utf-8"      # Excel needs the mark of -sig
                with io.TextIOWrapper(file, encoding, "backslashreplace", "") as out:
                    counts = write_parts(read_parts, args, out, failed)
            if not counts["failed"]:
                args.failed.unlink()
            for part in parts:
                part.unlink()
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
    direct  whether it is stdout, which is written to at once: then nothing can go on later
    parts   the folder of its parts
    failed  the list of rows that cannot be answered
    """
    parser = answer_parser("Answer a file of products.  After an interruption the same command goes on.")
    parser.add_argument("--input", metavar="FILE", required=True,
                        help="TSV, CSV or JSONL, also gzip; -: stdin")
    parser.add_argument("--output", metavar="FILE", required=True, type=user_path,
                        help="*.tsv, *.csv, *.jsonl, also *.gz; -: stdout; failed rows go to FILE.failed.tsv")
    parser.add_argument("--wide", action="store_true",
                        help="a line for each product, with value and probability of each attribute")
    parser.add_argument("--keep-columns", action="store_true", help="write the input's own columns, too")
    parser.add_argument("--images", metavar="DIR", type=user_path,
                        help="folder of photos (default: ROOT/images)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be answered")
    args = parse_flags(parser)
    output = args.output
    args.kind = Path(output.name.lower().removesuffix(".gz")).suffix
    args.direct = str(output) in ("-", "/dev/stdout")
    args.parts = output.with_name(f".{output.name}.parts")
    args.failed = output.with_name(f"{output.name}.failed.tsv")
    if args.kind not in ("", ".tsv", ".csv", ".jsonl"):
        raise UserError(f"--output {output}: must end in .tsv, .csv or .jsonl, or one of these and .gz")
    if processes.size() > 1 and (args.input == "-" or args.direct):
        raise UserError("--input - and --output - take one process: leave torchrun out")
    if args.images and not args.images.is_dir():
        raise UserError(f"--images {args.images}: is no folder; name the one with the photos")
    for path in (output, args.failed):                  # with parts, a join of them was interrupted
        if path.exists() and not args.parts.exists() and not args.direct:
            raise UserError(f"--output {output}: {path} exists already; name another file (if this command "
                            "wrote it, it is complete)")
    return args


def main():
    args = parse()
    status = sys.stderr if args.direct else sys.stdout
    blocks = read_blocks(args)
    first = next(blocks, None)                          # what is wrong with the file is said before loading
    if first is None:
        raise UserError(f"{args.input}: holds no products")
    blocks = itertools.chain([first], blocks)
    run, values = load_run(args, status)
    if args.images and run.photo_features:
        run.photo_features.images = args.images
    if args.direct:
        parts = (answer_block(run, args, values, rows) for rows in blocks)
        if args.keep_columns:                           # the names of all are known at the end
            parts = list(parts)
        # Stdout is not opened anew: a file that it leads to would be written over from its beginning.
        sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
        counts = write_parts(lambda: parts, args, sys.stdout, sys.stderr)
    else:
        counts = answer_file(run, args, values, blocks)
    if counts is None:
        return
    if values:
        print(temperature_note(run), file=status)
    notes = f": {args.failed}" if counts["failed"] and not args.direct else ""
    if counts["unknown"]:
        notes += f"; {counts['unknown']:,} answers are to attributes that the training data does not have"
    print(f"{args.output}: {counts['rows']:,} rows, {counts['answers']:,} answers, {counts['empty']:,} "
          f"empty, {counts['failed']:,} could not be answered{notes}", file=status)
    if not counts["answers"]:
        raise SystemExit(1)


if __name__ == "__main__":
    processes.run(main)
