"""Several processes against one: the same losses and answers, one error line, no hang.  docs/scale.md"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import at_once, command, held
from safetensors.torch import load_file
from torch import distributed

import eiven
from base.console import UserError
from support import answering, config, features, processes, run_folder

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 20


def torchruns(count):
    """(the store that torchrun keeps, [the environment that it gives to each of its processes])."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    same = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start(count, script, arguments, folder, before=None, limit_s=60):
    """Outcomes of a command in several forked processes."""
    store, environments = torchruns(count)
    arguments, calls = [str(a) for a in arguments], []
    for rank, env in enumerate(environments):
        (own := folder / f"process-{rank}").mkdir(parents=True, exist_ok=True)
        calls.append(partial(command, script, arguments, own, limit_s, before, env))
    outcomes = at_once(calls)
    del store                                           # it served until here
    return outcomes


def in_processes(count, function):
    """What function(rank) returns in each of several processes that are joined."""
    def joined(env):
        os.environ.update(env)
        processes.join()
        return function(int(env["RANK"]))

    store, environments = torchruns(count)
    found = at_once([partial(joined, env) for env in environments])
    del store
    return found


@pytest.fixture(scope="module", autouse=True)
def gloo():
    """Skip where processes cannot be connected."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    try:
        torchruns(1)
    except RuntimeError as error:
        pytest.skip(f"no connection to 127.0.0.1: {error}")


@pytest.fixture(scope="module")
def flags(data_root, llama_dir, vit_dir):
    """Batches of 13, 13, 13 and 1 of 40 examples: 5 epochs are 20 steps, and in every fourth all processes but one are idle."""
    return ["--data", str(data_root), "--dataset", "shoes", "--llama", str(llama_dir), "--vit", str(vit_dir),
            "--labels", "4", "--epochs", "5", "--batch-size", "13", "--device", "cpu"]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    outcome = command("train.py", [*flags, "--out", str(folder / "run")], folder)
    assert held(outcome) is None and outcome.code == 0, outcome.err
    return folder / "run"


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def check_same_training(run, one):
    """The losses and numbers of tokens of all steps, and the trained weights, are those of one process but for rounding."""
    assert len(log(run)) == len(log(one)) == STEPS
    for ours, theirs in zip(log(run), log(one)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert (ours["tokens"], ours["lr"]) == (theirs["tokens"], theirs["lr"])
    trained, expected = load_file(run / "adapter.safetensors"), load_file(one / "adapter.safetensors")
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-5)


def check_all_finished(outcomes):
    """All ended well, and process 0 alone printed."""
    assert [o.code for o in outcomes] == [0] * len(outcomes), [o.err for o in outcomes]
    assert outcomes[0].out
    assert not any(o.out + o.err for o in outcomes[1:])


@pytest.mark.parametrize("count, more", [(2, []), (3, ["--micro-batch-size", "2"]),
                                         (2, ["--shard"]), (3, ["--shard", "--micro-batch-size", "2", "--grad-checkpoint"])])
def test_training_equals_that_of_one_process(flags, one, tmp_path, count, more):
    outcomes = start(count, "train.py", [*flags, *more, "--out", tmp_path / "run"], tmp_path)
    check_all_finished(outcomes)
    check_same_training(tmp_path / "run", one)
    assert {p.name for p in (tmp_path / "run").rglob("*")} == {p.name for p in one.rglob("*")}


@pytest.mark.parametrize("more", [[], ["--constrain"], ["--shard"], ["--shard", "--constrain"], ["--shard", "--dtype", "bf16"],
                                  ["--shard", "--dtype", "int8"],
                                  ["--merge"]], ids=" ".join)
def test_answers_of_the_same_weights_are_the_same_bytes(one, tmp_path, more):
    """20 products are 3 batches of 7 (free) or 8 (scored) for 3 processes; the answers' lengths differ."""
    def small_batches():
        answering.ANSWER_BATCH = 7

    alone = command("evaluate.py", [str(one), "--split", "train", *(a for a in more if a != "--shard")], tmp_path,
                    before=small_batches)
    assert held(alone) is None and alone.code == 0, alone.err
    expected = (one / "train" / "predictions.tsv").read_bytes()
    (one / "train" / "predictions.tsv").unlink()
    check_all_finished(start(3, "evaluate.py", [one, "--split", "train", *more], tmp_path, small_batches))
    assert (one / "train" / "predictions.tsv").read_bytes() == expected


