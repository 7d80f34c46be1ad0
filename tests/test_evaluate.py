"""Scores against their definition, and what evaluate.py writes where."""

import json
import shutil
import sys
import zlib
from pathlib import Path

import pytest
from conftest import randomize, train_run

import evaluate
from base.console import UserError
from base.tsv import read_tsv
from data import Product, read_split
from evaluate import interval, micro_f1, score, scores_folder, table
from support import answering
from support.run import Run

# ---------------------------------------------------------------------------------------- scores


def test_micro_f1_by_hand():
    """2 TP / (2 TP + FP + FN): a wrong answer is both a false positive and a false negative.

    2 of 7 are right, and 5 are answers; 4 hold the gold value, whatever their case.
    """
    predictions = ["Flat", " Flat\n", "flat", "It is Flat", "Heel", "", " "]
    pairs = [(prediction, "Flat") for prediction in predictions]
    expected = [100 * 4 / (4 + 3 + 5), 100 * 2 / 5, 100 * 2 / 7, 7, 2, 5, 100 * 4 / 7]
    assert list(micro_f1(pairs).values()) == pytest.approx(expected)
    assert list(micro_f1(pairs[:1]).values()) == [100, 100, 100, 1, 1, 1, 100]
    assert not any(micro_f1([]).values())


def test_scores_are_micro_over_all_and_for_each_attribute():
    """Heel: 1 of 2 right.  Toe: 1 of 1.  Micro is 2/3, where the mean of the two is 3/4."""
    labels = ("Toe", "Open"), ("Heel", "Flat"), ("Heel", "High")
    products = [Product("", "", "", "", *label) for label in labels]
    metrics = score(products, ["Open", "Flat", "Flat"])
    metrics["seen_and_held_out"] = {"values held out": micro_f1([("", "Open")])}
    assert [line.rstrip() for line in table(metrics).splitlines()] == [
        "attribute        micro-F1  precision  recall      n  one value for all",
        "Heel                50.00      50.00   50.00      2   50.00 Flat (not beaten)",
        "Toe                100.00     100.00  100.00      1  100.00 Open (not beaten)",
        "values held out      0.00       0.00    0.00      1",
        "all (micro)         66.67      66.67   66.67      3   66.67  (not beaten)"]


@pytest.mark.parametrize("right, n, low, high", [
    (81, 263, 25.53, 36.62), (0, 20, 0, 16.11)])
def test_the_interval_is_wilsons(right, n, low, high):
    """Method 3 in table I of Newcombe 1998 (Statistics in Medicine 17, 857-872)."""
    assert interval(100 * right / n, n) == pytest.approx([low, high], abs=0.006)


def test_an_interval_counts_products_and_a_floor_is_beaten_when_the_interval_is_above_it():
    """20 products with two attributes: 20 independent ones, not 40.  Low Heel is the answer to 11 of them."""
    products = [Product(str(i), "", "", "", attribute, ("Low Heel", "Flat")[attribute == "Heel" and i > 10])
                for i in range(20) for attribute in ("Heel", "Toe")]
    metrics = score(products, [p.value for p in products])
    assert metrics["interval"] == metrics["attributes"]["Heel"]["interval"] == interval(100, 20)
    assert (metrics["floor"], metrics["attributes"]["Heel"]["floor"]) == pytest.approx((77.5, 55))
    assert [line.split("  ")[-1].strip() for line in table(metrics).splitlines()[1:]] == [
        "55.00 Low Heel", "100.00 Low Heel (not beaten)", "77.50"]


# ---------------------------------------------------------------------------------------- answers


def test_an_answer_does_not_depend_on_its_batch(run, data_root, monkeypatch):
    """Each product alone answers as among others: with its own photo, draws, values and temperature."""
    loaded = evaluate.load(run)
    randomize(loaded.model)
    loaded.calibration = {"temperature": 2.0}
    products = read_split(data_root, "shoes", "test")
    answering.prepare_photos(loaded, products)
    monkeypatch.setattr(Run, "answer_limit", 3)       # each more is a chance for rounding to decide
    monkeypatch.setattr(answering, "ANSWER_BATCH", 4)
    monkeypatch.setattr(answering, "SCORE_BATCH", 2)
    for values in (None, loaded.values):
        together = answering.answers(loaded, products, values, 1.0, 0.9)
        assert len(together) == len(products)
        for p, answer in zip(products, together):
            [alone] = answering.answers(loaded, [p], values, 1.0, 0.9)
            assert (answer.value, answer.runner_up) == (alone.value, alone.runner_up)
            assert answer.probability == pytest.approx(alone.probability, rel=1e-3)
        assert len({answer.probability for answer in together}) == len(products)


# ---------------------------------------------------------------------------------------- the command


