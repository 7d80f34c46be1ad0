"""Runs side by side: differences and intervals by hand, and what is not compared."""

import pytest
from conftest import command, held

from base.console import write_json
from base.tsv import write_tsv
from support.answering import PREDICTED


@pytest.fixture
def compare(tmp_path):
    """compare(rows of each run): lines of the outcome.  A row: id, attribute, gold value, answer."""
    def call(*runs, code=0):
        folders = [tmp_path / f"run{number}" for number in range(len(runs))]
        for number, (folder, rows) in enumerate(zip(folders, runs)):
            scores = {"micro_f1": number}
            write_json(folder / "metrics.json", scores | {"attributes": {"Heel": scores}})
            write_tsv(folder / "predictions.tsv", [
                [id, "", "", "", attribute, gold, answer, "0.5", "", ""]
                for id, attribute, gold, answer in rows], PREDICTED)
        done = command("-m tools.compare", folders, tmp_path)
        assert held(done) is None and done.code == code, done.err
        return (done.err if code else done.out).replace(f"{tmp_path}/", "").splitlines()
    return call


def answered(right):
    """Rows of 10 products, of which those with these numbers are right."""
    return [(f"B{i}", "Heel", "Flat", "Flat" if i in right else "\x1b[2J") for i in range(10)]


def test_the_difference_by_hand(compare):
    """Of 10 products 3 are gained, 1 is lost: squares 4 - 2² / 10, and 2 more; 196 sqrt(5.6) / 10 = 46.38."""
    lines = compare(answered({0, 1}), answered({1, 2, 3, 4}), answered({0, 1}))
    assert [line.split() for line in lines[:2]] == [["id", "attribute", "gold", "run0", "run1", "run2"],
                                                    ["B0", "Heel", "Flat", "Flat", "\\x1b[2J", "Flat"]]
    assert lines[5] == "different answers: 4" and lines[-1].startswith("n = 10;")
    assert [line.split(maxsplit=3) for line in lines[8:-1]] == [
        ["run0", "0.00", "0.00"], ["run1", "1.00", "1.00", "+20.00 (-26.38 to +66.38)"],
        ["run2", "2.00", "2.00", "+0.00 (-27.72 to +27.72)"]]


def test_questions_on_one_product_count_together(compare):
    """Of 2 products with 2 questions one gains both: squares 4 - 2² / 2, and 2 more; 196 sqrt(4) / 4 = 98."""
    wrong = [(id, attribute, "a", "b") for id in "AB" for attribute in ("Heel", "Toe")]
    lines = compare(wrong, [(*row[:3], "a") if row[0] == "A" else row for row in wrong])
    assert lines[-2].endswith("  +50.00 (-48.00 to +148.00)")


def test_runs_of_other_products_are_not_compared(compare):
    rows = answered({1})
    for other in rows[:9], [*rows[:9], ("B9", "Toe", "Flat", "")], [*rows[:9], ("B9", "Heel", "High", "")]:
        [said] = compare(rows, other, code=2)
        assert "products or their gold values are not the 10 of run0" in said
