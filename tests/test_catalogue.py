"""A catalogue: every format, rows that fail, interruptions at any moment, photo workers, flat memory."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PRODUCTS, at_once, command, held
from test_processes import start

import evaluate
import train
import vit
from base.console import Progress
from base.photo import open_photo
from base.tsv import COLUMNS, tsv_line
from data import Product
from support import answering, catalogue, catalogue_rows, config, features, photo_workers


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "2", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*flags, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def rows():
    """30 rows with photos, of two attributes in turn; each a dict with the names of the columns."""
    return [{"id": f"P{i}", "images": f"B{i % 55 + 1:04}.jpg", "category": "Shoes",
             "texts": f"[Title] black {'leather ' * (i % 4)}shoe", "attribute_names": PRODUCTS[i % 5][0], "attribute_values": ""} for i in range(30)]


def as_tsv(rows):
    return "".join(tsv_line([row[name] for name in COLUMNS]) for row in [dict(zip(COLUMNS, COLUMNS)), *rows]).encode()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path):
    """The rows of an output as dicts."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return [json.loads(line) for line in text.split(b"\n")[:-1]]
    return list(csv.DictReader(io.StringIO(text.decode(), newline=""), dialect="excel-tab"))


def small_blocks():
    catalogue_rows.BLOCK = 4


@pytest.fixture
def answer(run, tmp_path):
    """answer(input, output, *flags): evaluate.py with blocks of four rows; its Outcome.  code: None if it is killed."""
    def call(given, output, *more, code=0, before=small_blocks, **how):
        outcome = command("evaluate.py", [str(run), "--input", str(given), "--output", str(output), *map(str, more)], tmp_path,
                          before=before, limit_s=60, **how)
        if code is None:
            assert outcome.signal == signal.SIGKILL, outcome.err
        else:
            assert (code == 130 or held(outcome) is None) and outcome.code == code, outcome.err
        return outcome
    return call


@pytest.fixture(scope="module")
def expected(run, rows, data_root):
    """(id, attribute, prediction, probability) of each row, from Run.answer."""
    loaded, found = evaluate.load(run), []
    for row in rows:
        one = loaded.product(str(data_root / "images" / row["images"]), f"{row['texts'].removeprefix('[Title] ')}, Shoes",
                             row["attribute_names"])
        one = answering.replace(one, id=row["id"])       # the seed of its draws
        answering.prepare_photos(loaded, [one])
        [a] = answering.answers(loaded, [one])
        found.append((row["id"], row["attribute_names"], a.value, pytest.approx(a.probability, abs=2e-4)))
    assert len({value for _, _, value, _ in found}) > 3
    return found


def found_in(path):
    return [(row["id"], row["attribute_names"], row["prediction"], float(row["probability"])) for row in read(path)]


# ------------------------------------------------------------------------------------------------ formats


FORMATS = {"in.tsv": as_tsv, "in.tsv.gz": lambda rows: gzip.compress(as_tsv(rows)), "in.jsonl": as_jsonl,
           "in.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)), "bom.tsv": lambda rows: b"\xef\xbb\xbf" + as_tsv(rows),
           "named-wrongly.tsv": as_jsonl, "empty-lines.jsonl": lambda rows: b"\n \n" + as_jsonl(rows)}


OUTPUTS = itertools.cycle(["out.tsv", "out.tsv.gz", "out.jsonl", "out.jsonl.gz"])


@pytest.mark.parametrize("name, output", list(zip(FORMATS, OUTPUTS)))
def test_every_format_has_the_same_answers_in_the_same_order(answer, rows, expected, tmp_path, name, output):
    (tmp_path / name).write_bytes(FORMATS[name](rows))
    said = answer(tmp_path / name, tmp_path / output)
    assert found_in(tmp_path / output) == expected
    assert f"{tmp_path / output}: 30 products answered" in said.out
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {name, output, "stdout.txt", "stderr.txt"}           # no failed.tsv, no record, nothing half


