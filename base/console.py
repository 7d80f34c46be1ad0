"""For the terminal: errors as one line, progress as one line, and files that are never half written."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct.  The message says what was given, where, what is allowed, and what to do next."""


def run(main, name=None):
    """Run main() as a command: a UserError is printed as one line, and the exit code is 2.

    name  of the command in these lines; default: its file's
    """
    name = name or Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"{name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:                     # e.g. `| head`: the reader has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (MemoryError, RuntimeError) as error:        # PyTorch's are RuntimeErrors, and known by what they say
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in ("out of memory", "can't allocate memory")):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0][:120]
        print(f"{name}: error: more memory is needed than there is ({said}); --micro-batch-size and --grad-checkpoint take "
              "less, also with --resume", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:                    # a full disk, a folder that may not be written
        print(f"{name}: error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def whole_file(path):
    """Yield a temporary path next to `path`; the file written there is renamed to `path` at the end, or removed on an error.

    The bytes are on the disk before the rename, so after a power cut there is the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)      # the rename itself
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` to `path` whole, as UTF-8 with the newlines as given."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


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
    On a terminal, nothing is printed within the first second.  A log file gets its first line after 5 s, then a line after
    every further tenth of the time so far, at least every 30 s.  Everything goes to stderr; stdout is for results.
    """

    def __init__(self, what, total=None, unit="", done=0):
        self.what, self.total, self.unit = what, total, unit
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
        if self.note:
            parts.append(self.note)
        line = f"{self.what}  " + "  ".join(parts)
        if self.terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80     # 0 where nobody set it
            print("\r" + line[: width - 1].ljust(width - 1), end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
