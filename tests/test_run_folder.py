"""A run folder: its config, its files are of one run, one process works in it; sources, dtype and threads."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import resume, train_run

import eiven
import evaluate
from base.console import UserError, locked, read_json, write_json
from demo import world
from support import config
from support.config import Config, choose_dtype, choose_threads, describe, find_sources
from support.run_folder import new_run_folder, read_config, read_log


@pytest.fixture
def stopped(own):
    """A run as if it had been stopped after the last state was saved."""
    (own / "adapter.safetensors").unlink()
    return own


# ---------------------------------------------------------------------------------------- one run's files


def test_a_config_that_was_edited_is_refused(own):
    path = own / "config.json"
    record = read_json(path, "JSON")
    for change, said in (({"lbc": "foo"}, "lbc is 'foo'"), ({"epochs": "3"}, "epochs is '3'"),
                         ({"held_out": [1]}, "held_out is"), ({"weights_fingerprint": {}}, "another llama")):
        write_json(path, record | change)
        with pytest.raises(UserError, match=said):
            evaluate.load(own)
    del record["init"]                                  # of an older version
    write_json(path, record)
    assert read_config(own)[0].init is None
    del record["values"]
    write_json(path, record)
    with pytest.raises(UserError, match="config.json: .* it has no 'values'"):
        read_config(own)


def test_files_of_another_run_are_refused(own, flags, tmp_path):
    """The adapter, the state and the temperature of a run that differs in the seed alone."""
    other = train_run(tmp_path / "other", flags, "--seed", 1)
    fitted = {"run": read_config(own)[1]["id"], "n": 20, "values": 5, "temperature": 3.0}
    write_json(own / "calibration.json", fitted)
    assert evaluate.load(own).value_temperature == 3.0
    for change, said in ({"temperature": math.nan}, "is not above 0"), ({"run": "x"}, "another run"):
        write_json(own / "calibration.json", fitted | change)
        with pytest.raises(UserError, match=f"calibration.json: .* {said}"):
            evaluate.load(own)
    shutil.copy(other / "adapter.safetensors", own)
    with pytest.raises(UserError, match="adapter.safetensors: .* of another run than the config.json beside"):
        evaluate.load(own)
    (own / "adapter.safetensors").unlink()
    shutil.copy(other / "state.pt", own)
    with pytest.raises(UserError, match="state.pt: .* of another run than the config.json beside it"):
        resume(own)


def test_a_state_that_does_not_fit_is_refused(stopped):
    state = torch.load(stopped / "state.pt")
    bad = {"trained": state["trained"] | {"projector.up.bias": torch.full((32,), math.nan)}}
    for change, said in (({"step": 10 ** 9}, "step is 1000000000, but the run has 15 steps"),
                         (bad, "projector.up.bias holds NaN")):
        torch.save(state | change, stopped / "state.pt")
        with pytest.raises(UserError, match=f"state.pt: .*{said}"):
            resume(stopped)


@pytest.mark.parametrize("damage, left", [
    (lambda text: text[:-9], 14), (lambda text: b"\xff\xfe" + text, 0), (lambda text: text + bytes(9), 15),
])
def test_a_damaged_log_costs_the_learning_curve_alone(stopped, run, damage, left):
    text = (stopped / "log.jsonl").read_bytes()
    (stopped / "log.jsonl").write_bytes(damage(text))
    resume(stopped)
    assert read_log(stopped) == read_log(run)[:left]
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
        resume(run)


def test_a_new_run_has_the_next_number(tmp_path, monkeypatch):
    """A folder in which nothing was written is removed."""
    monkeypatch.setattr("support.run_folder.PROJECT", tmp_path)
    settings = Config(dataset="general/", labels=4)
    with new_run_folder(settings) as first, new_run_folder(settings) as second:
        assert [folder.name for folder in (first, second)] == ["general-4-1", "general-4-2"]
        (second / "config.json").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["general-4-2"]


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


def test_what_is_given_wins_then_the_projects_own_folders_then_the_demo(empty, data_root):
    """Symbolic links stay as they are: the files of a Hugging Face cache are links."""
    settings, demo = Config(), (empty / "demo-world", world.LLAMA, world.VIT)
    sources = find_sources(settings)
    assert sources == find_sources(settings) == demo    # written into the config, it stays
    line = describe(settings, sources)
    assert line == ("DEMO WORLD (drawn products), data set general; DEMO LLaMA; DEMO ViT.  "
                    "These figures are not the paper's.")
    for name in ("data", "llama", "vit", "other"):
        (empty / name).symlink_to(data_root)
    assert find_sources(Config()) == (empty / "data", empty / "llama", empty / "vit")
    settings = Config(data=str(empty / "other"), llama="demo")
    sources = find_sources(settings)
    assert sources == (empty / "other", world.LLAMA, empty / "vit")
    assert describe(settings, sources).startswith(f"data {empty / 'other'}, data set general; DEMO LLaMA; ")
    assert find_sources(Config(demo=True)) == demo


@pytest.mark.parametrize("paths, said", [
    ({"data": "."}, "--llama: LLaMA-7B's weights should be in .*--llama demo"),
    ({"data": ".", "llama": "demo"}, "--vit: CLIP ViT-B/16's weights should be in .* --no-image"),
])
def test_real_and_demo_are_never_mixed_unasked(empty, paths, said):
    with pytest.raises(UserError, match=said):
        find_sources(Config(**paths))
    assert find_sources(Config(**{"data": ".", **paths, "llama": "demo"}, image=False)).vit is None
    assert find_sources(Config(data="gone", llama="demo", vit="demo")).data.name == "gone"


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


@pytest.mark.parametrize("best", [1, 4])
def test_one_thread_or_all_whichever_is_faster_now(tiny, monkeypatch, best):
    """A number that is given is not measured."""
    def timer(code, globals, num_threads):
        eval(code, globals)
        return SimpleNamespace(blocked_autorange=lambda: SimpleNamespace(median=abs(num_threads - best)))

    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(config, "Timer", timer)
    model, settings = eiven.EIVEN(*tiny, None), Config()
    choose_threads(Config(), model)                     # OMP_NUM_THREADS is set
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_threads(settings, model)
    assert settings.threads == best
    choose_threads(Config(threads=3), model)
    assert threads == [4, best, 3]


def test_the_defaults_are_the_papers():
    """Section 4.1 and Table 5; the batch of 32 is LaVIN's."""
    papers = dict(epochs=15, batch_size=32, adapter="rep", adapter_dim=8, projector_dim=128, features="multi",
                  lbc="judge_last", lbc_ratio=1, image=True, text=True, lr=None)
    assert papers.items() <= vars(Config()).items()
    assert (eiven.TEMPERATURE, eiven.TOP_P) == (0.1, 0.75)
