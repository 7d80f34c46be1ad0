"""The model on a device other than the CPU, and in 16 bits, on a machine without a GPU.

The meta device holds shapes and dtypes without values.  PyTorch lets it pass what a GPU refuses, so `Strict` refuses that
here: tensors of two devices in one operation, and a matmul of two dtypes.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eiven
from data import Encoded
from eiven import EIVEN
from llama import load_llama
from train import make_optimizer, train_step
from vit import load_vit

aten = torch.ops.aten
MATMULS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm)


class Strict(TorchDispatchMode):
    """Run code on the meta device with a GPU's rules.  A value that is read back is 1, and a mask selects one row."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = operation.overloadpacket
        if name is aten._local_scalar_dense and args[0].is_meta:
            return {torch.bool: True, torch.float32: 1.0}.get(args[0].dtype, 1)
        if name is aten._to_copy and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name is not aten._to_copy:                   # a number in a tensor of no dimension may come from the CPU
            devices = {x.device for x in tensors if x.dim()}
            assert len(devices) < 2, f"{operation} has tensors of {devices}"
        if name in MATMULS:
            assert len({x.dtype for x in tensors}) == 1, f"{operation} has tensors of {[x.dtype for x in tensors]}"
        if name in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put):
            rows = [x if x is None or x.dtype != torch.bool else torch.empty(1, dtype=torch.long, device=x.device) for x in args[1]]
            args = (args[0], rows, *args[2:])
        return operation(*args, **kwargs)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def model(request, llama_dir):
    llama, tokenizer = load_llama(llama_dir, request.param, "meta")
    return EIVEN(llama, tokenizer, visual_width=24, adapter_dim=4, projector_dim=6)


EXAMPLES = [Encoded((0,), [5, 9, 17], [60, 2]), Encoded((1, 2), [5, 9, 17, 4, 4, 4, 4], [61, 62, 2]), Encoded((), [8], [60, 2])]
CLS_TOKENS = torch.empty(3, 2, 24, device="meta")


@pytest.mark.parametrize("photos", [True, False], ids=["photos", "no photos"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_training_step(model, checkpointed, photos, monkeypatch):
    """The step of train.py: forward, backward, loss scaling in fp16, AdamW (not fused: that has no kernel for meta)."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **settings: adamw(groups, **settings))
    monkeypatch.setattr("train.encode_examples", lambda examples, *_: (examples, [0, 1, 2] if photos else []))
    model.llama.grad_checkpoint = checkpointed
    scaler = torch.amp.GradScaler("cpu", enabled=model.llama.compute_dtype == torch.float16)
    features = SimpleNamespace(read=lambda names, device: CLS_TOKENS.to(device)) if photos else None
    run = SimpleNamespace(model=model, photo_features=features, config=SimpleNamespace(micro_batch_size=2, image=photos))
    examples = EXAMPLES if photos else [e._replace(photos=()) for e in EXAMPLES]
    optimizer = make_optimizer(model)
    with Strict():
        train_step(run, optimizer, scaler, examples)
    for name, p in model.trainable_parameters().items():
        trained = photos or not name.startswith("projector")
        assert (p.grad is not None) == trained and p.dtype == torch.float32, name
        assert not trained or (p.grad.device.type, p.grad.dtype) == ("meta", torch.float32)
    assert all(p.grad is None for p in model.llama.parameters() if not p.requires_grad)


@pytest.mark.parametrize("temperature", [0, 0.1])
def test_prefill_and_a_cached_step(model, temperature, monkeypatch):
    steps, next_tokens = [], eiven.next_tokens
    monkeypatch.setattr(eiven, "next_tokens", lambda *a: steps.append(a) or next_tokens(*a))
    with Strict():
        found = model.generate(EXAMPLES, CLS_TOKENS, temperature=temperature, limit=2)
    assert len(found) == 3 and len(steps) == 1
    keys = steps[0][2].keys
    assert {(x.device.type, x.dtype) for x in keys} == {("meta", model.llama.compute_dtype)}


def test_sequences_that_end_leave_the_cache(model, monkeypatch):
    """Two of three sequences have no room for a second token."""
    kept, keep = [], eiven.KVCache.keep
    monkeypatch.setattr(eiven.KVCache, "keep", lambda cache, rows: kept.append(rows) or keep(cache, rows))
    most = model.llama.config.max_position_embeddings
    long = [e._replace(photos=(), prompt=[5] * (most - 2)) for e in EXAMPLES[:2]]
    with Strict():
        model.generate([*long, EXAMPLES[2]], CLS_TOKENS, limit=3)
    assert [rows.device.type for rows in kept] == ["meta"]


def test_scores(model, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isnan", lambda x: torch.zeros(x.shape, dtype=torch.bool))
    with Strict():
        model.score(EXAMPLES, [[[60, 2], [61, 62, 2]], [[60, 2]], [[7, 2], [8, 9, 2]]], CLS_TOKENS)


def test_merged_adapters(model):
    with Strict():
        model.merge_adapters().answer_logits(EXAMPLES, CLS_TOKENS)


def test_the_vit(vit_dir):
    vit = load_vit(vit_dir, "meta")
    with Strict():
        assert vit(torch.empty(2, 3, 32, 32, device="meta"), (3, 6)).shape == (2, 2, 24)


def test_strict_finds_what_a_gpu_refuses():
    x = torch.empty(2, 3, device="meta")
    with Strict():
        for wrong in (lambda: x @ torch.empty(3, 3), lambda: x.index_select(0, torch.tensor([0])),
                      lambda: x @ torch.empty(3, 3, device="meta", dtype=torch.float16)):
            with pytest.raises(AssertionError, match="has tensors of"):
                wrong()
        assert x.sum().item() == 1.0 and bool((x > 0).any()) and x.tolist() == [[1.0] * 3] * 2
        assert x[torch.empty(2, device="meta") > 0].shape == (1, 3)
