"""A run folder: its config, its files are of one run, one process works in it; sources, dtype and threads."""

import argparse
import json
import math
import shutil

import pytest
import torch

import eiven
import evaluate
import train
from base.console import UserError, locked
from demo import world
from support import config
from support.config import Config, choose_dtype, choose_threads, describe, find_sources, number
from support.run_folder import new_run_folder, read_config, read_losses, save_temperature


@pytest.fixture
def own(run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def stopped(own):
    """The same, as if it had been stopped after the last state was saved."""
    (own / "adapter.safetensors").unlink()
    return own


def resume(run, said):
    with pytest.raises(UserError, match=said):
        train.main(["--resume", str(run)])
    assert not (run / "adapter.safetensors").exists()


# ---------------------------------------------------------------------------------------- one run's files


@pytest.mark.parametrize("change, said", [
    ({"lbc": "foo"}, "lbc is 'foo', which is not allowed"), ({"epochs": "3"}, "epochs is '3'"),
    ({"epochs": None}, "epochs is None"), ({"image": 1}, "image is 1"), ({"held_out": [1]}, "held_out is"),
    ({"weights_fingerprint": {}}, "was trained with another llama"),
])
def test_a_config_that_was_edited_is_refused(own, change, said):
    record = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=said):
        evaluate.load(own)
    del record["seed"]                                  # of an older version
    (own / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="config.json: .* it has no 'seed'"):
        read_config(own)


def test_files_of_another_run_are_refused(run, own, flags, tmp_path):
    """The adapter, the state and the temperature of a run that differs in the seed alone."""
    other = tmp_path / "other"
    train.main([*flags, "--seed", "1", "--out", str(other)])
    save_temperature(other, 2.0, 20, 5)
    save_temperature(own, 3.0, 20, 5)
    assert evaluate.load(own).value_temperature == 3.0
    save_temperature(own, math.nan, 20, 5)
    with pytest.raises(UserError, match="calibration.json: .* temperature is not above 0"):
        evaluate.load(own)
    for name in ("adapter.safetensors", "calibration.json"):
        shutil.copy(other / name, own)
        with pytest.raises(UserError, match=f"{name}: .* of another run than the config.json beside it"):
            evaluate.load(own)
        shutil.copy(run / "adapter.safetensors", own)
    (own / "adapter.safetensors").unlink()
    shutil.copy(other / "state.pt", own)
    resume(own, "state.pt: .* of another run than the config.json beside it")
    (own / "config.json").unlink()                      # a new run does not take over what is left of an old
    with pytest.raises(UserError, match="run: is not empty"):
        train.main([*flags, "--out", str(own)])


