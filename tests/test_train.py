"""The training loop and its command: what a run leaves, one step by hand, and resuming bit for bit."""

import itertools
import math
import os
import re
import resource
import shutil
import signal
import sys

import pytest
import torch
from conftest import (command, ends_at, held, interrupt, kill, log, losses, randomize, result, resume,
                      train_run, train_tokenizer)
from safetensors.torch import load_file

import evaluate
import train
from base.console import UserError, read_json, write_json
from data import encode_examples, epoch, read_split
from eiven import EIVEN
from llama import Tokenizer
from support import run_folder
from support.answering import prepare_photos


def read(run, name):
    return read_json(run / name, "JSON")


def at_step(monkeypatch, n, do):
    """Before step n of the next training, do(run) is called."""
    train_step, count = train.train_step, itertools.count(1)

    def step(run, *more):
        if next(count) == n:
            do(run)
        return train_step(run, *more)
    monkeypatch.setattr(train, "train_step", step)


# ---------------------------------------------------------------------------------------- a run


def test_a_run_leaves_what_the_readme_promises(run):
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    scores = {"metrics.json", "predictions.tsv", "report.html",
              "confusion-boot-style.png", "confusion-heel-height.png"}
    assert written == {"config.json", "log.jsonl", "state.pt", "adapter.safetensors",
                       *scores, *(f"val/{name}" for name in scores)}
    assert [line["step"] for line in log(run)] == list(range(1, 16))
    assert "threshold" in read(run / "val", "metrics.json")["confidence"]
    assert "threshold" not in read(run, "metrics.json")["confidence"]


def test_the_first_line_is_the_sources_and_the_seed_makes_the_run(run, flags, tmp_path, capsys):
    """With one label a value, val has one product of each of five values, and test all of its 15."""
    again = train_run(tmp_path / "again", flags)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"data {flags[1]}, data set shoes; LLaMA {flags[5]}; ViT ")
    assert said[-1] == f"results: {again / 'report.html'}"
    assert result(run) == result(again)
    other = train_run(tmp_path / "other", flags, "--seed", 1, "--labels", 1)
    assert losses(run)[0] != losses(other)[0]
    assert [read(other / split, "metrics.json")["n"] for split in ("val", "")] == [5, 15]


FLAGS = """
--adapter mlp                            5 steps (1, 32, 8)
--adapter mlp-linear --adapter-dim 4     5 steps (1, 32, 4)
--adapter-dim 4 --projector-dim 5        5 steps (2, 16, 2)
--no-image                               5 steps (2, 16, 4)
--no-text                                5 steps (2, 16, 4)
--lbc judge_first                        5 steps (2, 16, 4)
--features single                        5 steps (2, 16, 4)
--lr 0.1                                 5 steps (2, 16, 4)
--dtype int8                             5 steps (2, 16, 4)
--lbc none                               3 steps (2, 16, 4)
--lbc-ratio 2                            8 steps (2, 16, 4)
--labels all                             8 steps (2, 16, 4)
"""


@pytest.mark.parametrize("more, steps, shape", re.findall(r"(--.*?) +(\d) steps (.*)", FLAGS))
def test_flags_reach_the_training_and_are_read_back(run, flags, tmp_path, monkeypatch, more, steps, shape):
    """Of 20 products, and as many comparisons, in batches of 8; scored again, the answers are the same."""
    out = train_run(tmp_path / "run", flags, *more.split(), "--epochs", 1)
    assert len(losses(out)) == int(steps)
    assert losses(out)[:3] != losses(run)[:3]
    assert str(tuple(load_file(out / "adapter.safetensors")["adapters.0.up_weight"].shape)) == shape
    assert ("image/jpeg" in (out / "report.html").read_text("utf-8")) == (more != "--no-image")
    answers = (out / "predictions.tsv").read_bytes()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out)])
    evaluate.main()
    assert (out / "predictions.tsv").read_bytes() == answers


def test_batches_rates_and_held_out_values(flags, tmp_path, monkeypatch):
    """One of three boot styles is held out: 16 products and 16 comparisons in batches of 7, the last of 4."""
    batches = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *run: batches.append(run[-1]) or step(*run))
    out = train_run(tmp_path / "run", flags, "--batch-size", 7, "--epochs", 2, "--holdout-values", 1)
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 4] * 2
    first, second = (sorted(sum(half, [])) for half in (batches[:5], batches[5:]))
    assert first != second                              # each epoch has its own partners
    rates = [train.learning_rate(s, 10, 5, 9e-3 * 7 / 256) for s in range(10)]
    assert [line["lr"] for line in log(out)] == rates
    assert [line["epoch"] for line in log(out)] == [1] * 5 + [2] * 5
    [held_out] = read(out, "config.json")["held_out"]["Boot Style"]
    assert not any(held_out in e.answer for e in first)
    assert read(out / "val", "metrics.json")["n"] == 8
    apart = read(out, "metrics.json")["seen_and_held_out"]
    assert [apart[f"values {name}"]["n"] for name in ("trained on", "held out")] == [12, 3]