def test_a_file_of_products_is_answered_together(one, data_root, tmp_path):
    """The same bytes, and process 0 alone writes."""
    arguments = [str(one), "--input", str(data_root / "shoes" / "test.tsv"), "--output"]
    assert command("evaluate.py", [*arguments, str(tmp_path / "alone.tsv")], tmp_path).code == 0
    check_all_finished(start(3, "evaluate.py", [*arguments, tmp_path / "together.tsv"], tmp_path))
    assert (tmp_path / "together.tsv").read_bytes() == (tmp_path / "alone.tsv").read_bytes()


def test_the_features_of_a_photo_are_computed_once(one, tmp_path):
    """Process 0 of the machine fills an empty cache, and the others find all in it."""
    def before():
        config.FEATURE_CACHE = tmp_path / "features.sqlite"
        compute = features.PhotoFeatures._compute

        def noted(self, batch):
            (tmp_path / f"by-{os.environ['RANK']}").touch()
            compute(self, batch)

        features.PhotoFeatures._compute = noted

    check_all_finished(start(3, "evaluate.py", [one], tmp_path, before))
    assert [p.name for p in tmp_path.glob("by-*")] == ["by-0"]


@pytest.mark.parametrize("count", [3, 10])
def test_a_process_holds_only_its_rows_of_a_layer(llama_dir, tiny, count):
    whole, _ = tiny

    def rows(rank):
        llama, _ = processes.load_shard(llama_dir, torch.float32, torch.device("cpu"))
        return {name: p.to_local().numpy() for name, p in llama.layers.named_parameters()}

    parts = in_processes(count, rows)
    for name, p in whole.layers.named_parameters():
        assert all(len(part[name]) <= math.ceil(len(p) / count) for part in parts), name
        assert torch.equal(torch.cat([torch.from_numpy(part[name]) for part in parts]), p), name


def test_objects_and_turns():
    def talk(rank):
        with processes.one_first():
            mine = time.monotonic()
            time.sleep(0.1 if rank == 0 else 0)
        return processes.rank(), processes.size(), processes.broadcast({"from": rank}), processes.gather(rank), mine

    found = in_processes(3, talk)
    assert [one[:4] for one in found] == [(0, 3, {"from": 0}, [0, 1, 2]), (1, 3, {"from": 0}, []), (2, 3, {"from": 0}, [])]
    assert min(one[4] for one in found[1:]) >= found[0][4] + 0.1


@pytest.mark.parametrize("count, n, at_once", [(1, 7, None), (1, 7, 3), (2, 7, None), (2, 7, 3), (3, 2, None), (4, 1, 1),
                                               (3, 8, 2)])
def test_the_parts_of_a_batch_are_the_batch(monkeypatch, count, n, at_once):
    monkeypatch.setattr(processes, "size", lambda: count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(processes.micro_batches(list(range(n)), at_once)))
    assert len({len(part) for part in parts}) == 1, "under --shard all processes must call LLaMA equally often"
    taken = [(batch, weight) for part in parts for batch, weight in part]
    assert sorted(e for batch, weight in taken if weight for e in batch) == list(range(n))
    assert sum(weight for _, weight in taken) == pytest.approx(1)
    assert all(0 < len(batch) <= (at_once or n) for batch, _ in taken)


# ------------------------------------------------------------------------------------------------ errors, resuming


def in_forward(rank, step, action):
    """A function that lets process `rank` do something in the forward pass of a step, counted from 1, of this start."""
    def before():
        run_folder.SAVE_EVERY = -1                      # a state after every step
        forward, done = eiven.EIVEN.forward, []

        def changed(*arguments):
            done.append(1)
            mine = len(done) == step and rank in (None, int(os.environ.get("RANK", "0")))
            return forward(*arguments) * (action() if mine else 1)

        eiven.EIVEN.forward = changed
    return before


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    return 1


def check_one_error(outcomes, *words):
    """All ended in time with a code other than 0, and one of them said why in one line."""
    said = "".join(o.err for o in outcomes)
    assert all(o.code for o in outcomes if not o.signal) and all(o.seconds < 30 for o in outcomes), outcomes
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert all(word in said for word in words), said