@pytest.mark.parametrize("kind", ["in.tsv", "in.jsonl", "in.tsv.gz"])
def test_stdin_and_stdout(answer, rows, expected, tmp_path, kind):
    (tmp_path / "in").write_bytes(FORMATS[kind](rows))

    def piped():
        """`cat in | evaluate.py ...`: a pipe, not a file."""
        small_blocks()
        ours, theirs = os.pipe()
        if os.fork() == 0:
            os.write(theirs, (tmp_path / "in").read_bytes())
            os._exit(0)
        os.close(theirs)
        os.dup2(ours, 0)
        sys.stdin = open(0, closefd=False)

    said = answer("-", "/dev/stdout", before=piped)
    (tmp_path / "out.tsv").write_text(said.out)
    assert found_in(tmp_path / "out.tsv") == expected


def test_a_row_may_ask_for_several_attributes(answer, rows, expected, tmp_path):
    """Two rows of one product become one row with two attributes; the answers are the same, one to a line."""
    pairs = [{**a, "attribute_names": ["Boot Style", "Heel Height"]} for a in rows]
    (tmp_path / "in.jsonl").write_bytes(as_jsonl(pairs))
    (tmp_path / "in.tsv").write_bytes(as_tsv([{**a, "attribute_names": "Boot Style| Heel Height"} for a in rows]))
    answer(tmp_path / "in.jsonl", tmp_path / "json.tsv")
    answer(tmp_path / "in.tsv", tmp_path / "out.tsv")
    found = found_in(tmp_path / "out.tsv")
    assert [(i, a) for i, a, *_ in found] == [(row["id"], a) for row in rows for a in ("Boot Style", "Heel Height")]
    assert [one for one in expected if one in found] == expected
    assert (tmp_path / "json.tsv").read_bytes() == (tmp_path / "out.tsv").read_bytes()


def test_the_attributes_of_a_product_share_a_batch(run):
    """Their sequences begin alike; only in one batch is that computed once."""
    loaded = evaluate.load(run)
    products = [Product(f"P{i}", "B0001.jpg", "Shoes", "black " * (i % 7), attribute, "")
                for i in range(64) for attribute in ("Boot Style", "Heel")]
    for chosen in answering.batches(loaded, products, None):
        assert len(chosen) == 64 and all(i ^ 1 in chosen for i in chosen)
    for chosen in answering.batches(loaded, products, {"Boot Style": ["Flat"], "Heel": ["Flat"]}):
        assert len(chosen) == 8 and all(i ^ 1 in chosen for i in chosen)


def test_known_values_confidence_and_merge_work_as_for_a_split(answer, rows, run, tmp_path):
    (tmp_path / "in.tsv").write_bytes(as_tsv(rows))
    (tmp_path / "values.tsv").write_text("Boot Style\tSandal\nBoot Style\tMule\nHeel Height\tFlat\n")
    answer(tmp_path / "in.tsv", tmp_path / "out.jsonl", "--values", tmp_path / "values.tsv", "--min-confidence", "0.99",
           "--merge")
    found = read(tmp_path / "out.jsonl")
    assert {row["prediction"] for row in found if row["attribute_names"] == "Heel Height"} == {"Flat"}
    assert {row["prediction"] for row in found} <= {"Sandal", "Mule", "Flat", ""}
    assert all(row["probability"] >= 0.99 or not row["prediction"] for row in found)
    assert {row["runner_up_probability"] is None for row in found} == {True, False}


# ------------------------------------------------------------------------------------------------ rows that fail


