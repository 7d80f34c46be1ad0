"""A file of products: every format, rows that fail, files that must stay, interruptions at any moment."""

import csv
import gzip
import io
import json
import os
import random
import sys

import pytest
from conftest import command, ends_at, held, interrupt, together, train_run

import evaluate
from base.console import locked
from base.tsv import COLUMNS, tsv_line
from data import Product
from support import answering

SCRIPT = """
from support import processes
from tools import catalogue
catalogue.BLOCK = 4
processes.run(catalogue.main)
"""
ROWS = [{"id": f"P{i}", "images": f"B{i + 1:04}.jpg", "category": "Shoes",
         "texts": f"black {'leather ' * (i % 4)}shoe",
         "attribute_names": ("Boot Style", "Heel Height")[i % 2], "attribute_values": ""}
        for i in range(20)]


@pytest.fixture
def answer(run, tmp_path):
    """answer(the input's bytes, the output's name, *flags): the command with blocks of four rows; its
    Outcome.
    """
    (tmp_path / "small.py").write_text(SCRIPT)

    def call(content, output, *flags, code=0, before=None, of=run):
        (tmp_path / "in").write_bytes(content)
        files = ["--input", tmp_path / "in", "--output", tmp_path / output]
        outcome = command(str(tmp_path / "small.py"), [of, *files, *flags], tmp_path, 60, before)
        assert code is None or outcome.code == code and held(outcome) is None, outcome.err
        return outcome
    return call


def as_tsv(rows):
    return "".join(map(tsv_line, [COLUMNS, *map(dict.values, rows)])).encode()


def as_csv(rows, separator):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([rows[0], *map(dict.values, rows)])
    return text.getvalue().encode()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path):
    """The rows of an output, whatever its format, as dicts."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    if ".jsonl" in path.name.lower():
        return [json.loads(line) for line in text.splitlines()]
    dialect = "excel" if ".csv" in path.name else "excel-tab"
    return list(csv.DictReader(io.StringIO(text, newline=""), dialect=dialect))


def answers_in(path):
    return [(row["id"], row["attribute_names"], row["prediction"], float(row["probability"]))
            for row in read(path)]


@pytest.fixture(scope="module")
def expected(run):
    """(id, attribute, prediction, probability) of each row, without blocks."""
    loaded = evaluate.load(run)
    products = [Product(row["id"], row["images"], "Shoes", row["texts"], row["attribute_names"], "")
                for row in ROWS]
    answering.prepare_photos(loaded, products)
    answers = answering.answers(loaded, products)
    assert len({a.value for a in answers}) > 3
    return [(p.id, p.attribute, a.value, pytest.approx(a.probability, abs=2e-4))
            for p, a in zip(products, answers)]


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("content, output", [
    (b"\xef\xbb\xbf" + as_tsv(ROWS).replace(b"\n", b"\r\n"), "out.jsonl"),
    (gzip.compress(as_jsonl(ROWS)), "out.csv.gz"), (as_csv(ROWS, ";"), "out.JSONL.gz"),
])
def test_every_format_has_the_same_answers(answer, expected, tmp_path, content, output):
    said = answer(content, output).out
    assert answers_in(tmp_path / output) == expected
    assert said.endswith(f"{output}: 20 rows, 20 answers, 0 empty, 0 could not be answered\n")
    assert not list(tmp_path.glob("*failed*"))


def test_stdin_and_stdout(answer, expected, tmp_path):
    def piped():
        ours, theirs = os.pipe()
        os.write(theirs, as_jsonl([*ROWS, {"id": 3}]))
        os.close(theirs)
        os.dup2(ours, 0)
        sys.stdin = open(0, closefd=False)

    said = answer(b"", "x", "--input=-", "--output=-", before=piped)
    (tmp_path / "out.tsv").write_text(said.out)
    assert answers_in(tmp_path / "out.tsv") == expected
    assert "21\t3\t\tattribute_names is empty" in said.err and "1 could not be answered\n" in said.err


def test_ids_and_attributes(answer, tmp_path):
    """Several attributes in a row, of any case, once each; an id that is a number stays one."""
    rows = [{**ROWS[0], "id": 4711, "attribute_names": ["heel height", None, "Boot Style", "HEEL HEIGHT"]},
            {**ROWS[1], "attribute_names": "Colour| Boot Style|"}]
    said = answer(as_jsonl(rows), "out.jsonl").out
    assert [(row["id"], row["attribute_names"]) for row in read(tmp_path / "out.jsonl")] == [
        (4711, "Heel Height"), (4711, "Boot Style"), ("P1", "Colour"), ("P1", "Boot Style")]
    assert "2 rows, 4 answers, 0 empty, 0 could not be answered; 1 answers are to" in said


def test_values_and_confidence(answer, tmp_path):
    (tmp_path / "values.tsv").write_text("boot style\tSandal\nBoot Style\tMule\n")
    how = "--values", tmp_path / "values.tsv", "--merge"
    assert "10 answers, 0 empty, 10 could not be answered" in answer(as_tsv(ROWS), "out.jsonl", *how).out
    assert "--values and --constrain together" in (tmp_path / "out.jsonl.failed.tsv").read_text()
    assert {row["prediction"] for row in read(tmp_path / "out.jsonl")} <= {"Sandal", "Mule"}
    said = answer(as_tsv(ROWS), "all.tsv", *how, "--constrain", "--min-confidence", "1").out
    assert "20 answers, 20 empty, 0 could not be answered" in said


# ---------------------------------------------------------------------------------------- other columns


def test_wide_has_a_line_for_each_product(answer, expected, tmp_path):
    """The rows of a product may be apart.  An own column with the name of an answer's gets another."""
    asked = [*ROWS[:2], ROWS[0] | {"attribute_names": "heel height"}]
    content = as_csv([row | {"EAN": "0042", "boot style": "?"} for row in asked], ",")
    assert "3 rows, 3 answers, 0 empty" in answer(content, "wide.csv", "--wide", "--keep-columns").out
    assert (tmp_path / "wide.csv").read_bytes().startswith(
        b"\xef\xbb\xbfid,images,category,texts,EAN,input boot style,Boot Style,Boot Style probability,"
        b"Heel Height,Heel Height probability\r\nP0,")
    first, second = read(tmp_path / "wide.csv")
    for row, (id, name, value, probability) in zip((first, second), expected):
        assert (row["id"], row[name], float(row[f"{name} probability"])) == (id, value, probability)
    assert (first["EAN"], first["input boot style"]) == ("0042", "?")
    assert first["Heel Height"] and not second["Boot Style"]


