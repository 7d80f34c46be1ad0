"""A catalogue: any number of products from a file or from stdin, answered block by block.

    python evaluate.py RUN --input products.tsv.gz --output predictions.jsonl

A block is BLOCK rows of the input (support/catalogue_rows.py), cut by their number alone.  So with the same number of
threads its batches, and the bytes that are written for it, are the same whatever happened before.  After each block the
answers so far (OUTPUT.partial) and a record of how far they go (OUTPUT.partial.json) are synced to the disk.  After a power
cut the same command cuts OUTPUT.partial back to the record, reads past the rows that are answered, and goes on.  A row that
cannot be answered goes to failed.tsv.
"""

import gzip
import hashlib
import json
import os
import shutil
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from base.checkpoint import check_fields, read_json, sample_digest
from base.console import Progress, UserError, naming, remove, replaceable, sync, whole_file, write_text
from base.tsv import tsv_line
from demo import world
from support import catalogue_rows, processes
from support.answering import PREDICTED, answer_batch, batches, longest_values, prediction, too_long
from support.catalogue_rows import Failed, Rows
from support.confidence import temperature_note
from support.photo_workers import PhotoWorkers
from support.run_folder import only_process

# ------------------------------------------------------------------------------------------------ output


RECORD = {"run": (str, None), "settings": (dict, None), "input": (str, None), **{name: (int, (0, 1 << 62)) for name in (
    "rows", "input_bytes", "bytes", "failed_bytes", "answered", "empty", "failed")}}


class Output:
    """The answers that are written, and failed.tsv beside them.

    path      by its name TSV, or JSONL (.jsonl), and with .gz packed: one gzip member a block.  What cannot be replaced, such
              as /dev/stdout, is written to directly: then nothing can go on later, and rows that failed go to stderr.
    belongs   {"run": hash, "settings": {name: value}}: what must be the same to go on
    record    how far the answers go
    """

    def __init__(self, path, belongs):
        self.path, self.json, self.gz = path, path.name.endswith((".jsonl", ".jsonl.gz")), path.name.endswith(".gz")
        self.record = {**belongs, "input": "", **{name: 0 for name, (kind, _) in RECORD.items() if kind is int}}
        self.stream = None if replaceable(path) else open(path, "wb")
        if self.stream is None:
            self.path = path = Path(os.path.realpath(path)) if path.is_symlink() else path
            name = path.name if len(os.fsencode(path.name)) < 230 else path.name[:50]       # a file name has at most 255 bytes
            self.partial, self.failed, self.record_path = (path.with_name(name + end) for end in (
                ".partial", ".partial.failed", ".partial.json"))

    def go_on(self, rows):
        """Go on where an interrupted catalogue stopped, if there is one; the record, how far that is."""
        if self.stream or not (self.record_path.exists() and self.partial.exists()):
            for left in () if self.stream else (self.partial, self.failed, self.record_path):
                remove(left)
            return self.record
        found = check_fields(read_json(self.record_path, "the record of an interrupted catalogue"), RECORD, self.record_path)
        now, then = self.record["settings"], found["settings"]
        differ = [name for name in {**then, **now} if now.get(name) != then.get(name)]
        sizes = [path.stat().st_size if path.exists() else 0 for path in (self.partial, self.failed)]
        if found["run"] != self.record["run"]:
            wrong = "another run"
        elif differ:
            wrong = f"other settings ({', '.join(differ)})"
        elif sizes[0] < found["bytes"] or sizes[1] < found["failed_bytes"]:
            wrong = "a disk that lost a part of it"
        elif not rows.skip(found):
            wrong = "another input"
        else:
            self.record = found
            for path, size in zip((self.partial, self.failed), (found["bytes"], found["failed_bytes"])):
                if path.exists():
                    os.truncate(path, size)
            return found
        raise UserError(f"{self.partial}: is from {wrong}, so this command cannot go on with it; delete {self.partial} and "
                        f"{self.record_path} to begin again, or name another --output")

    def write(self, block):
        """Write the answers of a block and its failed rows; they are on the disk when this returns."""
        lines = [json_line(p, a) if self.json else tsv_line(prediction(p, a)) for p, a in block.answered]
        if not self.json and not self.record["rows"]:
            lines.insert(0, tsv_line(PREDICTED))
        data = "".join(lines).encode()
        if self.gz and (data or not self.record["rows"]):       # a file of no bytes is not gzip
            data = gzip.compress(data, mtime=0)
        failed = [tsv_line(one) for one in block.failed]
        if failed and not self.record["failed"]:
            failed.insert(0, tsv_line(Failed._fields))
        failed = "".join(failed).encode()
        record = self.record | block.read
        for name, more in {"bytes": len(data), "failed_bytes": len(failed), "answered": len(block.answered),
                           "empty": sum(not a.value for _, a in block.answered), "failed": len(block.failed)}.items():
            record[name] += more
        with naming(self.path):
            if self.stream:
                self.stream.write(data)
                self.stream.flush()
                sys.stderr.write(failed.decode())
            else:
                append(self.partial, data)
                if failed:
                    append(self.failed, failed)
                write_text(self.record_path, json.dumps(record))
        self.record = record                            # only now: nothing of a block counts if its writing fails

    def finish(self):
        """Give the files their names; the path of failed.tsv, or None."""
        if self.stream:
            self.stream.close()
            return None
        failed = self.path.with_name("failed.tsv")
        with naming(self.path):
            if self.record["failed"]:
                with whole_file(failed) as partial:     # a copy: until the answers have their name, all can be done again
                    shutil.copyfile(self.failed, partial)
            else:
                failed.unlink(missing_ok=True)          # of an earlier catalogue
            os.replace(self.partial, self.path)
            sync(self.path.parent)
            remove(self.failed)
            remove(self.record_path)
        return failed if self.record["failed"] else None


