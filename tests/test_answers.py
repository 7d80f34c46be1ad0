"""Known values, confidence, and values held out of the training, as the commands have them."""

import json
import re
import shutil
import sys

import pytest
from conftest import PRODUCTS, command, held, rows_of

import evaluate
import train
from base import console
from data import read_split
from support import answering
from support.confidence import advice, calibration_error


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


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_free_answers_say_how_sure_they_are_and_what_stands_outside_the_list(run, says):
    out = says(run)
    metrics, answers = metrics_of(run), rows_of(run / "predictions.tsv")
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
    before, at_1 = rows_of(run / "predictions.tsv"), metrics_of(run)["confidence"]
    says(run, "--constrain", "--split", "val")
    fitted = json.loads((run / "calibration.json").read_text())
    assert (fitted["split"], fitted["n"], fitted["values"]) == ("val", 10, 5) and fitted["temperature"] != 1
    out = says(run, "--constrain")
    after, confidence = rows_of(run / "predictions.tsv"), metrics_of(run)["confidence"]
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
    assert {row["prediction"] for row in rows_of(run / "predictions.tsv")} <= {"Sandal", "Rain Boots", "Flat"}
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
    before, confidence = rows_of(run / "predictions.tsv"), metrics_of(run)["confidence"]
    loaded = evaluate.load(run, data_needed=True)
    products = read_split(data_root, "shoes", "test")
    answering.prepare_photos(loaded, products)
    p = [a.probability for a in answering.answers(loaded, products, loaded.values if how else None)]
    cut = sorted(set(p))[len(set(p)) // 2]
    out = says(run, *how, "--min-confidence", cut)
    given = [q for q, row in zip(p, before) if row["prediction"]]
    assert f"answers below probability {cut} were left empty: {sum(q < cut for q in given)} of {len(given)}" in out
    after, metrics = rows_of(run / "predictions.tsv"), metrics_of(run)
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
    assert value not in {row["attribute_values"] for row in rows_of(folder / "val" / "predictions.tsv")}


def test_their_scores_are_reported_apart(holding_out, says):
    folder, _ = holding_out
    [value] = json.loads((folder / "config.json").read_text())["held_out"]["Boot Style"]
    for how in ([], ["--constrain"]):
        out = says(folder, *how)
        metrics, answers = metrics_of(folder), rows_of(folder / "predictions.tsv")
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
