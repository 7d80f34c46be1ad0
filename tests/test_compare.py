"""Runs side by side: differences and intervals by hand, and what is not compared."""

import pytest
from conftest import command, held

from base.console import write_json
from base.tsv import write_tsv
from data import Product
from evaluate import score
from support.answering import PREDICTED


@pytest.fixture
def compare(tmp_path):
    """compare(rows of each run, flags): lines of the outcome.  A row: id, attribute, gold value, answer."""
    def call(*runs, flags=(), code=0):
        folders = [tmp_path / f"run{number}" for number in range(len(runs))]
        for folder, rows in zip(folders, runs):
            products = [Product(id, "", "", "", attribute, gold) for id, attribute, gold, _ in rows]
            write_json(folder / "metrics.json", score(products, [answer for *_, answer in rows]))
            write_tsv(folder / "predictions.tsv", [
                [id, "", "", "", attribute, gold, answer, "0.5", "", ""]
                for id, attribute, gold, answer in rows], PREDICTED)
        done = command("-m tools.compare", [*folders, *flags], tmp_path)
        assert held(done) is None and done.code == code, done.err
        return (done.err if code else done.out).replace(f"{tmp_path}/", "").splitlines()
    return call


def answered(right, n=10):
    """Rows of n products, of which those with these numbers are right."""
    return [(f"B{i}", "Heel", "Flat", "Flat" if i in right else "High") for i in range(n)]


def test_the_difference_by_hand(compare):
    """Of 10 products 3 are gained, 1 is lost: squares 4 - 2² / 10, and 2 more; 196 sqrt(5.6) / 10 = 46.38."""
    lines = compare(answered({0, 1}), answered({1, 2, 3, 4}), answered({0, 1}))
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["run0", "20.00", "20.00"], ["run1", "40.00", "40.00"], ["run2", "20.00", "20.00"]]
    assert [line[-30:].strip() for line in lines[2:4]] == [
        "+20.00 (-26.38 to +66.38)", "+0.00 (-27.72 to +27.72)"]
    assert lines[4].startswith("n = 10;") and lines[6].startswith("different answers: 4;")


def test_questions_on_one_product_count_together(compare):
    """Of 2 products with 2 questions one gains both: squares 4 - 2² / 2, and 2 more; 196 sqrt(4) / 4 = 98."""
    wrong = [(id, attribute, "a", "b") for id in "AB" for attribute in ("Heel", "Toe")]
    lines = compare(wrong, [(*row[:3], "a") if row[0] == "A" else row for row in wrong])
    assert lines[2].endswith("  +50.00 (-48.00 to +148.00)")


def test_products_with_different_answers(compare):
    """First those that one run has right; 20 of them, or all."""
    first = answered(set(), 30)
    other = [(*row[:3], "\x1b[2J" if row[0] < "B2" else "Flat") for row in first]
    lines = compare(first, other)[6:]
    assert [line.split() for line in lines[:2]] == [
        ["id", "attribute", "gold", "run0", "run1"], ["B2", "Heel", "Flat", "High", "Flat"]]
    assert len(lines) == 21 and lines[-1].split()[3:] == ["High", "\\x1b[2J"]
    assert len(compare(first, other, flags=["--all"])[6:]) == 31


def test_runs_of_other_products_are_not_compared(compare):
    rows = answered({1})
    for other in (rows[:9], [*rows[:9], ("B9", "Toe", "Flat", "")], [*rows[:9], ("B9", "Heel", "High", "")]):
        [said] = compare(rows, other, code=2)
        assert "error: run1: its" in said and "products or their gold values are not the 10 of run0" in said
