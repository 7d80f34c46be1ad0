"""Known values and how far an answer's probability can be trusted: the arithmetic, by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import randomize

from base.console import UserError
from data import Product, base_question, encode_answer, encode_examples
from demo import world
from eiven import EIVEN
from experiments.plain import answer_log_probs
from llama import load_llama
from support import answering
from support.answering import Answer, likeliest, score_values
from support.confidence import calibration_error, coverage_curve, fit_temperature, summary, threshold
from support.report import coverage_diagram, reliability_diagram
from support.values import hold_out, outside, read_values, without

# ------------------------------------------------------------------------------------------------ by hand


def test_calibration_error_by_hand():
    """[0.9, 1]: 0.95 and right, gap 0.05.  [0.8, 0.9): twice 0.85, one right, gap 0.35.  [0, 0.1): 0.05 and wrong, gap 0.05.
    (1 * 0.05 + 2 * 0.35 + 1 * 0.05) / 4 = 0.2."""
    error, bins = calibration_error([0.95, 0.85, 0.85, 0.05], [True, True, False, False])
    assert error == pytest.approx(20.0)
    assert [b["n"] for b in bins] == [1, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert (bins[8]["confidence"], bins[8]["accuracy"]) == (pytest.approx(85.0), 50.0) and bins[1]["accuracy"] is None
    assert calibration_error([1.0, 0.5, 0.5], [True, True, False])[0] == 0.0
    assert calibration_error([], [])[0] == 0.0


def test_a_bin_holds_its_lower_edge_and_the_last_one_both():
    _, bins = calibration_error([0.0, 0.1, 0.3, 0.6, 0.7, 0.9, 1.0], [True] * 7)
    assert [b["n"] for b in bins] == [1, 1, 0, 1, 0, 0, 1, 1, 0, 2]


def test_coverage_by_hand():
    """Five products, one of them unanswered; two answers of the same confidence are given together."""
    curve = coverage_curve([0.5, 0.90004, 0.9, 0.2], [False, True, False, True], 5)
    assert curve == [{"min_confidence": 0.9, "coverage": 40.0, "accuracy": 50.0},
                     {"min_confidence": 0.5, "coverage": 60.0, "accuracy": pytest.approx(100 / 3)},
                     {"min_confidence": 0.2, "coverage": 80.0, "accuracy": 50.0}]
    assert threshold(curve, 50)["min_confidence"] == 0.2 and threshold(curve, 51) is None


def test_a_threshold_typed_as_it_is_printed_gives_the_coverage_that_was_promised():
    draw = np.random.default_rng(0)
    confidence, right = draw.random(300) ** 0.3, draw.random(300) < 0.8
    for point in coverage_curve(confidence, right, 300):
        given = [r for p, r in zip(confidence, right) if p >= float(f"{point['min_confidence']:.4f}")]
        assert (100 * len(given) / 300, 100 * sum(given) / len(given)) == pytest.approx((point["coverage"], point["accuracy"]))


def test_a_threshold_rests_on_30_answers_or_more():
    """29 right answers are too few.  Of 40, 30 with a wrong one among them have 97 %."""
    few = summary([0.9] * 29 + [0.1] * 11, [True] * 29 + [False] * 11, 40, choose=True)
    assert few["thresholds"]["95"] is None
    enough = summary([0.9] * 30 + [0.1] * 10, [True] * 29 + [False] * 11, 40, choose=True)
    assert enough["thresholds"]["95"]["coverage"] == 75.0 and enough["thresholds"]["99"] is None


def test_thresholds_are_chosen_only_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr("support.confidence.LEAST", 1)
    found = summary([0.9, 0.8, 0.3], [True, True, False], 3, choose=True)
    assert found["thresholds"]["95"] == {"min_confidence": 0.8, "coverage": pytest.approx(200 / 3), "accuracy": 100.0}
    assert "thresholds" not in summary([0.9, 0.8, 0.3], [True, True, False], 3, choose=False)
    assert summary([], [], 3, choose=True)["thresholds"] == {"90": None, "95": None, "99": None}


def test_the_temperature_by_hand():
    """Two values whose log-probabilities differ by 2; the likelier is right 3 times of 4.

    1 / (1 + exp(-2 / T)) = 3/4 at T = 2 / ln 3.
    """
    log_probs = [[-1.0, -3.0]] * 4
    assert fit_temperature(log_probs, [0, 0, 1, 0]) == pytest.approx(2 / math.log(3), rel=1e-6)
    # The range ends at 0.05 (all are right) and 20 (the less likely is right as often).
    assert fit_temperature(log_probs, [0] * 4) == pytest.approx(0.05)
    assert fit_temperature(log_probs, [0, 1] * 2) == pytest.approx(20)


def test_the_temperature_has_the_lowest_loss_of_all():
    """Lists of different lengths, against torch's own log_softmax on a grid."""
    draw = np.random.default_rng(1)
    log_probs = [(-3 * draw.random(n)).tolist() for n in (2, 3, 7, 4, 5, 1, 3, 2, 6)]
    gold = [max(range(len(lp)), key=lp.__getitem__) if i % 2 else draw.integers(len(lp)) for i, lp in enumerate(log_probs)]

    def loss(T):
        return -sum((torch.tensor(lp, dtype=torch.float64) / T).log_softmax(0)[g].item() for lp, g in zip(log_probs, gold))

    fitted = fit_temperature(log_probs, gold)
    assert 0.06 < fitted < 19 and loss(fitted) <= min(loss(T) for T in np.geomspace(0.05, 20, 2000)) + 1e-9


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_a_temperature_changes_probabilities_and_no_answer(temperature):
    log_probs = [-9.0, -2.0, -2.5, -800.0]
    answer = likeliest(["a", "b", "c", "d"], log_probs, temperature)
    assert (answer.value, answer.runner_up) == ("b", "c")
    p = (torch.tensor(log_probs, dtype=torch.float64) / temperature).softmax(0).tolist()
    assert (answer.probability, answer.runner_up_probability) == (pytest.approx(p[1]), pytest.approx(p[2]))
    assert likeliest(["a", "b", "c"], [-2000.0, -1.0, -1000.0], temperature).runner_up == "c"       # both weights are 0


