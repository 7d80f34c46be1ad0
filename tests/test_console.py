"""Files are never half written, progress is one line on a terminal and plain lines in a log."""

import errno
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from base.console import duration, whole_file, write_text

PROJECT = Path(__file__).resolve().parent.parent


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one\n")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one\n"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), whole_file(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with whole_file(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("whole")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "a"]


def test_what_cannot_be_replaced_is_written_to(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "link", "new")
    write_text(tmp_path / "null", "new")
    assert (tmp_path / "target").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert os.readlink(tmp_path / "null") == "/dev/null" and Path("/dev/null").is_char_device()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_names_the_file(tmp_path):
    """The error of a write knows no file name, and the temporary name is of no use."""
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space left") as caught, whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="No space left") as caught, whole_file(path) as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))
    assert caught.value.filename == str(path)


def test_what_killed_processes_left_is_removed_and_no_more(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".a.txt.{gone.pid}.partial", f".a.txt.b.{gone.pid}.partial", f".a.txt.{os.getppid()}.partial", ".a.txt.1.partial"]
    for name in names:
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*names[1:], "a.txt"})       # the parent may be 1


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"),
                                           (3600, "1 h 00 min"), (7620, "2 h 07 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


COUNT = """
import time
from base import console
time.monotonic = lambda t=iter(range(0, 4000, 4)): next(t)      # every look at the clock is 4 s later
with console.Progress("counting", 10, "sheep") as progress:
    for _ in range(10):
        progress.step(note="asleep")
"""


def test_a_log_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=PROJECT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert lines[0] == "counting  2/10 sheep  0.25/s  32 s left  asleep"
    assert lines[-1].startswith("counting  10/10 sheep") and "took" in lines[-1]
    assert "\r" not in done.stderr and done.stdout == ""


def test_a_terminal_gets_one_updating_line():
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", COUNT], cwd=PROJECT, stderr=theirs)
    process.wait()
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    assert text.count("\n") == 1 and text.count("\r") >= 10 and "8/10 sheep" in text


def test_mistakes_and_interrupts_have_their_exit_codes():
    def code(body):
        done = subprocess.run([sys.executable, "-c", f"from base import console\ndef main():\n    {body}\nconsole.run(main)"],
                              cwd=PROJECT, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr.strip()
    assert code("raise console.UserError('what, where, what next')") == (2, "-c: error: what, where, what next")
    for body in ("raise MemoryError", "raise RuntimeError('CUDA out of memory. Tried')", "__import__('torch').empty(1 << 60)"):
        assert code(body)[0] == 2 and "--micro-batch-size" in code(body)[1]
    assert code("raise KeyboardInterrupt")[0] == 130


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_ends_in_one_line(script, tmp_path):
    """A torch of our own presses Ctrl-C while it is imported."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, PROJECT / script, "--help"], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # a shell may ignore it
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, f"{script}: interrupted", "")


def test_text_that_is_no_utf8_is_one_line():
    text = "from base import console\ndef main():\n    'caf\\udce9'.encode()\nconsole.run(main)"
    done = subprocess.run([sys.executable, "-c", text], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "-c: error: 'caf\\udce9' is not UTF-8 text; rename the file, or leave those "
                                                 "characters out\n")
