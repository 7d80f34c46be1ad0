"""The benchmark measures two sides that do the same work: here on a tiny model, whatever they take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Strict, randomize

from base.console import UserError
from data import Encoded
from eiven import EIVEN
from experiments import measuring, memory_7b, speed, speed_memory
from llama import load_llama

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture
def subject(tiny):
    pytest.importorskip("transformers")
    llama, tokenizer = tiny
    model = randomize(EIVEN(llama, tokenizer, visual_width=24, adapter_dim=4, projector_dim=6))
    features = torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(5))
    encode, eos = tokenizer.encode, tokenizer.eos_id
    rows = [Encoded((0,), encode("Question: What is it?\nAnswer:"), encode("Rain Boots") + [eos]),
            Encoded((1, 2), encode("Question: What is it, this black leather shoe?\nAnswer:"), encode("Flat") + [eos]),
            Encoded((), encode("No photo\nAnswer:"), encode("No.") + [eos])]
    return speed.Subject("tiny", {"train": 0, "generate": 0}, model, rows, rows, features, features)


def test_both_sides_have_the_same_loss_gradients_and_answers(subject, capsys):
    """bench_train and bench_generate raise where the sides differ; and 512 tokens of padding change nothing."""
    report = speed.Report()
    speed.bench_train(subject, report, 1)
    speed.bench_generate(subject, report, 1)
    assert [line["section"] for line in report.lines] == ["train"] * 4 + ["generate"] * 3
    assert all(line["value"] > 0 and line["low"] <= line["value"] <= line["high"] for line in report.lines)
    assert "all answers the same" in capsys.readouterr().out


def test_a_busy_machine_is_measured_and_left_as_it_was(subject, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    started, popen, threads, report = [], subprocess.Popen, torch.get_num_threads(), speed.Report()
    monkeypatch.setattr(speed.subprocess, "Popen", lambda *a: started.append(popen(*a)) or started[0])
    speed.bench_busy(subject, report, 1)
    assert [line["section"] for line in report.lines] == ["busy"] * 2 and report.lines[0]["value"] > 0
    assert started[0].poll() is not None and torch.get_num_threads() == threads


def test_a_difference_is_an_error(subject, monkeypatch):
    peer_loss = speed.Peer.loss
    monkeypatch.setattr(speed.Peer, "loss", lambda *a: peer_loss(*a) * 1.001)
    with pytest.raises(UserError, match="tiny: loss: ours and the peer's differ"):
        speed.bench_train(subject, speed.Report(), 1)
    monkeypatch.setattr(speed.Peer, "generate", lambda self, X, *a: [[5]] * len(X))
    with pytest.raises(UserError, match="of 3 answers are the peer's"):
        speed.bench_generate(subject, speed.Report(), 1)


def test_a_ratio_is_the_median_of_the_rounds(capsys):
    report = speed.Report()
    report.ratio("x", "by hand", [2.0, 6.0, 20.0], [1.0, 2.0, 4.0], at_least=4)
    assert report.lines[0] | {"seconds": None} == {
        "section": "x", "what": "by hand", "value": 3.0, "low": 2.0, "high": 5.0, "rounds": 3, "unit": "x", "at_least": 4,
        "at_most": None, "note": "", "seconds": None}
    report.add("x", "met", [1.0], "%", at_most=1.02)
    report.add("x", "no number", [float("nan")], "%", at_most=1.02)
    report.add("x", "between", [20.0], "%", at_least=-15, at_most=15)
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert ["MISSED" in line for line in (first, second, third, fourth)] == [True, False, True, True]
    assert "-15 to 15" in fourth


def test_memory_is_measured_on_a_training(tmp_path):
    """The measuring itself: a folder is written, read by the ordinary code, and trained on."""
    speed_memory.write_products(tmp_path / "few", 40)
    assert speed_memory.child("train_a_little", tmp_path / "few") > 50e6
    with pytest.raises(UserError, match="train_a_little ended with 1: .*there is no data set"):
        speed_memory.child("train_a_little", tmp_path)


def test_a_clock_waits_for_the_gpu_before_it_is_read(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: order.append("clock") or len(order))
    assert measuring.seconds(lambda: order.append("work")) == 3
    assert order == ["wait", "clock", "work", "wait", "clock"]


def test_everything_is_made_on_the_device(llama_dir):
    """On the meta device: the peer, its sequences, and the matmuls of the limit."""
    pytest.importorskip("transformers")
    model = EIVEN(*load_llama(llama_dir, torch.float32, "meta"), visual_width=24, adapter_dim=4, projector_dim=6)
    rows = [Encoded((), [5, 6, 7], [60, 2]), Encoded((), [5, 6], [60, 61, 2])]
    peer = speed.Peer(model)
    X = [model.input_ids(row, None) for row in rows]
    with Strict():
        assert peer.loss(X, rows, None).is_meta
        assert len(peer.generate(X, None, 2)) == 2
        speed.matmul_times(model, [(4, 2), (2, 2)], backward=True)()


def test_memory_of_a_gpu_is_what_its_passes_allocate(tiny, monkeypatch):
    model, sizes = EIVEN(*tiny, visual_width=24, adapter_dim=4, projector_dim=6), iter([100, 350])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(sizes))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 500)
    assert memory_7b.allocated(model, 12) == (250, 400)
    assert all(p.grad is not None for name, p in model.trainable_parameters().items() if name.startswith("adapters"))


def test_kept_bytes_grow_with_the_tokens_alone():
    """On the meta device.  With attention weights, which a GPU does not keep, they would grow faster."""
    model = memory_7b.model_7b(int8=False)
    first, second, third = (memory_7b.held(model, tokens) for tokens in (128, 256, 384))
    assert second - first == third - second > 0


@pytest.mark.parametrize("int8, size", [
    (False, 2 * 6_738_415_616),
    # matrices and lm_head, a scale of 4 bytes for each row, embeddings and norms in 16 bits
    (True, 6_607_077_376 + 4 * (32 * (5 * 4096 + 2 * 11008) + 32000) + 2 * (131_072_000 + 266_240)),
])
def test_bytes_of_frozen_weights_at_7b(int8, size):
    assert sum(p.nbytes for p in memory_7b.model_7b(int8).llama.parameters() if not p.requires_grad) == size


def run(*arguments, code="from base import console; from experiments import speed; console.run(speed.main)"):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)


def test_mistakes_are_named():
    done = run("trian")
    assert done.returncode == 2 and "sections are train, busy, generate" in done.stderr
    done = run("load", code="import sys; sys.modules['transformers'] = None\nfrom base import console; from experiments import speed; console.run(speed.main)")
    assert done.returncode == 2 and "pip install transformers" in done.stderr and "Traceback" not in done.stderr


def test_the_command_writes_what_it_prints(tmp_path):
    pytest.importorskip("transformers")
    done = run("features", "--rounds", "1", "--json", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["figures"][0]["section"] == "features" and written["machine"]["torch"] == torch.__version__
    assert f"{written['figures'][0]['value']:.2f}" in done.stdout
