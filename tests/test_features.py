"""Features of photos: computed once, known by content, safe against what goes wrong."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import resume, train_run
from safetensors.torch import load_file, save_file

import evaluate
from base.console import UserError
from base.photo import open_photo
from support import features
from support.features import PhotoFeatures
from vit import load_vit, preprocess

NAMES = ["B0002.jpg", "B0001.jpg", "caf\udce9.jpg"]     # the last is no UTF-8


@pytest.fixture
def images(data_root, tmp_path, monkeypatch):
    """A folder of three photos; the cache is beside it."""
    monkeypatch.setenv("EIVEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number, name in enumerate(NAMES, start=3):
        shutil.copy(data_root / "images" / f"B000{number}.jpg", tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch):
    """The names of all photos that are decoded."""
    names = []
    monkeypatch.setattr(features, "open_photo", lambda path: names.append(path.name) or open_photo(path))
    return names


def prepared(vit, images, names=NAMES, single=False):
    photos = PhotoFeatures(vit, images, single)
    photos.prepare(names)
    return photos


def test_features_are_the_vits(vit_dir, images):
    photos = prepared(vit_dir, images)
    tokens = photos.read(NAMES)
    pixels = torch.stack([preprocess(open_photo(images / name), 32) for name in NAMES])
    torch.testing.assert_close(tokens, load_vit(vit_dir)(pixels, (3, 6)))
    single = prepared(vit_dir, images, NAMES[1:], single=True)      # the last layer alone
    assert torch.equal(single.read(NAMES[1:]), tokens[1:, -1:])
    assert photos.read([]) is None


def test_features_belong_to_the_bytes_of_a_photo_and_to_the_vit(vit_dir, images, decoded, tmp_path):
    photos = prepared(vit_dir, images)
    before = photos.read(NAMES)
    (images / "B0001.jpg").rename(images / "moved.jpg")         # known wherever it lies
    again = prepared(vit_dir, images, ["moved.jpg", NAMES[2]])
    assert torch.equal(again.read(["moved.jpg"]), before[1:2]) and sorted(decoded) == sorted(NAMES)
    shutil.copy(images / "B0002.jpg", images / "B0001.jpg")
    photos.prepare(NAMES)                               # the same name again, as in a web service
    after = photos.read(NAMES)
    assert torch.equal(after[1], after[0]) and not torch.equal(after[1], before[1])
    vit = shutil.copytree(vit_dir, tmp_path / "vit") / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(vit).items()}, vit)
    assert not torch.isclose(prepared(vit, images).read(NAMES), after).any()


def test_photos_that_cannot_be_used(vit_dir, images):
    photos = prepared(vit_dir, images)
    with pytest.raises(UserError, match="2 of 3 photos are not in .*'gone.jpg', ''.*--no-image"):
        photos.prepare(["gone.jpg", "", "gone.jpg", "B0002.jpg"])
    outside = shutil.copy(images / "B0001.jpg", images.parent / "outside.jpg")
    (images / "link.jpg").symlink_to(outside)
    (images / "B0001.jpg").write_text("<html>")
    with pytest.raises(UserError, match="B0001.jpg: .* an HTML"):
        photos.prepare(NAMES)
    bad = ["", "nul\0.jpg", "x" * 5000, "B0001.jpg", "link.jpg", "../outside.jpg"]
    problems = photos.prepare([*bad, str(outside), "B0002.jpg"], skip_bad=True)
    assert list(problems) == bad
    assert all("leads out of" in problems[name] for name in bad[-2:])
    assert photos.read(["B0002.jpg", str(outside)]).shape == (2, 2, 24)


def test_a_damaged_file_counts_as_missing(vit_dir, images, decoded):
    photos = prepared(vit_dir, images)
    expected = photos.read(NAMES)
    [path] = images.parent.rglob(photos.keys["B0002.jpg"])
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert torch.equal(prepared(vit_dir, images).read(NAMES), expected)
    assert decoded[3:] == ["B0002.jpg"]


def test_threads_share_features_and_folder(vit_dir, images):
    photos = [PhotoFeatures(vit_dir, images) for _ in range(2)]

    def prepare_and_read(n):
        photos[n % 2].prepare(NAMES)
        return photos[n % 2].read(NAMES)

    with ThreadPoolExecutor(8) as threads:
        tokens = list(threads.map(prepare_and_read, range(16)))
    assert all(torch.equal(one, tokens[0]) for one in tokens)
    assert len(list((images.parent / "cache").glob("features/*/*"))) == len(NAMES)


def test_products_without_a_photo_are_left_out_on_request(flags, data_root, tmp_path, capsys, monkeypatch):
    """Before labels are sampled; a resumed run is the same run, or is refused."""
    root = shutil.copytree(data_root, tmp_path / "data")
    (root / "images" / "B0001.jpg").unlink()
    os.mkfifo(root / "images" / "B0001.jpg")
    (root / "images" / "B0002.jpg").write_text("")
    (root / "images" / "B0055.jpg").write_text("<html>")
    arguments = [*flags, "--data", root, "--epochs", 1, "--skip-missing-photos"]
    run = train_run(tmp_path / "run", arguments)
    said = capsys.readouterr().out
    for line in "train: 2 of 30", "val: 0 of 10", "test: 1 of 15":
        assert f"{line} products have no photo in {root / 'images'}: left out\n" in said
    assert "on 20 labelled products" in said and "test split, 4 labels per value, seed 0, n = 14" in said
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--constrain"])
    evaluate.main()
    assert "n = 14" in capsys.readouterr().out
    (root / "images" / "B0002.jpg").write_bytes((root / "images" / "B0003.jpg").read_bytes())
    with pytest.raises(UserError, match="are not those that"):
        resume(run)


def test_what_stops_all_photos_is_no_photos_fault(vit_dir, images):
    (images.parent / "cache").touch()
    photos = PhotoFeatures(vit_dir, images)
    with pytest.raises(UserError, match="cannot be kept there .*EIVEN_CACHE"):
        photos.prepare(NAMES, skip_bad=True)
    photos.vit.pre_layrnorm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="its weights are damaged"):
        photos.prepare(NAMES, skip_bad=True)
