"""A run folder: config, state and log are checked before they are used, and one process at a time works in it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import at_once, command, held
from safetensors.torch import load_file, save_file

import evaluate
import train
from base import console
from base.console import UserError
from support import config, run_folder
from support.run_folder import read_config, read_losses


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "2", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A finished run of 2 steps: 10 labelled products in batches of 32 examples, 2 epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*flags, "--out", str(folder)])
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """The same run, as if it had been stopped after the last step's state was saved."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    return tmp_path / "run"


def resume(run, said):
    with pytest.raises(UserError, match=said) as error:
        train.main(["--resume", str(run)])
    assert "\n" not in str(error.value) and not (run / "adapter.safetensors").exists()


# ------------------------------------------------------------------------------------------------ state.pt


def moment(i, name, value):
    def change(state):
        state["optimizer"]["state"][i][name] = value
    return change


@pytest.mark.parametrize("change, said", [
    (lambda s: s.update(step=10 ** 9), "step is 1000000000, but must be a whole number from 0 to 2"),
    (lambda s: s.update(step=-1), "step is -1, but must be"),
    (lambda s: s.update(step=1.0), "step is 1.0, but must be"),
    (lambda s: s.pop("trained"), "has no 'trained'"),
    (lambda s: s.update(optimizer=[1]), r"optimizer is \[1\], but must be an object"),
    (lambda s: s["optimizer"].pop("state"), "cannot be read as the state of this run"),
    (lambda s: s["trained"].update({"adapters.0.up_bias": torch.ones(1)}), r"adapters.0.up_bias is \(1,\) in the file and"),
    (lambda s: s["trained"].update({"adapters.0.up_bias": 3}), "adapters.0.up_bias is int in the file and"),
    (lambda s: s["trained"]["projector.up.bias"].fill_(float("nan")), "projector.up.bias holds NaN or infinity"),
    (moment(0, "exp_avg", torch.ones(1)), "optimizer's state of parameter 0 does not fit this model"),
    (moment(3, "exp_avg_sq", torch.ones(2, 2)), "optimizer's state of parameter 3 does not fit this model"),
    (moment(1, "step", torch.ones(7)), "optimizer's state of parameter 1 does not fit this model"),
    (moment(1, "step", torch.tensor(1e9)), "optimizer's state of parameter 1 is not one that training writes"),
    (moment(1, "step", torch.tensor(-4.0)), "optimizer's state of parameter 1 is not one that training writes"),
    (lambda s: s["optimizer"]["state"][2]["exp_avg_sq"].neg_(), "optimizer's state of parameter 2 is not one that training"),
    (lambda s: s["optimizer"]["state"][2]["exp_avg"].fill_(float("inf")), "parameter 2 is not one that training writes"),
    (lambda s: s["optimizer"]["state"][0].pop("exp_avg"), "optimizer's state of parameter 0 does not fit this model"),
    (lambda s: s["optimizer"]["state"].update({99: s["optimizer"]["state"][0]}), "state is not that of 18 parameters"),
    (lambda s: s["optimizer"]["state"].pop(4), "optimizer's state is not that of 18 parameters"),
])
def test_a_state_that_does_not_fit_is_refused(stopped, change, said):
    state = torch.load(stopped / "state.pt")
    change(state)
    torch.save(state, stopped / "state.pt")
    resume(stopped, said)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_state_is_named(stopped, content):
    (stopped / "state.pt").write_bytes(content)
    resume(stopped, "state.pt: cannot be read as the state of this run .*start the run again")


