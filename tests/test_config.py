"""Where data and weights come from, and what a run says about them."""

import pytest
import torch

import eiven
from base.console import UserError
from demo import world
from support import config
from support.config import Config, choose_dtype, describe, find_sources


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
    assert sources == (empty / "demo-world", world.LLAMA, world.VIT) and settings.demo
    line = describe(settings, sources)
    assert "DEMO WORLD" in line and "DEMO LLaMA" in line and "DEMO ViT" in line and "not the paper's" in line
    assert find_sources(settings) == sources            # evaluate.py finds them again


def test_the_projects_own_folders_win_over_the_demo_world_and_paths_given_over_both(empty, data_root, llama_dir, vit_dir):
    for name, real in (("data", data_root), ("llama", llama_dir), ("vit", vit_dir)):
        (empty / name).symlink_to(real)
    assert find_sources(Config()) == (data_root, llama_dir, vit_dir)
    (empty / "other").symlink_to(data_root)
    settings = Config(data=str(empty / "other"), llama="demo")
    sources = find_sources(settings)
    assert sources == (data_root, world.LLAMA, vit_dir) and not settings.demo
    assert "DEMO LLaMA" in describe(settings, sources) and "DEMO WORLD" not in describe(settings, sources)
    assert find_sources(Config(demo=True)).llama == world.LLAMA


@pytest.mark.parametrize("given, said", [
    ({"data": "."}, "--llama: LLaMA-7B's weights should be in .* or take the small demo one with --llama demo"),
    ({"data": ".", "llama": "demo"}, "--vit: CLIP ViT-B/16's weights should be in .* --no-image"),
    ({"llama": "demo"}, "--data: the data sets should be in .*python -m dataset"),
])
def test_real_and_demo_are_never_mixed_unasked(empty, given, said):
    with pytest.raises(UserError, match=said):
        find_sources(Config(**given))
    if "data" in given:
        assert find_sources(Config(**given | {"llama": "demo"}, image=False)).vit is None


def test_a_cpu_computes_in_fp32_where_memory_holds_it(llama_dir, monkeypatch):
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu, llama_dir) == torch.float32
    assert choose_dtype("bf16", cpu, llama_dir) == torch.bfloat16
    assert choose_dtype("int8", cpu, llama_dir) is None         # of embeddings and norms
    monkeypatch.setattr(config.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}[name])
    assert choose_dtype("auto", cpu, llama_dir) is None         # the files' own


@pytest.mark.parametrize("capability, dtype", [((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_a_gpu_without_bf16_gets_fp16(capability, dtype, llama_dir, monkeypatch):
    """V100 (7.0) says yes to is_bf16_supported, by emulation; its capability is what counts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda"), llama_dir) == dtype
    assert choose_dtype("int8", torch.device("cuda"), llama_dir) == dtype       # of all that stays unquantised


def test_the_defaults_are_the_papers():
    """Section 4.1 and Table 5: 15 epochs, rank 8, d_h 128, all granularities, Judge_Last; LaVIN's batch of 32."""
    c = Config()
    assert (c.epochs, c.batch_size, c.adapter, c.adapter_dim, c.projector_dim) == (15, 32, "rep", 8, 128)
    assert (c.features, c.lbc, c.lbc_ratio, c.image, c.text, c.lr) == ("multi", "judge_last", 1.0, True, True, None)
    assert (eiven.TEMPERATURE, eiven.TOP_P) == (0.1, 0.75)
