"""The number of CPU threads: given, kept, or measured; with a clock that the tests move."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
from eiven import EIVEN
from experiments.random_weights import LLAMA_7B
from llama import LLaMA
from support import run_folder, threads
from support.config import Config


@pytest.fixture
def machine(monkeypatch):
    """A machine with a clock and cores.  A call of `work` takes seconds[number of threads]."""
    m = SimpleNamespace(now=0.0, threads=1, seconds={}, calls=0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: m.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(m, "threads", n))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: m.now)
    monkeypatch.setattr(threads.time, "monotonic", lambda: m.now)

    def work():
        m.now, m.calls = m.now + m.seconds[m.threads], m.calls + 1
    monkeypatch.setattr(threads, "feed_forward", lambda llama: work)
    return m


ON_CPU = SimpleNamespace(device=torch.device("cpu"), llama=None)


@pytest.mark.parametrize("seconds, best", [
    ({2: 0.011, 1: 0.020}, 2),                          # an idle machine
    ({2: 0.100, 1: 0.020}, 1),                          # beside one busy process
    ({8: 0.30, 4: 0.005, 2: 0.010, 1: 0.020}, 4),       # eight cores, one of them busy
    ({6: 0.004, 3: 0.006, 1: 0.02}, 6),
])
def test_the_fastest_number_of_threads_is_taken(machine, seconds, best, capsys):
    machine.seconds, machine.threads, config = seconds, max(seconds), Config()
    threads.choose_threads(config, ON_CPU)
    assert (machine.threads, config.threads) == (best, best)
    assert machine.now < 0.5 * len(seconds)
    said = capsys.readouterr().out
    assert f"CPU threads: {best} of {max(seconds)}, measured" in said and "--threads N" in said
    assert ("x slower now" in said) == (best < max(seconds))


def test_what_is_given_is_not_measured(machine, monkeypatch, capsys):
    machine.threads = 4
    config = Config(threads=3)
    threads.choose_threads(config, ON_CPU)
    assert (machine.threads, config.threads) == (3, 3)
    config, machine.threads = Config(), 1               # one core
    threads.choose_threads(config, ON_CPU)
    assert config.threads == 1
    config, machine.threads = Config(), 4
    threads.choose_threads(config, SimpleNamespace(device=torch.device("cuda"), llama=None))
    assert config.threads == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    config, machine.threads = Config(), 2               # as PyTorch has read it
    threads.choose_threads(config, ON_CPU)
    assert config.threads == 2 and machine.calls == 0 and capsys.readouterr().out == ""


def test_a_machine_that_becomes_busy_is_said_once(machine, capsys):
    watch = threads.StepTimes(2)

    def steps(n, seconds, tokens):
        for _ in range(n):
            machine.now += seconds
            watch.step(tokens)

    steps(10, 0.1, 100)
    steps(1, 30, 100)                                   # a pause of one step says nothing
    steps(20, 0.2, 200)                                 # nor do larger batches
    assert capsys.readouterr().err == ""
    steps(4, 0.5, 100)
    assert capsys.readouterr().err == ""                # the median is not slow yet
    steps(20, 0.5, 100)
    said = capsys.readouterr().err
    assert said.count("note: steps take 3.0 x as long as before") == 1 and "--resume RUN --threads 1" in said


def test_one_thread_waits_for_nobody(machine, capsys):
    watch = threads.StepTimes(1)
    for seconds in [0.1] * 20 + [5] * 20:
        machine.now += seconds
        watch.step(100)
    assert capsys.readouterr().err == ""


def test_a_few_milliseconds_of_the_models_own_feed_forward_are_tried(tiny):
    out = threads.feed_forward(EIVEN(*tiny, None).llama)()
    assert out.shape == (2048, 32)                      # a small model: many tokens
    with torch.device("meta"):
        assert len(threads.feed_forward(LLaMA(LLAMA_7B).half())()) == 16


@pytest.fixture
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


def test_a_resumed_run_keeps_its_threads_unless_another_number_is_given(data_root, llama_dir, tmp_path, monkeypatch,
                                                                        one_thread_afterwards):
    flags = ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--no-image", "--labels", "2",
             "--epochs", "4", "--device", "cpu", "--out", str(tmp_path / "run")]
    used, step = [], train.train_step

    def stop_after(n):
        def counted(*arguments):
            if len(used) == n:
                raise KeyboardInterrupt
            used.append(torch.get_num_threads())
            return step(*arguments)
        monkeypatch.setattr(train, "train_step", counted)

    monkeypatch.setattr(run_folder, "SAVE_EVERY", -1)
    stop_after(1)
    with pytest.raises(SystemExit):
        train.main([*flags, "--threads", "2"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["threads"] == 2
    torch.set_num_threads(1)
    stop_after(2)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path / "run")])
    stop_after(9)
    train.main(["--resume", str(tmp_path / "run"), "--threads", "1"])
    assert used == [2, 2, 1, 1]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run")])
    evaluate.main()                                     # not the 2 of the training, but OMP_NUM_THREADS
    assert torch.get_num_threads() == 1