def test_settings_of_the_optimizer_in_a_state_change_nothing(stopped, finished):
    state = torch.load(stopped / "state.pt")
    state["optimizer"]["param_groups"] = [{"params": [0], "lr": "abc"}]
    torch.save(state, stopped / "state.pt")
    train.main(["--resume", str(stopped)])
    assert (stopped / "adapter.safetensors").read_bytes() == (finished / "adapter.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ log.jsonl


@pytest.mark.parametrize("damage, left", [
    (lambda text: text[:-9], 1), (lambda text: b"\xff\xfe" + text, 0), (lambda text: b"", 0), (lambda text: text[:3], 0),
    (lambda text: text.replace(b'"loss"', b'"less"'), 0), (lambda text: b"[" * 100_000, 0),
    (lambda text: text.replace(b'"step": 2', b'"step": 2e0'), 1), (lambda text: text + b'{"step": 3, "lo', 2),
])
def test_a_damaged_log_costs_the_learning_curve_alone(stopped, finished, damage, left, capsys):
    text = (stopped / "log.jsonl").read_bytes()
    (stopped / "log.jsonl").write_bytes(damage(text))
    assert read_losses(stopped) == read_losses(finished)[:left]
    train.main(["--resume", str(stopped)])
    assert ("log.jsonl, line " in capsys.readouterr().err) == (damage(text) != b"")
    assert (stopped / "log.jsonl").read_bytes() == b"".join(text.splitlines(keepends=True)[:left])
    assert (stopped / "adapter.safetensors").read_bytes() == (finished / "adapter.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("change, said", [
    ({"lbc": "foo"}, "lbc is 'foo', but only 'judge_last' or"), ({"epochs": "3"}, "epochs is '3', but must be a whole number"),
    ({"epochs": None}, "has no 'epochs'"), ({"batch_size": 0}, "batch_size is 0, but must be"),
    ({"adapter_dim": 10 ** 30}, "adapter_dim is 1000.*, but must be"), ({"image": "yes"}, "image is 'yes', but must be true or"),
    ({"dataset": 3}, "dataset is 3, but must be a text"), ({"values": {"Boot Style": "Chelsea"}}, "the values of 'Boot Style'"),
    ({"values": {"Boot Style": []}}, "the values of 'Boot Style' must be a list of texts, none of them empty"),
    ({"values": {"Boot Style": ["Combat", " "]}}, "the values of 'Boot Style' must be a list of texts, none of them empty"),
    ({"values": {}}, "values is empty; it must hold each attribute"),
    ({"data_fingerprint": {}}, "data_fingerprint: has no 'train'"), ({"weights_fingerprint": [1]}, "weights_fingerprint is"),
    ({"lbc_ratio": float("nan")}, "lbc_ratio is nan, but must be"), ({"adapter": ["rep"]}, "adapter is .*, but only 'rep'"),
])
def test_a_config_that_was_edited_is_refused(stopped, change, said):
    record = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=said) as error:
        read_config(stopped)
    assert str(stopped / "config.json") in str(error.value)


