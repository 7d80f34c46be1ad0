"""Known values, how far an answer's probability can be trusted, and values held out of the training."""

import csv
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import PRODUCTS, command, held, randomize

import evaluate
import train
from base import console
from base.console import UserError
from data import Product, base_question, encode_answer, encode_examples, read_split
from demo import world
from eiven import EIVEN
from experiments.plain import answer_log_probs
from llama import load_llama
from support import answering
from support.answering import Answer, likeliest, score_values
from support.confidence import advice, calibration_error, coverage_curve, fit_temperature, summary, threshold
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


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "4", "--epochs", "8", "--lr", "0.01", "--lbc", "none", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*flags, "--out", str(folder)])
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A run of one's own: evaluation writes into it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def says(monkeypatch, capsys):
    """What a command prints that succeeds."""
    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return "".join(capsys.readouterr())
    return call


@pytest.fixture
def fails(monkeypatch, capsys):
    """A command's last line, where it must end with exit code 2."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            console.run(evaluate.main)
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    return call


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_free_answers_say_how_sure_they_are_and_what_stands_outside_the_list(run, says):
    out = says(run)
    metrics, answers = metrics_of(run), rows(run / "predictions.tsv")
    known = json.loads((run / "config.json").read_text())["values"]
    n = sum(row["prediction"] not in known[row["attribute_names"]] for row in answers if row["prediction"])
    assert f"answers outside the attribute's known values: {n} of 15 ({100 * n / 15:.1f} %); " in out
    assert metrics["outside"]["n"] == n > 0
    assert sum(sum(counts.values()) for counts in metrics["outside"]["answers"].values()) == n
    given = [row for row in answers if row["prediction"]]
    right = [row["prediction"] == row["attribute_values"] for row in given]
    expected, _ = calibration_error([float(row["probability"]) for row in given], right)
    assert metrics["confidence"]["calibration_error"] == pytest.approx(expected, abs=0.01)
    assert f"expected calibration error: {expected:.1f} % (test, n = {len(given)}, 10 bins)" in out
    assert "thresholds" not in metrics["confidence"] and "--min-confidence" not in out         # nothing is chosen on test
    page = (run / "report.html").read_text()
    assert "aria-label='confidence against accuracy'" in page and "aria-label='coverage against accuracy'" in page
    assert "Answers outside the known values" in page


def test_thresholds_come_from_val(run, says):
    out = says(run, "--split", "val")
    found = metrics_of(run / "val")["confidence"]["thresholds"]
    assert set(found) == {"90", "95", "99"}
    assert (f"for 95 % precision answer only with confidence {found['95']['min_confidence']:.4f} or more" if found["95"]
            else "no confidence gives 30 answers or more of 95 % precision") in out and ("of 10 products)" if found["95"] else "(val, n = 10)") in out
    assert advice({"95": {"min_confidence": 0.8, "coverage": 40.0, "accuracy": 96.0}}, 95, "val", 5).endswith(
        "0.8000 or more (--min-confidence), which covers 40.0 % (val: 2 of 5 products)")


def test_a_part_of_val_is_val(run, data_root):
    loaded, products = evaluate.load(run, data_needed=True), read_split(data_root, "shoes", "val")
    answering.prepare_photos(loaded, products)
    metrics = evaluate.evaluate(loaded, products, "val (without a part)", run / "part", loaded.values)
    assert "thresholds" in metrics["confidence"] and loaded.calibration["n"] == 10


def test_the_temperature_is_fitted_on_val_and_used_from_then_on(run, says, data_root):
    assert "not calibrated (temperature 1); to calibrate them: python evaluate.py" in says(run, "--constrain")
    before, at_1 = rows(run / "predictions.tsv"), metrics_of(run)["confidence"]
    says(run, "--constrain", "--split", "val")
    fitted = json.loads((run / "calibration.json").read_text())
    assert (fitted["split"], fitted["n"], fitted["values"]) == ("val", 10, 5) and fitted["temperature"] != 1
    out = says(run, "--constrain")
    after, confidence = rows(run / "predictions.tsv"), metrics_of(run)["confidence"]
    assert f"temperature {fitted['temperature']:.2f}, fitted on val (n = 10, 5 values)" in out
    assert [row["prediction"] for row in before] == [row["prediction"] for row in after]
    assert [row["probability"] for row in before] != [row["probability"] for row in after]
    assert confidence["temperature"] == fitted["temperature"]
    assert confidence["calibration_error_at_1"] == pytest.approx(at_1["calibration_error"])
    assert "outside" not in metrics_of(run)
    # One product, a file of products and Python have the same probability.
    row = after[0]
    image, text = data_root / "images" / row["images"], f"{row['texts']}, {row['category']}"
    out = says(run, "--image", image, "--text", text, "--attribute", row["attribute_names"], "--constrain")
    assert f"{row['prediction']}  (probability {float(row['probability']):.2f})" in out and "fitted on val (n = 10" in out
    says(run, "--input", data_root / "shoes" / "test.tsv", "--output", run / "out.tsv", "--constrain")
    assert (run / "out.tsv").read_bytes() == (run / "predictions.tsv").read_bytes()
    answer = evaluate.load(run).answer(image, text, row["attribute_names"], constrain=True)
    assert (answer.value, f"{answer.probability:.4f}") == (row["prediction"], row["probability"])


def test_free_answers_are_not_touched_by_the_temperature(run, says, trained):
    says(run, "--constrain", "--split", "val")
    says(run)
    assert (run / "predictions.tsv").read_bytes() == (trained / "predictions.tsv").read_bytes()


def test_without_known_gold_values_on_val_the_temperature_is_1(run, says, tmp_path):
    (tmp_path / "values.tsv").write_text("Boot Style\tSandal\nBoot Style\tSlipper\nHeel Height\tSky\n")
    out = says(run, "--split", "val", "--values", tmp_path / "values.tsv")
    assert "not calibrated (temperature 1); val has no products whose gold value is in the list" in out
    assert json.loads((run / "calibration.json").read_text())["temperature"] == 1.0


def test_a_broken_temperature_is_named(run, fails):
    for content, said in (('{"temperature": 0, "n": 3, "values": 2}', "a "), ('{"temperature": "warm", "n": 3, "values": 2}', "a "),
                          ('{"temperature": 1.5, "n": 3}', "values"), ("{", "is not valid JSON")):
        (run / "calibration.json").write_text(content)
        line = fails(run, "--constrain")
        assert "calibration.json" in line and said in line


def test_values_of_a_file_are_the_ones_chosen_from(run, says, fails, tmp_path, data_root):
    path = tmp_path / "values.tsv"
    path.write_text("Boot Style\tSandal\nBoot Style\tRain Boots\nHeel Height\tFlat\n")
    says(run, "--values", path)
    assert {row["prediction"] for row in rows(run / "predictions.tsv")} <= {"Sandal", "Rain Boots", "Flat"}
    assert metrics_of(run)["constrained"] and metrics_of(run)["values"] == {"Boot Style": 2, "Heel Height": 1}
    one = ("--image", data_root / "images" / "B0001.jpg", "--text", "black shoe")
    assert "Heel Height: Flat  (probability 1.00)" in says(run, *one, "--attribute", "heel height", "--values", path)
    path.write_text("Boot Style\tSandal\n")
    assert "there are no known values of Heel Height; " in fails(run, "--values", path)
    assert "values.tsv has those of Boot Style" in fails(run, *one, "--attribute", "Heel Height", "--values", path)
    path.write_text("Boot Style\n")
    assert "values.tsv, line 1" in fails(run, "--values", path)
    path.write_text(f"Boot Style\t{'boot ' * 3000}\nHeel Height\tFlat\n")
    assert "with the value 'boot boot" in fails(run, "--values", path)
    assert "nowhere.tsv: not found" in fails(run, "--values", tmp_path / "nowhere.tsv")


@pytest.mark.parametrize("how", [["--constrain"], []])
def test_answers_below_the_confidence_are_left_empty(run, says, how, data_root):
    says(run, "--split", "val", "--constrain")          # the tiny model is too sure without
    says(run, *how)
    before, confidence = rows(run / "predictions.tsv"), metrics_of(run)["confidence"]
    loaded = evaluate.load(run, data_needed=True)
    products = read_split(data_root, "shoes", "test")
    answering.prepare_photos(loaded, products)
    p = [a.probability for a in answering.answers(loaded, products, loaded.values if how else None)]
    cut = sorted(set(p))[len(set(p)) // 2]
    out = says(run, *how, "--min-confidence", cut)
    given = [q for q, row in zip(p, before) if row["prediction"]]
    assert f"answers below probability {cut} were left empty: {sum(q < cut for q in given)} of {len(given)}" in out
    after, metrics = rows(run / "predictions.tsv"), metrics_of(run)
    assert [row["probability"] for row in after] == [row["probability"] for row in before]
    assert [row["prediction"] for row in after] == [row["prediction"] if q >= cut else "" for q, row in zip(p, before)]
    assert 0 < metrics["answered"] < 15 and metrics["precision"] == pytest.approx(100 * metrics["right"] / metrics["answered"])
    assert metrics["recall"] == pytest.approx(100 * metrics["right"] / 15) and metrics["min_confidence"] == cut
    assert metrics["confidence"] == confidence          # of all answers, whatever is left out afterwards
    out = says(run, *how, "--min-confidence", cut, "--input", data_root / "shoes" / "test.tsv", "--output", run / "out.tsv")
    assert (run / "out.tsv").read_bytes() == (run / "predictions.tsv").read_bytes()
    assert f"15 products answered, {15 - metrics['answered']} of them left empty" in out


@pytest.mark.parametrize("p", ["-0.1", "1.5", "nan", "much"])
def test_a_confidence_is_a_probability(run, fails, p):
    assert "--min-confidence" in fails(run, "--min-confidence", p)


def test_python_has_the_same_choices(run, data_root):
    loaded, image = evaluate.load(run), data_root / "images" / "B0001.jpg"
    answer = loaded.answer(image, "black shoe", "Boot Style", values=["Sandal", " Rain  Boots", "Sandal"])
    assert {answer.value, answer.runner_up} == {"Sandal", "Rain Boots"}
    assert answer.probability + answer.runner_up_probability == pytest.approx(1)
    left_out = loaded.answer(image, "black shoe", "Boot Style", values=["Sandal", "Rain Boots"], min_confidence=1.0)
    assert left_out.value == "" and left_out.probability == pytest.approx(answer.probability)
    assert loaded.answer(image, "black shoe", "Colour", values=["Mint", "Mints"]).value in ("Mint", "Mints")
    for wrong in ([], "Sandal", [""], [3], {}):
        with pytest.raises(ValueError, match="values must be a list"):
            loaded.answer(image, "black shoe", "Boot Style", values=wrong)


# ------------------------------------------------------------------------------------------------ held-out values


@pytest.fixture(scope="module")
def holding_out(flags, tmp_path_factory):
    """(its run folder, the texts that it was trained on) of a run that does not see one value of Boot Style."""
    folder, seen, step = tmp_path_factory.mktemp("runs") / "run", [], train.train_step

    def watched(run, optimizer, scaler, examples):
        seen.extend(examples)
        return step(run, optimizer, scaler, examples)

    train.train_step = watched
    try:
        train.main([*flags, "--holdout-values", "1", "--lbc", "better_instance", "--epochs", "1", "--out", str(folder)])
    finally:
        train.train_step = step
    return folder, seen


def test_a_held_out_value_is_in_no_training_text_and_not_in_val(holding_out):
    folder, seen = holding_out
    config = json.loads((folder / "config.json").read_text())
    assert config["holdout_values"] == 1 and list(config["held_out"]) == ["Boot Style"]        # Heel Height has only two
    [value] = config["held_out"]["Boot Style"]
    assert ("Boot Style", value) in PRODUCTS and config["values"]["Boot Style"].count(value) == 1
    assert len(seen) == 2 * 16 and not any(value in e.prompt.split("\n")[0] or value in e.answer for e in seen)
    assert value not in {row["attribute_values"] for row in rows(folder / "val" / "predictions.tsv")}


def test_their_scores_are_reported_apart(holding_out, says):
    folder, _ = holding_out
    [value] = json.loads((folder / "config.json").read_text())["held_out"]["Boot Style"]
    for how in ([], ["--constrain"]):
        out = says(folder, *how)
        metrics, answers = metrics_of(folder), rows(folder / "predictions.tsv")
        apart, of_value = metrics["seen_and_held_out"], [row for row in answers if row["attribute_values"] == value]
        assert (apart["values held out"]["n"], apart["values trained on"]["n"]) == (3, 12)
        assert apart["values held out"]["right"] == sum(row["prediction"] == value for row in of_value)
        assert re.search(r"^values held out +\d+\.\d\d ", out, re.MULTILINE)
        assert "<td>values held out</td>" in (folder / "report.html").read_text()
    assert metrics["values"] == {"Boot Style": 3, "Heel Height": 2}         # the full list
    says(folder, "--constrain", "--split", "val")
    assert json.loads((folder / "calibration.json").read_text())["n"] == 8


def test_a_run_from_before_the_flag_still_loads(run, says, fails):
    config = json.loads((run / "config.json").read_text())
    del config["holdout_values"], config["held_out"]
    (run / "config.json").write_text(json.dumps(config))
    says(run)
    assert "seen_and_held_out" not in metrics_of(run)
    del config["epochs"]
    (run / "config.json").write_text(json.dumps(config))
    assert "lacks epochs" in fails(run)


def test_a_resumed_run_holds_the_same_values_out(holding_out, tmp_path):
    folder = shutil.copytree(holding_out[0], tmp_path / "run")
    before = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").unlink()
    train.main(["--resume", str(folder)])               # it would refuse other data than at the start
    assert (folder / "adapter.safetensors").read_bytes() == before
    assert metrics_of(folder / "val")["n"] == 8 and metrics_of(folder)["seen_and_held_out"]["values held out"]["n"] == 3


def test_flags_that_do_not_fit_are_one_line(flags, run, tmp_path):
    for script, arguments in (("train.py", [*flags, "--holdout-values", "-1", "--out", str(tmp_path / "new")]),
                              ("train.py", [*flags, "--holdout-values", "x", "--out", str(tmp_path / "new")]),
                              ("evaluate.py", [str(run), "--values", str(tmp_path)])):
        outcome = command(script, arguments, tmp_path)
        assert held(outcome) is None and outcome.code == 2, outcome


# ------------------------------------------------------------------------------------------------ diagrams


def test_diagrams_by_hand():
    """Accuracy 50 % is half of the height 188, and so is a coverage of 50 % of the width 340."""
    _, bins = calibration_error([0.85, 0.85], [True, False])
    page = reliability_diagram(bins)
    assert page.count("<rect") == 1 and "<rect x='322' y='106.0' width='30' height='94.0' fill='#0072B2'/>" in page
    assert "y1='40.2' y2='40.2' stroke='#D55E00'" in page         # 200 - 85 % of 188
    page = coverage_diagram([{"coverage": 50.0, "accuracy": 100.0}, {"coverage": 100.0, "accuracy": 50.0}])
    assert "points='218.0,12.0 388.0,106.0'" in page
