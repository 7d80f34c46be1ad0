"""The model as a GPU runs it: weights and activations of 16 bits, and a device other than the CPU.

Values        in every dtype against the plain model in fp32; on the CPU, and where there is a GPU on it, in another process.
Meta device   shapes and dtypes without values, on every machine.  PyTorch lets it pass what a GPU refuses, so `Strict` refuses
              that here: tensors of two devices in one operation, and a matmul of two dtypes.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import GPUS, Strict
from safetensors.torch import load_file

import eiven
from base.checkpoint import load_strict
from base.packing import KVCache, next_tokens, pack
from data import Encoded
from eiven import EIVEN
from experiments.plain import answer_log_probs
from experiments.random_weights import TINY_VIT
from llama import Linear, LLaMA, load_llama
from train import make_optimizer, train_step
from vit import ViT, load_vit, official_name, vision_tower

EXAMPLES = [Encoded((0,), [5, 9, 17], [60, 2]), Encoded((1, 2), [5, 9, 17, 4, 4, 4, 4], [61, 62, 2]), Encoded((), [8], [60, 2])]
CLS_TOKENS = torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(5))
CANDIDATES = [[[60, 2], [61, 62, 2]], [[60, 2]], [[7, 2], [8, 9, 2]]]


def eiven_on(folder, device, dtype, int8=False):
    return EIVEN(*load_llama(folder, dtype, device, int8), visual_width=24, adapter_dim=4, projector_dim=6)


def run_with(model, cls_tokens, micro_batch_size=None):
    """What train_step needs of a Run; its examples are encoded already."""
    features = None if cls_tokens is None else SimpleNamespace(read=lambda names, device: cls_tokens.to(device))
    return SimpleNamespace(model=model, photo_features=features,
                           config=SimpleNamespace(micro_batch_size=micro_batch_size, image=cls_tokens is not None))


@pytest.fixture
def encoded(monkeypatch):
    monkeypatch.setattr("train.encode_examples", lambda examples, *_: (examples, None))


# ------------------------------------------------------------------------------------------------ values


class Place(NamedTuple):
    """A device, the dtype of weights and activations, and how far from fp32 results may be, as a share of the largest."""

    device: str
    dtype: torch.dtype
    tolerance: float

    def agree(self, ours, reference, tolerance=None):
        atol = (tolerance or self.tolerance) * reference.abs().max().item()
        torch.testing.assert_close(ours.detach().float().cpu(), reference.detach(), rtol=0, atol=atol)


PLACES = [Place(device, dtype, tolerance) for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()
          for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 0.005), (torch.bfloat16, 0.04))]


def test_values_on_a_gpu():
    """The tests below that are for CUDA, in a process that sees the GPU (conftest.py says why)."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is for CPUs alone")
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {"TEST_ON_GPU": "1"}
    env |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda-", __file__], env=env,
                          capture_output=True, text=True, check=False)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("there is no GPU")
    assert done.returncode == 0, done.stdout


@pytest.fixture(params=PLACES, ids=lambda place: f"{place.device}-{str(place.dtype).removeprefix('torch.')}")
def place(request, monkeypatch):
    """Each Place of this machine.  On the CPU, too, activations have the dtype of the weights here."""
    monkeypatch.setattr(LLaMA, "compute_dtype", property(lambda llama: llama.embed_tokens.weight.dtype))
    return request.param


@pytest.fixture
def pair(place, llama_dir):
    """(the model at this place, the same model with the same rounded weights in fp32 on the CPU)"""
    ours, reference = eiven_on(llama_dir, place.device, place.dtype), eiven_on(llama_dir, "cpu", place.dtype)
    reference.llama.float()
    return randomize(ours), randomize(reference)


