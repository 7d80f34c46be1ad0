"""For the terminal and the disk: a mistake as one line, progress as one line, files that are never half
written.
"""

import difflib
import fcntl
import json
import os
import pickle
import re
import shutil
import sys
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake that the user can correct.  The message says what was given, where, what is allowed, and
    what to do next.
    """


def user_path(text):
    """A type for argparse: a path, with ~ for the home folder, which a shell leaves alone in --output=~/x."""
    return Path(text).expanduser()


def cache_folder():
    """Where the features of photos and the demo world are kept: $EIVEN_CACHE, else cache/ in the project's
    folder.
    """
    return Path(os.environ.get("EIVEN_CACHE") or PROJECT / "cache").absolute()


# ---------------------------------------------------------------------------------------- a command


def run(main, name=None):
    """Run main() as a command.  Every error is one line on stderr; EIVEN_DEBUG=1 shows the traceback as well.

    Exit code 2: a UserError, a mistake of the user.  1: anything else.  130: Ctrl-C.  141: nobody reads the
    output.
    name  of the command in the line; default: its file's
    """
    for place in ("stdout", "stderr"):                  # closed, or not Python's own as in a notebook
        stream = getattr(sys, place) or open(os.devnull, "w")
        setattr(sys, place, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code, message = 0, None
    try:
        try:
            main()
            sys.stdout.flush()
        except Exception:
            if os.environ.get("EIVEN_DEBUG"):
                traceback.print_exc()
            raise
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:                             # e.g. `| head`
        code = 141
    except OSError as error:                            # a full disk, a folder that may not be written
        code, message = 1, f"error: {error.filename or 'the output'}: {error.strerror or error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(place.filename).name
        code = 1
        message = (f"error: {type(error).__name__}: {reason(error)} ({file}, line {place.lineno}; "
                   "EIVEN_DEBUG=1 shows where it came from)")
    if code:
        try:
            sys.stdout.flush()
        except OSError:  # Python would flush it again at exit, and print a traceback
            sys.stdout = None
        if message:
            # One write, so that the lines of several processes do not mix.
            sys.stderr.write(f"{name or Path(sys.argv[0]).name}: {printable(message)}\n")
        raise SystemExit(code)


def printable(text):
    """The text on one line, with its control characters made visible: they could change the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def reason(error):
    """The first line of what an exception says, or its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def parse_flags(parser, argv=None):
    """parser.parse_args; its error for an unknown flag also names the flag that is most like it."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = re.findall(r"--[\w-]+", parser.format_usage())
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0], flags)}")
    return args