def test_answers_outside_the_known_values_are_counted():
    products = [Product(str(i), "", "", "", "Heel Height", "Flat") for i in range(5)]
    answers = [Answer(v, 0.5) for v in ("Flats", "Flat", "", "Flats", "High")]
    assert outside(products, answers, {"Heel Height": ["Flat", "Wedge"]}) == {"Heel Height": {"Flats": 2, "High": 1}}


# ------------------------------------------------------------------------------------------------ lists of values


def test_a_file_of_values(tmp_path):
    path = tmp_path / "values.tsv"
    path.write_text("Boot Style\tChelsea\nHeel Height\t  High   Heel \n\nBoot Style\tRain Boots\nBoot Style\tChelsea\n",
                    encoding="utf-8-sig")
    assert read_values(path) == {"Boot Style": ["Chelsea", "Rain Boots"], "Heel Height": ["High Heel"]}


@pytest.mark.parametrize("content, said", [
    (b"Boot Style\tChelsea\nBoot Style Combat\n", "line 2: 'Boot Style Combat' should be an attribute, one tab and a value"),
    (b"Boot Style\t\n", "line 1: 'Boot Style.*' should be"), (b"a\tb\tc\n", r"line 1: 'a\\tb\\tc' should be"),
    (b"", "is an empty file"), (b"a" * 200, "line 1: 'a{80}' should be"),
    (b"\n\t\n", "holds no values"), (b"a\t\xff\n", "not UTF-8"), (b'a\t"b\n', "line 1: is not a readable TSV"),
])
def test_a_broken_file_of_values_is_named_with_its_line(tmp_path, content, said):
    (tmp_path / "values.tsv").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_values(tmp_path / "values.tsv")
    assert "values.tsv" in str(error.value) and "\n" not in str(error.value)


def test_values_are_held_out_by_seed_and_two_always_stay():
    values = {"A": list("abcdefgh"), "B": list("xyz"), "C": ["one", "two"]}
    held_out = hold_out(values, 3, seed=0)
    assert {a: len(v) for a, v in held_out.items()} == {"A": 3, "B": 1}
    assert held_out == hold_out(values, 3, seed=0) and len({str(hold_out(values, 3, seed)) for seed in range(5)}) > 1
    assert set(hold_out(values, 2, 0)["A"]) < set(held_out["A"]) < set(values["A"])
    assert hold_out(values, 0, 0) == {}
    with pytest.raises(UserError, match="--holdout-values 1: each attribute .* has two values or fewer"):
        hold_out({"C": ["one", "two"]}, 1, 0)
    products = [Product("1", "", "", "", "A", held_out["A"][0]), Product("2", "", "", "", "B", held_out["A"][0])]
    assert without(products, held_out) == products[1:]          # a value is held out of its own attribute


