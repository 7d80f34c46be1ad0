"""Free beside constrained answers, and Table 4: what their commands count, by hand."""

import csv

import pytest

from data import Product
from experiments import constrained, table_4
from support.answering import Answer
from support.config import Sources


def products(*values, attribute="Shape"):
    return [Product(f"P{i}", f"{i}.jpg", "Jewelry", "a title", attribute, value) for i, value in enumerate(values)]


def test_a_threshold_of_val_is_used_on_test():
    """Val: 30 answers of 0.9 are right, 10 of 0.5 are wrong, so 90 % precision reach down to 0.9.  Test: 2 of its 3 answers above
    that are right, and one below and an empty one are left out."""
    val = products(*["Heart"] * 40)
    val_found = [Answer("Heart", 0.9)] * 30 + [Answer("Round", 0.5)] * 10
    test = products(*["Heart"] * 5)
    found = [Answer("Heart", 0.95), Answer("Heart", 0.9), Answer("Round", 0.92), Answer("Heart", 0.6), Answer("", 0.99)]
    assert constrained.at_threshold(val, val_found, test, found) == "60.0 / 66.7 %"
    assert constrained.at_threshold(val, [Answer("Round", 0.9)] * 40, test, found) == "none"
    assert constrained.best_coverage(test, found[:2] + found[3:]) == "60.0 %"             # 3 of 5


def test_the_data_set_without_an_attribute(tmp_path):
    """Its train and val do not have the attribute, its test has nothing else."""
    both = [*products("Heart", "Round"), *products("Wool", attribute="Material")]
    table_4.without_attribute(tmp_path / "new", Sources(tmp_path / "data", tmp_path, None), "general", "Shape",
                              {"train": both, "val": both, "test": both})
    for split, ids in (("train", ["P0"]), ("val", ["P0"]), ("test", ["P0", "P1"])):
        with open(tmp_path / "new" / "general" / f"{split}.tsv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, dialect="excel-tab"))
        assert [row["id"] for row in rows] == ids
        assert {row["attribute_names"] for row in rows} == {"Shape" if split == "test" else "Material"}


def test_table_4_scores_free_and_constrained_answers_and_guessing(monkeypatch):
    some, values = products("Heart", "Round", "Star", "Oval"), {"Shape": ["Heart", "Round", "Star", "Oval"]}
    free, chosen = ["Heart", "Rund", "", "Oval"], ["Heart", "Round", "Heart", "Oval"]
    monkeypatch.setattr(table_4, "prepare_photos", lambda run, products: None)
    monkeypatch.setattr(table_4, "answers", lambda run, products, values=None: [Answer(v, 0.5) for v in (chosen if values else free)])
    f1_free, f1_chosen, guessing, in_list = table_4.measure(None, some, values)
    assert f1_free == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))      # 2 of 3 answers and of 4 products
    assert (f1_chosen, guessing, in_list) == (75, 25, 75)
