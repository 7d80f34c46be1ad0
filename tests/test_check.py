"""python -m dataset check: what train.py refuses is refused, what spoils a result is named, and a clean folder passes."""

import numpy as np
import pytest
from conftest import command, held
from PIL import Image

from base.console import UserError
from base.tsv import write_tsv
from dataset.check import check
from dataset.stats import SPLITS

SHOES = ["ankle", "suede", "lace", "trail", "city", "winter", "slip", "heavy", "light", "classic", "retro", "urban", "alpine"]


def write_shop(folder, change=lambda rows: None):
    """FOLDER/shop/{train,val,test}.tsv and FOLDER/images/: 3 values of one attribute, 12 + 2 + 2 products each; `change` may
    alter the rows {split: [row]} before they are written."""
    rows, n = {}, 0
    (folder / "images").mkdir(parents=True)
    for part, each in zip(SPLITS, (12, 2, 2)):
        rows[part] = []
        for value in ("Chelsea", "Combat", "Rain Boots") * each:
            n += 1
            blocks = np.random.default_rng(n).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((80, 60)).save(folder / "images" / f"{n}.jpg")
            rows[part].append([f"P{n}", f"{n}.jpg", "Footwear", f"[Title] {SHOES[n % 13]} shoe number {n}", "Boot Style", value])
    change(rows)
    for part, each in rows.items():
        write_tsv(folder / "shop" / f"{part}.tsv", each)
    return folder / "shop"


def test_a_clean_folder_can_be_trained(tmp_path, capsys):
    check(write_shop(tmp_path))
    out = capsys.readouterr().out
    assert "REFUSED" not in out and "SPOILS" not in out and "train 36, val 6, test 6" in out
    assert f"python train.py --data {tmp_path} --dataset shop --labels 10" in out


def answer_in_title(rows):
    rows["train"][0][3] = "[Title] chelseas for the rain"


def few_labels(rows):
    del rows["train"][3:9:3]


def one_value(rows):
    rows["train"][0][4:], rows["test"][0][4:] = ["Colour", "Red"], ["Colour", "Red"]


def same_title(rows):
    rows["test"][0][3] = "[Title] 5 NUMBER " + rows["train"][4][3].removeprefix("[Title] ").replace("number 5", "")


def same_photo(rows):
    rows["val"][0][1] = rows["train"][0][1]


def twins(rows):
    for row in rows["train"][::6]:
        row[5] = "chelsea's"


def unknown_value(rows):
    rows["test"][1][5] = "Western"


def id_twice(rows):
    rows["train"][3][0] = rows["train"][0][0]


def two_values(rows):
    rows["val"][1][0] = rows["train"][0][0]


@pytest.mark.parametrize("change, says", [
    (answer_in_title, "titles or categories that hold their answer: 1 (the model learns to copy)\n"
                      "      P1 (train.tsv) Boot Style = Chelsea"),
    (few_labels, "values with fewer than 12 labels to train on: 1\n      Boot Style = Chelsea: 10"),
    (one_value, "attributes with one value alone: 1 (there is nothing to learn)\n      Colour = Red"),
    (same_title, "products of test.tsv with the same title words as one of train.tsv: 1 (their score measures memory)\n"
                 "      P43 as P5"),
    (same_photo, "products of val.tsv with the same photo bytes as one of train.tsv: 1 (their score measures memory)\n"
                 "      P37 as P1"),
    (twins, "values that differ only in case, plural or hyphens: 1 (an exact match takes them for two)\n"
            "      Boot Style: \"chelsea's\" 6, 'Chelsea' 10"),
    (unknown_value, "values of test.tsv that train.tsv does not have: 1 (no answer to them can be right)\n"
                    "      Boot Style = Western: 1 products"),
    (id_twice, "ids that stand twice in a file for one attribute: 1\n      P1, Boot Style (train.tsv)"),
    (two_values, "ids with two values of one attribute: 1\n      P1, Boot Style: Chelsea, Combat")])
def test_what_spoils_a_result_is_named_and_can_be_trained(change, says, tmp_path, capsys):
    check(write_shop(tmp_path, change), labels=12)
    out = capsys.readouterr().out
    assert "REFUSED" not in out and says in out, out


