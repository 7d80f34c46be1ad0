"""The training loop and its command: what a run leaves, one step by hand, and resuming bit for bit."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from conftest import command, randomize
from safetensors.torch import load_file, save_file

import evaluate
import train
from base.console import UserError, read_json, write_json
from data import encode_examples, epoch, read_split
from eiven import EIVEN
from support import run_folder
from support.answering import prepare_photos

NO_SCALER = torch.amp.GradScaler(enabled=False)


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in log(run)]


def read(run, name):
    return read_json(run / name, "JSON")


def same_run(one, other):
    """Whether two runs are equal bit for bit: losses, what was trained, and answers."""
    trained, others = (load_file(run / "adapter.safetensors") for run in (one, other))
    equal = all(torch.equal(tensor, others[name]) for name, tensor in trained.items())
    for split in ("", "val"):
        answers = [(run / split / "predictions.tsv").read_bytes() for run in (one, other)]
        equal = equal and answers[0] == answers[1]
    return equal and losses(one) == losses(other)


# ---------------------------------------------------------------------------------------- a run


def test_a_run_leaves_what_the_readme_promises(run):
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    scores = {"metrics.json", "predictions.tsv", "report.html",
              "confusion-boot-style.png", "confusion-heel-height.png"}
    assert written == {"config.json", "log.jsonl", "state.pt", "adapter.safetensors",
                       *scores, *(f"val/{name}" for name in scores)}
    config = read(run, "config.json")
    assert config["values"]["Heel Height"] == ["Flat", "High Heel"]
    assert [line["step"] for line in log(run)] == list(range(1, 16))
    assert not any(name.startswith(("layers", "embed")) for name in load_file(run / "adapter.safetensors"))
    assert "threshold" in read(run / "val", "metrics.json")["confidence"]
    assert "threshold" not in read(run, "metrics.json")["confidence"]


def test_the_first_line_is_the_sources_and_the_seed_makes_the_run(run, flags, tmp_path, capsys):
    """With one label a value, val has one product of each of five values, and test all of its 15."""
    train.main([*flags, "--out", str(tmp_path / "again")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"data {flags[1]}, data set shoes; LLaMA {flags[5]}; ViT ")
    assert said[-1] == f"results: {tmp_path / 'again' / 'report.html'}"
    assert same_run(run, tmp_path / "again")
    train.main([*flags, "--seed", "1", "--labels", "1", "--out", str(tmp_path / "other")])
    assert losses(run)[0] != losses(tmp_path / "other")[0]
    assert [read(tmp_path / "other" / split, "metrics.json")["n"] for split in ("val", "")] == [5, 15]


@pytest.mark.parametrize("more, steps, shape", [
    (["--adapter", "mlp"], 5, (1, 32, 8)), (["--adapter", "mlp-linear", "--adapter-dim", "4"], 5, (1, 32, 4)),
    (["--adapter-dim", "4", "--projector-dim", "5"], 5, (2, 16, 2)),
    *((more, 5, (2, 16, 4)) for more in (
        ["--no-image"], ["--no-text"], ["--lbc", "judge_first"], ["--features", "single"], ["--lr", "0.1"],
        ["--dtype", "int8"])),
    (["--lbc", "none"], 3, (2, 16, 4)), (["--lbc-ratio", "2"], 8, (2, 16, 4)),
    (["--labels", "all"], 8, (2, 16, 4)),
])
def test_flags_reach_the_training_and_are_read_back(run, flags, tmp_path, monkeypatch, more, steps, shape):
    """Of 20 products, and as many comparisons, in batches of 8; scored again, the answers are the same."""
    out = tmp_path / "run"
    train.main([*flags, *more, "--epochs", "1", "--out", str(out)])
    assert len(losses(out)) == steps
    assert losses(out)[:3] != losses(run)[:3]
    assert load_file(out / "adapter.safetensors")["adapters.0.up_weight"].shape == shape
    photos = (out / "report.html").read_text(encoding="utf-8").count("image/jpeg")
    assert bool(photos) == ("--no-image" not in more)
    answers = (out / "predictions.tsv").read_bytes()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out)])
    evaluate.main()
    assert (out / "predictions.tsv").read_bytes() == answers


def test_batches_rates_and_held_out_values(flags, tmp_path, monkeypatch, capsys):
    """One of three boot styles is held out: 16 products and 16 comparisons in batches of 7, the last of 4."""
    batches = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *run: batches.append(run[-1]) or step(*run))
    more = ["--batch-size", "7", "--epochs", "2", "--holdout-values", "1"]
    train.main([*flags, *more, "--out", str(tmp_path / "run")])
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 4] * 2
    first, second = (sorted(sum(half, [])) for half in (batches[:5], batches[5:]))
    assert first != second                              # each epoch has its own partners
    rates = [train.learning_rate(s, 10, 5, 9e-3 * 7 / 256) for s in range(10)]
    assert [line["lr"] for line in log(tmp_path / "run")] == rates
    assert [line["epoch"] for line in log(tmp_path / "run")] == [1] * 5 + [2] * 5
    [held_out] = read(tmp_path / "run", "config.json")["held_out"]["Boot Style"]
    assert f"held out of training and val: Boot Style: {held_out}\n" in capsys.readouterr().out
    assert not any(held_out in e.answer for e in first)
    assert read(tmp_path / "run" / "val", "metrics.json")["n"] == 8
    apart = read(tmp_path / "run", "metrics.json")["seen_and_held_out"]
    assert [apart[f"values {name}"]["n"] for name in ("trained on", "held out")] == [12, 3]


# ---------------------------------------------------------------------------------------- a step


@pytest.fixture
def step(run, data_root):
    """(a run with random trained values, its optimizer at rate 0, 9 examples whose photos are prepared)."""
    loaded = evaluate.load(run, data_needed=True)
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
        loss = train.train_step(run, optimizer, NO_SCALER, examples)
    assert loss == (pytest.approx(total.item() / 9, rel=1e-4), tokens)
    for parameter, gradient in zip(parameters.values(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_not_finite_takes_no_step(step):
    run, _, examples = step
    before = {name: p.clone() for name, p in run.model.trainable_parameters().items()}
    run.model.projector.up.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="its largest gradient inf|its largest gradient nan"):
        train.train_step(run, train.make_optimizer(run.model), NO_SCALER, examples)
    assert all(torch.equal(p, before[name]) for name, p in run.model.trainable_parameters().items())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(flags, tmp_path, monkeypatch):
    forward = EIVEN.forward
    count = itertools.count(1)
    monkeypatch.setattr(EIVEN, "forward", lambda *arguments: forward(*arguments) / (next(count) != 7))
    said = r"step 7 \(epoch 2\) .* loss is (nan|inf).* begins with .Question: .*--lr"
    with pytest.raises(UserError, match=said):
        train.main([*flags, "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "state.pt")
    assert state["step"] == 6
    assert all(p.isfinite().all() for p in state["trained"].values())


def test_a_frozen_weight_that_is_not_finite_is_named(flags, llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "llama")
    tensors = load_file(llama_dir / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 5] = math.nan
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    with pytest.raises(UserError, match="damaged: layers.1.mlp.up_proj.weight holds NaN"):
        train.main([*flags, "--llama", str(tmp_path / "llama"), "--out", str(tmp_path / "run")])


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


@pytest.mark.parametrize("nth", [3, 9, 17, 18, 20, 27])
def test_a_killed_run_goes_on_bit_for_bit(run, flags, tmp_path, nth):
    """SIGKILL where the n-th file would replace the one before: config, log, 15 states, what was trained,
    the scores of val and of test.
    """
    out = tmp_path / "run"
    replace = os.replace
    count = itertools.count(1)

    def killed(*paths):
        if next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    def before():
        run_folder.SAVE_EVERY = -1                      # a state after every step
        os.replace = killed

    assert command("train.py", [*flags, "--out", out], tmp_path, 60, before).signal == signal.SIGKILL
    assert len(log(out)) == min(nth - 2, 15)
    if nth <= 17:
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 99, "lo')              # the line that was being written
    train.main(["--resume", str(out)])
    assert same_run(run, out)
    assert {path.name for path in out.rglob("*")} == {path.name for path in run.rglob("*")}


def at_step(monkeypatch, n, do):
    """Before step n of the next training, do() is called."""
    step = train.train_step
    count = itertools.count(1)
    monkeypatch.setattr(train, "train_step", lambda *run: (next(count) != n or do()) and step(*run))


def test_ctrl_c_says_how_to_go_on_and_later_steps_are_done_again(run, flags, tmp_path, monkeypatch, capsys):
    """There is no state yet, but a log of six steps.  With less memory it is the same run."""
    at_step(monkeypatch, 7, lambda: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--out", str(tmp_path / "a run")])
    assert f"python train.py --resume '{tmp_path / 'a run'}'" in capsys.readouterr().err
    assert len(log(tmp_path / "a run")) == 6 and not (tmp_path / "a run" / "state.pt").exists()
    train.main([*flags, "--resume", "--out", str(tmp_path / "a run"), "--grad-checkpoint"])
    assert same_run(run, tmp_path / "a run")


def test_a_folder_that_is_moved_while_it_trains_stops_and_goes_on(run, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SAVE_EVERY", -1)
    at_step(monkeypatch, 4, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    with pytest.raises(UserError, match="was its folder moved"):
        train.main([*flags, "--out", str(tmp_path / "run")])
    train.main(["--resume", str(tmp_path / "moved")])
    assert same_run(run, tmp_path / "moved")


def test_flags_beside_resume(run):
    for more in (["--seed", "7"], ["--labels", "all"], ["--no-image"]):
        with pytest.raises(UserError, match="It keeps its settings: leave the flag out"):
            train.parse(["--resume", str(run), *more])
    for wrong in (["--resume"], ["--resume", str(run), "--out", str(run)], ["--resum", str(run)]):
        with pytest.raises(SystemExit):
            train.parse(wrong)
    config, folder = train.parse(["--resume", str(run), "--labels", "4", "--threads", "3", "--data", "here"])
    assert (folder, config.epochs, config.threads, config.data) == (run, 3, 3, "here")


def test_a_run_that_starts_from_another_goes_on_when_that_is_gone(run, flags, tmp_path, monkeypatch):
    """Its first state holds the other's values.  A run that has no state yet reads the other one again."""
    other = shutil.copytree(run, tmp_path / "other")
    whole, out, early = (tmp_path / name for name in ("whole", "out", "early"))
    more = [*flags, "--seed", "1", "--init", str(other), "--out"]
    train.main([*more, str(whole)])
    at_step(monkeypatch, 3, lambda: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(KeyboardInterrupt):
        train.main([*more, str(out)])
    assert read(out, "config.json")["init_id"] == run_folder.read_config(run)[1]["id"]
    begin = torch.load(out / "state.pt")["trained"]
    assert all(torch.equal(begin[name], p) for name, p in load_file(run / "adapter.safetensors").items())
    shutil.copytree(out, early)
    (early / "state.pt").unlink()
    shutil.rmtree(other)
    train.main(["--resume", str(out)])
    with pytest.raises(UserError, match="other/config.json: does not exist"):
        train.main(["--resume", str(early)])
    shutil.copytree(out, other)
    with pytest.raises(UserError, match="other is not the run any more that this one starts from"):
        train.main(["--resume", str(early)])
    shutil.rmtree(other)
    shutil.copytree(run, other)
    train.main(["--resume", str(early)])
    assert same_run(whole, out) and same_run(whole, early)


@pytest.mark.parametrize("more, said", [
    (["--adapter-dim", "4"], "adapter_dim = 8, this one 4"), ([], "trained with another llama than"),
])
def test_a_run_starts_from_one_of_the_same_kind_alone(run, flags, tmp_path, more, said):
    other = shutil.copytree(run, tmp_path / "other")
    write_json(other / "config.json", read(other, "config.json") | {"weights_fingerprint": {}})
    with pytest.raises(UserError, match=said):
        train.main([*flags, *more, "--init", str(other), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_help_has_groups_with_examples_that_run_and_a_misspelt_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = capsys.readouterr().out
    examples = re.findall(r"^(\w.*):\n  e\.g\. python train\.py (.*)$", said, re.M)
    assert [title for title, _ in examples] == ["data and weights", "model", "training", "machine"]
    for _, example in examples:
        train.parse(example.split())
    with pytest.raises(SystemExit):
        train.parse(["--epoch", "3"])
    assert "unrecognized arguments: --epoch 3 (did you mean '--epochs'?)\n" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_data(run, tmp_path, data_root, capsys):
    """From another folder it does.  What stands in two splits is said."""
    data = shutil.copytree(data_root, tmp_path / "data")
    resume = ["--resume", str(run), "--data", str(data)]
    train.main(resume)
    first = (data / "shoes" / "train.tsv").read_text().splitlines()[1]
    with open(data / "shoes" / "test.tsv", "a") as file:
        file.write(first + "\n")
    with pytest.raises(UserError, match="the products or photos in .* are not those"):
        train.main(resume)
    assert "1 of 16 products of test have the id of a product of train" in capsys.readouterr().err