def test_a_run_goes_on_with_another_number_of_processes(flags, one, tmp_path):
    """Two processes, one of them is killed; then one process, killed; then two again."""
    run = tmp_path / "run"
    outcomes = start(2, "train.py", [*flags, "--out", run], tmp_path / "1", in_forward(1, 7, kill))
    assert outcomes[1].signal == signal.SIGKILL
    check_one_error(outcomes, "another process", "--resume")
    assert len(log(run)) == 6
    assert command("train.py", ["--resume", str(run)], tmp_path, before=in_forward(0, 6, kill)).signal == signal.SIGKILL
    assert len(log(run)) == 11
    check_all_finished(start(2, "train.py", ["--resume", run], tmp_path / "2"))
    check_same_training(run, one)


@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "nothing"], ["there is no data set 'nothing'"]), (["--nonsense"], ["--nonsense"])])
def test_an_error_of_all_processes_is_printed_once(flags, tmp_path, arguments, words):
    check_one_error(start(3, "train.py", [*flags, *arguments, "--out", tmp_path / "run"], tmp_path), *words)
    assert not (tmp_path / "run").exists()


def test_an_error_of_process_0_alone_ends_all(flags, one, tmp_path):
    check_one_error(start(2, "train.py", [*flags, "--out", one], tmp_path), "holds a run already")


def test_a_loss_that_is_not_finite_in_one_process_stops_all(flags, tmp_path):
    outcomes = start(2, "train.py", [*flags, "--out", tmp_path / "run"], tmp_path, in_forward(1, 3, lambda: math.nan))
    check_one_error(outcomes, "the loss is nan in step 3")
    assert len(log(tmp_path / "run")) == 2


def test_a_traceback_of_another_process_is_seen_once(flags, tmp_path):
    outcomes = start(3, "train.py", [*flags, "--out", tmp_path / "run"], tmp_path, in_forward(2, 3, lambda: 1 / 0))
    assert all(o.code for o in outcomes)
    assert [o.err.count("Traceback") for o in outcomes] == [0, 0, 1] and "ZeroDivisionError" in outcomes[2].err
    assert not any("error: " in o.err for o in outcomes)


def test_ctrl_c_says_once_how_to_continue(flags, tmp_path):
    outcomes = start(2, "train.py", [*flags, "--out", tmp_path / "run"], tmp_path, in_forward(None, 3, interrupt))
    assert [o.code for o in outcomes] == [130, 130]
    assert outcomes[0].err.count("Continue with: python train.py --resume") == 1 and not outcomes[1].err


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(processes, "size_here", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))         # this machine need not have a GPU
    with pytest.raises(UserError, match="2 processes on this machine, but it has 1 GPU"):
        config.choose_device("cuda")
    assert config.choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("count, script, arguments, word", [
    (1, "train.py", ["--shard"], "torchrun"), (2, "evaluate.py", ["--shard", "--merge"], "--merge"),
    (2, "evaluate.py", ["--image", "x.jpg", "--attribute", "Boot Style"], "torchrun"),
    (2, "evaluate.py", ["--explain", "B0001"], "torchrun")])
def test_what_does_not_go_together_is_refused(flags, one, tmp_path, count, script, arguments, word):
    first = [*flags, "--out", tmp_path / "run"] if script == "train.py" else [one]
    check_one_error(start(count, script, [*first, *arguments], tmp_path), word)


def children(process):
    """Ids of a process's children, the oldest first.  Linux has a file for this, but only if it was built with it."""
    stats = [path.read_text().rpartition(")") for path in Path("/proc").glob("[0-9]*/stat")]
    return sorted(int(before.split()[0]) for before, _, after in stats if int(after.split()[1]) == process)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are found in /proc")
def test_torchrun_ends_all_processes_once_one_is_killed(flags, tmp_path):
    run = tmp_path / "run"
    with open(tmp_path / "said", "w+") as said:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *flags, "--epochs", "100000",
             "--out", run], cwd=PROJECT, stdout=said, stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1", "EIVEN_CACHE": str(tmp_path / "cache")})
        give_up = time.monotonic() + 120
        while time.monotonic() < give_up and torchrun.poll() is None and not ((run / "log.jsonl").exists() and log(run)):
            time.sleep(0.1)
        workers = children(torchrun.pid)
        os.kill(workers[1], signal.SIGKILL)
        start_of_end = time.monotonic()
        assert torchrun.wait(60) != 0
        assert time.monotonic() - start_of_end < 30
        said.seek(0)
        text = said.read()
    assert text.count("error: another process of this run has ended") == 1, text
    assert text.count("training continues with --resume") == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
