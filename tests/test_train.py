"""The commands as a user runs them, on a tiny world: what they write, and resuming."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file

import evaluate
import train
from base.console import UserError
from support import answering, run_folder

PROJECT = Path(__file__).resolve().parent.parent


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_readme_promises(run, flags):
    written = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    scores = {"metrics.json", "predictions.tsv", "report.html", "confusion-boot-style.png", "confusion-heel-height.png"}
    assert written == {"config.json", "log.jsonl", "state.pt", "adapter.safetensors"} | scores | {f"val/{s}" for s in scores}
    config = json.loads((run / "config.json").read_text())
    assert (config["labels"], config["lbc"], config["seed"], config["lr"]) == (4, "judge_last", 0, None)
    assert config["values"]["Heel Height"] == ["Flat", "High Heel"]
    assert set(config["data_fingerprint"]) == {"train", "val", "test"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert all(line["tokens"] > 0 and line["lr"] > 0 for line in lines)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n"] == 15 and metrics["split"] == "test" and sum(m["n"] for m in metrics["attributes"].values()) == 15
    assert not any(name.startswith(("layers", "embed", "model")) for name in load_file(run / "adapter.safetensors"))


def test_a_second_run_with_the_same_seed_is_the_same_run(run, flags, tmp_path):
    train.main([*flags, "--out", str(tmp_path / "again")])
    assert losses(run) == losses(tmp_path / "again")
    for name, tensor in load_file(run / "adapter.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "again" / "adapter.safetensors")[name])
    train.main([*flags, "--out", str(tmp_path / "other"), "--seed", "1"])
    assert losses(run) != losses(tmp_path / "other")


def cut_and_resume(flags, folder, stopped_after, monkeypatch):
    """Stop a run in the middle of a step, as a power cut does, and continue it."""
    class PowerCut(Exception):
        pass

    step, done = train.train_step, []

    def counted(*arguments):
        if len(done) == stopped_after:
            raise PowerCut
        done.append(1)
        return step(*arguments)

    monkeypatch.setattr(run_folder, "SAVE_EVERY", -1)        # a state after every step
    monkeypatch.setattr(train, "train_step", counted)
    with pytest.raises(PowerCut):
        train.main([*flags, "--out", str(folder)])
    monkeypatch.setattr(train, "train_step", step)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 99, "lo')                   # the line that was being written
    train.main(["--resume", str(folder)])


@pytest.mark.parametrize("stopped_after", [1, 5, 7, 14])
def test_a_resumed_run_is_the_same_run_bit_for_bit(run, flags, tmp_path, monkeypatch, stopped_after):
    cut_and_resume(flags, tmp_path / "cut", stopped_after, monkeypatch)
    assert losses(run) == losses(tmp_path / "cut")
    for name, tensor in load_file(run / "adapter.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "cut" / "adapter.safetensors")[name]), name
    assert (run / "predictions.tsv").read_bytes() == (tmp_path / "cut" / "predictions.tsv").read_bytes()


def test_an_int8_run_is_resumed_and_says_what_it_is(run, flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--dtype", "int8"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    cut_and_resume(flags, tmp_path / "cut", 7, monkeypatch)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") != losses(run)
    assert losses(tmp_path / "whole") == pytest.approx(losses(run), rel=0.05)
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text())["dtype"] == "torch.int8"
    assert json.loads((run / "metrics.json").read_text())["dtype"] == "torch.float32"
    for more in (["--merge"], ["--export", str(tmp_path / "exported")]):
        done = run_command("evaluate.py", tmp_path / "whole", *more)
        assert done.returncode == 2 and "error: int8 weights cannot hold a merged adapter" in done.stderr
        assert run_command("evaluate.py", tmp_path / "whole", *more, "--dtype", "fp32").returncode == 0


def test_a_killed_process_is_resumed(flags, tmp_path, run):
    """The real thing: SIGKILL in the middle of the training, then --resume --out with the flags given again."""
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", "import train; from support import run_folder; run_folder.SAVE_EVERY = -1; train.main()", *flags,
                                "--out", str(out)], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "EIVEN_CACHE": str(tmp_path)})   # sums depend on threads
    give_up = time.monotonic() + 200
    while time.monotonic() < give_up and (not (out / "log.jsonl").exists() or len(losses_so_far(out)) < 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(losses_so_far(out)) < 15, "the process was to be killed in the middle"
    train.main([*flags, "--out", str(out), "--resume"])
    assert losses(out) == losses(run)


def losses_so_far(run):
    return (run / "log.jsonl").read_text().splitlines()


@pytest.mark.parametrize("more", [
    ["--lbc", "judge_first"], ["--lbc", "better_instance"], ["--lbc", "none"], ["--features", "single"], ["--no-text"],
    ["--no-image"], ["--adapter", "mlp"], ["--adapter", "mlp-linear"], ["--dtype", "bf16"], ["--dtype", "int8"], ["--lbc-ratio", "0.5"],
    ["--micro-batch-size", "3"], ["--grad-checkpoint"], ["--labels", "all"], ["--adapter-dim", "4", "--projector-dim", "5"],
])
def test_every_flag_trains_answers_and_is_read_back(flags, tmp_path, more, says):
    train.main([*flags, "--epochs", "1", *more, "--out", str(tmp_path / "run")])
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    before = (tmp_path / "run" / "predictions.tsv").read_bytes()
    says("evaluate.py", tmp_path / "run")
    assert (tmp_path / "run" / "predictions.tsv").read_bytes() == before


@pytest.fixture(scope="module")
def one_epoch(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    train.main([*flags, "--epochs", "1", "--out", str(folder)])
    return losses(folder)


@pytest.mark.parametrize("more, shapes", [
    (["--adapter", "mlp"], {"adapters.0.up_weight": (1, 32, 8)}),
    (["--adapter-dim", "4", "--projector-dim", "5"], {"adapters.0.up_weight": (2, 16, 2), "projector.gate.weight": (5, 24)}),
    (["--no-image"], {"projector.gate.weight": None}), (["--no-text"], {}), (["--lbc", "judge_first"], {}), (["--lbc", "none"], {}),
    (["--lbc", "better_instance"], {}), (["--lbc-ratio", "2"], {}), (["--features", "single"], {}), (["--lr", "0.1"], {}),
])
def test_flags_reach_the_training(one_epoch, flags, tmp_path, more, shapes):
    train.main([*flags, *more, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert losses(tmp_path / "run")[:3] != one_epoch[:3]
    steps = {"--lbc none": 3, "--lbc-ratio 2": 8}.get(" ".join(more), 5)        # of 20 products, and as many comparisons
    assert len(losses(tmp_path / "run")) == steps
    trained = load_file(tmp_path / "run" / "adapter.safetensors")
    assert {name: tuple(trained[name].shape) if name in trained else None for name in shapes} == shapes


def test_val_is_as_small_as_the_labels_and_test_is_whole(flags, tmp_path):
    """One label for each of the 5 values: 5 of val's 10 products, all 15 of test's."""
    train.main([*flags, "--labels", "1", "--epochs", "1", "--out", str(tmp_path / "run")])
    metrics = [json.loads((tmp_path / "run" / name / "metrics.json").read_text()) for name in ("val", "")]
    assert [m["n"] for m in metrics] == [5, 15]
    train.main([*flags, "--labels", "1", "--epochs", "1", "--seed", "1", "--out", str(tmp_path / "other")])
    zero, one = (json.loads((tmp_path / name / "config.json").read_text())["data_fingerprint"] for name in ("run", "other"))
    assert [zero[split] == one[split] for split in ("train", "val", "test")] == [False, False, True]


def test_duplicates_are_said_before_the_training(flags, data_root, tmp_path, capsys):
    import shutil
    shutil.copytree(data_root, tmp_path / "data")
    lines = (data_root / "shoes" / "train.tsv").read_text().splitlines(keepends=True)
    with open(tmp_path / "data" / "shoes" / "test.tsv", "a") as file:
        file.write(lines[1])
    (tmp_path / "data" / "shoes" / "train.tsv").write_text("".join([*lines, lines[1]]))
    train.main([*flags, "--data", str(tmp_path / "data"), "--labels", "all", "--epochs", "1", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "note: 1 of 31 products of train repeat the id and attribute of another, e.g. 'B0001'\n" in said
    assert said.count("of a product of train") == 2 and "1 of 16 products of test have the title and photo of" in said


def test_epochs_draw_their_own_partners_and_end_with_a_smaller_batch(flags, tmp_path, monkeypatch):
    """40 examples in batches of 7: six steps an epoch, the last of them 5 examples."""
    batches, step = [], train.train_step

    def seen(run, optimizer, scaler, examples):
        batches.append(examples)
        return step(run, optimizer, scaler, examples)

    monkeypatch.setattr(train, "train_step", seen)
    train.main([*flags, "--batch-size", "7", "--epochs", "2", "--out", str(tmp_path / "run")])
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 5] * 2
    first, second = ([e for batch in half for e in batch] for half in (batches[:6], batches[6:]))
    base, pairs = ([{e for e in epoch if len(e.photos) == n} for epoch in (first, second)] for n in (1, 2))
    assert base[0] == base[1] and len(base[0]) == 20 and pairs[0] != pairs[1]
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([train.learning_rate(s, 12, 6, 9e-3 * 7 / 256) for s in range(12)])


def test_a_step_pairs_examples_with_their_photos(run, data_root):
    """The loss of train_step, by hand: each example alone, with the features of its own photos."""
    loaded = evaluate.load(run, data_needed=True)
    from conftest import randomize

    from data import Epoch, encode_examples, read_split
    model, photo_features = randomize(loaded.model), loaded.photo_features
    epoch = Epoch(read_split(data_root, "shoes", "train"), 0, 0)
    examples = [epoch[n] for n in range(9)]
    photo_features.prepare(name for e in examples for name in e.photos)
    optimizer = train.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    alone = []
    for e in examples:
        batch, names = encode_examples([e], model.tokenizer)
        assert names == list(dict.fromkeys(e.photos))
        alone.append(model(batch, torch.stack([photo_features.read_one(name) for name in names])).item())
    for size in (None, 4):
        loaded.config.micro_batch_size = size
        loss, _ = train.train_step(loaded, optimizer, torch.amp.GradScaler(enabled=False), examples)
        assert loss == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def test_a_gradient_that_is_not_finite_takes_no_step(run, data_root):
    loaded = evaluate.load(run, data_needed=True)
    from data import Epoch, read_split
    model, epoch = loaded.model, Epoch(read_split(data_root, "shoes", "train"), 0, 0)
    loaded.photo_features.prepare(name for n in range(4) for name in epoch[n].photos)
    before = {name: p.clone() for name, p in model.trainable_parameters().items()}
    model.projector.up.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="its gradients are not finite"):
        train.train_step(loaded, train.make_optimizer(model), torch.amp.GradScaler(enabled=False), [epoch[n] for n in range(4)])
    assert all(torch.equal(p, before[name]) for name, p in model.trainable_parameters().items())


def test_what_does_not_change_the_result_does_not(run, flags, tmp_path):
    for name, more in (("micro", ["--micro-batch-size", "3"]), ("checkpoint", ["--grad-checkpoint"])):
        train.main([*flags, *more, "--out", str(tmp_path / name)])
        assert losses(tmp_path / name) == pytest.approx(losses(run), rel=1e-3)


def test_training_learns(flags, tmp_path):
    train.main([*flags, "--epochs", "12", "--lr", "0.01", "--lbc", "none", "--out", str(tmp_path / "run")])
    curve = losses(tmp_path / "run")
    assert sum(curve[-3:]) < 0.75 * sum(curve[:3])      # nothing but adapters and projector can have done it


def test_learning_rate():
    rates = [train.learning_rate(step, 150, 10, 1e-3) for step in range(150)]
    assert rates[0] == pytest.approx(1e-3 / 20) and rates[19] == rates[20] == pytest.approx(1e-3)
    assert rates[20 + 65] == pytest.approx(0.5e-3)      # the middle of the cosine
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True) and rates[-1] < 1e-6
    assert all(rate > 0 for rate in (train.learning_rate(step, 3, 3, 1.0) for step in range(3)))
    # One epoch alone: the warm-up is half of its four steps.
    assert [train.learning_rate(step, 4, 4, 1.0) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])


def test_the_optimizer_has_all_that_is_trained_and_biases_do_not_decay(tiny):
    from eiven import EIVEN
    model = EIVEN(*tiny, 24)
    groups = train.make_optimizer(model).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.trainable_parameters().values())
    assert [g["weight_decay"] for g in groups] == [0.02, 0.0] and groups[0]["betas"] == (0.9, 0.95)
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(flags, tmp_path, monkeypatch):
    from eiven import EIVEN
    forward, calls = EIVEN.forward, []

    def breaks(self, rows, features):
        calls.append(1)
        return forward(self, rows, features) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(EIVEN, "forward", breaks)
    said = "the loss is nan in step 7: epoch 2, examples 9 to 16, the first of them .Question: "
    with pytest.raises(UserError, match=said):
        train.main([*flags, "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "state.pt")
    assert state["step"] == 6 and all(p.isfinite().all() for p in state["trained"].values())


# ------------------------------------------------------------------------------------------------ answering


@pytest.fixture
def says(monkeypatch, capsys):
    """What a command prints that succeeds."""
    def call(script, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        {"train.py": train, "evaluate.py": evaluate}[script].main()
        return capsys.readouterr().out
    return call


def test_answering_one_product(run, data_root, says):
    image = data_root / "images" / "B0001.jpg"
    done = run_command("evaluate.py", run, "--image", image, "--text", "black shoe", "--attribute", "boot style")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Boot Style: ") and "(probability 0." in done.stdout
    known = says("evaluate.py", run, "--image", image, "--text", "black shoe", "--attribute", "Boot Style", "--constrain")
    assert any(known.startswith(f"Boot Style: {v} ") for v in ("Rain Boots", "Chelsea", "Combat"))


def test_answering_a_file_and_merging(run, data_root, tmp_path, says):
    says("evaluate.py", run, "--input", data_root / "shoes" / "test.tsv", "--output", tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_bytes() == (run / "predictions.tsv").read_bytes()
    says("evaluate.py", run, "--merge", "--input", data_root / "shoes" / "test.tsv", "--output", tmp_path / "merged.tsv")
    answers = []
    for name in ("out.tsv", "merged.tsv"):
        with open(tmp_path / name, encoding="utf-8", newline="") as file:
            answers.append([line["prediction"] for line in csv.DictReader(file, dialect="excel-tab")])
    assert answers[0] == answers[1] and len(answers[0]) == 15


def test_merge_merges(run, data_root, says, monkeypatch, tmp_path):
    from eiven import EIVEN
    merged, merge = [], EIVEN.merge_adapters
    monkeypatch.setattr(EIVEN, "merge_adapters", lambda model: merged.append(1) or merge(model))
    for more in ([], ["--merge"]):
        says("evaluate.py", run, *more, "--input", data_root / "shoes" / "test.tsv", "--output", tmp_path / "out.tsv")
    assert merged == [1]


def test_answers_go_to_their_products(run, data_root, monkeypatch):
    """Each product alone, with its photo and its own seed, answers as in the file; at a temperature that draws.

    Of few tokens: every draw is another chance that rounding decides between two of them.
    """
    loaded = evaluate.load(run, data_needed=True)
    from conftest import randomize

    from data import base_question, encode_examples, read_split
    model, photo_features, config = randomize(loaded.model), loaded.photo_features, loaded.config
    products = read_split(data_root, "shoes", "test")
    photo_features.prepare(p.image for p in products)
    expected = []
    for p in products:
        batch, [name] = encode_examples([base_question(p)], model.tokenizer)
        [(ids, probability)] = model.generate(batch, photo_features.read_one(name)[None],
                                              [f"answer {config.seed} {p.id} {p.attribute}"], temperature=1.0, top_p=0.9,
                                              limit=3)
        expected.append((model.tokenizer.decode(ids).strip(), pytest.approx(probability, rel=1e-3, abs=0)))
    assert len({text for text, _ in expected}) > 5      # photo, text and seed matter
    monkeypatch.setattr(answering.Run, "answer_limit", 3)
    for size in (64, 4):
        monkeypatch.setattr(answering, "ANSWER_BATCH", size)
        found = answering.answers(loaded, products, temperature=1.0, top_p=0.9)
        assert [(a.value, a.probability) for a in found] == expected


def test_a_constrained_answer_is_the_likeliest_value(run, data_root, monkeypatch):
    """Scores of every value, each product alone: the answer, its probability among the values, and the runner-up."""
    loaded = evaluate.load(run, data_needed=True)
    from conftest import randomize

    from data import base_question, encode_answer, encode_examples, read_split
    model, photo_features = randomize(loaded.model), loaded.photo_features
    products = read_split(data_root, "shoes", "test")
    photo_features.prepare(p.image for p in products)
    for size in (8, 3):
        monkeypatch.setattr(answering, "SCORE_BATCH", size)
        for p, found in zip(products, answering.answers(loaded, products, loaded.values), strict=True):
            batch, [name] = encode_examples([base_question(p)], model.tokenizer)
            weight = {}
            for value in loaded.values[p.attribute]:
                R = encode_answer(value, model.tokenizer)
                log_p = model.answer_logits([batch[0]._replace(answer=R)], photo_features.read_one(name)[None]).log_softmax(-1)
                weight[value] = log_p[range(len(R)), R].sum().exp().item()
            first, second, *_ = sorted(weight, key=weight.get, reverse=True)
            assert (found.value, found.runner_up) == (first, second)
            assert found.probability == pytest.approx(weight[first] / sum(weight.values()), rel=1e-3)
            assert found.runner_up_probability == pytest.approx(weight[second] / sum(weight.values()), rel=1e-3)


def test_three_lines_of_python(run, data_root, capsys):
    loaded = evaluate.load(run)
    image = data_root / "images" / "B0001.jpg"
    answer = loaded.answer(image=str(image), text="black shoe", attribute="boot style")
    assert str(answer) == f"{answer.value or '(no answer)'}  (probability {answer.probability:.2f})"
    assert loaded.answer(image, "black shoe", "Boot Style", constrain=True).value in loaded.values["Boot Style"]
    for wrong, said in (({"image": image}, "give --text"), ({"image": "nowhere.jpg", "text": "x"}, "there is no such file")):
        with pytest.raises(UserError, match=said):
            loaded.answer(attribute="Boot Style", **wrong)


def test_scoring_with_other_settings_says_so(run, says, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    says("evaluate.py", tmp_path / "run", "--merge", "--constrain", "--temperature", "1.5", "--top-p", "0.9")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["merged"], metrics["constrained"], metrics["temperature"], metrics["top_p"]) == (True, True, 1.5, 0.9)
    known = json.loads((run / "config.json").read_text())["values"]
    with open(tmp_path / "run" / "predictions.tsv", newline="") as file:
        assert all(row["prediction"] in known[row["attribute_names"]] for row in csv.DictReader(file, dialect="excel-tab"))
    says("evaluate.py", tmp_path / "run", "--split", "train")
    assert json.loads((tmp_path / "run" / "train" / "metrics.json").read_text())["n"] == 20


def test_exporting_a_run(run, says, tmp_path):
    out = says("evaluate.py", run, "--export", tmp_path / "out")
    assert float(out.split("merged against unmerged, is ")[1].split(" ")[0]) < 1e-3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "tokenizer.model", "model.safetensors",
                                                              "projector.safetensors", "README.md"}
    assert "after ViT layer 3, 6\n" in (tmp_path / "out" / "README.md").read_text()


def test_one_product_needs_no_data_set(run, data_root, says, tmp_path):
    answer = says("evaluate.py", run, "--data", tmp_path / "gone", "--image", data_root / "images" / "B0001.jpg",
                  "--text", "black shoe", "--attribute", "Boot Style")
    assert answer.startswith("Boot Style: ")


def test_a_run_goes_on_with_less_memory(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    train.main(["--resume", str(tmp_path / "run"), "--micro-batch-size", "2", "--grad-checkpoint"])
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_val_is_scored_again_on_the_same_products(run, says, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / "run")
    says("evaluate.py", tmp_path / "run", "--split", "val")
    assert (tmp_path / "run" / "val" / "predictions.tsv").read_bytes() == (run / "val" / "predictions.tsv").read_bytes()