@contextmanager
def locked(path):
    """The folder of an output, which is made if it is not there.  One process at a time answers a catalogue into it."""
    if not replaceable(path):
        yield
        return
    folder = Path(os.path.realpath(path)).parent
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder, "answering a catalogue"):
        yield


def append(path, data):
    """Append bytes to a file and wait until they are on the disk."""
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def json_line(p, a):
    """A product and its Answer as a line of JSONL, with the names of PREDICTED."""
    row = dict(zip(PREDICTED, prediction(p, a)))
    for name in ("probability", "runner_up_probability"):
        row[name] = float(row[name]) if row[name] else None
    return json.dumps(row, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------ the catalogue


class Catalogue:
    """The products of --input.  Made before the weights are loaded: what is wrong with the whole file is found at once."""

    def __init__(self, path):
        if processes.size() > 1 and str(path) == "-":
            raise UserError("--input -: several processes cannot share stdin; name a file, or leave torchrun out")
        self.rows, self.workers = Rows(path), PhotoWorkers()

    def answer(self, run, args, values, source, status):
        """Answer all rows and write them to --output.

        args     flags of evaluate.py
        values   {attribute: values} to choose from, which come from `source`; None: free answers
        status   where the last lines are printed
        """
        photos, self.draws = run.photo_features, run.config.demo and not run.config.data and not args.images
        if args.images:
            if not photos:
                raise UserError("this run was trained without photos (--no-image): leave --images out")
            photos.images = args.images
        if photos and not self.draws and not photos.images.is_dir():
            raise UserError(f"{photos.images}: there is no such folder of photos; name the right one with --images")
        settings = {"values": hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16], "temperature": args.temperature,
                    "top_p": args.top_p, "min_confidence": args.min_confidence, "merge": args.merge,
                    "dtype": str(run.model.llama.layers[0].mlp.up_proj.weight.dtype), "value_temperature": run.value_temperature,
                    "images": photos and str(photos.images.resolve()), "feature_cache": not args.no_feature_cache,
                    "block": catalogue_rows.BLOCK}
        belongs = {"run": sample_digest([run.folder / name for name in ("config.json", "adapter.safetensors")]),
                   "settings": settings}
        with closing(self.workers), processes.in_process_0(locked(args.output)):
            output = Output(args.output, belongs) if processes.rank() == 0 else None
            record = processes.broadcast(output and output.go_on(self.rows))
            if not output:
                self.rows.skip(record)
            try:
                for block in self.answered(run, args, values, source):
                    output.write(block)
            except BaseException:
                if output and output.record["rows"] and not output.stream:
                    print(f"\n{output.record['rows']:,} rows are answered; the same command goes on from there", file=sys.stderr)
                raise
            if not self.rows.rows:
                raise UserError(f"{self.rows.path}: holds no products")
            if not output:
                return
            failed = output.finish()
        done = output.record
        left = f", {done['empty']:,} of them left empty" if done["empty"] else ""
        print(f"{args.output}: {done['answered']:,} products answered{left}", file=status)
        if done["failed"]:
            print(f"{done['failed']:,} could not be answered: {failed or 'see above'}", file=status)
        if values:
            print(temperature_note(run), file=status)

    def answered(self, run, args, values, source):
        """Yield all blocks, answered, in order.  Of N processes, each answers every N-th block, and process 0 yields all."""
        longest = longest_values(run, values)
        with Progress("answering", unit="answers", share=self.rows.share()) as progress:
            block, more = self.read_round(run)
            while more:
                pixels = self.workers.results()
                following, more = self.read_round(run)
                if block:
                    of_block = replace(run, photo_features=block_features(run.photo_features, block, pixels))
                    products = [p for line, p in block.products if not fails(of_block, block, line, p, values, longest, source)]
                    block.failed.sort(key=lambda one: one.line)
                    if block.failed and args.strict:
                        raise UserError(f"{self.rows.path}, line {block.failed[0].line}: {block.failed[0].reason}")
                    found, together = [None] * len(products), batches(run, products, values)
                    before = progress.share
                    for number, chosen in enumerate(together, start=1):
                        answer_batch(of_block, products, chosen, found, values, args.temperature, args.top_p)
                        if before is not None:
                            progress.share = before + (block.share - before) * number / len(together)
                        progress.step(len(chosen))
                    block.answered = [(p, a.above(args.min_confidence)) for p, a in zip(products, found)]
                processes.keep_up(run.model.llama)
                for one in processes.gather(block):
                    if one:
                        yield one
                block = following

    def read_round(self, run):
        """(the next Block of this process, whether there is one for any process); the workers begin with its photos."""
        several, photos = [self.rows.block() for _ in range(processes.size())], run.photo_features
        block, names = several[processes.rank()], []
        if block and photos:
            names = list(dict.fromkeys(p.image for _, p in block.products))
            if self.draws:                              # photos of the demo world
                world.draw_photos(run.sources.data, names)
            block.photos = photos.look_up(names)
            names = [name for name, found in block.photos.items() if isinstance(found, tuple) and not found[1]]
        self.workers.start(names, photos and photos.images, photos and photos.vit.config.image_size)
        return block, several[0] is not None


class BlockFeatures(NamedTuple):
    """The features of a block's photos, in the place of PhotoFeatures.  tokens: {name: (K, V)}"""

    tokens: dict
    cls_layers: tuple

    def read(self, names, device):
        """(P, K, V), or None for no photos."""
        return torch.stack([self.tokens[name] for name in names]).to(device) if names else None


def block_features(photos, block, pixels):
    """The BlockFeatures of a block, or None without photos.  pixels: {name: what read_photo returned}, of those not cached."""
    if photos is None:
        return None
    block.photos |= {name: found for name, found in pixels.items() if isinstance(found, str)}
    fine = {name: (found[0], pixels.get(name)) for name, found in block.photos.items() if isinstance(found, tuple)}
    return BlockFeatures(photos.complete(fine), photos.cls_layers)


def fails(run, block, line, p, values, longest, source):
    """Whether a product cannot be answered; the reason goes to block.failed."""
    reason = block.photos.get(p.image)
    if not isinstance(reason, str):
        reason = too_long(run, p, longest)
        if values and p.attribute not in values:
            reason = f"there are no known values of {p.attribute}; {source} has those of {', '.join(values)}"
    if reason:
        block.failed.append(Failed(line, p.id, p.attribute, reason))
    return reason