def did_you_mean(word, names):
    """" (did you mean 'NAME'?)" with the name that is most like a misspelt word; "" if none is."""
    close = difflib.get_close_matches(word, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------------------------------- reading


@contextmanager
def reading(path, what):
    """Whatever fails inside becomes a UserError: the path, what should be there, the reason, what to do next.

    what  that should be at `path`, e.g. "LLaMA's config.json"
    A reader inside raises what it likes, e.g. ValueError("line 5: ...").
    """
    path = Path(path)
    if not os.path.isfile(path):                        # opening a pipe would wait for ever
        there = "does not exist"
        if os.path.exists(path):
            there = "is a folder" if path.is_dir() else "is a pipe or a device"
        raise UserError(f"{path}: {there}; {what} should be there")
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        if isinstance(error, pickle.UnpicklingError):   # PyTorch's words say how to run what is in the file
            problem = "it holds something other than tensors, or is damaged"
        impostor = what_is(path)
        if impostor:
            problem = f"it is {impostor}"
        elif type(error) is not ValueError:             # what raised a ValueError knows what to do
            problem += "; download or save it again"
        raise UserError(f"{path}: cannot be read as {what}: {problem}") from error


KINDS = {                                               # how a file begins, and what it is then
    b"version https://git-lfs": "a git-LFS pointer and not the file itself (git lfs pull)",
    b"\x00\x05\x16\x07": "a macOS resource fork (`._` file), not the file itself",
    b"<": "an HTML or XML page, such as a server sends with an error",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK": "a zip archive or an Excel workbook; save a table as tab-separated text (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save it as tab-separated text (UTF-8)",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"%PDF": "a PDF",
    b"GGUF": "a GGUF file",
    b"Entry not found": "a server's error message",
    b"Access to model": "a server's error message",
}


def what_is(path):
    """What a file really is, in a few words, if its first bytes tell, else None.  For the message of an
    error.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"not readable ({error.strerror})"
    if not head:
        return "an empty file"
    if b"/data.pkl" in head:                            # what torch.save writes is a zip archive, too
        return None
    if head[4:8] == b"ftyp":
        return "an HEIC or AVIF photo, or a video; save it as JPEG"
    return next((kind for start, kind in KINDS.items() if head.lstrip().startswith(start)), None)


@contextmanager
def reading_json(path, what):
    """`reading` of the JSON object in a file, which it yields."""
    with reading(path, what):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object {{...}}")
        yield value


def read_json(path, what):
    """The JSON object in a file."""
    with reading_json(path, what) as value:
        return value


# ---------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path):
    """Yield a temporary path, .NAME.partial; the file written there replaces `path` at the end, or is removed
    on an error.

    Its bytes are on the disk before that, so after a power cut there is the old file or the new one.  A
    symbolic link stays: the file that it leads to is replaced.  A device, such as /dev/stdout, is yielded
    itself.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        yield path
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name[:100]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode                   # by the umask; safetensors would let nobody else read
        yield partial
        os.chmod(partial, mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a full disk has as many kinds of errors as there are writers
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def own_copy(path):
    """Yield a temporary path that nobody else writes to; the file written there replaces `path` at the end,
    or is removed on an error.

    For files in a cache: any number of threads and processes may write the same one, with the same bytes.
    (The temporary name of `whole_file` is the same for all.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{uuid.uuid4()}{path.suffix}")
    try:
        yield own
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` to `path` whole, as UTF-8."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(path, value):
    """Write `value` to `path` whole, as JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def locked(folder, doing):
    """While one process works in a folder, a second one that wants to is told so.  The lock ends with the
    process.

    doing  what the process does there, for the message: "training"
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise UserError(f"{folder}: another process is {doing} here; wait for it, or stop it") from None
    except OSError:                                     # a file system without locks
        pass
    try:
        yield folder
    finally:
        os.close(held)


# ---------------------------------------------------------------------------------------- progress


def duration(seconds):
    """Seconds as text: 8 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """`what  done/total unit  rate  time left  note`: one updating line on a terminal, a line now and then in
    a log.

        with Progress("photos", total=763, unit="photos") as progress:
            for photo in photos:
                ...
                progress.step()

    total  number of units, or None if it is unknown;  done: units that were finished before (resume)
    What takes less than a second (in a log: 5 seconds) prints nothing.  All lines go to stderr; stdout is for
    results.
    """

    def __init__(self, what, total=None, unit="", done=0):
        self.what, self.total, self.unit = what, total, unit
        self.done = self.done_before = done

    def __enter__(self):
        self.terminal = getattr(sys.stderr, "isatty", bool)()     # a stream of the user's may lack it
        self.start = time.monotonic()
        self.next_print = self.start + (1 if self.terminal else 5)
        self.printed = False
        return self

    def step(self, n=1, note=""):
        """n more units are done; `note` is a short text, such as the loss."""
        self.done += n
        now = time.monotonic()
        if now >= self.next_print:
            self.show(note, "" if self.terminal else "\n")
            self.next_print = now + (0.1 if self.terminal else 10)

    def show(self, note, end):
        seconds = time.monotonic() - self.start
        rate = (self.done - self.done_before) / max(seconds, 1e-9)
        of_total = f"/{self.total:,}" if self.total else ""
        line = f"{self.what}  {self.done:,}{of_total} {self.unit}  {rate:,.2f}/s  {duration(seconds)}"
        if self.total and rate:
            line += f"  {duration((self.total - self.done) / rate)} left"
        line += f"  {note}"
        if self.terminal:                               # go back to the start of the line, and clear it
            line = "\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end=end, file=sys.stderr, flush=True)
        self.printed = True

    def __exit__(self, *_):
        if self.printed:
            self.show("", "\n")
