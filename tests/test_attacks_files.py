"""Attacks with files: names from data, and outputs.

    ATTACKS=all python -m pytest tests/test_attacks_files.py        every attack, in some minutes; otherwise a seeded sample

The rule: a right result and exit 0, or one line that says what is wrong and exit 2.  Never a traceback, a signal, a hang,
1 GB of memory, a changed input, or an output that a later start cannot use.
"""

import contextlib
import csv
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from conftest import attack, command, files_in, held, judged, rows_of

# ------------------------------------------------------------------------------------------------ names from data


NASTY = ["../x", "../../etc/passwd", "..", ".", "/etc/passwd", "a/b", "a//b/", "C:\\x", "..\\x", "%00", "\\0", "\0", "a\0b",
         '"', '""', '"open', "'", "<b>&amp;</b>", "<script>alert(1)</script>", "' onload='x", "\u202eabc\u202c", "\u200f",
         "a" * 300, "a" * 250, "质" * 100, "👟" * 70, "e\u0301", "=1+1", "+1", "-1", "@x", "  ", "\u00a0", "\u2028", "{}",
         "{attribute}", "%s", "$HOME", "`id`", "a\tb", "a\nb", "a\r\nb", "a\rb", "\ufeff", "\x1b[31m", "\x07", "NUL", "con",
         "~", "--help", "*", "?", "(other)", "First: x; Second: y; No.", "…", ".hidden", "-", "train.tsv", "a.tsv/../b"]
ALIKE = ["A/B", "A-B", "a b", "a-b", "A B", "a/b", "A\\B", "Ä/B", "a" * 299 + "b", "a" * 299 + "c", "质" * 99 + "地",
         "质" * 99 + "量"]


