"""Attacks with a disk that has no space left.

    ATTACKS=all python -m pytest tests/test_attacks_space.py        every attack, in some minutes; otherwise a seeded sample

The rule: a right result and exit 0, or one line that says what is wrong and exit 2.  Never a traceback, a signal, a hang,
1 GB of memory, a changed input, or an output that a later start cannot use.
"""

import filecmp
import os
import resource
import shutil
import subprocess

import pytest
from conftest import attack, command, files_in, held, judged

from experiments import make_mave
from support import config, run_folder


def no_space(after, limit=16, save_every=None, cache=None):
    """For `before`: once `after` files have been written whole, no file may grow beyond `limit` bytes."""
    def before():
        written, replace = [], os.replace

        def counted(*arguments):
            replace(*arguments)
            written.append(arguments)
            if len(written) == after:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        os.replace = counted
        if save_every is not None:
            run_folder.SAVE_EVERY = save_every
        if cache:
            config.FEATURE_CACHE = cache
        if not after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return before


def count_writes(arguments, folder):
    """How many files a command writes whole."""
    def before():
        replace = os.replace
        os.replace = lambda *a: os.write(1, b"<written>") and replace(*a)
    done = command(*arguments, folder, before=before)
    assert done.code == 0, done.err
    return done.out.count("<written>")


def test_no_space_in_a_training(tally, world, tmp_path_factory):
    """The training ends with one line, and goes on as if nothing had happened when there is space again."""
    folder = tmp_path_factory.mktemp("space")
    writes = count_writes(("train.py", world.flags(folder / "counted")), folder)
    assert writes == 2 + 1 + 2 * 5                      # config, state, adapter; predictions, metrics, 2 matrices, report

    def judge(after, limit, save_every=None):
        here = tmp_path_factory.mktemp("full")
        out = here / "out"
        done = command("train.py", world.flags(out), here, before=no_space(after, limit, save_every))
        if wrong := held(done):
            return wrong
        if left := list(here.rglob("*.partial")):
            return f"left {left}"
        if done.code == 2:
            if str(out) not in done.err:
                return f"the line names no file: {done.err}"
            again = ["--resume", str(out)] if (out / "config.json").exists() else world.flags(out)
            done = command("train.py", again, here)
            if done.code:
                return f"could not go on: {done.err}"
        for name in ("adapter.safetensors", "predictions.tsv", "val/predictions.tsv"):
            if not filecmp.cmp(out / name, world.run / name, shallow=False):
                return f"{name} is another one after going on"
        return None

    cases = [(f"after {n} files, {limit} bytes", n, limit) for n in range(writes + 1) for limit in (16, 300, 5000)]
    cases += [(f"after {n} files, {limit} bytes, a state after each step", n, limit, -1) for n in range(writes + 1)
              for limit in (16, 20_000)]
    always = [case for case in cases if case[1:] in ((1, 300), (1, 16), (3, 16), (2, 20_000, -1))]
    attack(tally, "no space in a training", judge, always, [case for case in cases if case not in always], 5)