# ---------------------------------------------------------------------------------------- a step


@pytest.fixture
def step(run, data_root):
    """(a run with random trained values, its optimizer at rate 0, 9 examples whose photos are prepared)."""
    loaded = evaluate.load(run)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # choose_device says why
    randomize(loaded.model)
    products = read_split(data_root, "shoes", "train")
    prepare_photos(loaded, products)
    optimizer = train.make_optimizer(loaded.model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return loaded, optimizer, epoch(products, 0, 0)[:9]


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_step_by_hand(step, micro_batch_size):
    """The mean of the losses of each example alone, with its own photos, and the gradient of this mean."""
    run, optimizer, examples = step
    total, tokens = 0, 0
    for example in examples:
        [encoded], photos = encode_examples([example], run.model.tokenizer)
        total = total + run.model([encoded], run.photo_features.read(photos))
        tokens += len(encoded.prompt) + len(encoded.answer)
    parameters = run.model.trainable_parameters()
    expected = torch.autograd.grad(total / 9, parameters.values())
    run.config.micro_batch_size = micro_batch_size
    for _ in range(2):                                  # the gradient of a step before is gone
        loss = train.train_step(run, optimizer, torch.GradScaler(enabled=False), examples)
    assert loss == (pytest.approx(total.item() / 9, rel=1e-4), tokens)
    for parameter, gradient in zip(parameters.values(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("do, said", [
    (lambda run: run.model.register_forward_hook(lambda model, inputs, loss: loss / 0),
     r"step 7 \(epoch 2\) .* loss is inf.* begins with .Question: .*--lr"),
    (lambda run: run.model.projector.up.weight.register_hook(lambda gradient: gradient / 0),
     "its largest gradient (inf|nan)"),
    (lambda run: run.model.llama.norm.weight.data.fill_(math.nan), "damaged: norm.weight holds NaN"),
])
def test_what_is_not_finite_takes_no_step_and_is_named(flags, tmp_path, monkeypatch, do, said):
    at_step(monkeypatch, 7, do)
    with pytest.raises(UserError, match=said):
        train_run(tmp_path, flags)
    state = torch.load(tmp_path / "state.pt")
    assert state["step"] == 6
    assert all(p.isfinite().all() for p in state["trained"].values())


def test_learning_rate():
    rates = [train.learning_rate(step, 150, 10, 1e-3) for step in range(150)]
    cosine = [5e-4 * (1 + math.cos(math.pi * step / 130)) for step in range(130)]
    assert rates == pytest.approx([*(1e-3 * (step + 1) / 20 for step in range(20)), *cosine])
    # One epoch alone: the warm-up is half of its four steps; and one step alone.
    assert [train.learning_rate(step, 4, 4, 1.0) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])
    assert train.learning_rate(0, 1, 1, 1.0) == 1


def test_the_optimizer_has_all_that_is_trained_and_biases_do_not_decay(tiny):
    model = EIVEN(*tiny, 24)
    decayed, biases = train.make_optimizer(model).param_groups
    trained = model.trainable_parameters().values()
    assert set(biases["params"]) == {p for p in trained if p.dim() == 1}
    assert {*decayed["params"], *biases["params"]} == {*trained}
    assert [group["weight_decay"] for group in (decayed, biases)] == [0.02, 0.0]
    assert decayed["betas"] == biases["betas"] == (0.9, 0.95)


# ---------------------------------------------------------------------------------------- resuming


def fill_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@pytest.mark.parametrize("end", [kill, fill_the_disk])
@pytest.mark.parametrize("nth", [5, 8, 26, 50, 53, 59, 80])
def test_a_run_that_was_ended_goes_on_bit_for_bit(run, flags, tmp_path, monkeypatch, end, nth):
    """Each file is three changes on the disk: config, log, 15 states, what was trained, the scores of val and
    of test.  Here the run ends before the second of three.  A full disk is one line.
    """
    out = tmp_path / "run"
    monkeypatch.setattr(run_folder, "SAVE_EVERY", -1)   # a state after every step
    done = command("train.py", [*flags, "--out", out], tmp_path, 60, ends_at(nth, end))
    assert done.signal == signal.SIGKILL or done.code and not held(done)
    if nth <= 50:
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 99, "lo')              # the line that was being written
    resume(out)
    assert result(run) == result(out)
    assert {path.name for path in out.rglob("*")} == {path.name for path in run.rglob("*")}


def test_ctrl_c_says_how_to_go_on_and_later_steps_are_done_again(run, flags, tmp_path, monkeypatch, capsys):
    """There is no state yet, but a log of six steps.  With less memory it is the same run."""
    out = tmp_path / "a run"
    at_step(monkeypatch, 7, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(out, flags)
    assert f"python train.py --resume '{out}'" in capsys.readouterr().err
    assert len(log(out)) == 6 and not (out / "state.pt").exists()
    resume(out, "--grad-checkpoint")
    assert result(run) == result(out)


def test_a_folder_that_is_moved_while_it_trains_stops_and_goes_on(run, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SAVE_EVERY", -1)
    at_step(monkeypatch, 4, lambda run: run.folder.rename(tmp_path / "moved"))
    with pytest.raises(UserError, match="was its folder moved"):
        train_run(tmp_path / "run", flags)
    resume(tmp_path / "moved")
    assert result(run) == result(tmp_path / "moved")


def test_flags_beside_resume(run):
    for more in (["--seed", "7"], ["--labels", "all"]):
        with pytest.raises(UserError, match="It keeps its settings: leave the flag out"):
            train.parse(["--resume", str(run), *more])
    config, folder = train.parse(["--resume", str(run), "--labels", "4", "--threads", "3", "--data", "here"])
    assert (folder, config.epochs, config.threads, config.data) == (run, 3, 3, "here")


def test_a_run_that_starts_from_another_goes_on_when_that_is_gone(run, own, flags, tmp_path, monkeypatch):
    """Its first state holds the other's values.  A run that has no state yet reads the other one again."""
    out, early = tmp_path / "out", tmp_path / "early"
    at_step(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(out, flags, "--seed", 1, "--init", own)
    begin = torch.load(out / "state.pt")["trained"]
    assert all(torch.equal(begin[name], p) for name, p in load_file(run / "adapter.safetensors").items())
    shutil.copytree(out, early)
    (early / "state.pt").unlink()
    own.rename(tmp_path / "gone")
    resume(out)
    with pytest.raises(UserError, match="run/config.json: does not exist"):
        resume(early)
    shutil.copytree(out, own)
    with pytest.raises(UserError, match="run is not the run any more that this one starts from"):
        resume(early)
    shutil.rmtree(own)
    (tmp_path / "gone").rename(own)
    resume(early)
    assert result(out) == result(early)


def test_a_run_starts_from_one_of_the_same_kind_alone(own, flags, tmp_path):
    write_json(own / "config.json", read(own, "config.json") | {"weights_fingerprint": {}})
    for size, said in ("4", "adapter_dim = 8, this one 4"), ("8", "trained with another llama than"):
        with pytest.raises(UserError, match=said):
            train_run(tmp_path / "new", flags, "--init", own, "--adapter-dim", size)


def test_help_has_groups_with_examples_that_run_and_a_misspelt_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = capsys.readouterr().out
    examples = re.findall(r"^\w.*:\n  e\.g\. python train\.py (.*)$", said, re.M)
    assert len(examples) == 4
    for example in examples:
        train.parse(example.split())
    with pytest.raises(SystemExit):
        train.parse(["--epoch", "3"])
    assert "unrecognized arguments: --epoch 3 (did you mean '--epochs'?)\n" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_data(run, tmp_path, data_root, capsys):
    """From another folder it does.  What stands in two splits is said."""
    data = shutil.copytree(data_root, tmp_path / "data")
    resume(run, "--data", str(data))
    first = (data / "shoes" / "train.tsv").read_text().splitlines()[1]
    with open(data / "shoes" / "test.tsv", "a") as file:
        file.write(first + "\n")
    with pytest.raises(UserError, match="the products or photos in .* are not those"):
        resume(run, "--data", str(data))
    assert "1 of 16 products of test have the id of a product of train" in capsys.readouterr().err


def test_a_value_that_the_tokenizer_changes_is_named(tmp_path, capsys):
    tokenizer = Tokenizer(train_tokenizer(tmp_path / "tokenizer.model", "nmt_nfkc"))
    train.note_changed({"Sleeve": ["Long Sleeve", "½ Sleeve"]}, tokenizer)
    assert "the value '½ Sleeve' into '1⁄2 Sleeve'" in capsys.readouterr().err