def write_data(root, world, rows):
    """ROOT/shoes with these rows (of cells) in each split, and the photos of the world."""
    (root / "shoes").mkdir(parents=True)
    shutil.copytree(world.data / "images", root / "images", copy_function=os.link)
    for split in ("train", "val", "test"):
        with open(root / "shoes" / f"{split}.tsv", "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, dialect="excel-tab", quoting=csv.QUOTE_ALL)
            lines.writerow("id images category texts attribute_names attribute_values".split())
            lines.writerows(rows)
    return root


def test_names_in_a_data_set(tally, world, tmp_path_factory):
    def judge(rows):
        folder = tmp_path_factory.mktemp("names")
        root, out = write_data(folder / "data", world, rows), folder / "out"
        before = files_in(root)
        done = command("train.py", world.flags(out, root), folder)
        if wrong := held(done):
            return wrong
        if {p.name for p in folder.iterdir()} - {"data", "out", "stdout.txt", "stderr.txt"} or files_in(root) != before:
            return "wrote somewhere else"
        if done.code == 2:
            return None if ", line 2: " in done.err and done.err.count("\n") == 1 else done.err
        expected = [[" ".join(cell.split()) for cell in row] for row in rows]
        found = [[row[name] for name in "id images category texts attribute_names attribute_values".split()] for row in
                 rows_of(out / "predictions.tsv")]
        if [row[:3] + row[4:] for row in found] != [row[:3] + row[4:] for row in expected]:
            return "predictions.tsv does not hold what the data set does"
        attributes = {row[4] for row in expected}
        pictures = list(out.glob("confusion-*.png"))
        if len(pictures) != len(attributes) or not (out / "report.html").exists():
            return f"{len(pictures)} confusion matrices of {len(attributes)} attributes"
        return None

    row = ["B1", "B0001.jpg", "Shoes", "[Title] black shoe", "Boot Style", "Flat"]
    cases = [(f"{text!r:.60} as {place}", [[text if i == column else cell for i, cell in enumerate(row)], ["B2", *row[1:]]])
             for column, place in ((0, "id"), (2, "category"), (3, "title"), (4, "attribute"), (5, "value")) for text in NASTY]
    always = [("attributes that are alike", [[f"B{i}", *row[1:4], name, "Flat"] for i, name in enumerate(ALIKE)]),
              *(case for case in cases if "as attribute" in case[0] and ("aaaa" in case[0] or "质" in case[0]))]
    attack(tally, "names in a data set", judge, always, [case for case in cases if case not in always], 12)


def test_photos_that_leave_their_folder(tally, world, tmp_path_factory):
    """An absolute name, or one with .., is refused with file and line by each command that reads it."""
    def judge(name, script):
        folder = tmp_path_factory.mktemp("leave")
        rows = [["B1", name, "Shoes", "[Title] black shoe", "Boot Style", "Flat"]]
        if script == "import":
            source = folder / "release"
            write_data(source / "data" / "training_data" / "texts", world, rows)
            (source / "data" / "training_data" / "texts" / "shoes").rename(source / "data" / "training_data" / "texts" / "Shoes")
            done = command("-m dataset", ["import", str(source), "--data", str(folder / "root")], folder)
            return judged(done, f"{name!r}" in done.out and "line 2" in done.out and not list((folder / "root").rglob("*.jpg")))
        root = write_data(folder / "data", world, rows)
        (folder / "secret.jpg").write_bytes((world.data / "images" / "B0001.jpg").read_bytes())
        if script == "stats":
            done = command("-m dataset", ["stats", "--data", str(root)], folder)
            return judged(done, f"{name!r}" in done.out and "line 2" in done.out)
        arguments = world.flags(folder / "out", root) if script == "train.py" else [
            str(world.run), "--strict", "--input", str(root / "shoes" / "test.tsv"), "--output", str(folder / "out.tsv")]
        done = command(script, arguments, folder)
        return judged(done, done.code == 2 and ".tsv, line 2: images is " in done.err)

    secret = "../../secret.jpg"
    cases = [(f"{name} in {script}", name, script) for name in
             (secret, "sub/../../../secret.jpg", "..", str(world.data / "images" / "B0001.jpg"), "/etc/passwd", "../B0001.jpg")
             for script in ("train.py", "evaluate.py", "stats", "import")]
    attack(tally, "photos that leave their folder", judge, cases[:4], cases[4:], 6)


def test_import_takes_no_file_from_outside(world, tmp_path):
    """A link in the release that leads out of it is neither linked nor copied; one that stays inside is."""
    release = tmp_path / "release"
    texts = release / "data" / "training_data" / "texts"
    write_data(texts, world, [["B1", "in.jpg", "Shoes", "[Title] a", "Boot Style", "Flat"],
                              ["B2", "out.jpg", "Shoes", "[Title] b", "Boot Style", "Flat"],
                              ["B3", "loop.jpg", "Shoes", "[Title] c", "Boot Style", "Flat"]])
    (tmp_path / "secret.jpg").write_bytes((world.data / "images" / "B0001.jpg").read_bytes())
    (release / "photos").mkdir()
    (release / "photos" / "real.jpg").write_bytes((world.data / "images" / "B0002.jpg").read_bytes())
    (release / "photos" / "in.jpg").symlink_to("real.jpg")
    (release / "photos" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (release / "photos" / "loop.jpg").symlink_to("loop.jpg")
    done = command("-m dataset", ["import", str(release), "--data", str(tmp_path / "root")], tmp_path)
    assert not held(done) and done.code == 0, done.err
    assert {p.name for p in (tmp_path / "root" / "images").iterdir()} == {"in.jpg"}
    assert "out.jpg leads to" in done.out and "secret.jpg, outside of the folders given" in done.out


# ------------------------------------------------------------------------------------------------ outputs


def outputs(folder, device=False):
    """(name, path, how): how is "holds" the answers afterwards, "sink" for what keeps nothing, or "refused"."""
    folder.mkdir()
    (folder / "folder").mkdir()
    for name in ("file.tsv", "target.tsv", "hard.tsv"):
        (folder / name).write_text("old\n")
    os.link(folder / "hard.tsv", folder / "hard2.tsv")
    for name, target in (("link.tsv", "target.tsv"), ("dangling.tsv", "new.tsv"), ("loop.tsv", "loop.tsv"), ("null", "/dev/null"),
                         ("to-folder", "folder"), ("full", "/dev/full"), ("stdout", "/proc/self/fd/1")):
        (folder / name).symlink_to(target)
    yield "a new file", folder / "new-file.tsv", "holds"
    yield "a new folder", folder / "deep" / "er" / "out.tsv", "holds"
    yield "an old file", folder / "file.tsv", "holds"
    yield "a file with two names", folder / "hard.tsv", "holds"
    yield "a link to a file", folder / "link.tsv", "holds"
    yield "a link to nothing yet", folder / "dangling.tsv", "holds"
    yield "a link to itself", folder / "loop.tsv", "refused"
    yield "a link to /dev/null", folder / "null", "sink"
    yield "a link to stdout", folder / "stdout", "stdout"
    yield "/dev/full", folder / "full", "refused"
    yield "a folder", folder / "folder", "refused"
    yield "a link to a folder", folder / "to-folder", "refused"
    yield "in a file", folder / "file.tsv" / "out.tsv", "refused"
    yield "a name of 250 bytes", folder / ("a" * 246 + ".tsv"), "holds"
    yield "a name of 300 bytes", folder / ("a" * 296 + ".tsv"), "refused"
    yield "in /proc", Path("/proc/out.tsv"), "refused"
    yield "in /sys", Path("/sys/out.tsv"), "refused"
    yield "bytes that are no text", folder / os.fsdecode(b"caf\xe9.tsv"), "holds"
    with contextlib.suppress(PermissionError):          # only root can make a device
        os.mknod(folder / "device", 0o600 | 0o020000, os.makedev(1, 3))
        yield "a device", folder / "device", "sink"


def test_output_goes_where_it_is_sent(tally, world, tmp_path):
    given = world.data / "shoes" / "test.tsv"
    right = (world.run / "predictions.tsv").read_text(encoding="utf-8")

    def judge(path, how):
        kind = path.lstat().st_mode if os.path.lexists(path) and not os.path.isfile(path) else None
        link = os.readlink(path) if os.path.islink(path) else None
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(path)], tmp_path)
        if wrong := held(done):
            return wrong
        if link and (not path.is_symlink() or os.readlink(path) != link) or kind and path.lstat().st_mode != kind:
            return "was replaced"
        if (done.code == 2) != (how == "refused"):
            return f"exit {done.code}: {done.err}"
        if how == "holds" and path.read_text(encoding="utf-8") != right:
            return "does not hold the answers"
        if how == "stdout" and done.out != right:
            return f"stdout is not the answers: {done.out[:100]!r}"
        left = [p.name for p in tmp_path.rglob("*.partial")]
        return f"left {left}" if left else None

    attack(tally, "outputs", judge, list(outputs(tmp_path / "outputs")))