@pytest.mark.parametrize("change, said", [
    (lambda s: s.update(step=10 ** 9), "step is 1000000000, but the run has 15 steps"),
    (lambda s: s.pop("trained"), "it has no 'trained'"),
    (lambda s: s.update(optimizer=[1]), "cannot be read as the state of this run"),
    (lambda s: s["trained"].pop("projector.up.bias"), "projector.up.bias is absent here"),
    (lambda s: s["trained"]["projector.up.bias"].fill_(math.nan), "projector.up.bias holds NaN"),
])
def test_a_state_that_does_not_fit_is_refused(stopped, change, said):
    state = torch.load(stopped / "state.pt")
    change(state)
    torch.save(state, stopped / "state.pt")
    resume(stopped, f"state.pt: .*{said}")
    (stopped / "state.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    resume(stopped, "state.pt: cannot be read as the state of this run")


@pytest.mark.parametrize("damage, left", [
    (lambda text: text[:-9], 14), (lambda text: b"\xff\xfe" + text, 0), (lambda text: b"", 0),
    (lambda text: text + bytes(9), 15),
])
def test_a_damaged_log_costs_the_learning_curve_alone(stopped, run, damage, left):
    text = (stopped / "log.jsonl").read_bytes()
    (stopped / "log.jsonl").write_bytes(damage(text))
    train.main(["--resume", str(stopped)])
    assert read_losses(stopped) == read_losses(run)[:left]
    assert (stopped / "adapter.safetensors").read_bytes() == (run / "adapter.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------- one process


def test_one_process_works_in_a_folder(run, tmp_path):
    """A second one that is told so leaves the first one's folder alone, though it is still empty."""
    settings = Config(out=str(tmp_path / "run"))
    with new_run_folder(settings) as folder:
        for _ in range(2):
            with pytest.raises(UserError, match="another process is training here"), new_run_folder(settings):
                pass
        assert folder.exists()
    with locked(run, "training"), pytest.raises(UserError, match="another process is training here"):
        train.main(["--resume", str(run)])


def test_a_new_run_has_a_new_folder_or_an_empty_one(flags, tmp_path, monkeypatch):
    """Without --out each has the next number; what an error leaves empty is removed."""
    monkeypatch.setattr("support.run_folder.PROJECT", tmp_path)
    with new_run_folder(Config(labels=4)) as first, new_run_folder(Config(labels=4)) as second:
        assert [folder.name for folder in (first, second)] == ["general-4-1", "general-4-2"]
        (second / "config.json").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["general-4-2"]
    with pytest.raises(UserError, match=r"no data set 'shoe' \(did you mean 'shoes'\?\) in .*: it holds"):
        train.main([*flags, "--dataset", "shoe", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for out, said in (("file", "is a file; name a folder"), ("runs", "is not empty")):
        with pytest.raises(UserError, match=said):
            train.main([*flags, "--out", str(tmp_path / out)])


def test_a_run_that_is_moved_while_it_is_scored(own, tmp_path):
    """Its scores do not go to a folder of their own.  (test_train.py moves one that trains.)"""
    loaded = evaluate.load(own)
    own.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="this run is not here any more"):
        evaluate.evaluate(loaded, [], "test", own)
    assert not own.exists()


# ---------------------------------------------------------------------------------------- sources


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A project folder with neither data nor weights."""
    for name in ("DATA", "LLAMA", "VIT"):
        monkeypatch.setattr(config, name, tmp_path / name.lower())
    monkeypatch.setattr(world, "write_dataset", lambda: tmp_path / "demo-world")
    return tmp_path


def test_nothing_given_and_nothing_there_is_the_demo_world(empty):
    settings = Config()
    sources = find_sources(settings)
    assert sources == find_sources(settings) == (empty / "demo-world", world.LLAMA, world.VIT)
    line = describe(settings, sources)
    assert line == ("DEMO WORLD (drawn products), data set general; DEMO LLaMA; DEMO ViT.  "
                    "These figures are not the paper's.")


def test_a_path_given_wins_then_the_projects_own_folders(empty, data_root, llama_dir, vit_dir):
    """Symbolic links stay as they are: the files of a Hugging Face cache are links."""
    for name, real in (("data", data_root), ("llama", llama_dir), ("vit", vit_dir), ("other", data_root)):
        (empty / name).symlink_to(real)
    assert find_sources(Config()) == (empty / "data", empty / "llama", empty / "vit")
    settings = Config(data=str(empty / "other"), llama="demo")
    sources = find_sources(settings)
    assert sources == (empty / "other", world.LLAMA, empty / "vit") and not settings.demo
    assert "DEMO LLaMA" in describe(settings, sources) and "DEMO WORLD" not in describe(settings, sources)
    assert find_sources(Config(demo=True)) == (empty / "demo-world", world.LLAMA, world.VIT)


@pytest.mark.parametrize("paths, said", [
    ({"data": "."}, "--llama: LLaMA-7B's weights should be in .*--llama demo"),
    ({"data": ".", "llama": "demo"}, "--vit: CLIP ViT-B/16's weights should be in .* --no-image"),
    ({"llama": "demo"}, "--data: the data sets should be in .*python -m dataset"),
])
def test_real_and_demo_are_never_mixed_unasked(empty, paths, said):
    with pytest.raises(UserError, match=said):
        find_sources(Config(**paths))
    assert find_sources(Config(**{"data": ".", **paths, "llama": "demo"}, image=False)).vit is None
    assert find_sources(Config(data="gone", llama="demo", vit="demo"), data_needed=False).data.name == "gone"


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name, memory, capability, dtype", [
    ("auto", 1 << 40, None, torch.float32), ("auto", 1 << 10, None, None), ("bf16", 0, None, torch.bfloat16),
    ("int8", 1 << 40, None, None), ("auto", 0, (7, 0), torch.float16), ("int8", 0, (8, 0), torch.bfloat16),
])
def test_the_dtype_of_frozen_weights(llama_dir, monkeypatch, name, memory, capability, dtype):
    """A V100 (7.0) says yes to is_bf16_supported, by emulation; its capability counts.  None: the files'."""
    monkeypatch.setattr(config.os, "sysconf", lambda key: memory if key == "SC_PAGE_SIZE" else 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda" if capability else "cpu")
    assert choose_dtype(name, device, llama_dir) == dtype


@pytest.mark.parametrize("slow, best", [(1, 4), (4, 1)])
def test_one_thread_or_all_whichever_is_faster_now(tiny, monkeypatch, capsys, slow, best):
    """A number that is given is not measured."""
    class Timer:
        def __init__(self, code, globals, num_threads):
            eval(code, globals)
            self.median = 5 if num_threads == slow else 1

        def blocked_autorange(self):
            return self

    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(config, "Timer", Timer)
    model, settings = eiven.EIVEN(*tiny, None), Config(threads=3)
    choose_threads(settings, model)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads(Config(), model)
    assert threads == [4, 3] and capsys.readouterr().out == ""
    monkeypatch.delenv("OMP_NUM_THREADS")
    settings = Config()
    threads.append(4)
    choose_threads(settings, model)
    assert settings.threads == threads[-1] == best
    assert f"CPU threads: {best} of 4, measured; --threads N" in capsys.readouterr().out


def test_numbers_of_the_command_line():
    share, whole = number(float, 0, 1), number(int, 1, 10, word="all")
    assert [share("0"), share("1"), whole("10"), whole("all")] == [0, 1, 10, None]
    for kind, text in ((share, "1.1"), (share, "nan"), (share, "all"), (whole, "0"), (whole, "2.5")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a .*number from .* but is '{text}'"):
            kind(text)


def test_the_defaults_are_the_papers():
    """Section 4.1 and Table 5; the batch of 32 is LaVIN's."""
    c = Config()
    assert (c.epochs, c.batch_size, c.adapter, c.adapter_dim, c.projector_dim) == (15, 32, "rep", 8, 128)
    assert (c.features, c.lbc, c.lbc_ratio, c.image, c.text) == ("multi", "judge_last", 1, True, True)
    assert (c.lr, eiven.TEMPERATURE, eiven.TOP_P) == (None, 0.1, 0.75)