BAD = [                                                 # (what, the line in a TSV, what failed.tsv says)
    ("no photo", b"B1\tgone.jpg\tShoes\tx\tBoot Style\t\n", "there is no photo 'gone.jpg' in "),
    ("columns", b"B1\tB0001.jpg\tShoes\n", "has 3 columns, the header 6"),
    ("a quote that is never closed", b'B1\tB0001.jpg\tShoes\t"[Title] x\tBoot Style\t\n', "is not a readable TSV"),
    ("not UTF-8", b"B1\tB0001.jpg\tShoes\t\xff\tBoot Style\t\n", "is not UTF-8 text (invalid start byte)"),
    ("no id", b"\tB0001.jpg\tShoes\tx\tBoot Style\t\n", "id is empty"),
    ("no attribute", b"B1\tB0001.jpg\tShoes\tx\t\t\n", "attribute_names is empty"),
    ("bars alone", b"B1\tB0001.jpg\tShoes\tx\t | \t\n", "attribute_names is empty"),
    ("outside", b"B1\t../B0001.jpg\tShoes\tx\tBoot Style\t\n", "images is '../B0001.jpg', but must name a file inside"),
    ("no name", b"B1\t\tShoes\tx\tBoot Style\t\n", "there is no photo '' in "),
    ("a broken photo", b"B1\tbroken.jpg\tShoes\tx\tBoot Style\t\n", "cannot be read as a photo"),
    ("an HTML page", b"B1\tpage.jpg\tShoes\tx\tBoot Style\t\n", "should be a photo, but is an HTML"),
    ("too long", b"B1\tB0001.jpg\tShoes\t" + b"word " * 3000 + b"\tBoot Style\t\n", "tokens, more than the 2,048"),
    ("unknown values", b"B1\tB0001.jpg\tShoes\tx\tSize\t\n", "there are no known values of Size; the run's training data"),
]
BAD_JSON = [
    (b'{"id": "B1"', "is not valid JSON"), (b'["B1"]', "is not a JSON object"), (b"[" * 100_000, "is not valid JSON"),
    (b'{"id": {}, "attribute_names": "Heel Height"}', "id is {}, but must be a text"),
    (b'{"id": true, "attribute_names": "Heel Height"}', "id is True, but must be a text"),
    (b'{"id": "a\\ud800", "attribute_names": "Heel Height"}', "is not UTF-8 text"),
    (b'{"id": "B1", "attribute_names": []}', "attribute_names is empty"),
    (b'{"attribute_names": "Heel Height"}', "id is empty"), (b'{"id": "B1", "x": ' + b"1" * 5000 + b"}", "is not valid JSON"),
]


