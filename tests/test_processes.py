"""Several processes against one: the same losses and answers, errors that say who failed, no hang."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import command, ends_at, log, losses, together, train_run
from safetensors.torch import load_file

from base.console import PROJECT

# Batches of 13, 13, 13 and 1 of 40 examples: in every fourth step all processes but one are idle.
TRAINING = ["--epochs", "5", "--batch-size", "13"]
STEPS = 20


@pytest.fixture
def script(tmp_path):
    """Writes a command, of which main() has these lines; its path."""
    def write(*lines):
        path = tmp_path / "work.py"
        path.write_text("\n    ".join([
            "import os, signal, sys, time\nimport torch\nfrom support.processes import *\ndef main():",
            *lines]) + "\nrun(main)\n")
        return str(path)
    return write


# ------------------------------------------------------------------------------------------------ alone


def test_what_processes_exchange(script, tmp_path):
    path = script("with one_first():",
                  "    time.sleep(0.3 if rank() == 0 else 0)",
                  "    turn = time.monotonic()",
                  "p = torch.nn.Parameter(torch.zeros(2, 3))",
                  "p.grad = torch.ones(2, 3) * (rank() + 1)",
                  "sums = sum_over_processes([p], rank() / 2, 4)",
                  "check_same('sums', {'gradients': p.grad.tolist()})",
                  "every = gather([rank(), broadcast(rank()), p.grad[1].tolist(), list(sums)])",
                  "turns = gather(turn)",
                  "print(every, turns == [] or turns[0] == min(turns))")
    outcomes = together(3, path, [], tmp_path)
    expected = [[rank, 0, [6.0, 6.0, 6.0], [1.5, 12.0]] for rank in range(3)]
    assert [outcome[::2] for outcome in outcomes] == [(0, f"{expected} True\n"), (0, ""), (0, "")], outcomes


@pytest.mark.parametrize("lines, errors", [
    (["if rank() == 1: raise UserError('bad photo')", "gather(1)"],
     ["[rank 0]: error: another process", "[rank 1]: error: bad photo"]),
    (["if rank() == 1: os.kill(os.getpid(), signal.SIGKILL)", "gather(1)"],
     ["[rank 0]: error: another process", ""]),
    (["check_same('flags', {'seed': 7, 'labels': 4 - 2 * rank()})"],
     ["[rank 0]: error: flags: labels is 4 in process 0 and 2 in process 1;", ""]),
])
def test_a_process_that_fails_says_why_and_ends_all(script, tmp_path, lines, errors):
    for outcome, error in zip(together(2, script(*lines), [], tmp_path), errors):
        assert (outcome.code or outcome.signal) and error in outcome.err and bool(error) == bool(outcome.err)


@pytest.mark.parametrize("count, variables, word", [
    (2, {"GLOO_SOCKET_IFNAME": "nothing0"}, "GLOO_SOCKET_IFNAME"),
    (1, {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "refused"),
])
def test_processes_that_cannot_be_connected(script, tmp_path, count, variables, word):
    """Also where the variables of an earlier torchrun are left."""
    for outcome in together(count, script("print('joined')"), [], tmp_path, **variables):
        assert outcome.code and not outcome.out and word in outcome.err
        assert "error: torchrun's processes cannot be connected" in outcome.err


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The run of one process."""
    return train_run(tmp_path_factory.mktemp("one") / "run", flags, *TRAINING)


def check_same_training(run, one):
    """The losses and numbers of tokens of all steps, and the trained weights, are equal but for rounding."""
    assert len(log(run)) == STEPS and losses(run) == pytest.approx(losses(one), rel=1e-5)
    for name in ("tokens", "lr"):
        assert [line[name] for line in log(run)] == [line[name] for line in log(one)]
    trained, expected = load_file(run / "adapter.safetensors"), load_file(one / "adapter.safetensors")
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count, more", [(2, []), (3, ["--micro-batch-size", "2"])])
def test_training_equals_that_of_one_process(flags, one, tmp_path, count, more):
    arguments = [*flags, *TRAINING, *more, "--out", tmp_path / "run"]
    outcomes = together(count, "train.py", arguments, tmp_path)
    assert "results: " in outcomes[0].out and not any(outcome.code for outcome in outcomes), outcomes
    check_same_training(tmp_path / "run", one)
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {path.name for path in one.rglob("*")}


@pytest.mark.parametrize("more", [[], ["--constrain"]])
def test_answers_of_the_same_weights_are_the_same_bytes(one, tmp_path, more):
    def answers(count):
        outcome = together(count, "evaluate.py", [one, "--split", "train", *more], tmp_path)[0]
        assert outcome.code == 0, outcome.err
        return {path.name: path.read_bytes() for path in one.rglob("train*/predictions.tsv")}, outcome.out

    assert answers(1) == answers(3)


def test_a_run_goes_on_with_another_number_of_processes(flags, one, tmp_path):
    """Two processes of torchrun, with Ctrl-C; then three, of which the first is killed; then one."""
    run = tmp_path / "run"
    slow = tmp_path / "slow.py"                         # train.py, with a state after every step
    slow.write_text("import time, train\nfrom support import processes, run_folder\n"
                    "run_folder.SAVE_EVERY, step = -1, train.train_step\n"
                    "train.train_step = lambda *a: time.sleep(0.1) or step(*a)\nprocesses.run(train.main)\n")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         slow, *flags, *TRAINING, "--out", run],
        env=os.environ | {"PYTHONPATH": str(PROJECT)}, stderr=subprocess.PIPE, start_new_session=True)
    while len(log(run)) < 3 and torchrun.poll() is None:
        time.sleep(0.01)
    os.killpg(torchrun.pid, signal.SIGINT)              # as a terminal does: to all of them
    assert b"Continue with" in torchrun.communicate(timeout=60)[1] and torchrun.returncode
    before = len(log(run))
    outcomes = together(3, str(slow), ["--resume", run], tmp_path, ends_at(10))
    assert outcomes[0].signal and outcomes[1].code and outcomes[2].code
    assert 3 <= before < len(log(run)) < STEPS
    assert command("train.py", ["--resume", run], tmp_path).code == 0
    check_same_training(run, one)


@pytest.mark.parametrize("name, change, said", [
    ("train", "+= ['--seed', rank]", "flags: seed is 0 in process 0 and 1 in process 1"),
    ("train", "+= ['--llama', 'llama']", "data or weights: llama is '"),
    ("evaluate", "[2:] = ['--temperature', rank]", "flags: temperature is 0.0 in process 0 and 1.0 in"),
])
def test_processes_that_differ_end_at_once(flags, one, llama_dir, tmp_path, name, change, said):
    """As when two machines are given different lines, or have different files."""
    for rank in "01":
        shutil.copytree(llama_dir, tmp_path / rank / "llama")
    with open(tmp_path / "1" / "llama" / "config.json", "a") as config:
        config.write("\n")
    different = tmp_path / "different.py"
    different.write_text(f"import os, sys, {name}\nfrom support import processes\nrank = os.environ['RANK']\n"
                         f"os.chdir(f'{tmp_path}/{{rank}}')\nsys.argv {change}\nprocesses.run({name}.main)\n")
    first = one if name == "evaluate" else "--out"
    outcomes = together(2, str(different), [first, tmp_path / "run", *flags], tmp_path)
    assert said in outcomes[0].err
    assert all(outcome.code for outcome in outcomes) and not (tmp_path / "run").exists()