# ------------------------------------------------------------------------------------------------ scored values

ALIKE = ["Mint", "Mints", "Mint Green", "M", "Ankle Boot", "Ankle Bootie", "Ankle Boots", "Ankle", "Boot", "ü", "a " * 40 + "b"]


def alone(model, example, values, cls_tokens):
    """The distribution over values by brute force: each value alone, through the plain model."""
    answers = [encode_answer(v, model.tokenizer) for v in values]
    log_p = [answer_log_probs(model, example._replace(answer=R), cls_tokens).sum() for R in answers]
    return torch.stack(log_p).softmax(0).tolist()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [8192, 60, 1])
def test_values_that_begin_alike_get_their_own_probabilities(tiny, monkeypatch, tokens):
    """Within 1e-5 of each value alone, however many are scored at once."""
    monkeypatch.setattr(answering, "SCORE_TOKENS", tokens)
    model = randomize(EIVEN(*tiny, 24))
    products = [Product("1", "1.jpg", "Shoes", "black shoe", "Boot Style", ""), Product("2", "2.jpg", "", "a", "Pattern", "")]
    batch, _ = encode_examples([base_question(p) for p in products], model.tokenizer)
    cls_tokens = torch.randn(2, 2, 24, generator=torch.Generator().manual_seed(0))
    found = score_values(model, batch, [ALIKE, ALIKE[:3]], cls_tokens)
    for example, values, log_probs in zip(batch, [ALIKE, ALIKE[:3]], found, strict=True):
        assert torch.tensor(log_probs).softmax(0).tolist() == pytest.approx(alone(model, example, values, cls_tokens), abs=1e-5)


@torch.no_grad()
def test_the_same_with_the_demo_worlds_weights():
    model = EIVEN(*load_llama(world.LLAMA, torch.float32), 64)
    draw = torch.Generator().manual_seed(0)
    for p in model.trainable_parameters().values():
        p += 0.05 * torch.randn(p.shape, generator=draw)
    product = Product("1", "1.jpg", "Bags", "Norvik Soft Tote for a sailor", "Pattern", "")
    batch, _ = encode_examples([base_question(product)], model.tokenizer)
    cls_tokens = torch.randn(1, 4, 64, generator=draw)
    for values in (list(world.VALUES["Pattern"]), ALIKE):
        [log_probs] = score_values(model, batch, [values], cls_tokens)
        assert torch.tensor(log_probs).softmax(0).tolist() == pytest.approx(alone(model, batch[0], values, cls_tokens), abs=1e-5)


@torch.no_grad()
def test_many_values_are_scored_in_parts(tiny, monkeypatch):
    """400 values for each of 8 products: no forward pass has more tokens than the bound."""
    model, seen = randomize(EIVEN(*tiny, None)), []
    score = model.score

    def counted(examples, candidates, cls_tokens):
        seen.append(sum(len(e.prompt) + len(R) for e, several in zip(examples, candidates) for R in several))
        return score(examples, candidates, cls_tokens)

    monkeypatch.setattr(model, "score", counted)
    products = [Product(str(i), "", "", f"shoe {i}", "Boot Style", "") for i in range(8)]
    batch, _ = encode_examples([base_question(p) for p in products], model.tokenizer, image=False)
    found = score_values(model, batch, [[f"Boots {k}" for k in range(400)]] * 8, None)
    assert [len(log_probs) for log_probs in found] == [400] * 8
    assert max(seen) <= answering.SCORE_TOKENS < sum(seen)


# ------------------------------------------------------------------------------------------------ diagrams


def test_diagrams_by_hand():
    """Accuracy 50 % is half of the height 188, and so is a coverage of 50 % of the width 340."""
    _, bins = calibration_error([0.85, 0.85], [True, False])
    page = reliability_diagram(bins)
    assert page.count("<rect") == 1 and "<rect x='322' y='106.0' width='30' height='94.0' fill='#0072B2'/>" in page
    assert "y1='40.2' y2='40.2' stroke='#D55E00'" in page         # 200 - 85 % of 188
    page = coverage_diagram([{"coverage": 50.0, "accuracy": 100.0}, {"coverage": 100.0, "accuracy": 50.0}])
    assert "points='218.0,12.0 388.0,106.0'" in page
