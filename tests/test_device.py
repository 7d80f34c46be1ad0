"""The model as a GPU runs it: weights and activations of 16 bits, on a device other than the CPU.

Values       in each dtype against the plain model in fp32, on the CPU; and on a GPU, where there is one, in
             another process.
Meta device  shapes and dtypes without values, on every machine.  PyTorch lets it pass what a GPU refuses;
             `Strict` refuses that here.
"""

import math
import warnings
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from test_eiven import CLS_TOKENS, EXAMPLES
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from eiven import EIVEN
from experiments.plain import answer_log_probs
from llama import Linear, LLaMA, load_llama
from vit import load_vit


def build(folder, device, dtype, int8=False):
    """EIVEN with random trained values, the same on each device."""
    model = EIVEN(*load_llama(folder, dtype, device, int8), visual_width=24, adapter_dim=4, projector_dim=6)
    draw = torch.Generator().manual_seed(0)
    for p in model.trainable_parameters().values():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model


def train_steps(model, count, monkeypatch, micro_batch_size=2):
    """Losses of `count` steps of train.py on EXAMPLES, which are encoded already."""
    monkeypatch.setattr(train, "encode_examples", lambda examples, *_: (examples, None))
    run = SimpleNamespace(model=model, photo_features=SimpleNamespace(read=lambda names: CLS_TOKENS),
                          config=SimpleNamespace(micro_batch_size=micro_batch_size, image=True))
    optimizer = train.make_optimizer(model)
    scaler = torch.amp.GradScaler("cuda" if model.device.type == "cuda" else "cpu", init_scale=1024,
                                  enabled=model.llama.compute_dtype == torch.float16)
    return [train.train_step(run, optimizer, scaler, EXAMPLES)[0] for _ in range(count)]


# ---------------------------------------------------------------------------------------- values


TOLERANCES = {torch.float32: 2e-5, torch.float16: 0.005, torch.bfloat16: 0.04}      # of the largest value
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def test_values_on_a_gpu():
    """The tests below that are for CUDA, in a process that sees the GPU (conftest.py says why)."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is for CPUs alone")
    env = os.environ | {"TEST_ON_GPU": "1"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("there is no GPU")
    assert done.returncode == 0, done.stdout


@pytest.fixture(params=product(DEVICES, TOLERANCES, (False, True)), ids=str)
def pair(request, llama_dir, monkeypatch):
    """(model whose activations have the dtype of its weights, the same weights in fp32 on the CPU, agree)"""
    device, dtype, int8 = request.param
    monkeypatch.setattr(LLaMA, "compute_dtype", property(lambda llama: llama.embed_tokens.weight.dtype))
    model, reference = (build(llama_dir, place, dtype, int8) for place in (device, "cpu"))
    for module in reference.llama.modules():
        if int8 and isinstance(module, Linear):
            module.weight.data = module.weight * module.scale[:, None]
            module.scale = None
    reference.llama.float()

    def agree(ours, expected, looser=1):
        atol = looser * TOLERANCES[dtype] * expected.abs().max().item()
        torch.testing.assert_close(ours.detach().float().cpu(), expected.detach(), rtol=0, atol=atol)

    return model, reference, agree


def log_p(model, example, answer):
    return answer_log_probs(model, example._replace(answer=answer), CLS_TOKENS).sum()


def test_loss_and_gradients_are_those_of_the_plain_model(pair):
    model, reference, agree = pair
    expected = -sum(log_p(reference, e, e.answer) for e in EXAMPLES) / len(EXAMPLES)
    expected.backward()
    for checkpointed in (False, True):
        model.llama.grad_checkpoint = checkpointed
        model.zero_grad()
        loss = model(EXAMPLES, CLS_TOKENS.to(model.device))
        loss.backward()
        agree(loss, expected)
        theirs = reference.trainable_parameters()
        for name, ours in model.trainable_parameters().items():
            agree(ours.grad, theirs[name].grad, looser=5)


def test_answers_have_the_probability_that_the_plain_model_gives_them(pair):
    """Through the KV cache.  In 16 bits another token may be drawn; its probability must still be right."""
    model, reference, agree = pair
    answers = model.generate(EXAMPLES, CLS_TOKENS.to(model.device), temperature=2.0, limit=6)
    for example, (ids, p) in zip(EXAMPLES, answers):
        agree(torch.tensor(math.log(p)), log_p(reference, example, ids + [2] * (len(ids) < 6)))


def test_training_lowers_the_loss_as_in_fp32(pair, monkeypatch):
    """With loss scaling in fp16, as train.py does."""
    model, reference, agree = pair
    expected = train_steps(reference, 4, monkeypatch)
    assert expected[3] < 0.99 * expected[0]
    agree(torch.tensor(train_steps(model, 4, monkeypatch)), torch.tensor(expected))


# ---------------------------------------------------------------------------------------- the meta device


aten = torch.ops.aten


class Strict(TorchDispatchMode):
    """Run code on the meta device with a GPU's rules.  A value read back is 1; nonzero finds one row.

    waits  how often the CPU would wait for a GPU: to read a value, to know how many rows there are, or to
           copy from memory that is not pinned
    """

    waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = operation.overloadpacket
        assert name is not aten.index or tensors[-1].dtype != torch.bool, "it waits for the rows of a mask"
        if name is aten._to_copy:
            moved = torch.device(kwargs.get("device") or args[0].device) != args[0].device
            self.waits += moved and (args[0].is_meta or not kwargs.get("non_blocking"))
        self.waits += name in (aten._local_scalar_dense, aten.nonzero) and args[0].is_meta
        assert name not in (aten.masked_select, aten.equal), f"{operation} waits"
        if name is aten._local_scalar_dense and args[0].is_meta:
            return {torch.bool: True, torch.float32: 1.0}.get(args[0].dtype, 1)
        if name is aten._to_copy and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name is aten.nonzero:
            return torch.empty(1, args[0].dim(), dtype=torch.long, device="meta")
        if name is not aten._to_copy:                   # a number (of no dimension) may be on the CPU
            devices = {x.device for x in tensors if x.dim()}
            assert len(devices) < 2, f"{operation} has tensors of {devices}"
        if name in (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm):
            dtypes = {x.dtype for x in tensors}
            assert len(dtypes) == 1, f"{operation} has tensors of {dtypes}"
        return operation(*args, **kwargs)


class FromLists(TorchFunctionMode):
    """Refuses torch.tensor(list, device=...), whose copy no other mode sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = torch.device(kwargs.get("device") or "cpu").type
        assert function not in (torch.tensor, torch.as_tensor) or to == "cpu", "its copy waits"
        return function(*args, **kwargs)


