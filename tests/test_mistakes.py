"""Every mistake of a user at the commands has its message, exit code 2, and no traceback."""

import json
import os
import sys

import pytest
from conftest import run_command
from safetensors.torch import load_file, save_file

import evaluate
import train
from base import console
from base.console import UserError
from support import run_folder


@pytest.fixture
def fails(monkeypatch, capsys):
    """A command's last line, where it must end with exit code 2 and no traceback."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            console.run({"train.py": train, "evaluate.py": evaluate}[script].main)
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    return call


@pytest.mark.parametrize("more, said", [
    (["--labels", "0"], "argument --labels: must be a whole number from 1 to 1,000,000,000 or 'all', but is '0'"),
    (["--labels", "ten"], "must be a whole number from 1 to 1,000,000,000 or 'all', but is 'ten'"),
    (["--lr", "-1"], "argument --lr: must be a number from 1e-12 to 100, but is '-1'"),
    (["--lr", "nan"], "argument --lr: must be a number from 1e-12 to 100, but is 'nan'"),
    (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 9,223,372,036,854,775,807, but is '-1'"),
    (["--lbc", "judge"], "invalid choice: 'judge' (choose from"),
    (["--lbc-ratio", "-1"], "argument --lbc-ratio: must be a number from 0 to 100, but is '-1'"),
    (["--lbc-ratio", "1e300"], "argument --lbc-ratio: must be a number from 0 to 100"),
    (["--projector-dim", "1" + "0" * 18], "argument --projector-dim: must be a whole number from 1 to 65,536"),
    (["--adapter-dim", "1" + "0" * 18], "argument --adapter-dim: must be a whole number from 1 to 4,096"),
    (["--batch-size", "1" + "0" * 18], "argument --batch-size: must be a whole number from 1 to 65,536"),
    (["--epochs", "1" + "0" * 400], "argument --epochs: must be a whole number from 1 to 1,000,000"),
    (["--epochs", "1" * 5000], "argument --epochs: must be a whole number from 1 to 1,000,000, but is '1111"),
    (["--dataset", os.fsdecode(b"caf\xe9")], "argument --dataset: must be UTF-8 text, but is 'caf\\udce9'"),
    (["--device", "meta"], "--device meta: cannot be used here"),
    (["--device", os.fsdecode(b"cp\xe9")], "cannot be used here"),
    (["--dataset", "boots"], "no data set 'boots'"),
    (["--llama", "nowhere"], "--llama: LLaMA-7B's weights should be in nowhere, which does not exist"),
    (["--vit", "nowhere"], "--vit: CLIP ViT-B/16's weights should be in nowhere"),
    (["--data", "nowhere"], "--data: the data sets should be in nowhere"),
    (["--device", "tpu9"], "--device tpu9: cannot be used here"),
    (["--adapter-dim", "3"], "--adapter-dim 3: a RepAdapter has 2 groups"),
    (["--resume"], "--resume: name the run folder"),
    (["--resume", "nowhere"], "nowhere: is not a run folder"),
    (["--label", "3"], "unrecognized arguments: --label 3"),
])
def test_mistakes_in_training(fails, flags, more, said, tmp_path):
    out = [] if "--resume" in more else ["--out", tmp_path / "run"]
    assert said in fails("train.py", *flags, *out, *more)
    assert not list(tmp_path.rglob("*"))                # nothing half made is left


def test_a_folder_with_a_run_is_not_written_over(fails, run, flags):
    before = (run / "adapter.safetensors").read_bytes()
    assert "holds a run already; continue it with --resume" in fails("train.py", *flags, "--out", run)
    assert "a resumed run keeps its settings" in fails("train.py", "--resume", run, "--labels", "9")
    assert (run / "adapter.safetensors").read_bytes() == before


def test_a_run_does_not_go_on_with_other_data(fails, run, flags, data_root, tmp_path):
    import shutil
    shutil.copytree(data_root, tmp_path / "data")
    lines = (tmp_path / "data" / "shoes" / "test.tsv").read_text().replace("Chelsea", "Combat")
    (tmp_path / "data" / "shoes" / "test.tsv").write_text(lines)
    assert "is not what this run was started with" in fails("train.py", "--resume", run, "--data", tmp_path / "data")


def test_a_run_is_not_scored_on_other_data(fails, run, data_root, tmp_path):
    import shutil
    shutil.copytree(data_root, tmp_path / "data")
    lines = (tmp_path / "data" / "shoes" / "test.tsv").read_text().replace("Chelsea", "Combat")
    (tmp_path / "data" / "shoes" / "test.tsv").write_text(lines)
    assert "the test split is not the one that this run was started with" in fails(
        "evaluate.py", run, "--data", tmp_path / "data")


def test_a_run_goes_with_the_weights_it_was_trained_on(fails, run, llama_dir, tmp_path):
    import shutil
    shutil.copytree(llama_dir, tmp_path / "llama")
    weights = load_file(llama_dir / "model.safetensors")
    save_file({name: -w for name, w in weights.items()}, tmp_path / "llama" / "model.safetensors")
    for command in (["evaluate.py", run], ["train.py", "--resume", run]):
        assert "was trained with another llama than the one in" in fails(*command, "--llama", tmp_path / "llama")


def test_with_strict_a_title_that_is_too_long_is_named_before_any_answer(fails, run, data_root, tmp_path):
    lines = (data_root / "shoes" / "test.tsv").read_text().splitlines()
    cells = lines[5].split("\t")
    long = "\t".join([*cells[:3], "word " * 3000, *cells[4:]])
    (tmp_path / "in.tsv").write_text("\n".join([*lines[:5], long, *lines[6:]]) + "\n")
    said = fails("evaluate.py", run, "--input", tmp_path / "in.tsv", "--output", tmp_path / "out.tsv", "--strict")
    assert f"product {cells[0]!r}: its question has" in said and "shorten its title" in said
    assert not (tmp_path / "out.tsv").exists()


def test_two_titles_that_do_not_fit_together_are_found_before_the_training(flags, data_root, tmp_path):
    import shutil
    shutil.copytree(data_root, tmp_path / "data")
    path = tmp_path / "data" / "shoes" / "train.tsv"
    path.write_text(path.read_text().replace("[Title] ", "[Title] " + "black " * 1200, 1))
    how = [*flags, "--data", str(tmp_path / "data"), "--labels", "all", "--epochs", "1"]
    with pytest.raises(UserError, match="its question with another product as long has 2,[0-9]{3} tokens, more than the 2,048"):
        train.main([*how, "--out", str(tmp_path / "run")])
    train.main([*how, "--lbc", "none", "--out", str(tmp_path / "run")])         # alone it fits


def test_a_run_that_was_stopped_before_its_scores_is_scored_with_what_it_learned(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    for name in ("", "val"):
        (tmp_path / "run" / name / "predictions.tsv").unlink()
    train.main(["--resume", str(tmp_path / "run")])
    for name in ("", "val"):
        assert (tmp_path / "run" / name / "predictions.tsv").read_bytes() == (run / name / "predictions.tsv").read_bytes()


def test_two_processes_do_not_train_in_one_folder(fails, run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    with run_folder.only_process(tmp_path / "run"):
        assert "another process is training in this folder" in fails("train.py", "--resume", tmp_path / "run")
    train.main(["--resume", str(tmp_path / "run")])


def test_a_broken_state_is_named(fails, run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    (tmp_path / "run" / "state.pt").write_bytes((run / "state.pt").read_bytes()[:1000])
    assert "cannot be read as the state of this run" in fails("train.py", "--resume", tmp_path / "run")


@pytest.mark.parametrize("arguments, said", [
    (["--temperature", "-1"], "argument --temperature: must be a number from 0 to 1,000, but is '-1'"),
    (["--temperature", "inf"], "argument --temperature: must be a number from 0 to 1,000, but is 'inf'"),
    (["--top-p", "0"], "argument --top-p: must be a number from 1e-06 to 1, but is '0'"),
    (["--text", "a shoe", "--attribute", os.fsdecode(b"caf\xe9")], "argument --attribute: must be UTF-8 text, but is 'caf"),
    (["--text", os.fsdecode(b"caf\xe9"), "--attribute", "Boot Style"], "argument --text: must be UTF-8 text, but is 'caf"),
    (["--text", "a shoe", "--attribute", " "], "--attribute is empty; name the attribute to answer, e.g. one of this run's"),
    (["--input", "x.tsv"], "--input and --output go together"),
    (["--attribute", "Boot Style"], "this run was trained with images: give --image"),
    (["--image", "nowhere.jpg", "--attribute", "Boot Style"], "--image nowhere.jpg: there is no such file"),
    (["--text", "a shoe"], "give --attribute"),
    (["--input", __file__, "--output", __file__], "is a folder, or the input itself"),
    (["--input", __file__, "--output", os.path.relpath(__file__)], "is a folder, or the input itself"),
    (["--input", __file__, "--output", "x.tsv", "--text", "a shoe", "--attribute", "Boot Style"], "for one product, give"),
    (["--export", "x", "--text", "a shoe", "--attribute", "Boot Style"], "--export does not answer"),
    (["--split", "dev"], "invalid choice: 'dev'"),
    (["--input", "nowhere.tsv", "--output", "x.tsv"], "nowhere.tsv: not found"),
])
def test_mistakes_in_evaluation(fails, run, arguments, said):
    assert said in fails("evaluate.py", run, *arguments)


def test_a_folder_that_is_no_finished_run(fails, run, tmp_path):
    import shutil
    assert "is not a run folder" in fails("evaluate.py", tmp_path)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    assert "its training is not finished; continue it with: python train.py --resume" in fails("evaluate.py", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"labels": 3}')
    assert "lacks dataset" in fails("evaluate.py", tmp_path / "run")


def test_an_mlp_adapter_cannot_be_merged(fails, flags, tmp_path):
    train.main([*flags, "--epochs", "1", "--adapter", "mlp", "--out", str(tmp_path / "run")])
    assert "this run has MLP-Adapters, which are not linear and cannot be merged" in fails("evaluate.py", tmp_path / "run", "--merge")
    assert "cannot be merged" in fails("evaluate.py", tmp_path / "run", "--export", tmp_path / "out")


def test_constrain_checks_attributes_and_lengths_before_any_answer(fails, run, data_root, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    lines = (data_root / "shoes" / "test.tsv").read_text()
    (tmp_path / "in.tsv").write_text(lines.replace("Heel Height", "Toe Style"))
    how = ["--constrain", "--strict", "--output", tmp_path / "out.tsv", "--input"]
    said = fails("evaluate.py", tmp_path / "run", *how, tmp_path / "in.tsv")
    assert "there are no known values of Toe Style; the run's training data has those of Boot Style, Heel Height" in said
    record = json.loads((run / "config.json").read_text())
    record["values"]["Boot Style"].append("black " * 3000)
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    for more in ([*how, data_root / "shoes" / "test.tsv"], ["--constrain"]):
        assert "tokens, more than the 2,048 that this LLaMA was trained to read" in fails("evaluate.py", tmp_path / "run", *more)
    assert not (tmp_path / "out.tsv").exists()


def test_the_commands_themselves(run, tmp_path):
    for script in ("train.py", "evaluate.py"):
        done = run_command(script, "--help")
        assert done.returncode == 0 and "usage" in done.stdout
    done = run_command("train.py", "--resume", tmp_path / "nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("train.py: error: ")