def no_photo(folder):
    (folder / "images/1.jpg").unlink()


def broken_photo(folder):
    (folder / "images/2.jpg").write_text("<!doctype html>")


def bad_line(folder):
    with open(folder / "shop/val.tsv", "a") as file:
        file.write("P99\ttoo few\n")


def no_val(folder):
    (folder / "shop/val.tsv").unlink()


def empty_test(folder):
    write_tsv(folder / "shop/test.tsv", [])


def no_value(folder):
    write_tsv(folder / "shop/test.tsv", [["P1", "1.jpg", "Shoes", "[Title] x", "Boot Style", ""]])


@pytest.mark.parametrize("change, says", [
    (no_photo, "photos that are not in {}/images: 1 (train with --no-image if there are none)\n      1.jpg (train.tsv)"),
    (broken_photo, "files that are no photos: 1\n      {}/images/2.jpg: "), (bad_line, "{}/shop/val.tsv, line 8: has 2 columns"),
    (no_val, "val.tsv missing. Divide"), (empty_test, "{}/shop/test.tsv: has a header but no products"),
    (no_value, "{}/shop/test.tsv, line 2: attribute_values is empty")])
def test_what_train_py_refuses_is_refused(change, says, tmp_path, capsys, llama_dir, vit_dir, monkeypatch):
    """By both, and a clean folder by neither."""
    import train
    monkeypatch.setattr("support.config.FEATURE_CACHE", tmp_path / "features.sqlite")
    folder = write_shop(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match="train.py would refuse it"):
        check(folder)
    out = capsys.readouterr().out
    assert out.index("REFUSED") < out.index(says.format(tmp_path)), out
    with pytest.raises(UserError):
        train.main(["--data", str(tmp_path), "--dataset", "shop", "--llama", str(llama_dir), "--vit", str(vit_dir),
                    "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")])


def test_a_shop_with_one_file_is_told_what_is_missing(tmp_path, capsys):
    write_shop(tmp_path)
    rows = (tmp_path / "shop/train.tsv").read_bytes()
    for part in SPLITS:
        (tmp_path / f"shop/{part}.tsv").unlink()
    (tmp_path / "shop/products.tsv").write_bytes(rows)
    (tmp_path / "images").rename(tmp_path / "shop/images")
    with pytest.raises(UserError):
        check(tmp_path / "shop")
    out = capsys.readouterr().out
    assert "train.tsv, val.tsv, test.tsv missing. Divide the lines of products.tsv into train.tsv, val.tsv and test.tsv" in out
    assert f"some are in {tmp_path}/shop/images, move them" in out and "products 36" in out


def test_tokens_are_counted_as_train_py_counts_them(tmp_path, capsys, llama_dir):
    def long_title(rows):
        rows["train"][0][3] = "[Title] " + "shoe " * 1500

    folder = write_shop(tmp_path, long_title)
    with pytest.raises(UserError):
        check(folder, llama=llama_dir)
    assert "products with more tokens than the 2,048 that this LLaMA reads: 1\n      P1 (train.tsv): " in capsys.readouterr().out
    check(write_shop(tmp_path / "fine"), llama=llama_dir)
    assert "tokens of a question and its answer: median" in capsys.readouterr().out


def test_the_command_and_its_errors(tmp_path):
    folder = write_shop(tmp_path / "root")
    fine = command("-m dataset", ["check", str(folder), "--labels", "12"], tmp_path)
    assert fine.code == 0 and not held(fine) and "It can be trained" in fine.out
    for arguments, says in (([str(tmp_path / "none")], "is not a folder"),
                            ([str(tmp_path / "root")], "Its folders shop do: give one"), ([str(tmp_path)], "holds no TSV file"), ([str(folder), "--llama", str(tmp_path)], "config.json")):
        outcome = command("-m dataset", ["check", *arguments], tmp_path)
        assert outcome.code == 2 and not held(outcome), held(outcome)
        assert outcome.err.startswith("python -m dataset: error: ") and says in outcome.err, outcome.err
