"""The figures show what they are given: points at their height, products that differ, counts of both matrices."""

import json

import pytest
from PIL import Image

from data import Product
from experiments import figures


@pytest.fixture
def runs(tmp_path):
    for row, f1 in (("full", 80.0), ("no-lbc-twice", 40.0)):
        folder = tmp_path / f"general-10-{row}-seed0"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"micro_f1": f1, "n": 1, "merged": False, "constrained": False,
                                                         "temperature": 0.1, "top_p": 0.75}))
    return tmp_path


def test_figure_4_has_each_curve_at_its_height(runs):
    (runs / "general-baselines.json").write_text(json.dumps({"extractive": 10.0, "discriminative": {"10": [60.0]}}))
    image = figures.figure_4(runs, "general", ["10"], [0])
    x, bottom, top = 110, 530 - 180, 40
    colours = {f1: image.getpixel((x, round(bottom - (bottom - top) * f1 / 100))) for f1 in (80, 60, 40, 32.27, 10, 50)}
    assert ["#%02X%02X%02X" % colours[f1] for f1 in (80, 60, 40, 32.27, 10)] == [
        figures.BLUE, figures.PINK, figures.GREEN, figures.GREY, figures.BLACK]
    assert colours[50] not in {colours[f1] for f1 in (80, 60, 40, 32.27, 10)}


def test_figures_5_and_6_compare_the_two_runs(monkeypatch):
    products = [Product(f"P{i}", "", "", f"title {i}", "Pattern", "Plaid") for i in range(4)]
    same, other = ({(p.id, "Pattern"): said for p, said in zip(products, answers)} for answers in (
        ["Plaid", "Plaid", "Floral", ""], ["Plaid", "Floral", "Floral", "Plaid"]))
    cards, matrices = [], []
    monkeypatch.setattr(figures, "card", lambda product, photo, lines: cards.append((product.id, lines)) or photo)
    figures.figure_5(products, lambda product: Image.new("RGB", (300, 40)), same, other)
    assert [name for name, _ in cards] == ["P1", "P3"]
    assert [text for text, _ in cards[0][1]] == ["Pattern: Plaid", "with comparisons: Plaid", "without: Floral (wrong)"]
    assert cards[1][1][1] == ("with comparisons: (no answer) (wrong)", figures.ORANGE)
    monkeypatch.setattr(figures, "confusion_png", lambda title, counts: matrices.append(counts) or Image.new("RGB", (300, 40)))
    figures.figure_6(products, "Pattern", same, other)
    assert matrices == [{("Plaid", "Plaid"): 2, ("Plaid", "Floral"): 2},
                        {("Plaid", "Plaid"): 2, ("Plaid", "Floral"): 1, ("Plaid", ""): 1}]
