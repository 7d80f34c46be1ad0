"""Features of photos: computed once, known by content, safe against what goes wrong."""

import os
import shutil
import time

import pytest
import torch

from base.console import UserError
from base.photo import open_photo
from support import features
from support.features import PhotoFeatures
from vit import load_vit, preprocess


@pytest.fixture
def folder(data_root, tmp_path):
    """A cache's path and a folder of three photos."""
    (tmp_path / "images").mkdir()
    for name in ("B0001.jpg", "B0002.jpg", "B0003.jpg"):
        shutil.copy(data_root / "images" / name, tmp_path / "images" / name)
    return tmp_path


NAMES = ["B0002.jpg", "B0001.jpg", "B0003.jpg"]


def open_features(folder, vit_dir, **how):
    return PhotoFeatures(folder / "cache" / "f.sqlite", vit_dir, folder / "images", **how)


def test_features_are_the_vits(folder, vit_dir):
    f = open_features(folder, vit_dir)
    f.prepare(NAMES)
    vit = load_vit(vit_dir)
    pixels = torch.stack([preprocess(open_photo(folder / "images" / name), 32) for name in NAMES])
    expected = vit(pixels, (3, 6))
    torch.testing.assert_close(f.read(NAMES, "cpu"), expected)
    assert f.width == 24 and f.read([], "cpu") is None
    single = open_features(folder, vit_dir, single=True)
    single.prepare(NAMES)
    torch.testing.assert_close(single.read(NAMES, "cpu"), expected[:, -1:])       # the last layer alone


def test_no_photo_is_decoded_twice(folder, vit_dir, monkeypatch):
    open_features(folder, vit_dir).prepare(NAMES)
    monkeypatch.setattr(features, "open_photo", lambda path: pytest.fail(f"{path} was opened again"))
    again = open_features(folder, vit_dir)
    again.prepare(NAMES)
    (folder / "images" / "B0001.jpg").rename(folder / "images" / "moved.jpg")
    again.prepare(["moved.jpg"])                        # known by its bytes, wherever it lies
    assert torch.equal(again.read(["moved.jpg"], "cpu"), again.read(["B0001.jpg"], "cpu"))


def test_another_photo_or_another_vit_is_another_entry(folder, vit_dir, tmp_path):
    f = open_features(folder, vit_dir)
    f.prepare(NAMES)
    before = f.read(["B0001.jpg"], "cpu")
    shutil.copy(folder / "images" / "B0003.jpg", folder / "images" / "B0001.jpg")
    f = open_features(folder, vit_dir)
    f.prepare(NAMES)
    assert torch.equal(f.read(["B0001.jpg"], "cpu"), f.read(["B0003.jpg"], "cpu"))
    assert not torch.equal(f.read(["B0001.jpg"], "cpu"), before)
    from experiments.random_weights import write_vit
    write_vit(tmp_path / "other", load_vit(vit_dir).config, seed=9, std=0.2)
    other = open_features(folder, tmp_path / "other")
    other.prepare(NAMES)
    assert not torch.equal(other.read(["B0003.jpg"], "cpu"), f.read(["B0003.jpg"], "cpu"))


def test_missing_photos_are_counted_and_named(folder, vit_dir):
    f = open_features(folder, vit_dir)
    for _ in range(2):                                  # counted by photo, not by mention, and again the same
        with pytest.raises(UserError, match=r"2 of 4 photos are not in .*'gone.jpg', ''.*--no-image"):
            f.prepare(["B0001.jpg", "gone.jpg", "", "gone.jpg", "B0002.jpg", "B0002.jpg", "B0001.jpg"])
    f.prepare(NAMES)                                    # those that were only counted are computed when it matters
    assert f.read(NAMES, "cpu").shape == (3, 2, 24)


def test_a_name_may_be_any_bytes_and_equal_photos_are_computed_once(folder, vit_dir, monkeypatch):
    odd = os.fsdecode(b"caf\xe9.jpg")
    for name in (odd, "copy.jpg"):
        shutil.copy(folder / "images" / "B0001.jpg", folder / "images" / name)
    opened = []
    monkeypatch.setattr(features, "open_photo", lambda path: opened.append(path) or open_photo(path))
    f = open_features(folder, vit_dir)
    f.prepare([*NAMES, odd, "copy.jpg"])
    assert len(opened) == 3
    assert torch.equal(f.read([odd], "cpu"), f.read(["B0001.jpg"], "cpu"))


def test_a_broken_photo_is_named_and_loses_nothing(folder, vit_dir, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 1)
    (folder / "images" / "B0003.jpg").write_text("<html>")
    f = open_features(folder, vit_dir)
    with pytest.raises(UserError, match="B0003.jpg: should be a photo, but is an HTML"):
        f.prepare(NAMES)
    f.read(["B0002.jpg", "B0001.jpg"], "cpu")           # those before it are kept


def test_a_broken_cache_is_named(folder, vit_dir):
    (folder / "cache").mkdir()
    (folder / "cache" / "f.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="delete it"):
        open_features(folder, vit_dir)


def test_two_processes_may_make_the_cache_at_once(tmp_path):
    """Without waiting, one of the two ends with "database is locked" more often than not."""
    def child(path, at):
        while time.monotonic() < at:
            pass
        features.open_cache(path).close()

    for n in range(20):
        at, children = time.monotonic() + 0.02, []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    child(tmp_path / f"{n}.sqlite", at)
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
