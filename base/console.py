"""For the terminal: errors as one line, progress as one line, and files that are never half written."""

import os
import shutil
import signal
import stat
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake that the user can correct.  The message says what was given, where, what is allowed, and what to do next."""


def first_line(error):
    """The first line of what an exception says, or its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def cache_folder():
    """Where computed features and the demo world are kept: $EIVEN_CACHE, else cache/ in the project's folder."""
    return Path(os.environ.get("EIVEN_CACHE") or PROJECT / "cache").absolute()


def end_at_once(*_):
    """Ctrl-C while the imports are still running.  An exception there could come out of PyTorch as any other."""
    os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if started.parent == PROJECT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:     # train.py, evaluate.py
    signal.signal(signal.SIGINT, end_at_once)


def run(main, name=None):
    """Run main() as a command: a UserError is printed as one line, and the exit code is 2.

    name  of the command in these lines; default: its file's
    """
    name = name or Path(sys.argv[0]).name
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):             # where the terminal has no such letter, its number is printed
        stream.reconfigure(errors="backslashreplace")

    def fail(message):
        stop(2, f"{name}: error: {message}")

    odd = [argument for argument in sys.argv[1:] if argument.startswith("--") and argument.endswith("=--")]
    if odd:                                     # Python 3.11's argparse makes an empty list of it
        fail(f"{odd[0]}: `--` is not a value")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        stop(130, f"\n{name}: interrupted")
    except BrokenPipeError:                     # e.g. `| head`: the reader has stopped reading
        stop(141)
    except (MemoryError, RuntimeError) as error:        # PyTorch's are RuntimeErrors, and known by what they say
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in ("out of memory", "can't allocate memory")):
            raise
        fail(f"more memory is needed than there is ({first_line(error)}); in training, --micro-batch-size and --grad-checkpoint "
             "take less, also with --resume")
    except UnicodeEncodeError as error:         # a name with bytes that are no UTF-8, where only text is possible
        fail(f"{error.object[:100]!r} is not UTF-8 text; rename the file, or leave those characters out")
    except OSError as error:                    # a full disk, a folder that may not be written
        place = str(error.filename or "the output")
        move = "; the environment variable EIVEN_CACHE names another folder for it" if str(cache_folder()) in place else ""
        fail(f"{place}: {error.strerror or error}{move}")


def stop(code, message=None):
    """Leave the program with this exit code, after a last line on stderr."""
    try:
        sys.stdout.flush()
    except OSError:                             # nobody reads it, or its disk is full: what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print(message, file=sys.stderr)
    raise SystemExit(code) from None


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def whole_file(path):
    """Yield a temporary path next to `path`; the file or folder made there is renamed to `path` at the end, or removed on
    an error.

    A file's bytes are on the disk before the rename, so after a power cut there is the old file or the new one.
    What a killed process left of an earlier attempt at the same file is removed.
    A symbolic link stays: the file that it leads to is replaced.  What cannot be replaced (see `replaceable`) is yielded
    itself, and written to directly.
    """
    path = Path(path)
    with naming(path):
        if not replaceable(path):
            yield path
            return
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file name has at most 255 bytes.
        start = f".{path.name if len(os.fsencode(path.name)) < 230 else path.name[:50]}."
        partial = path.with_name(f"{start}{os.getpid()}.partial")
        for left in partials(path.parent):
            process = left.name.removeprefix(start).removesuffix(".partial")
            if left.name.startswith(start) and process.isdecimal() and not running(int(process)):
                remove(left)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)                           # the rename itself
        finally:
            remove(partial)


@contextmanager
def naming(path):
    """An error of the operating system names `path`, if it names no file: a full disk is found by a write, which knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is None or ".partial" in str(error.filename):
            error.filename = str(path)
        raise


def replaceable(path):
    """Whether a new file can take the place of `path`: not of a device or a pipe, nor of the file that stdout goes to."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return True
    with suppress(OSError):                             # stdout may be closed
        if os.path.samestat(there, os.fstat(1)):
            return False
    return stat.S_ISREG(there.st_mode)


@cache
def partials(folder):
    """Unfinished files in a folder.  It is listed once a process: a folder of photos is long."""
    return list(folder.glob(".*.partial"))


def running(process):
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def remove(path):
    """Remove a file or a folder, if it is there and may be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(path):
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    """Write `text` to `path` whole, as UTF-8 with the newlines as given.

    Bytes of a file name that are no UTF-8 are written as \\udc80 to \\udcff, which JSON reads back as they were.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def duration(seconds):
    """Seconds as text: 8 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """`what  done/total  rate  time left  note`: one updating line on a terminal, plain lines now and then in a log.

        with Progress("photos", total=763, unit="photos") as progress:
            for photo in photos:
                ...
                progress.step()

    total  number of units, or None if it is unknown; done: units that were finished before this start (resume).
    share  instead of a total: how much of the work is done, 0 to 1.  The caller sets it before each step.
    On a terminal, nothing is printed within the first second.  A log file gets its first line after 5 s, then a line after
    every further tenth of the time so far, at least every 30 s.  Everything goes to stderr; stdout is for results.
    """

    def __init__(self, what, total=None, unit="", done=0, share=None):
        self.what, self.total, self.unit = what, total, unit
        self.share = self.share_before = share
        self.done = self.done_before = done
        self.note = ""
        self.terminal = sys.stderr.isatty()

    def __enter__(self):
        self.start = time.monotonic()
        self.patience = 1 if self.terminal else 5       # what is done sooner needs no line
        self.next_print = self.start + self.patience
        return self

    def step(self, n=1, note=None):
        """n more units are done; `note` (a short text, such as the loss) is shown until the next one."""
        self.done += n
        if note is not None:
            self.note = note
        now = time.monotonic()
        if now >= self.next_print:
            self._print(now)
            self.next_print = now + (0.1 if self.terminal else min(30, max(5, (now - self.start) / 10)))

    def __exit__(self, kind, value, traceback):
        if time.monotonic() - self.start < self.patience:
            return False
        if kind is None:
            self._print(time.monotonic(), last=True)
        elif self.terminal:
            print(file=sys.stderr)              # leave the unfinished line standing
        return False

    def _print(self, now, last=False):
        elapsed = max(now - self.start, 1e-9)
        rate = (self.done - self.done_before) / elapsed
        parts = [f"{self.done:,}/{self.total:,}" if self.total is not None else f"{self.done:,}"]
        parts[0] += f" {self.unit}" if self.unit else ""
        if rate > 0:
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s")
        if last:
            parts.append(f"took {duration(elapsed)}")
        elif self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        elif self.share is not None and self.share > self.share_before:
            parts.append(f"{self.share:.1%}")
            parts.append(f"{duration(elapsed * (1 - self.share) / (self.share - self.share_before))} left")
        if self.note:
            parts.append(self.note)
        line = f"{self.what}  " + "  ".join(parts)
        if self.terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80     # 0 where nobody set it
            print("\r" + line[: width - 1].ljust(width - 1), end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