@pytest.fixture(scope="module")
def images(data_root, tmp_path_factory):
    """A folder of photos, two of them broken."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    shutil.copytree(data_root / "images", folder)
    (folder / "broken.jpg").write_bytes((folder / "B0002.jpg").read_bytes()[:200])
    (folder / "page.jpg").write_text("<!doctype html>")
    return folder


def with_bad(rows):
    """A TSV of good rows, with each bad one between two of them; and the number of each bad line."""
    lines = as_tsv(rows).splitlines(keepends=True)
    mixed, numbers = lines[:1], []
    for good, (_, bad, _) in zip(lines[1:], BAD):
        mixed += [good, bad, b"\n"]
        numbers.append(len(mixed) - 1)
    return b"".join([*mixed, *lines[1 + len(BAD):]]), numbers


def test_rows_that_cannot_be_answered_are_listed_and_the_others_answered(answer, rows, expected, images, tmp_path):
    text, numbers = with_bad(rows)
    (tmp_path / "in.tsv").write_bytes(text)
    said = answer(tmp_path / "in.tsv", tmp_path / "out.tsv", "--images", images, "--constrain")
    assert [row["id"] for row in read(tmp_path / "out.tsv")] == [row["id"] for row in rows]
    failed = read(tmp_path / "failed.tsv")
    assert [int(row["line"]) for row in failed] == numbers
    for row, (what, line, reason) in zip(failed, BAD):
        assert reason in row["reason"], (what, row)
    assert [row["attribute"] for row in failed[6:]] == [" | ", *["Boot Style"] * 5, "Size"]
    assert f"{len(BAD)} could not be answered: {tmp_path / 'failed.tsv'}" in said.out
    (tmp_path / "in.tsv").write_bytes(as_tsv(rows))
    answer(tmp_path / "in.tsv", tmp_path / "out.tsv", "--images", images)
    assert not (tmp_path / "failed.tsv").exists()       # that of the catalogue before
    assert found_in(tmp_path / "out.tsv") == expected


def test_bad_json_and_bad_bytes(answer, rows, expected, tmp_path):
    lines = as_jsonl(rows).splitlines()
    mixed = [line for pair in zip(lines, (bad for bad, _ in BAD_JSON)) for line in pair] + lines[len(BAD_JSON):]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(mixed))
    answer(tmp_path / "in.jsonl", tmp_path / "out.tsv")
    assert found_in(tmp_path / "out.tsv") == expected
    failed = read(tmp_path / "failed.tsv")
    assert [int(row["line"]) for row in failed] == [2 * n + 2 for n in range(len(BAD_JSON))]
    for row, (_, reason) in zip(failed, BAD_JSON):
        assert reason in row["reason"], row


def test_an_id_may_be_a_number_and_columns_be_absent(answer, rows, tmp_path):
    row = {"id": 4711, "images": "B0001.jpg", "texts": "x", "attribute_names": "Heel Height", "attribute_values": None,
           "price": 3.5}
    (tmp_path / "in.jsonl").write_bytes(as_jsonl([row]))
    answer(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    [found] = read(tmp_path / "out.jsonl")
    assert (found["id"], found["category"], found["attribute_values"]) == ("4711", "", "")
    assert list(found) == list(catalogue.PREDICTED)


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad[0] in ("no photo", "columns", "too long", "unknown values")],
                         ids=lambda bad: bad[0])
def test_strict_stops_at_the_first(answer, rows, images, tmp_path, bad):
    lines = as_tsv(rows[:6]).splitlines(keepends=True)
    (tmp_path / "in.tsv").write_bytes(b"".join([*lines, bad[1], bad[1]]))
    said = answer(tmp_path / "in.tsv", tmp_path / "out.tsv", "--images", images, "--constrain", "--strict", code=2)
    assert f"{tmp_path / 'in.tsv'}, line 8: " in said.err and bad[2] in said.err
    assert not (tmp_path / "out.tsv").exists() and not (tmp_path / "failed.tsv").exists()
    assert "4 rows are answered; the same command goes on from there" in said.err
    # The row is mended, and the same command goes on.
    (tmp_path / "in.tsv").write_bytes(b"".join(lines))
    answer(tmp_path / "in.tsv", tmp_path / "out.tsv", "--images", images, "--constrain", "--strict")
    assert len(read(tmp_path / "out.tsv")) == 6


@pytest.mark.parametrize("content, more, said", [
    (b"id\timages\n", [], "line 1: the header lacks category, texts, attribute_names"),
    (b"\xff\xfei\0d\0", [], "line 1: is not UTF-8 text"), (b"", [], "an empty file"),
    ("\t".join(COLUMNS).encode() + b"\n", [], "has a header but no products"),
    ("\t".join(COLUMNS).encode() + b"\n\n\n", [], "holds no products"), (b" \nid", [], "line 1: the header lacks"),
    (gzip.compress(b"", mtime=0), [], "line 1: the header lacks"), (b"\xef\xbb\xbf", [], "line 1: the header lacks"),
    (gzip.compress(b"x" * 100, mtime=0)[:20], [], "the gzip file is damaged or cut off"),
    ("header", ["--images", "nowhere"], "nowhere: there is no such folder of photos"),
])
def test_what_is_wrong_with_the_whole_file_is_an_error_at_once(answer, rows, tmp_path, content, more, said):
    (tmp_path / "in").write_bytes(as_tsv(rows) if content == "header" else content)
    assert said in answer(tmp_path / "in", tmp_path / "out.tsv", *more, code=2).err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("more", [["--strict"], ["--no-feature-cache"], ["--images", "photos"]])
def test_flags_of_a_catalogue_go_with_an_input(run, tmp_path, more):
    outcome = command("evaluate.py", [str(run), *more], tmp_path)
    assert outcome.code == 2 and "--images, --strict and --no-feature-cache go with --input" in outcome.err


def test_a_gzip_file_that_is_cut_off_is_named_and_what_was_answered_kept(answer, rows, tmp_path):
    text = as_tsv([{**row, "texts": random.Random(row["id"]).randbytes(8000).hex()} for row in rows])
    (tmp_path / "in.tsv.gz").write_bytes(gzip.compress(text)[:-20_000])
    said = answer(tmp_path / "in.tsv.gz", tmp_path / "out.tsv", "--no-feature-cache", code=2)
    assert "the gzip file is damaged or cut off" in said.err and "after line " in said.err and "rows are answered" in said.err


def test_if_every_row_fails_the_packed_file_can_be_unpacked(answer, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n" * 9)
    said = answer(tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz")
    packed = (tmp_path / "out.jsonl.gz").read_bytes()
    assert packed and gzip.decompress(packed) == b"" and "9 could not be answered" in said.out


def test_a_line_of_many_megabytes_fails_alone(answer, rows, tmp_path):
    lines = as_tsv(rows[:3]).splitlines(keepends=True)
    (tmp_path / "in.tsv").write_bytes(b"".join([*lines[:2], b"x" * (1 << 25), b"\n", *lines[2:]]))
    answer(tmp_path / "in.tsv", tmp_path / "out.tsv")
    assert [row["id"] for row in read(tmp_path / "out.tsv")] == ["P0", "P1", "P2"]
    [failed] = read(tmp_path / "failed.tsv")
    assert failed["line"] == "3" and failed["reason"] == "has more than 16,777,216 bytes"


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.fixture(scope="module")
def whole(run, rows, images, tmp_path_factory):
    """An input with rows that fail, and {format: the bytes (answers, failed.tsv)} of a command that nothing stopped."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    (folder / "in.tsv").write_bytes(with_bad(rows)[0])
    for name in ("out.tsv", "out.jsonl.gz"):
        outcome = command("evaluate.py", [str(run), "--input", str(folder / "in.tsv"), "--output", str(folder / name),
                                          "--images", str(images)], folder, before=small_blocks)
        assert outcome.code == 0, outcome.err
        found[name] = (folder / name).read_bytes(), (folder / "failed.tsv").read_bytes()
    return folder / "in.tsv", found