def test_output_to_a_pipe_and_to_our_own_stdout(tally, world, tmp_path):
    given = world.data / "shoes" / "test.tsv"
    right = (world.run / "predictions.tsv").read_bytes()

    def fifo():
        os.mkfifo(tmp_path / "fifo")
        read = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()), daemon=True)
        reader.start()
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(tmp_path / "fifo")], tmp_path)
        reader.join(5)
        return judged(done, read == [right] and (tmp_path / "fifo").is_fifo(), "the reader did not get the answers")

    def file():
        """As `> out.tsv` does, and --output /dev/stdout: the file is the same one, and holds the answers alone."""
        (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
        target = os.open(tmp_path / "out.tsv", os.O_WRONLY | os.O_CREAT)
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(tmp_path / "stdout")], tmp_path,
                       before=lambda: os.dup2(target, 1))
        same = os.fstat(target).st_ino == (tmp_path / "out.tsv").stat().st_ino
        os.close(target)
        return judged(done, same and (tmp_path / "out.tsv").read_bytes() == right, "out.tsv does not hold the answers alone")

    def full(arguments):
        target = os.open("/dev/full", os.O_WRONLY)
        done = command(arguments[0], arguments[1:], tmp_path, before=lambda: os.dup2(target, 1))
        os.close(target)
        return judged(done, done.code == 2)

    def given_itself(path):
        before = given.read_bytes()
        done = command("evaluate.py", [str(world.run), "--input", str(given), "--output", str(path)], tmp_path)
        return judged(done, done.code == 2 and given.read_bytes() == before)

    def not_a_file(flag):
        if not (tmp_path / "pipe").exists():
            os.mkfifo(tmp_path / "pipe")
        arguments = world.one_product(tmp_path / "pipe") if flag == "--image" else [
            str(world.run), "--input", str(tmp_path / "pipe"), "--output", str(tmp_path / "x.tsv")]
        done = command("evaluate.py", arguments, tmp_path)
        return judged(done, done.code == 2 and "pipe or a device" in done.err)

    (tmp_path / "input.tsv").symlink_to(given)
    run = str(world.run)
    attack(tally, "pipes, stdout, the input", lambda do, *a: do(*a), [
        ("a pipe", fifo), ("stdout in a file", file), ("scores to /dev/full", full, ["evaluate.py", run]),
        ("an answer to /dev/full", full, ["evaluate.py", *world.one_product(world.data / "images" / "B0001.jpg")]),
        ("the input", given_itself, given), ("a link to the input", given_itself, tmp_path / "input.tsv"),
        ("a pipe as --input", not_a_file, "--input"), ("a pipe as --image", not_a_file, "--image")])