def test_own_columns_keep_their_types(answer, tmp_path):
    """Not every line of JSONL has the same ones."""
    rows = [ROWS[0] | {"price": 9.5, "prediction": None, "cut": "\ud83d"}, ROWS[1] | {"tags": ["a", "é"]}]
    answer(as_jsonl(rows), "out.jsonl", "--keep-columns")
    first, second = read(tmp_path / "out.jsonl")
    assert (first["price"], first["input prediction"], second["tags"]) == (9.5, None, ["a", "é"])
    assert first["cut"] == "\ud83d" and "tags" not in first      # half of a character
    assert '["a", "é"]' in (tmp_path / "out.jsonl").read_text()
    answer(as_jsonl(rows), "out.tsv", "--keep-columns")
    first, second = read(tmp_path / "out.tsv")
    assert (first["price"], first["tags"], second["price"], second["tags"]) == ("9.5", "", "", '["a", "é"]')
    twice = as_tsv(ROWS).replace(b"texts", b"texts\tEAN\tean")
    assert "line 1 names a column twice" in answer(twice, "twice.tsv", "--keep-columns", code=2).err


# ---------------------------------------------------------------------------------------- rows that fail


BAD = {                                                 # a line, and what is said about it
    b"B1\tgone.jpg\tShoes\tx\tBoot Style\t\n": "gone.jpg: does not exist",
    b"B1\tB0001.jpg\tShoes\n": "has 3 cells, the header 6",
    b"B1\tB0001.jpg\tShoes\t\xff\tBoot Style\t\n": "is not UTF-8 text",
    b"B1\tB0001.jpg\tShoes\tx\t | \t\n": "attribute_names names none",
    b"B1\tB0001.jpg\tShoes\t" + b"word " * 3000 + b"\tBoot Style\t\n": "more than the 2,048"}
BAD_JSON = {
    b'["B1"]\n': "it is a list", b"[" * 100_000 + b"\n": "is not a product",
    b'{"id": {}, "attribute_names": "Heel"}\n': "id is {}, but must be a text",
    b'{"id": "a\\ud800", "attribute_names": "Heel"}\n': "surrogates",
    b'{"attribute_names": "Heel"}\n': "id is empty"}


def with_bad(good, bad):
    """The lines of a file, with each bad one after a good one."""
    lines = good.splitlines(keepends=True)
    for number, line in enumerate(bad, start=1):
        lines.insert(2 * number, line)
    return b"".join(lines)


@pytest.mark.parametrize("good, bad", [(as_tsv(ROWS), BAD), (as_jsonl(ROWS), BAD_JSON)])
def test_rows_that_cannot_be_answered_are_listed(answer, expected, tmp_path, good, bad):
    said = answer(with_bad(good, bad), "out.tsv").out
    assert answers_in(tmp_path / "out.tsv") == expected
    failed = read(tmp_path / "out.tsv.failed.tsv")
    assert [int(row["line"]) for row in failed] == [2 * n + 3 for n in range(len(bad))]
    for row, reason in zip(failed, bad.values()):
        assert reason in row["reason"], row
    assert said.endswith(f"{len(bad)} could not be answered: {tmp_path}/out.tsv.failed.tsv\n")
    said = answer(good, "none.tsv", "--images", tmp_path, code=None)
    assert said.code == 1 and "0 answers, 0 empty, 20 could not be answered" in said.out


