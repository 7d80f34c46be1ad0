"""The import of the authors' release, stats of a data set, and the commands of dataset/ with every mistake's message."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOOD, contents
from PIL import Image

from base.console import UserError
from base.tsv import write_tsv
from dataset import build, release, stats
from dataset.values import VALUES, read_values

HERE = Path(__file__).resolve().parent
REAL = HERE.parents[1] / "shared" / "data" / "implicitave"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the authors' data are not here")


def write_release(folder, data_sets):
    """The authors' layout, {domain: {split: rows}}."""
    for domain, parts in data_sets.items():
        for part, rows in parts.items():
            write_tsv(folder / "data/training_data/texts" / domain / f"{part}.tsv", rows)
            write_tsv(folder / "data/training_data/texts" / domain / "train_and_val.tsv", rows)


def a_row(n, value="Plaid", title="A shirt", image=None):
    return [f"B{n:09}", image or f"B{n:09}.jpg", "Shirts & Tops", f"[Title] {title}", "Pattern", value]


def test_import_of_the_authors_layout(tmp_path, capsys):
    theirs, ours = tmp_path / "ImplicitAVE", tmp_path / "data"
    write_release(theirs, {"Jewlery_and_General_Apparel": {"train": [a_row(n) for n in range(6)], "val": [a_row(6)],
                                                           "test": [a_row(7, title='Quoted "name"')]},
                           "Home": {part: [a_row(8)] for part in stats.SPLITS}})
    for place, ids in (("evaluation_data/images", [7, 8]), ("training_data/images/part1", [0, 1]),
                       ("training_data/images/part2/deeper", [2])):
        for n in ids:
            path = theirs / "data" / place / f"B{n:09}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(GOOD)
            path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (theirs / "data/training_data/images/B000000003.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (theirs / "data/training_data/images/B000000004.jpg").write_text("<html>")
    (theirs / "data/training_data/images/more.zip").write_bytes(b"PK")
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive/B000000005.jpg").write_bytes(GOOD)
    release.import_release(theirs, ours, [tmp_path / "drive"])
    out = capsys.readouterr().out
    assert "general/train.tsv: 6 rows, 4 of 6 with their photo" in out and "home/test.tsv: 1 rows, 1 of 1" in out
    assert "3 photos missing, 2 of them files that are no photo" in out and "5 '._' files" in out and "more.zip" in out
    missing = (ours / "missing_photos.tsv").read_text()
    assert "git-LFS pointer" in missing and "a web page" in missing and "B000000006.jpg\tnot found" in missing
    assert sorted(path.name for path in (ours / "images").iterdir()) == [f"B{n:09}.jpg" for n in (0, 1, 2, 5, 7, 8)]
    assert stats.read_tsv(ours / "general/test.tsv")[0][0]["texts"] == '[Title] Quoted "name"'
    before = contents(ours)
    release.import_release(theirs, ours, [tmp_path / "drive"])
    assert contents(ours) == before
    with pytest.raises(UserError, match="--with-photos-only leaves no row in general/val: "):
        release.import_release(theirs, ours, [tmp_path / "drive"], with_photos_only=True)
    assert contents(ours) == before                     # nothing is written of a data set that nobody could train on
    (tmp_path / "drive/B000000006.jpg").write_bytes(GOOD)
    release.import_release(theirs, ours, [tmp_path / "drive"], with_photos_only=True)
    assert len(stats.read_tsv(ours / "general/train.tsv")[0]) == 4 and len(stats.read_tsv(ours / "general/val.tsv")[0]) == 1


def test_import_never_leaves_the_images_folder(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    write_release(theirs, {"Clothing": {part: [a_row(1), a_row(2, image="../../evil.jpg"), a_row(3, image="/etc/passwd")]
                                        for part in stats.SPLITS}})
    release.import_release(theirs, tmp_path / "data")
    assert "'../../evil.jpg' is no plain file name" in capsys.readouterr().out
    assert len(stats.read_tsv(tmp_path / "data/clothing/train.tsv")[0]) == 1


def test_import_errors(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        release.import_release(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="holds no data/training_data"):
        release.import_release(tmp_path, tmp_path)
    write_tsv(tmp_path / "Clothing/train.tsv", [a_row(1)])
    with pytest.raises(UserError, match="val.tsv cannot be read"):
        release.import_release(tmp_path, tmp_path / "data")
    with pytest.raises(UserError, match="unpacked"):
        release.import_release(tmp_path, tmp_path / "data", [tmp_path / "none"])


@real
def test_import_of_the_real_release(tmp_path, capsys):
    """The authors' layout, rebuilt from their texts and photos, comes back as it was."""
    theirs = tmp_path / "ImplicitAVE"
    domains = {"clothing": "Clothing", "footwear": "Footwear", "general": "Jewlery_and_General_Apparel"}
    for name, domain in domains.items():
        folder = theirs / "data/training_data/texts" / domain
        folder.mkdir(parents=True)
        for part in stats.SPLITS:
            os.symlink(REAL / name / f"{part}.tsv", folder / f"{part}.tsv")
    (theirs / "data/evaluation_data").mkdir()
    (theirs / "data/evaluation_data/images").mkdir()
    for photo in (REAL / "images").glob("*.jpg"):
        shutil.copyfile(photo, theirs / "data/evaluation_data/images" / photo.name)     # a link out of the clone is not used
    release.import_release(theirs, tmp_path / "data")
    out = capsys.readouterr().out
    for name, (n, test) in {"clothing": (15132, 226), "footwear": (17091, 317), "general": (10473, 220)}.items():
        assert f"{name}/train.tsv: {n:,} rows" in out and f"{name}/test.tsv: {test} rows, {test} of {test} with" in out
        for part in stats.SPLITS:
            assert stats.read_tsv(REAL / name / f"{part}.tsv") == stats.read_tsv(tmp_path / "data" / name / f"{part}.tsv")


@real
def test_stats_of_the_real_release(capsys):
    stats.stats(REAL, [], read_values(VALUES)[1])
    out = capsys.readouterr().out
    for n, values in (("19,094", 23), ("21,759", 29), ("13,281", 20)):
        assert re.search(rf"all +{n} +{values} ", out)
    assert "photos missing in test" not in out and "ids in two splits" not in out
    assert "titles that still name their value: 6" in out and "Table 6    24,664      30  1,000    211" in out


def test_stats_finds_what_is_wrong(tmp_path, capsys):
    folder = tmp_path / "general"
    write_tsv(folder / "train.tsv", [a_row(1), a_row(1), a_row(2, title="A plaid shirt"), a_row(3, title="Tartan!"),
                                           a_row(5, image="../x.jpg"), ["too", "few"], a_row(6)[:5] + [""]])
    write_tsv(folder / "test.tsv", [a_row(2, title="Fine"), a_row(4, value="Argyle")])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/B000000001.jpg").write_bytes(GOOD)
    (tmp_path / "images/B000000002.jpg").write_text("<html>")
    stats.stats(tmp_path, ["general"], read_values(VALUES)[1], tmp_path / "plot.png")
    out = capsys.readouterr().out
    for says in ("train           4       1      4      4  Pattern", "all             6       2      5      1",
                 "line 6: '../x.jpg' is no plain file name", "line 7: 2 fields, not 6",
                 "line 8: nothing under attribute_values", "val.tsv cannot be read", "ids twice in a split: 1",
                 "ids in two splits: 1", "B000000002 (test, train)", "photos missing in train: 1", "photos missing in test: 1",
                 "files in images that are no photo: 1", "titles that still name their value: 1",
                 "another spelling of their value (values.tsv): 1", "values in test that train does not have: 1",
                 "Pattern = Argyle"):
        assert says in out, (says, out)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and len(picture.getcolors(1 << 20)) > 4


def test_stats_errors(tmp_path):
    with pytest.raises(UserError, match="holds no data set"):
        stats.stats(tmp_path, [], {})
    with pytest.raises(UserError, match="no data set .*footwear. In .*: none"):
        stats.stats(tmp_path, ["footwear"], {})
    (tmp_path / "x").mkdir()
    (tmp_path / "x/train.tsv").write_text("id\tname\n")
    with pytest.raises(UserError, match="no data set among"):
        stats.stats(tmp_path, ["x"], {})


# ---- the commands

def command(*arguments):
    return subprocess.run([sys.executable, "-m", "dataset", *map(str, arguments)], capture_output=True, text=True, cwd=HERE.parent)


def test_mistakes_end_with_one_line_and_code_2(tmp_path):
    for arguments, says in ((["build", "--labels", tmp_path / "l", "--metadata", tmp_path / "m"], "cannot be opened"),
                            (["import", tmp_path / "none", "--data", tmp_path], "is not a folder"),
                            (["stats", "--data", tmp_path], "holds no data set"),
                            (["build", "--at-most", "0"], "is not a whole number from 1 on"),
                            (["build"], "required: --labels, --metadata"), ([], "required: command")):
        done = command(*arguments)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "python -m dataset: error: " in done.stderr or "usage: python -m dataset" in done.stderr
    (tmp_path / "file").write_text("")
    (tmp_path / "l").write_text(json.dumps({"id": "B000000001", "category": "Shoes", "attributes": []}))
    done = command("build", "--labels", tmp_path / "l", "--metadata", tmp_path / "l", "--data", tmp_path / "file")
    assert done.returncode == 2 and "leave to write" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_and_a_quick_start():
    for name in ("build", "import", "stats"):
        assert "--data ROOT" in command(name, "--help").stdout
    assert "--llama DIR" in command("check", "--help").stdout
    seen = subprocess.run([sys.executable, "-c", "import dataset.__main__, sys; print('torch' in sys.modules, 'PIL' in sys.modules)"],
                          capture_output=True, text=True, cwd=HERE.parent).stdout
    assert seen == "False False\n"


def test_what_was_not_built_here_is_not_written_over(made, tmp_path):
    write_tsv(tmp_path / "clothing/train.tsv", [a_row(1)])
    (tmp_path / ".build").mkdir()                       # of a build that came to nothing
    with pytest.raises(UserError, match="clothing: there already, and not built here"):
        build.build(*made[:2], tmp_path, photos=False)
    write_release(tmp_path / "theirs", {"Clothing": {part: [a_row(2)] for part in stats.SPLITS}})
    with pytest.raises(UserError, match="holds another data set"):
        release.import_release(tmp_path / "theirs", tmp_path)
    assert stats.read_tsv(tmp_path / "clothing/train.tsv")[0][0]["id"] == a_row(1)[0]


def test_stats_refuse_what_training_refuses(tmp_path):
    write_tsv(tmp_path / "train.tsv", [a_row(1)])
    text = (tmp_path / "train.tsv").read_bytes()
    (tmp_path / "train.tsv").write_bytes(text.replace(b"[Title] ", b"[Title] \xe9 "))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        stats.read_tsv(tmp_path / "train.tsv")
    (tmp_path / "train.tsv").write_bytes(text.replace(b"[Title] ", b'"[Title] "a" b'))
    assert stats.read_tsv(tmp_path / "train.tsv")[1]
