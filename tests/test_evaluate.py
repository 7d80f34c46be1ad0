"""Scores worked out by hand, and what evaluation writes."""

import csv
import json
import re
import time

import pytest
from PIL import Image

from data import Product
from evaluate import exact_match, micro_f1, score, table, write_results
from support import report
from support.answering import Answer
from support.report import confusion_files, confusion_png, report_html


@pytest.mark.parametrize("prediction, right", [
    ("Short Sleeve", True), (" Short Sleeve ", True), ("Short Sleeve\n", True),
    ("short sleeve", False), ("Short  Sleeve", False), ("Short Sleeves", False), ("Short Sleeve.", False),
    ("It is Short Sleeve", False), ("", False), ("  ", False),
])
def test_exact_match(prediction, right):
    assert exact_match(prediction, "Short Sleeve") is right


def test_micro_f1_by_hand():
    """10 products: 4 right, 2 of the other 6 are empty, 1 has another case, 1 contains its value.

    precision = 4 / 8, recall = 4 / 10, F1 = 2 * 0.5 * 0.4 / 0.9; the substring scorer counts 6.
    """
    pairs = [("Flat", "Flat"), (" Flat", "Flat"), ("Wedge\n", "Wedge"), ("Mid Heel ", "Mid Heel"),
             ("", "Flat"), ("   ", "Wedge"), ("flat", "Flat"), ("a Flat heel", "Flat"), ("Wedge", "Flat"), ("Flat", "Wedge")]
    m = micro_f1(pairs)
    assert (m["right"], m["answered"], m["n"]) == (4, 8, 10)
    assert (m["precision"], m["recall"]) == (50.0, 40.0)
    assert m["micro_f1"] == pytest.approx(100 * 0.4 / 0.9)
    assert m["implicitave"] == pytest.approx(60.0)


@pytest.mark.parametrize("pairs, f1", [([], 0), ([("", "Flat")], 0), ([("x", "Flat")], 0), ([("Flat", "Flat")], 100)])
def test_micro_f1_at_the_ends(pairs, f1):
    assert micro_f1(pairs)["micro_f1"] == f1


def products_and_answers():
    """Heel Height: 1 of 2 right; Toe Style: 1 of 1 right, so micro is 2/3 where the mean of the two is 3/4."""
    products = [Product("1", "1.jpg", "Shoes", "a <b>", "Heel Height", "Flat"),
                Product("2", "2.jpg", "Shoes", "b", "Heel Height", "High Heel"),
                Product("3", "3.jpg", "Shoes", 'c "quoted"', "Toe Style", "Open Toe")]
    return products, [Answer("Flat", 0.9), Answer("Flats & more", 0.2), Answer("Open Toe", 1.0)]


def test_scores_are_micro_over_all_and_per_attribute():
    products, answers = products_and_answers()
    metrics = score(products, [a.value for a in answers])
    assert metrics["micro_f1"] == pytest.approx(200 / 3) and metrics["n"] == 3
    assert metrics["attributes"]["Heel Height"]["micro_f1"] == 50.0 and metrics["attributes"]["Heel Height"]["n"] == 2
    assert metrics["attributes"]["Toe Style"]["micro_f1"] == 100.0
    last = table(metrics).splitlines()[-1].split()
    assert last == ["all", "(micro)", "66.67", "66.67", "66.67", "3"]


def test_what_is_written(tmp_path):
    products, answers = products_and_answers()
    metrics = score(products, [a.value for a in answers])
    metrics.update(sources="test", temperature=0.1, top_p=0.75, constrained=False, merged=False, seconds=1.0)
    write_results(tmp_path, "a title", products, answers, metrics)
    assert json.loads((tmp_path / "metrics.json").read_text())["attributes"]["Toe Style"]["n"] == 1
    with open(tmp_path / "predictions.tsv", newline="") as file:
        lines = list(csv.DictReader(file, dialect="excel-tab"))
    assert [line["prediction"] for line in lines] == ["Flat", "Flats & more", "Open Toe"]
    assert lines[2]["texts"] == 'c "quoted"' and lines[1]["probability"] == "0.2000"
    expected = confusion_png("Heel Height: a title", {("Flat", "Flat"): 1, ("High Heel", "Flats & more"): 1})
    assert Image.open(tmp_path / "confusion-heel-height.png").tobytes() == expected.tobytes()      # gold values are the rows
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;b&gt;" in page and "Flats &amp; more" in page and "<b>," not in page
    assert "2 of 3 answers are right (67 %)" in page and "Weakest attribute: Heel Height (50 %)" in page
    assert "<svg" not in page                           # no losses, no curve
    assert not list(tmp_path.glob(".*partial"))