def test_no_space_in_an_evaluation_and_an_export(tally, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(world.run, folder / "run")
    scoring = count_writes(("evaluate.py", [str(folder / "run")]), folder)
    exporting = count_writes(("evaluate.py", [str(folder / "run"), "--export", str(folder / "export")]), folder)

    def score(after, limit):
        here = tmp_path_factory.mktemp("full")
        shutil.copytree(world.run, here / "run")
        done = command("evaluate.py", [str(here / "run")], here, before=no_space(after, limit))
        if wrong := held(done):
            return wrong
        names = {p.name for p in (here / "run").iterdir()}
        if names != {p.name for p in world.run.iterdir()}:
            return f"the folder holds {names}"
        done = command("evaluate.py", [str(here / "run")], here)
        same = filecmp.cmp(here / "run" / "predictions.tsv", world.run / "predictions.tsv", shallow=False)
        return None if done.code == 0 and same else f"could not be scored again: {done.err}"

    def export(after, limit):
        here = tmp_path_factory.mktemp("full")
        done = command("evaluate.py", [str(world.run), "--export", str(here / "out")], here, before=no_space(after, limit))
        if wrong := held(done):
            return wrong
        if done.code == 2 and {p.name for p in here.iterdir()} != {"stdout.txt", "stderr.txt"}:
            return f"left {sorted(p.name for p in here.iterdir())}"
        if done.code == 2:
            done = command("evaluate.py", [str(world.run), "--export", str(here / "out")], here)
        return None if files_in(here / "out") == files_in(folder / "export") else f"another export: {done.err}"

    def output(limit):
        here = tmp_path_factory.mktemp("full")
        (here / "out.tsv").write_text("old")
        done = command("evaluate.py", [str(world.run), "--input", str(world.data / "shoes" / "test.tsv"), "--output",
                                       str(here / "out.tsv")], here, before=no_space(0, limit))
        return judged(done, done.code == 2 and str(here / "out.tsv") in done.err and (here / "out.tsv").read_text() == "old")

    cases = [(f"scores, after {n} files, {limit} bytes", score, n, limit) for n in range(scoring) for limit in (16, 1000)]
    cases += [(f"export, after {n} files, {limit} bytes", export, n, limit)
              for n in range(exporting) for limit in (16, 1000, 50_000)]
    cases += [(f"--output, {limit} bytes", output, limit) for limit in (0, 16, 1000)]
    always = [case for case in cases if case[2:] in ((0, 16), (0,), (0, 50_000))]
    attack(tally, "no space in an evaluation or export", lambda do, *a: do(*a), always,
           [case for case in cases if case not in always], 5)


def test_no_space_for_the_cache_of_features(tally, world, tmp_path_factory):
    def judge(limit):
        here = tmp_path_factory.mktemp("cache")
        arguments = [str(world.run), "--input", str(world.data / "shoes" / "test.tsv"), "--output", str(here / "out.tsv")]
        cache = here / "features.sqlite"
        done = command("evaluate.py", arguments, here, before=no_space(0, limit, cache=cache))
        if wrong := held(done):
            return wrong
        if done.code == 2:
            done = command("evaluate.py", arguments, here, before=lambda: setattr(config, "FEATURE_CACHE", cache))
        same = done.code == 0 and filecmp.cmp(here / "out.tsv", world.run / "predictions.tsv", shallow=False)
        return None if same else f"could not go on: {done.err}"

    limits = [0, 1, 100, 512, 4095, 4096, 8192, 12_000, 16_384, 20_000, 32_000, 32_768, 40_000, 60_000, 100_000]
    cases = [(f"{limit} bytes", limit) for limit in limits]
    attack(tally, "no space for the cache", judge, cases[:1], cases[1:], 3)


def test_no_space_in_a_build(tally, tmp_path_factory):
    """The build of a data set ends with one line, leaves no half split, and gives the same files when there is space again."""
    folder = tmp_path_factory.mktemp("build")
    labels, metadata = make_mave.make(folder, 3000, 3000)

    def build(here):
        return ["build", "--labels", str(labels), "--metadata", str(metadata), "--data", str(here / "data"), "--no-photos",
                "--more-than", "5", "--jobs", "1"]

    def files(here):
        return files_in(here / "data") if (here / "data").exists() else {}

    writes = count_writes(("-m dataset", build(folder)), folder)
    expected = {name: content for name, content in files(folder).items() if not name.startswith(".build")}
    assert writes >= 9 and sum(name.endswith("train.tsv") for name in expected) == 3

    def judge(after, limit):
        here = tmp_path_factory.mktemp("full")
        done = command("-m dataset", build(here), here, before=no_space(after, limit))
        if wrong := held(done):
            return wrong
        if left := [name for name in files(here) if name.endswith(".partial")]:
            return f"left {left}"
        if done.code == 2:
            done = command("-m dataset", build(here), here)
        found = {name: content for name, content in files(here).items() if not name.startswith(".build")}
        return None if done.code == 0 and found == expected else f"could not go on: {done.err[-200:]}"

    cases = [(f"after {n} files, {limit} bytes", n, limit) for n in range(writes + 1) for limit in (0, 16, 5000, 40_000)]
    attack(tally, "no space in a build", judge, cases[:1], cases[1:], 4)


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a disk of its own this many kB; skips where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(kilobytes, *how):
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((*how, f"size={kilobytes}k")), "tmpfs", disk], check=True,
                       capture_output=True)
        return disk

    try:
        mount(16)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk cannot be mounted here")
    yield mount
    subprocess.run(["umount", "--all-targets", "--recursive", disk], check=True)


def test_a_disk_that_is_full(tally, world, small_disk, tmp_path):
    """The real thing: run folder and cache on a disk of some kB, and later on a larger one."""
    def judge(kilobytes):
        subprocess.run(["umount", tmp_path / "disk"], check=True)
        disk = small_disk(kilobytes)
        out, cache = disk / "out", disk / "features.sqlite"
        done = command("train.py", world.flags(out), tmp_path, before=lambda: setattr(config, "FEATURE_CACHE", cache))
        if wrong := held(done):
            return wrong
        small_disk(20_000, "remount")
        if done.code == 2:
            again = ["--resume", str(out)] if (out / "config.json").exists() else world.flags(out)
            done = command("train.py", again, tmp_path, before=lambda: setattr(config, "FEATURE_CACHE", cache))
        same = done.code == 0 and filecmp.cmp(out / "predictions.tsv", world.run / "predictions.tsv", shallow=False)
        return None if same else f"could not go on: {done.err}"

    cases = [(f"{size} kB", size) for size in range(4, 200, 4)]
    attack(tally, "a full disk", judge, more=cases, sample=4)