def dies_at(n):
    """For `before`: killed at moment n; a moment is just before, or in the middle of, or just after a change on the disk."""
    def before():
        small_blocks()
        moments, append = itertools.count(1), catalogue.append

        def moment():
            if next(moments) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def with_moments(function):
            def call(*arguments, **how):
                moment()
                done = function(*arguments, **how)
                moment()
                return done
            return call

        def append_in_two(path, data):
            append(path, data[:len(data) // 2])
            moment()
            append(path, data[len(data) // 2:])

        os.fsync, os.replace, os.truncate = with_moments(os.fsync), with_moments(os.replace), with_moments(os.truncate)
        catalogue.append = append_in_two
    return before


@pytest.mark.parametrize("name", ["out.tsv", "out.jsonl.gz"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(run, images, whole, tmp_path, name):
    """Killed at random moments, again and again: each start goes further, or stops where the one before did."""
    given, expected = whole
    arguments = [str(run), "--input", str(given), "--output", str(tmp_path / name), "--images", str(images)]
    draw, kills = random.Random(name), 0
    for _ in range(40):
        outcome = command("evaluate.py", arguments, tmp_path, before=dies_at(draw.randint(8, 45)))
        if outcome.code == 0 and not outcome.signal:
            break
        assert outcome.signal == signal.SIGKILL, outcome.err
        assert not (tmp_path / name).exists() or (tmp_path / name).read_bytes() == expected[name][0]
        kills += 1
    assert kills >= 3
    assert ((tmp_path / name).read_bytes(), (tmp_path / "failed.tsv").read_bytes()) == expected[name]
    assert {p.name for p in tmp_path.iterdir()} == {name, "failed.tsv", "stdout.txt", "stderr.txt"}


def interrupted_after(size, number=signal.SIGINT):
    """For `before`: the command gets a signal, as from Ctrl-C, once a file has so many bytes."""
    def before():
        small_blocks()
        signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background job ignores it
        append = catalogue.append

        def watched(path, data):
            append(path, data)
            if path.stat().st_size > size:
                os.kill(os.getpid(), number)
        catalogue.append = watched
    return before


@pytest.fixture
def half(answer, images, whole, tmp_path):
    """A catalogue that was interrupted: (input, output, its flags)."""
    shutil.copy(whole[0], tmp_path / "in.tsv")
    said = answer(tmp_path / "in.tsv", tmp_path / "out.tsv", "--images", images, code=130, before=interrupted_after(1500))
    assert "rows are answered; the same command goes on from there" in said.err and "interrupted" in said.err
    assert {p.name for p in tmp_path.glob("out*")} == {"out.tsv.partial", "out.tsv.partial.failed", "out.tsv.partial.json"}
    return tmp_path / "in.tsv", tmp_path / "out.tsv", ["--images", images]


def test_after_a_full_disk_it_goes_on(answer, images, whole, tmp_path):
    import resource
    given, expected = whole

    def full():
        small_blocks()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    arguments = given, tmp_path / "out.tsv", "--images", images, "--no-feature-cache"
    said = answer(*arguments, code=2, before=full)
    rows_kept = json.loads((tmp_path / "out.tsv.partial.json").read_text())["rows"]
    assert f"{tmp_path / 'out.tsv'}: File too large" in said.err
    assert f"\n{rows_kept} rows are answered; the same command goes on from there" in said.err
    answer(*arguments)
    assert ((tmp_path / "out.tsv").read_bytes(), (tmp_path / "failed.tsv").read_bytes()) == expected["out.tsv"]


def test_stdin_goes_on_too(answer, images, whole, tmp_path):
    given, expected = whole

    def redirected(then):
        def before():
            then()
            os.dup2(os.open(given, os.O_RDONLY), 0)
            sys.stdin = open(0, closefd=False)
        return before

    arguments = "-", tmp_path / "out.tsv", "--images", images
    answer(*arguments, code=130, before=redirected(interrupted_after(1500)))
    answer(*arguments, before=redirected(small_blocks))
    assert ((tmp_path / "out.tsv").read_bytes(), (tmp_path / "failed.tsv").read_bytes()) == expected["out.tsv"]


def other_run(half, run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    config_file = tmp_path / "other" / "config.json"
    config_file.write_text(config_file.read_text().replace('"seed": 0', '"seed": 1'))
    return [str(tmp_path / "other"), "--images", str(half[2][1])]


def change_input(half, run, tmp_path):
    half[0].write_bytes(half[0].read_bytes().replace(b"P1\t", b"Q1\t"))
    return [str(run), "--images", str(half[2][1])]


def lose_bytes(half, run, tmp_path):
    os.truncate(f"{half[1]}.partial", 100)
    return [str(run), "--images", str(half[2][1])]


@pytest.mark.parametrize("change, said", [
    (other_run, "is from another run"), (change_input, "is from another input"), (lose_bytes, "a disk that lost a part of it"),
    (lambda half, run, _: [str(run), "--images", str(half[2][1]), "--temperature", "2", "--constrain"],
     "is from other settings (values, temperature"),
    (lambda half, run, _: [str(run), "--images", str(half[2][1]), "--dtype", "int8"], "is from other settings (dtype)"),
    (lambda half, run, _: [str(run)], "is from other settings (images)"),
])
def test_what_was_begun_otherwise_is_not_mixed(half, run, tmp_path, change, said):
    arguments = [*change(half, run, tmp_path), "--input", str(half[0]), "--output", str(half[1])]
    before = {p.name: p.read_bytes() for p in tmp_path.glob("out*")}
    outcome = command("evaluate.py", arguments, tmp_path, before=small_blocks)
    assert held(outcome) is None and outcome.code == 2 and said in outcome.err
    assert f"delete {half[1]}.partial and {half[1]}.partial.json to begin again" in outcome.err
    assert {p.name: p.read_bytes() for p in tmp_path.glob("out*")} == before
    for end in (".partial", ".partial.json"):           # as the line says
        Path(f"{half[1]}{end}").unlink()
    outcome = command("evaluate.py", arguments, tmp_path, before=small_blocks)
    assert outcome.code == 0 and not list(tmp_path.glob("out.tsv.partial*")), outcome.err


def test_rows_may_be_added_before_it_goes_on(answer, half, whole):
    given, out, flags = half
    given.write_bytes(given.read_bytes() + given.read_bytes().splitlines(keepends=True)[1].replace(b"P0", b"Q0"))
    answer(given, out, *flags)
    assert out.read_bytes().startswith(whole[1]["out.tsv"][0]) and read(out)[-1]["id"] == "Q0"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"rows": "a"}', b"\xff"])
def test_a_damaged_record_is_named(answer, half, content):
    given, out, flags = half
    Path(f"{out}.partial.json").write_bytes(content)
    assert "out.tsv.partial.json" in answer(given, out, *flags, code=2).err


def test_of_two_that_write_one_output_one_is_refused(run, whole, images, tmp_path):
    given, expected = whole

    def one(name):
        (tmp_path / name).mkdir()

        def slowly():
            small_blocks()
            append = catalogue.append
            catalogue.append = lambda *a: time.sleep(0.1) or append(*a)
        return command("evaluate.py", [str(run), "--input", str(given), "--output", str(tmp_path / "out.tsv"), "--images",
                                       str(images)], tmp_path / name, before=slowly, limit_s=60)

    outcomes = at_once([lambda: one("a"), lambda: one("b")])
    assert [held(outcome) for outcome in outcomes] == [None, None] and sorted(o.code for o in outcomes) == [0, 2]
    assert "another process is answering a catalogue in this folder" in "".join(outcome.err for outcome in outcomes)
    assert ((tmp_path / "out.tsv").read_bytes(), (tmp_path / "failed.tsv").read_bytes()) == expected["out.tsv"]


# ------------------------------------------------------------------------------------------------ photos


def test_without_the_feature_cache_the_answers_are_the_same_and_nothing_is_kept(answer, images, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "FEATURE_CACHE", tmp_path / "cache" / "features.sqlite")
    answer(whole[0], tmp_path / "out.tsv", "--images", images, "--no-feature-cache")
    assert ((tmp_path / "out.tsv").read_bytes(), (tmp_path / "failed.tsv").read_bytes()) == whole[1]["out.tsv"]
    assert not (tmp_path / "cache").exists()


def test_the_features_of_a_block_are_kept_together(answer, rows, tmp_path, monkeypatch):
    """A block that is interrupted between two ViT batches has no photo in the cache, so its batches are the same again."""
    monkeypatch.setattr(config, "FEATURE_CACHE", tmp_path / "cache" / "features.sqlite")

    def dies_in_the_second_batch():
        small_blocks()
        features.BATCH, encode, calls = 2, features.PhotoFeatures.encode, itertools.count(1)
        features.PhotoFeatures.encode = lambda *a: encode(*a) if next(calls) < 4 else os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "in.tsv").write_bytes(as_tsv(rows))
    answer(tmp_path / "in.tsv", tmp_path / "out.tsv", code=None, before=dies_in_the_second_batch)
    [kept] = features.open_cache(config.FEATURE_CACHE).execute("select count(*) from cls").fetchone()
    assert kept == 4                                    # of the first block, not of the second


def test_a_photo_in_two_blocks_has_the_features_of_the_first(answer, rows, tmp_path, monkeypatch):
    """Else an interruption between the two would change last bits: then the second block finds them in the cache."""
    monkeypatch.setattr(config, "FEATURE_CACHE", tmp_path / "cache" / "features.sqlite")
    (tmp_path / "in.tsv").write_bytes(as_tsv(rows[:4] * 3))

    def counted():
        small_blocks()
        encode = features.PhotoFeatures.encode
        features.PhotoFeatures.encode = lambda self, pixels: print(f"<{len(pixels)}>") or encode(self, pixels)

    said = answer(tmp_path / "in.tsv", tmp_path / "out.tsv", before=counted)
    assert said.out.count("<4>") == said.out.count("<") == 1


def kills_its_reader(always):
    """For `before`: the worker that reads B0003.jpg is killed, each time or only the first time."""
    def before():
        small_blocks()
        read, killed = photo_workers.read_photo, Path(os.environ["KILLED"])

        def deadly(path, size):
            if path.name == "B0003.jpg" and (always or not killed.exists()):
                killed.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            return read(path, size)
        photo_workers.read_photo = deadly
    return before


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_is_replaced(answer, rows, expected, data_root, tmp_path, always):
    """Only a photo that ends its worker twice cannot be answered."""
    (tmp_path / "in.tsv").write_bytes(as_tsv(rows))
    answer(tmp_path / "in.tsv", tmp_path / "out.tsv", "--no-feature-cache", before=kills_its_reader(always),
           env={"KILLED": str(tmp_path / "killed")})
    assert found_in(tmp_path / "out.tsv") == [one for one in expected if not (always and one[0] == "P2")]
    failed = read(tmp_path / "failed.tsv") if always else []
    assert [row["reason"] for row in failed] == ["the photo 'B0003.jpg' ended the process that read it"] * always


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, None), (signal.SIGINT, 130)])
def test_no_process_is_left(answer, images, whole, tmp_path, number, code):
    """However the command ends, its workers end, too: then nobody holds the write end of a pipe any more."""
    ours, theirs = os.pipe()
    answer(whole[0], tmp_path / "out.tsv", "--images", images, "--no-feature-cache", code=code,
           before=interrupted_after(1500, number))
    os.close(theirs)
    ended = threading.Thread(target=os.read, args=(ours, 1), daemon=True)
    ended.start()
    ended.join(10)
    assert not ended.is_alive()


def test_photos_are_read_as_everywhere(images, data_root):
    """A worker's pixels, after normalize, are those of preprocess."""
    for path in sorted((data_root / "images").glob("*.jpg"))[:5]:
        assert vit.normalize(photo_workers.read_photo(path, 32)).equal(vit.preprocess(open_photo(path), 32))


def test_a_run_without_photos_takes_no_folder_of_photos(flags, answer, rows, tmp_path, monkeypatch):
    train.main([*flags, "--no-image", "--out", str(tmp_path / "blind")])
    (tmp_path / "in.tsv").write_bytes(as_tsv([{**row, "images": ""} for row in rows]))
    arguments = [str(tmp_path / "blind"), "--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out.tsv")]
    outcome = command("evaluate.py", [*arguments, "--images", str(tmp_path)], tmp_path)
    assert held(outcome) is None and outcome.code == 2 and "leave --images out" in outcome.err
    assert command("evaluate.py", arguments, tmp_path, before=small_blocks).code == 0
    assert len(read(tmp_path / "out.tsv")) == 30


# ------------------------------------------------------------------------------------------------ any number


def test_memory_does_not_grow_with_the_rows(answer, rows, tmp_path):
    """20,000 rows with photos, and one that fails.  The model's own time is left out: its answer is always the same."""
    lines = as_tsv([{**row, "id": f"P{i}"} for i, row in enumerate(rows * 667)]).splitlines(keepends=True)
    (tmp_path / "in.tsv").write_bytes(b"".join([*lines[:20_000], b"broken\n", *lines[20_000:]]))

    def watched():
        def answer_batch(run, products, chosen, found, *_):
            for i in chosen:
                found[i] = answering.Answer("Flat", 0.5)

        def write(output, block, write=catalogue.Output.write):
            write(output, block)
            with open(tmp_path / "memory", "a") as file:
                print(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), file=file)

        catalogue.answer_batch, catalogue.Output.write = answer_batch, write

    answer(tmp_path / "in.tsv", tmp_path / "out.tsv.gz", before=watched)
    resident = [int(line) for line in (tmp_path / "memory").read_text().split()]
    assert len(resident) == 79 and max(resident[8:]) - resident[8] < 10e6
    assert len(read(tmp_path / "out.tsv.gz")) == 20_010 and len(read(tmp_path / "failed.tsv")) == 1


def test_progress_knows_the_time_left_of_a_file_but_not_of_stdin(capsys):
    with Progress("answering", unit="answers", share=0.0) as known, Progress("answering", unit="answers") as unknown:
        known.start = unknown.start = time.monotonic() - 60
        known.next_print = unknown.next_print = 0
        known.share = 0.25
        known.step(1200)
        unknown.step(1200)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "answering  1,200 answers  20/s  25.0%  3 min 00 s left"
    assert lines[1] == "answering  1,200 answers  20/s"


def test_several_processes_write_the_same_bytes(run, images, whole, tmp_path):
    """Each answers every third block; one of them is killed on the way, and then all go on."""
    given, expected = whole
    arguments = [run, "--input", given, "--output", tmp_path / "out.tsv", "--images", images]
    start(3, "evaluate.py", arguments, tmp_path, interrupted_after(1500, signal.SIGKILL))
    assert (tmp_path / "out.tsv.partial.json").exists()
    outcomes = start(3, "evaluate.py", arguments, tmp_path, small_blocks)
    assert [o.code for o in outcomes] == [0, 0, 0], outcomes
    assert ((tmp_path / "out.tsv").read_bytes(), (tmp_path / "failed.tsv").read_bytes()) == expected["out.tsv"]
