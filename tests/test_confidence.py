"""Known values and how far an answer's probability can be trusted: the arithmetic, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import randomize

from data import Product, base_question, encode_answer, encode_examples
from eiven import EIVEN
from support import answering, confidence
from support.answering import Answer, likeliest, score_values
from support.run import Run


def test_calibration_error_by_hand():
    """[0.9, 1]: 1, right, gap 0.  [0.8, 0.9): twice 0.8, one right, gap 0.3.  [0, 0.1): 0, wrong, gap 0.

    2 * 0.3 / 4 = 0.15.  A bin holds its lower edge, and the last one both.
    """
    error, bins = confidence.calibration_error([(1.0, True), (0.8, True), (0.8, False), (0.0, False)])
    assert error == pytest.approx(15.0)
    assert [tuple(b.values()) for b in bins] == [(0.0, 1, 0, 0), (0.8, 2, 80, 50), (0.9, 1, 100, 100)]
    assert confidence.calibration_error([]) == (0.0, [])


def test_coverage_by_hand():
    """Five products, one of them unanswered; two answers of the same confidence are given together."""
    curve = confidence.coverage_curve([(0.5, False), (0.90004, True), (0.9, False), (0.2, True)], 5)
    assert tuple(curve[1].values()) == (0.5, 3, 60.0, pytest.approx(100 / 3))
    assert [point["min_confidence"] for point in curve] == [0.9, 0.5, 0.2]


def test_the_temperature_by_hand():
    """Two values whose log-probabilities differ by 2; the likelier is right 3 times of 4.

    1 / (1 + exp(-2 / T)) = 3/4 at T = 2 / ln 3.  A product with one value changes nothing.
    """
    T = 2 / math.log(3)
    log_probs = [*[[-1.0, -3.0]] * 4, [-2.0]]
    assert likeliest(["a", "b"], log_probs[0], T)[:4] == ("a", pytest.approx(0.75), "b", pytest.approx(0.25))
    assert confidence.fit_temperature(log_probs, [0, 0, 1, 0, 0]) == pytest.approx(T, rel=0.01)
    # All are right, and the less likely is right as often: the ends of what is tried.
    assert confidence.fit_temperature(log_probs, [0, 0, 0, 0, 0]) == 0.05
    assert confidence.fit_temperature(log_probs, [0, 1, 0, 1, 0]) == 20


@pytest.fixture
def measured(tmp_path):
    """A function: lines on n products; the answers have confidence 0.9, and 2 in 3 are right."""
    run = Run(tmp_path, "id", None, {"Heel": ["Flat"]}, None, None, None)

    def measure(n, values, fit):
        products = [Product(str(i), "", "", "", "Heel", "Flat" if i % 3 else "Wedge") for i in range(n)]
        answers = [likeliest(["High", "Flat"], [math.log(0.1), math.log(0.9)])] * n
        if values and fit:
            answers = confidence.calibrate(run, products, answers, values)
        metrics = confidence.measure(run, products, answers, values, fit)
        return "\n".join(confidence.lines(run, {**metrics, "split": "part", "n": n, "min_confidence": 0.0}))

    return measure


def test_a_threshold_is_chosen_only_where_that_is_allowed_and_rests_on_30_answers(measured, monkeypatch):
    assert "precision" not in measured(45, None, False)
    assert "no confidence gives 30 answers or more of 95 % precision (part, n = 4" in measured(45, None, True)
    monkeypatch.setattr(confidence, "PRECISION", 60)
    assert "no confidence gives 30 answers" in measured(29, None, True)
    assert "confidence 0.9000 or more (--min-confidence), which covers 100.0 % (part: 30 of 30 products)" in (
        measured(30, None, True))


def test_calibrated_answers(measured):
    """Odds of 9 where 2 of 3 are right: T = ln 9 / ln 2 = 3.17.  What cannot be trusted says so."""
    values = {"Heel": ["Wedge", "Flat"]}
    assert "not calibrated (temperature 1); to calibrate them" in measured(45, values, False)
    text = measured(45, values, True)
    assert "temperature 3.1" in text and "trust" not in text
    assert "%; at temperature 1: 23.3 % (part, n = 45, 10 bins)" in text
    assert "do not trust it" in measured(19, values, True)
    assert "0.05, fitted on val (n = 30, 2 values); do not" in measured(45, {"Heel": ["High", "Flat"]}, True)
    assert "1.00, fitted on val (n = 0, 2 values); do not" in measured(45, {"Heel": ["High", "Mid"]}, True)


def test_answers_outside_the_known_values_are_counted():
    answers = [Answer(value, 0.5) for value in ("Flats", "Flat", "", "High", "High")]
    products = [Product("1", "", "", "", "Heel", "Flat")] * 5
    metrics = confidence.measure(SimpleNamespace(values={"Heel": ["Flat"]}), products, answers, None, False)
    assert metrics["outside"] == {"Heel: 'High'": 2, "Heel: 'Flats'": 1}
    assert confidence.outside_text({"n": 5, **metrics}, 1) == "3 of 5 (60.0 %); Heel: 'High' (2)"


ALIKE = ["Mint", "Mints", "Mint Green", "M", "Ankle Boot", "Ankle Bootie", "Ankle", "ü", "a " * 40 + "b"]


@torch.no_grad()
@pytest.mark.parametrize("pairs", [128, 5, 1])
def test_values_that_begin_alike_get_their_own_probabilities(tiny, monkeypatch, pairs):
    """Those of each value alone, however many are scored at once."""
    monkeypatch.setattr(answering, "SCORE_VALUES", pairs)
    model = randomize(EIVEN(*tiny, 24))
    questions = [base_question(Product(id, id, "Shoes", "black shoe", "Style", "")) for id in "12"]
    batch, _ = encode_examples(questions, model.tokenizer)
    cls_tokens = torch.randn(2, 2, 24)
    for example, log_probs in zip(batch, score_values(model, batch, [ALIKE] * 2, cls_tokens), strict=True):
        for value, log_p in zip(ALIKE, log_probs, strict=True):
            R = encode_answer(value, model.tokenizer)
            [alone] = model.score([example._replace(answer=R)], cls_tokens)
            assert log_p == pytest.approx(alone, abs=1e-3)