def test_a_folder_name_that_is_no_utf8_is_read_back(flags, data_root, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(data_root, odd)
    train.main([*flags, "--data", str(odd), "--epochs", "1", "--out", str(tmp_path / "run")])
    assert read_config(tmp_path / "run")[0].data == str(odd)
    train.main(["--resume", str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------------ the lock


def together(tmp_path, *arguments):
    """Two trainings that start at the same time: their exit codes, and what they say on stderr."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    outcomes = at_once([lambda folder=folder: command("train.py", arguments, folder, limit_s=60) for folder in folders])
    assert [held(outcome) for outcome in outcomes] == [None, None]
    return [outcome.code for outcome in outcomes], [outcome.err for outcome in outcomes]


def test_of_two_that_start_in_one_folder_one_trains(flags, tmp_path, finished):
    codes, said = together(tmp_path, *flags, "--out", str(tmp_path / "run"))
    assert sorted(codes) == [0, 2]
    assert "another process is training in this folder" in said[codes.index(2)] or "holds a run" in said[codes.index(2)]
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == (finished / "adapter.safetensors").read_bytes()


def test_without_out_two_that_start_together_get_two_folders(flags, tmp_path, finished, monkeypatch):
    monkeypatch.setattr(run_folder, "PROJECT", tmp_path)
    codes, _ = together(tmp_path, *flags)
    assert codes == [0, 0]
    trained = [(tmp_path / "runs" / f"shoes-2-{n}" / "adapter.safetensors").read_bytes() for n in (1, 2)]
    assert trained == [(finished / "adapter.safetensors").read_bytes()] * 2


def test_a_folder_is_locked_though_its_config_is_replaced(stopped):
    with run_folder.only_process(stopped):
        shutil.copy(stopped / "config.json", stopped / "new")
        os.replace(stopped / "new", stopped / "config.json")
        resume(stopped, "another process is training in this folder")


def test_a_folder_that_was_there_before_stays(flags, tmp_path):
    (tmp_path / "mine").mkdir()
    for out, there in ((tmp_path / "mine", True), (tmp_path / "new", False)):
        with pytest.raises(UserError, match="no data set 'boots'"):
            train.main([*flags, "--dataset", "boots", "--out", str(out)])
        assert out.exists() == there


def test_an_out_that_cannot_be_made_is_found_before_anything_is_loaded(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_sources", None)
    (tmp_path / "file").write_text("")
    for out, said in (("file", "is a file; name a folder"), ("file/run", "cannot be made .Not a directory.; name another")):
        with pytest.raises(UserError, match=said):
            train.main([*flags, "--out", str(tmp_path / out)])


# ------------------------------------------------------------------------------------------------ weights with NaN


def damaged(llama_dir, folder, name, value):
    """A copy of the LLaMA, in which one number of a tensor is NaN or infinite."""
    shutil.copytree(llama_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_frozen_weight_that_is_not_finite_is_named(flags, finished, llama_dir, tmp_path, monkeypatch):
    bad = damaged(llama_dir, tmp_path / "llama", "model.layers.1.mlp.up_proj.weight", float("nan"))
    said = "llama: the weights are damaged: layers.1.mlp.up_proj.weight holds NaN or infinity; download them again"
    with pytest.raises(UserError, match=said) as error:
        train.main([*flags, "--llama", str(bad), "--out", str(tmp_path / "run")])
    assert "--lr" not in str(error.value)
    monkeypatch.setattr("support.answering.check_weights", lambda *_: None)
    run = evaluate.load(finished, llama=str(bad))
    for constrain in (False, True):
        with pytest.raises(UserError, match=said):
            run.answer(flags[1] + "/images/B0001.jpg", "a shoe", "Boot Style", constrain)


# ------------------------------------------------------------------------------------------------ long values


def test_a_value_of_many_tokens_is_not_cut_off(finished, monkeypatch):
    """The longest known value has 40 tokens with its end token: a model that gives it is not stopped at 32."""
    run = evaluate.load(finished)
    long = " ".join(["black"] * 500)
    ids = run.model.tokenizer.encode(long)[:39]
    run.values["Boot Style"].append(run.model.tokenizer.decode(ids))
    wanted, step = [*ids, run.model.tokenizer.eos_id], iter(range(100))
    assert len(wanted) == 40
    monkeypatch.setattr("eiven.nucleus", lambda *_: torch.tensor([wanted[next(step)]]))
    answer = run.answer(run.sources.data / "images" / "B0001.jpg", "a shoe", "Boot Style")
    assert answer.value == run.values["Boot Style"][-1]


def test_values_that_do_not_fit_are_found_before_any_answer(finished, data_root):
    from data import read_split
    from support.answering import check_lengths
    run, products = evaluate.load(finished), read_split(data_root, "shoes", "test")
    check_lengths(run, products, values=run.values)
    run.values["Boot Style"].append("black " * 3000)
    check_lengths(run, products)
    with pytest.raises(UserError, match="its question has .* tokens, more than the 2,048"):
        check_lengths(run, products, values=run.values)


# ------------------------------------------------------------------------------------------------ the terminal, the cache


def test_a_terminal_without_chinese_gets_numbers(finished, data_root, tmp_path):
    def ascii_terminal():
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
        sys.stderr.reconfigure(encoding="ascii", errors="strict")

    image = data_root / "images" / "B0001.jpg"
    outcome = command("evaluate.py", [str(finished), "--image", str(image), "--text", "鞋", "--attribute", "靴子"], tmp_path,
                      before=ascii_terminal)
    assert held(outcome) is None and outcome.code == 0
    assert outcome.out.startswith("\\u9774\\u5b50: ") and "note: '\\u9774\\u5b50' is not an attribute" in outcome.err


def test_the_cache_can_be_put_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("EIVEN_CACHE", str(tmp_path))
    assert console.cache_folder() == tmp_path
    monkeypatch.delenv("EIVEN_CACHE")
    assert console.cache_folder() == Path(config.PROJECT) / "cache"


def test_a_cache_that_cannot_be_written_says_how_to_move_it(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(config, "FEATURE_CACHE", tmp_path / "file" / "cache" / "features.sqlite")
    with pytest.raises(UserError, match="cannot be used .*name another folder with the environment variable EIVEN_CACHE"):
        evaluate.load(finished)

    def no_permission():
        raise PermissionError(13, "Permission denied", str(console.cache_folder() / "demo" / "general"))
    with pytest.raises(SystemExit):
        console.run(no_permission)
    assert capsys.readouterr().err.rstrip().endswith("the environment variable EIVEN_CACHE names another folder for it")