def waits(do):
    """How often the CPU would wait for a GPU in do()."""
    with FromLists(), Strict() as strict:
        do()
    return strict.waits


META = torch.empty(2, 3, device="meta")


def test_what_a_gpu_refuses_is_refused_and_waits_are_counted():
    for wrong in (lambda: META @ torch.empty(3, 3), lambda: META[torch.tensor([0])],
                  lambda: META @ META.T.half(), lambda: torch.tensor([1], device="meta"),
                  lambda: META[META > 0], lambda: META.equal(META)):
        with pytest.raises(AssertionError):
            waits(wrong)
    for wait in META.sum().item, META.tolist, META.nonzero, lambda: torch.ones(2).to("meta"):
        assert waits(wait) == 1


@pytest.mark.parametrize("dtype, int8", [
    (torch.bfloat16, False), (torch.float16, False), (torch.float16, True)])
def test_all_that_a_model_does_is_fit_for_a_gpu(dtype, int8, llama_dir, monkeypatch):
    """Training, answers of which one leaves the cache early, scores, and the merge.

    The CPU waits twice in a step, for the loss and the largest gradient, and once for a token.
    """
    adamw = torch.optim.AdamW                           # fused, it has no kernel for the meta device
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **settings: adamw(groups, **settings))
    model, cls_tokens = build(llama_dir, "meta", dtype, int8), CLS_TOKENS.to("meta")
    for size, checkpointed in ((2, False), (None, False), (1, True)):
        model.llama.grad_checkpoint = checkpointed
        waited = waits(lambda: train_steps(model, 1, monkeypatch, size))
        assert waited == 2 or dtype == torch.float16    # whose scaler waits here, and not on a GPU
    assert all(p.grad.dtype == torch.float32 for p in model.trainable_parameters().values())
    long = [5] * (model.llama.config.max_position_embeddings - 2)
    batch = [EXAMPLES[0], EXAMPLES[3]._replace(prompt=long)]
    for temperature in (0, 0.1):
        assert waits(lambda: model.generate(batch, cls_tokens, temperature=temperature, limit=4)) == 4
    with Strict():
        model.score([e._replace(answer=[7, 8, 2]) for e in EXAMPLES], cls_tokens)
        if not int8:
            model.merge_adapters().answer_logits(EXAMPLES, cls_tokens)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_gpu_is_waited_for_as_rarely(dtype, device, llama_dir, monkeypatch):
    """As PyTorch itself says.  In fp16 the scaler looks at the gradients without a wait."""
    model, cls_tokens = build(llama_dir, device, dtype), CLS_TOKENS.to(device)
    train_steps(model, 1, monkeypatch)
    for limit, do in ((2, lambda: train_steps(model, 1, monkeypatch)),
                      (4, lambda: model.generate(EXAMPLES, cls_tokens, limit=4))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            do()
            torch.cuda.set_sync_debug_mode("default")
        assert sum("called a synchronizing" in str(warning.message) for warning in caught) <= limit


def test_the_vit_is_fit_for_a_gpu(vit_dir):
    vit = load_vit(vit_dir, "meta")
    with Strict():
        assert vit(torch.empty(2, 3, 32, 32, device="meta"), (3, 6)).shape == (2, 2, 24)