def randomize(model):
    """Trained values that do not depend on the device."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.trainable_parameters().values():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model


def plain_log_probs(model, examples):
    return torch.cat([answer_log_probs(model, e, CLS_TOKENS) for e in examples])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_loss_and_gradients_are_those_of_the_plain_model(pair, place, checkpointed):
    ours, reference = pair
    ours.llama.grad_checkpoint = checkpointed
    loss, expected = ours(EXAMPLES, CLS_TOKENS.to(place.device)), -plain_log_probs(reference, EXAMPLES).sum() / len(EXAMPLES)
    place.agree(loss, expected)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(ours.trainable_parameters().items(), reference.trainable_parameters().values()):
        assert p.grad.dtype == torch.float32, name
        place.agree(p.grad, q.grad, 5 * place.tolerance)


def test_int8_weights_have_the_loss_and_gradients_of_their_widened_values(place, llama_dir):
    ours, reference = (randomize(eiven_on(llama_dir, device, place.dtype, int8=True)) for device in (place.device, "cpu"))
    for linear in (m for m in reference.llama.modules() if isinstance(m, Linear)):
        linear.weight, linear.scale = torch.nn.Parameter(linear.weight * linear.scale[:, None], requires_grad=False), None
    reference.llama.float()
    loss, expected = ours(EXAMPLES, CLS_TOKENS.to(place.device)), -plain_log_probs(reference, EXAMPLES).sum() / len(EXAMPLES)
    place.agree(loss, expected)
    loss.backward()
    expected.backward()
    for p, q in zip(ours.trainable_parameters().values(), reference.trainable_parameters().values()):
        place.agree(p.grad, q.grad, 5 * place.tolerance)


def test_training_steps_are_those_in_fp32(pair, place, encoded):
    """With loss scaling in fp16, as train.py does: three steps, and the loss after them."""
    ours, reference = pair
    losses = []
    for model, device in ((ours, place.device), (reference, "cpu")):
        optimizer = make_optimizer(model)
        scaler = torch.amp.GradScaler(device, init_scale=1024, enabled=model.llama.compute_dtype == torch.float16)
        run = run_with(model, CLS_TOKENS, 2)
        losses.append(torch.tensor([train_step(run, optimizer, scaler, EXAMPLES)[0] for _ in range(4)]))
    assert losses[1][3] < 0.99 * losses[1][0]
    place.agree(losses[0], losses[1])


def test_scores_are_those_of_the_plain_model(pair, place):
    ours, reference = pair
    found = ours.score(EXAMPLES, CANDIDATES, CLS_TOKENS.to(place.device))
    for example, several, log_p in zip(EXAMPLES, CANDIDATES, found):
        alone = [plain_log_probs(reference, [example._replace(answer=R)]).sum() for R in several]
        place.agree(torch.tensor(log_p), torch.stack(alone))


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_answers_have_the_probability_that_the_plain_model_gives_them(pair, place, temperature):
    """Through the KV cache.  In 16 bits the most probable token may be another; its probability must still be right."""
    ours, reference = pair
    for example, (ids, p) in zip(EXAMPLES, ours.generate(EXAMPLES, CLS_TOKENS.to(place.device), [1, 2, 3], temperature, limit=6)):
        answer = ids if len(ids) == 6 else [*ids, ours.tokenizer.eos_id]
        place.agree(torch.tensor(math.log(p)), plain_log_probs(reference, [example._replace(answer=answer)]).sum())


def test_merged_logits_are_those_of_the_adapters(pair, place):
    ours, reference = pair
    expected = reference.answer_logits(EXAMPLES, CLS_TOKENS)
    place.agree(ours.merge_adapters().answer_logits(EXAMPLES, CLS_TOKENS.to(place.device)), expected)


def test_cached_and_batched_logits_are_those_of_one_sequence_in_fp32(pair, place):
    ours, reference = (model.llama for model in pair)
    sequences, more = [[5, 9, 17, 3], [8, 2], [44, 45, 46, 47, 48, 49]], [[10, 11], [20, 21], [30, 31]]
    cache = KVCache(ours.config, 3, 6 + 2, ours.compute_dtype, place.device)
    tokens = pack(sequences, [1, 1, 1], place.device, cache)
    with torch.no_grad():
        h = ours(ours.embed(tokens.ids), tokens)
        for step in range(3):
            for b, (sequence, tail) in enumerate(zip(sequences, more)):
                alone = pack([sequence + tail[:step]], [1])
                place.agree(ours.logits(h)[b], reference.logits(reference(reference.embed(alone.ids), alone))[0])
            if step < 2:
                ids = torch.tensor([tail[step] for tail in more], device=place.device)
                h = ours(ours.embed(ids), next_tokens(ids, [len(sequence) + step for sequence in sequences], cache))


@pytest.mark.parametrize("device", sorted({place.device for place in PLACES}))
def test_the_vit_gives_the_features_recorded_from_transformers(device):
    golden = load_file(Path(__file__).parent / "golden" / "vit.safetensors")
    pixels, *expected = (golden.pop(name) for name in ("pixels", "cls.3", "cls.6"))
    with torch.device("meta"):
        model = ViT(TINY_VIT)
    load_strict(model, vision_tower(golden, "golden"), "golden", official_name, device=device)
    with torch.no_grad():
        ours = model(pixels.to(device), (3, 6)).cpu()
    tolerance = 1e-5 if device == "cpu" else 0.01       # cuDNN may compute the patch embedding in TF32
    torch.testing.assert_close(ours, torch.stack(expected, 1), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ the meta device

@pytest.fixture(params=[(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)], ids=["fp16", "bf16", "int8"])
def model(request, llama_dir):
    dtype, int8 = request.param
    return eiven_on(llama_dir, "meta", dtype, int8)


ON_META = CLS_TOKENS.to("meta")


@pytest.mark.parametrize("photos", [True, False], ids=["photos", "no photos"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_training_step(model, checkpointed, photos, encoded, monkeypatch):
    """The step of train.py: forward, backward, loss scaling in fp16, AdamW (not fused: that has no kernel for meta)."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **settings: adamw(groups, **settings))
    model.llama.grad_checkpoint = checkpointed
    scaler = torch.amp.GradScaler("cpu", enabled=model.llama.compute_dtype == torch.float16)
    examples = EXAMPLES if photos else [e._replace(photos=()) for e in EXAMPLES]
    optimizer = make_optimizer(model)
    with Strict():
        train_step(run_with(model, ON_META if photos else None, 2), optimizer, scaler, examples)
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
        found = model.generate(EXAMPLES, ON_META, temperature=temperature, limit=2)
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
        model.generate([*long, EXAMPLES[2]], ON_META, limit=3)
    assert [rows.device.type for rows in kept] == ["meta"]


def test_scores(model, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isnan", lambda x: torch.zeros(x.shape, dtype=torch.bool))
    with Strict():
        model.score(EXAMPLES, CANDIDATES, ON_META)


def test_merged_adapters(llama_dir):
    model = eiven_on(llama_dir, "meta", torch.bfloat16)
    with Strict():
        model.merge_adapters().answer_logits(EXAMPLES, ON_META)


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