def test_strict_stops_at_the_first_and_goes_on_when_it_is_mended(answer, expected, tmp_path):
    said = answer(as_tsv(ROWS).replace(b"B0007", b"gone"), "out.tsv", "--strict", code=2).err
    assert "in, line 8: " in said and "the same command goes on from there" in said
    assert len(list(tmp_path.glob(".out*/*"))) == 1 and not list(tmp_path.glob("out*"))
    answer(as_tsv(ROWS), "out.tsv")
    assert answers_in(tmp_path / "out.tsv") == expected


@pytest.mark.parametrize("content, said", [
    (b"id,images\n1,2\n", "the header 'id' 'images', lacks category"), (b"\xff\xfei\0d\0", "it is UTF-16"),
    (as_tsv([]) + b"\n", "holds no products"), (gzip.compress(b"x" * 100)[:20], "end-of-stream"),
])
def test_what_is_wrong_with_the_whole_file_is_one_line(answer, tmp_path, content, said):
    assert said in answer(content, "out.tsv", code=2).err
    assert not list(tmp_path.glob("*out.tsv*"))


def test_no_other_file_is_replaced(answer, run, tmp_path):
    (tmp_path / "out.tsv.failed.tsv").write_text("mine")
    assert "failed.tsv exists already" in answer(as_tsv(ROWS), "out.tsv", code=2).err
    output = run / "predictions.tsv"
    before = output.read_bytes()
    assert "name another file" in answer(as_tsv(ROWS), output, code=2).err
    assert output.read_bytes() == before
    answer(as_tsv(ROWS), "out.xlsx", code=2)            # an ending of no format


# ---------------------------------------------------------------------------------------- interruptions


UNEVEN = with_bad(as_tsv(ROWS), BAD)                    # an input with rows that fail


def results(path):
    """The bytes of answers and of the failed rows."""
    return path.read_bytes(), path.with_name(f"{path.name}.failed.tsv").read_bytes()


@pytest.fixture
def whole(answer, tmp_path):
    """What UNEVEN gives without interruption."""
    answer(UNEVEN, "whole.tsv")
    return results(tmp_path / "whole.tsv")


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(answer, whole, tmp_path):
    draw, kills = random.Random(3), 0
    while answer(UNEVEN, "out.tsv", code=None, before=ends_at(draw.randint(2, 17))).signal:
        kills += 1
        assert kills < 60
    assert kills >= 3 and results(tmp_path / "out.tsv") == whole and not list(tmp_path.glob(".out*"))


def test_what_was_begun_otherwise_is_not_mixed(answer, flags, run, whole, tmp_path):
    said = answer(UNEVEN, "out.tsv", code=None, before=ends_at(8, interrupt)).err
    parts = {p: p.read_bytes() for p in tmp_path.glob(".out*/*")}
    assert "interrupted" in said and len(parts) >= 2
    other_run = train_run(tmp_path / "other", flags, "--epochs", 1, "--seed", 1)
    other = UNEVEN.replace(b"P1\t", b"Q1\t")
    changes = [(UNEVEN, other_run, []), (other, run, []), (UNEVEN, run, ["--temperature", "2"]),
               (UNEVEN, run, ["--constrain"]), (UNEVEN, run, ["--dtype", "int8"])]
    for content, of, more in changes:
        said = answer(content, "out.tsv", *more, code=2, of=of).err
        assert "was begun with another run, other settings or another input" in said
        assert {p: p.read_bytes() for p in tmp_path.glob(".out*/*")} == parts
    with locked(tmp_path / ".out.tsv.parts", "testing"):
        assert "another process" in answer(UNEVEN, "out.tsv", code=2).err
    answer(UNEVEN, "out.tsv")
    assert results(tmp_path / "out.tsv") == whole


def test_several_processes_write_the_same_bytes(run, whole, tmp_path):
    """Each answers every second block; one of them is killed on the way, and then all go on."""
    arguments = [run, "--input", tmp_path / "in", "--output", tmp_path / "out.tsv"]
    killed = "import os\nif os.environ['RANK'] == '1': catalogue.write_json = lambda *a: os._exit(9)\n"
    for lines, codes in (killed, [2, 9]), ("", [0, 0]):
        (tmp_path / "small.py").write_text(SCRIPT.replace("processes.run", f"{lines}processes.run"))
        outcomes = together(2, str(tmp_path / "small.py"), arguments, tmp_path)
        assert [outcome.code for outcome in outcomes] == codes, outcomes
        assert bool(list(tmp_path.glob(".out*/*"))) == bool(lines)
    assert results(tmp_path / "out.tsv") == whole