def test_an_export_goes_to_a_new_folder(tally, world, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")

    def judge(path, code):
        done = command("evaluate.py", [str(world.run), "--export", str(path)], tmp_path)
        left = [p.name for p in tmp_path.rglob("*.partial")]
        return judged(done, done.code == code and not left, f"left {left}")

    attack(tally, "exports", judge, [
        ("a file", tmp_path / "file", 2), ("a pipe", tmp_path / "fifo", 2), ("new", tmp_path / "a" / "b", 0),
        ("in a file", tmp_path / "file" / "x", 2), ("/proc", Path("/proc/x"), 2), ("nothing", "", 2),
        ("a link to nothing yet", tmp_path / "link", 0), ("long", tmp_path / ("a" * 300), 2)])


def test_what_a_killed_process_left_is_removed(world, tmp_path):
    """Of the same file, and only if its process is gone: another live process may be writing there.

    Of --output that is the record of a catalogue; its answers so far stay."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out = tmp_path / "out.tsv"
    for name in (f".out.tsv.partial.json.{gone.pid}.partial", f".other.tsv.{gone.pid}.partial",
                 f".out.tsv.partial.json.{os.getpid()}.partial",
                 ".out.tsv.partial.json.x.partial", ".out.tsv.partial.json.99999999999999999999.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".export.{gone.pid}.partial").mkdir()
    (tmp_path / f".export.{gone.pid}.partial" / "model.safetensors").write_text("half")
    given = world.data / "shoes" / "test.tsv"
    for arguments in (["--input", str(given), "--output", str(out)], ["--export", str(tmp_path / "export")]):
        done = command("evaluate.py", [str(world.run), *arguments], tmp_path)
        assert not held(done) and done.code == 0, done.err
    assert sorted(p.name for p in tmp_path.glob(".*.partial")) == sorted([
        f".other.tsv.{gone.pid}.partial", f".out.tsv.partial.json.{os.getpid()}.partial", ".out.tsv.partial.json.x.partial",
        ".out.tsv.partial.json.99999999999999999999.partial"])
