"""Answers to one product, from the command and from Python; and the exported model."""

import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import command, held, train_run
from PIL import Image

import evaluate
from base.console import UserError
from base.tsv import read_tsv
from data import base_question, encode_examples, read_split
from llama import load_llama
from support.answering import prepare_photos
from tools import export


@pytest.fixture
def says(run, tmp_path):
    """says(tool, *arguments): its stdout; with code=2 its error instead."""
    def call(tool, *arguments, code=0, folder=run):
        done = command(tool, [folder, *arguments], tmp_path, limit_s=60)
        assert held(done) is None and done.code == code, done.err
        return done.err if code else done.out
    return call


@pytest.fixture
def photo(data_root):
    return data_root / "images" / "B0001.jpg"


def test_one_product_has_its_answer_in_all_ways(run, says, data_root, tmp_path):
    """Free, and from known values whose temperature was fitted: as in predictions.tsv, and in Python."""
    run = shutil.copytree(run, tmp_path / "run")
    says("evaluate.py", "--constrain", "--split", "val", folder=run)
    says("evaluate.py", "--constrain", folder=run)
    loaded = evaluate.load(run)
    rows = [row for _, row in read_tsv(run / "scores" / "test-constrain" / "predictions.tsv")][:4]
    for flags, settings in ([], {}), (["--constrain"], {"constrain": True}):
        for row in rows:
            one = [data_root / "images" / row["images"], f"{row['texts']}, {row['category']}",
                   row["attribute_names"].upper()]
            answer = loaded.answer(*one, **settings)
            said = says("-m tools.answer", "--image", one[0], "--text", one[1], "--attribute", one[2], *flags,
                        folder=run)
            assert said == f"{row['attribute_names']}: {answer}\n"
            if flags:                                   # free draws depend on the id, too
                assert (answer.value, str(round(answer.probability, 4))) == (
                    row["prediction"], row["probability"])


def test_flags_of_an_answer(says, photo, tmp_path):
    one = ["--image", photo, "--text=-Pillow", "--attribute"]
    (tmp_path / "values.tsv").write_text("Heel Height\tFlat\n")
    values = ["--values", tmp_path / "values.tsv"]
    assert says("-m tools.answer", *one, "heel height", *values) == "Heel Height: Flat  (probability 1.00)\n"
    said = says("-m tools.answer", *one, "Boot Style", *values, code=2)
    assert "there are no known values of Boot Style, only of Heel Height; --values and" in said
    unsure = says("-m tools.answer", *one, "Colour", "--temperature", "3", "--min-confidence", "1")
    assert unsure.startswith("Colour: (no answer)  (probability 0.")


def test_python_has_the_same_choices(run, photo):
    one = evaluate.load(run).answer
    answer = one(photo, "black shoe", "Boot Style", values=["Sandal", " Rain  Boots", "Sandal"])
    assert {answer.value, answer.runner_up} == {"Sandal", "Rain Boots"}
    assert answer.probability + answer.runner_up_probability == pytest.approx(1)
    for wrong in ([], "Sandal", [""], [3]):
        with pytest.raises(ValueError, match="values must be a list"):
            one(photo, "black shoe", "Boot Style", values=wrong)
    assert one(photo, "black shoe", "Boot Style", constrain=True, values=["?"]).value != "?"
    for wrong, error in ({"dtype": "float16"}, ValueError), ({"labels": 3}, TypeError):
        with pytest.raises(error):
            evaluate.load(run, **wrong)
    with pytest.raises(UserError, match="known values of Colour"):
        one(photo, "black shoe", "Colour", constrain=True)
    with pytest.raises(ValueError, match="min_confidence is from 0 to 1"):
        one(photo, "black shoe", "Boot Style", min_confidence=95)