def test_a_confusion_matrix_shows_counts_where_they_belong():
    """Gold A: 3 right and 1 as B; gold B: 1 answer that is no value.  Cells are blue by their share of the row."""
    image = confusion_png("t", {("A", "A"): 3, ("A", "B"): 1, ("B", "no value"): 1})
    cell = 44
    left, top = image.width - 24 - 3 * cell, image.height - 44 - 2 * cell
    corner = {(i, j): image.getpixel((left + j * cell + 4, top + i * cell + 4)) for i in range(2) for j in range(3)}
    assert corner[0, 2] == corner[1, 0] == corner[1, 1] == (255, 255, 255)
    assert corner[1, 2] == (20, 70, 150)                # all of B under (other)
    assert corner[1, 2][0] < corner[0, 0][0] < corner[0, 1][0] < 255


def test_a_large_matrix_shows_the_most_confused_values(tmp_path):
    """100 values with 10 products each, all right, but for v000: 9 of its answers are v099, and 1 is no value.

    v000 and v099 are in the most mistakes and so in the picture; the 58 others are the first by name.
    """
    values = [f"v{i:03}" for i in range(100)]
    counts = {(v, v): 10 for v in values[1:]} | {("v000", "v099"): 9, ("v000", "no value"): 1}
    image = confusion_png("t", counts)
    cell = 44
    left, top = image.width - 24 - 61 * cell, image.height - 44 - 60 * cell

    def shade(i, j):
        return image.getpixel((left + j * cell + 4, top + i * cell + 4))

    assert shade(0, 0) == (255, 255, 255) and shade(1, 1) == shade(58, 58) == shade(59, 59) == (20, 70, 150)
    assert shade(0, 59) == (44, 88, 160)                # v099: 9 of 10, 0.9 of the way from white to blue
    assert shade(0, 60) == (232, 236, 244)              # (other): 1 of 10
    products = [Product(str(i), "", "", "t", "A", gold) for i, (gold, _) in enumerate(counts)]
    answers = [Answer(answer, 1.0) for _, answer in counts]
    metrics = score(products, [a.value for a in answers])
    metrics.update(sources="test", temperature=0.1, top_p=0.75, constrained=False, merged=False, seconds=1.0)
    write_results(tmp_path, "a title", products, answers, metrics)
    with open(tmp_path / "confusion-a.tsv", newline="") as file:
        lines = [(line["gold"], line["answer"], int(line["count"])) for line in csv.DictReader(file, dialect="excel-tab")]
    assert sorted(lines) == sorted((gold, answer, 1) for gold, answer in counts)


def test_a_matrix_of_thousands_of_values_is_quick():
    counts = {(f"value {i}", f"value {i * 7 % 5000}"): 1 + i % 3 for i in range(5000)}
    start = time.process_time()
    image = confusion_png("t", counts)
    assert time.process_time() - start < 2 and max(image.size) < 4000


def test_a_value_may_be_long_or_called_other():
    image = confusion_png("t", {("x" * 5000, "(other)"): 1, ("(other)", "(other)"): 1, ("a", "b"): 1})
    assert max(image.size) < 1000                       # 3 values and a column for b
    assert image.width - 24 - 4 * 44 == image.height - 44 - 3 * 44 - 40


def test_each_attribute_has_a_file_of_its_own():
    assert list(confusion_files(["Boot Style", "Ärmel 2"]).values()) == ["confusion-boot-style.png", "confusion-ärmel-2.png"]
    alike = ["A/B", "A-B", "a b", "x" * 300, "x" * 299 + "y", "质" * 100, "..", "/", ""]
    names = confusion_files(alike).values()
    assert len(set(names)) == len(alike)
    assert all(len(name.encode()) < 200 and "/" not in name and name.startswith("confusion-") for name in names)


def test_what_cannot_be_drawn_costs_no_scores(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise ValueError("no font")

    monkeypatch.setattr(report, "confusion_png", broken)
    products, answers = products_and_answers()
    metrics = score(products, [a.value for a in answers])
    metrics.update(sources="test", temperature=0.1, top_p=0.75, constrained=False, merged=False, seconds=1.0)
    write_results(tmp_path, "a title", products, answers, metrics)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "predictions.tsv", "report.html"}
    assert "confusion-heel-height.png was not drawn: ValueError('no font')" in capsys.readouterr().err


def test_the_report_shows_the_most_confident_mistake_first_and_the_learning_curve():
    products = [Product(str(i), "", "", f"title {i}", "Heel Height", "Flat") for i in range(3)]
    answers = [Answer("Wedge", 0.2), Answer("Flat", 0.9), Answer("High Heel", 0.7)]
    metrics = score(products, [a.value for a in answers])
    metrics.update(sources="test", temperature=0.1, top_p=0.75, constrained=False, merged=False, seconds=1.0)
    page = report_html("a title", products, answers, metrics, losses=[4.0, 2.0, 0.0])
    assert page.index("High Heel</b>") < page.index("Wedge</b>") < page.index("Flat</b>")
    thin, thick = re.findall(r"points='([^']*)'", page)
    assert thin == "48.0,12.0 339.0,101.0 630.0,190.0"   # the highest loss at the top, 0 at the bottom
    assert thick == thin                                # so few steps are not smoothed