def test_no_scoring_writes_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    for name in ("a.tsv", "b/a.tsv"):
        Path(name).write_text(name)
    parser = evaluate.answer_parser("")
    parser.add_argument("--split", default="test")
    parser.add_argument("--without-duplicates", action="store_true")
    settings = """
--split val, --split train, --constrain, --merge, --without-duplicates, --dtype bf16, --min-confidence 1,
--min-confidence 0.5, --values a.tsv, --values b/a.tsv, --temperature 0, --temperature 1, --top-p 1,
--constrain --split val, --constrain --values a.tsv""".split(",")
    folders = [scores_folder(parser.parse_args(["RUN", *words.split()]), parser) for words in settings]
    assert folders[:2] == [Path("RUN/val"), Path("RUN/train")]
    assert len({*folders}) == len(settings)
    assert {folder.parent for folder in folders[2:]} == {Path("RUN/scores")}


@pytest.fixture
def scored(own, monkeypatch):
    """scored(folder, *flags): (rows of predictions.tsv, metrics) in RUN/folder.  No other file changes."""
    def call(folder, *flags, run=own):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), *map(str, flags)])
        evaluate.main()
        where = run / folder
        assert all(path.read_bytes() == old for path, old in before.items() if path.parent != where)
        metrics = json.loads((where / "metrics.json").read_text())
        rows = [row for _, row in read_tsv(where / "predictions.tsv")]
        expected = micro_f1([(row["prediction"], row["attribute_values"]) for row in rows])
        assert {name: metrics[name] for name in expected} == expected
        return rows, metrics
    return call


def test_scoring_again(own, run, scored, data_root, capsys):
    """With the training's settings nothing changes; a row begins with the product's cells.

    Of its 15 products 3 have each value: one of three for Boot Style, one of two for Heel Height.
    """
    rows, metrics = scored("")
    said = capsys.readouterr().out
    assert said.startswith(f"data {data_root}, data set shoes; LLaMA ")
    assert table(metrics) in said
    assert ("one value for all is not beaten" in said) == (metrics["interval"][0] <= metrics["floor"])
    assert metrics["floor"] == pytest.approx(100 * 6 / 15)
    assert "95 % interval of micro-F1 over products: {:.1f} to {:.1f}\n".format(*metrics["interval"]) in said
    assert (own / "predictions.tsv").read_bytes() == (run / "predictions.tsv").read_bytes()
    assert [Product(*list(row.values())[:6]) for row in rows] == read_split(data_root, "shoes", "test")
    merged, metrics = scored("scores/test-merge", "--merge")
    assert [row["prediction"] for row in merged] == [row["prediction"] for row in rows]
    assert metrics["merged"]
    empty, metrics = scored("scores/test-min_confidence-1.0", "--min-confidence", 1)
    assert {row["prediction"] for row in empty} == {""}
    assert [row["probability"] for row in empty] == [row["probability"] for row in rows]
    scored("val", "--split", "val")
    assert (own / "val" / "predictions.tsv").read_bytes() == (run / "val" / "predictions.tsv").read_bytes()
    assert len(scored("train", "--split", "train")[0]) == 20


def test_values_to_choose_from(own, scored, tmp_path):
    values = tmp_path / "values.tsv"
    values.write_text('\ufeffboot style\t"Sandal "\n\nHeel  Height\tFlat\nHeel Height\tFlat\n', "utf-8")
    name = f"values-values-{zlib.crc32(values.read_bytes()):08x}"      # another list may have this name
    rows, _ = scored(f"scores/test-{name}", "--values", values)
    assert {row["prediction"] for row in rows} == {"Sandal", "Flat"}
    scored(f"scores/test-constrain-{name}", "--constrain", "--values", values)
    values.write_text("Boot Style\tSandal\n")
    with pytest.raises(UserError, match="known values of Heel Height, only of Boot Style; .*--constrain"):
        scored("", "--values", values)
    scored("scores/val-constrain", "--constrain", "--split", "val")
    _, metrics = scored("scores/test-constrain", "--constrain")
    fitted = json.loads((own / "calibration.json").read_text())
    assert metrics["confidence"]["temperature"] == fitted["temperature"] != 1


def test_without_duplicates_of_train(flags, data_root, tmp_path, scored, capsys):
    """One product of test has the title words and the photo of one in train, under another id."""
    data = shutil.copytree(data_root, tmp_path / "data")
    first = (data / "shoes" / "train.tsv").read_text().splitlines()[1]
    with open(data / "shoes" / "test.tsv", "a") as file:
        file.write("X" + first + "\n")
    other = train_run(tmp_path / "other", flags, "--data", data, "--labels", 1, "--epochs", 1)
    rows, metrics = scored("scores/test-without_duplicates", "--without-duplicates", run=other)
    assert "1 of 16 products left out" in capsys.readouterr().out
    assert rows[-1]["id"] == "B0055"
    assert metrics["split"] == "test (without duplicates of train)"


def test_what_is_not_scored(scored, data_root, tmp_path):
    with pytest.raises(UserError, match="int8 weight cannot hold a merged"):
        scored("", "--merge", "--dtype", "int8")
    data = shutil.copytree(data_root, tmp_path / "data")
    shutil.copy(data / "images" / "B0001.jpg", data / "images" / "B0055.jpg")
    with pytest.raises(UserError, match="the products or photos of test are not those of this run"):
        scored("", "--data", data)