def test_answers_come_in_order_from_any_iterable(run, data_root, monkeypatch, capsys):
    """Batches, NaN for what is absent, keys of no meaning, photos as relative paths or PIL images."""
    monkeypatch.setattr("support.run.ANSWER_BATCH", 3)
    monkeypatch.chdir(data_root / "images")             # photos may be named from any folder
    loaded = evaluate.load(run)
    asked = [(f"B{i:04}.jpg", "black " + "shoe " * (i % 4), loaded.known_attribute("HEEL height"))
             for i in range(1, 9)]
    expected = [loaded.answer(*one) for one in asked]
    assert len({answer.value for answer in expected}) > 3
    records = (dict(zip(("image", "text", "attribute"), one), price=math.nan) for one in asked)
    answers = loaded.answers(records)
    assert str(next(answers)) == str(expected[0])
    assert next(records)["image"] == "B0004.jpg"        # three are read at a time
    assert [answer.value for answer in answers] == [answer.value for answer in expected[1:3] + expected[4:]]
    picture, exif = Image.linear_gradient("L").resize((40, 30)), Image.Exif()
    exif[274] = 3                                       # to be turned by 180 degrees
    picture.save("turned.png", exif=exif)
    photos = Path("turned.png"), Image.open("turned.png"), picture.rotate(180), picture
    answers = loaded.answers({"image": photo, "text": "x", "attribute": "Hue"} for photo in photos)
    first, *same, other = [math.log(answer.probability) for answer in answers]
    assert same == pytest.approx([first] * 2, abs=1e-5) and abs(other - first) > 1e-3
    assert capsys.readouterr().err.count("'Hue' is not an attribute of this run's training data") == 1
    with pytest.raises(AttributeError, match="no attribute 'get'"):
        list(loaded.answers(["B0001.jpg"]))
    with pytest.raises(UserError, match="more than the 2,048"):
        loaded.answer("B0001.jpg", "x " * 3000, "Heel Height")


def test_an_export_is_an_ordinary_llama(run, says, data_root, tmp_path, monkeypatch):
    """transformers reads it and its tokenizer; by the README's lines it gives the merged model's logits."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert "the greatest difference of logits, merged against unmerged, is " in says("-m tools.export", out)
    loaded = evaluate.load(run)
    product = read_split(data_root, "shoes", "test")[0]
    prepare_photos(loaded, [product])
    examples, names = encode_examples([base_question(product)], loaded.model.tokenizer)
    cls_tokens = loaded.photo_features.read(names)
    with torch.no_grad():
        expected = loaded.model.merge_adapters().answer_logits(examples, cls_tokens)[0]
    monkeypatch.chdir(out)
    lines = (out / "README.md").read_text().splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    head, _, generate = code.rpartition("\n")
    assert generate.startswith("llama.generate(inputs_embeds=x")
    scope = {"torch": torch, "safetensors": safetensors, "transformers": transformers, "cls": cls_tokens[0],
             "title": product.title, "category": product.category, "attribute": product.attribute}
    exec(head.replace('prompt = "', 'prompt = f"'), scope)
    with torch.no_grad():
        theirs = scope["llama"](inputs_embeds=scope["x"][None]).logits[0, -1]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert load_llama(out)[0].config.attention_bias     # and our own loader reads it


def test_an_unfinished_export_is_not_taken_for_a_whole_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_text", lambda *a: 1 / 0)     # README.md, just before config.json
    with pytest.raises(ZeroDivisionError):
        export.export(evaluate.load(run), tmp_path)
    assert (tmp_path / "tokenizer.model").exists() and not (tmp_path / "config.json").exists()


def test_an_export_says_what_its_run_saw(flags, says, tmp_path):
    for name, more in ("a", "--no-image"), ("b", "--no-text --features single"), ("c", "--adapter mlp"):
        train_run(tmp_path / name, flags, *more.split(), "--epochs", 1)
    assert "cannot be merged" in says("-m tools.export", tmp_path / "out", folder=tmp_path / "c", code=2)
    assert not (tmp_path / "out").exists()
    for name in "ab":
        says("-m tools.export", tmp_path / "out" / name, folder=tmp_path / name)
    readme = (tmp_path / "out/a/README.md").read_text()
    assert "Context: {title}" in readme and "image" not in readme
    assert not (tmp_path / "out/a/projector.safetensors").exists()
    readme = (tmp_path / "out/b/README.md").read_text()
    assert "Context: {title}" not in readme and "(1, 24), the [cls] after ViT layer (6,)" in readme
