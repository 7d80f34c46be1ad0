"""Commands: exit codes, streams, progress; files that are whole or absent; weight files, read strictly."""

import io
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import command, held
from safetensors.torch import load_file

from base import console
from base.checkpoint import check_frozen, fingerprint, load_strict, restore, save_tensors
from base.console import Progress, UserError, whole_file, write_text
from random_weights import write_llama
from llama import load_llama

# ---------------------------------------------------------------------------------------- a command


@pytest.mark.parametrize("error, code, said", [
    (UserError("what\x1b[31m, where\r\n, what next"), 2, r"x: error: what\x1b[31m, where\r\n, what next"),
    (RuntimeError("first line\nsecond"), 1, "x: error: RuntimeError: first line (test_console.py, line "),
    (OSError(28, "No space left on device", "a.txt"), 1, "x: error: a.txt: No space left on device"),
    (KeyboardInterrupt(), 130, "x: interrupted"), (BrokenPipeError(), 141, ""),
])
def test_an_error_has_its_exit_code_and_one_line(error, code, said, capsys, monkeypatch):
    def fails():
        raise error

    with pytest.raises(SystemExit, match=f"^{code}$"):
        console.run(fails, "x")
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said)
    monkeypatch.setenv("EIVEN_DEBUG", "1")
    with pytest.raises(SystemExit):
        console.run(fails, "x")
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, Exception)


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len, flush=list)])
def test_closed_and_replaced_streams(run, tmp_path, stream):
    """A daemon has none; a notebook's own can write and flush, and no more.  Exit codes are the same."""
    def before():
        sys.stdout = sys.stderr = stream

    assert command("evaluate.py", [run], tmp_path, before=before).code == 0
    assert command("evaluate.py", [tmp_path / "nowhere"], tmp_path, before=before).code == 2


def test_an_output_that_is_full_is_one_line(run, tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    done = command("evaluate.py", [run], tmp_path, before=lambda: os.dup2(full, 1))
    os.close(full)
    assert done.code == 1 and not held(done) and "the output: No space left on device" in done.err


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_lines_in_a_log(monkeypatch, terminal):
    stream, clock = io.StringIO(), iter(range(0, 4000, 4))
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))          # every look at the clock is 4 s later
    with Progress("counting", 10, "sheep") as progress:
        for _ in range(10):
            progress.step(note="asleep")
    text = stream.getvalue()
    assert re.search(r"counting  2/10 sheep  0\.1\d/s  1[26] s  (48 s|1 min 04 s) left  asleep", text)
    assert text.count("\n") == (1 if terminal else len(text.splitlines())) and ("\r" in text) == terminal
    assert text.splitlines()[-1].lstrip("\r\x1b[K").startswith("counting  10/10 sheep")


# ---------------------------------------------------------------------------------------- whole files


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one\n")
    for error, caught in ((RuntimeError, UserError), (KeyboardInterrupt, KeyboardInterrupt)):
        with pytest.raises(caught), whole_file(path) as partial:
            partial.write_text("half")
            raise error
    assert path.read_text() == "one\n" and os.listdir(path.parent) == ["file.txt"]
    with pytest.raises(UserError, match="deep: is a folder"):
        write_text(path.parent, "two")
    with pytest.raises(UserError, match="cannot be written: "):
        write_text("/proc/x", "two")


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("link", "null"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_text() == "new" and not os.path.isfile("/dev/null")


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "adapter.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "adapter.safetensors").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------------- weight files


def test_loading_is_strict_and_converts():
    module, weight = torch.nn.Linear(3, 2, bias=False), torch.randn(2, 3)
    load_strict(module, {"x.weight": weight}, "here", lambda name: f"x.{name}", dtype=torch.bfloat16)
    assert torch.equal(module.weight, weight.bfloat16())
    with pytest.raises(UserError, match="2 tensors do not fit .* weight is absent here .*; y is .* absent"):
        load_strict(module, {"y": weight}, "here")
    module.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="here: is damaged: weight holds NaN or infinity"):
        check_frozen(module, "here")


def test_a_checkpoint_in_shards_is_read_and_not_copied(tmp_path, tiny_config, tokenizer_file):
    """Without a change of dtype a parameter is the file's own pages: a byte changed there changes it."""
    write_llama(tmp_path, tiny_config, tokenizer_file, torch.bfloat16, shards=2)
    paths = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(paths[0]) | load_file(paths[1])
    model, _ = load_llama(tmp_path)
    assert len(list(model.parameters())) == len(tensors)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name if name.startswith("lm_head") else f"model.{name}"])
    for path in paths:
        with open(path, "rb+") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))       # after the header
            file.write(bytes(path.stat().st_size - file.tell()))
    assert not any(parameter.any() for parameter in model.parameters())


def test_all_is_restored_or_nothing():
    parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(3))}
    for more, said in ({}, "b is absent here"), ({"b": torch.full((3,), torch.nan)}, "b holds NaN"):
        with pytest.raises(UserError, match=said):
            restore(parameters, {"a": torch.ones(2), **more}, "here")
        assert not parameters["a"].any()


def test_a_fingerprint_depends_on_size_and_content_alone(tmp_path):
    seen = []
    for name, content in ("a", b"00"), ("b", b"00"), ("c", b"01"), ("d", b"000"):
        (tmp_path / name).write_bytes(content * 500_000)
        seen.append(fingerprint([tmp_path / name]))
    assert seen[0] == seen[1] and len(set(seen)) == 3
