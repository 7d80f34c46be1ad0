"""Each operation of base/frozen_ops.py against its plain expression in fp64: value and gradient."""

import pytest
import torch

from base import frozen_ops

WEIGHT = 0.5 + torch.arange(6) / 6


@pytest.mark.parametrize("large", [0, 1 << 60], ids=["oneDNN", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_frozen_linear(dtype, large, monkeypatch):
    monkeypatch.setattr(frozen_ops, "LARGE", large)
    monkeypatch.setattr(frozen_ops, "STRIP", 3)
    monkeypatch.setattr(frozen_ops, "FORWARD", 21)      # three rows of 7
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(8, 7)
    weight = frozen_ops.quantize(weight) if dtype == torch.int8 else (weight.to(dtype),)
    torch.testing.assert_close(frozen_ops.frozen_linear(x, *weight), frozen_ops.linear_plain(x, *weight))
    grad = torch.randn(5, 8)
    [ours] = torch.autograd.grad(frozen_ops.frozen_linear(x, *weight), x, grad)
    [plain] = torch.autograd.grad(frozen_ops.linear_plain(x, *weight), x, grad)
    torch.testing.assert_close(ours, plain)


@pytest.mark.skipif(frozen_ops.ONEDNN is None, reason="PyTorch has no oneDNN here")
@pytest.mark.parametrize("rows, out, dtype, by_onednn", [
    (128, 512, torch.float32, True), (129, 512, torch.float32, False),          # few rows; one more
    (4, 511, torch.float32, False),                                             # a smaller matrix
    (129, 512, torch.bfloat16, True), (129, 512, torch.int8, True),             # strips, with any number of rows
])
def test_which_matmuls_onednn_does(rows, out, dtype, by_onednn, monkeypatch):
    calls, onednn = [], frozen_ops.ONEDNN
    monkeypatch.setattr(frozen_ops, "ONEDNN", lambda *a: calls.append(a) or onednn(*a))
    x, weight = torch.randn(rows, 512, requires_grad=True), torch.randn(out, 512)
    weight = frozen_ops.quantize(weight) if dtype == torch.int8 else (weight.to(dtype),)
    y = frozen_ops.frozen_linear(x, *weight)
    assert bool(calls) == by_onednn
    calls.clear()
    [grad_x] = torch.autograd.grad(y, x, torch.ones_like(y))
    assert bool(calls) == by_onednn
    plain = frozen_ops.linear_plain(x, *weight)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_x, torch.autograd.grad(plain, x, torch.ones_like(y))[0], rtol=1e-5, atol=1e-4)


def test_quantize_by_hand(monkeypatch):
    """Scales are a 127th of each row's largest value; halves are rounded to the even neighbour."""
    monkeypatch.setattr(frozen_ops, "STRIP", 2)
    weight = torch.tensor([[1.27, -0.504, 0.0049], [0, 0, 0], [-254, 3, 5.1]])
    values, scale = frozen_ops.quantize(weight)
    torch.testing.assert_close(scale, torch.tensor([0.01, 0, 2]), rtol=1e-6, atol=1e-30)
    assert values.dtype == torch.int8 and values.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_quantized_weight_is_half_a_scale_away_at_most(dtype):
    weight = (torch.randn(1300, 64) * (0.001 + torch.rand(1300, 1))).to(dtype)
    values, scale = frozen_ops.quantize(weight)
    away = (weight.double() - values.double() * scale[:, None].double()).abs()
    assert (away <= scale[:, None].double() * (0.5 + 1e-5)).all() and away.max() > 0.4 * scale.max()
    assert values.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("ours, plain, shapes", [
    (lambda x: frozen_ops.rms_norm(x, WEIGHT, 1e-5), lambda x: frozen_ops.rms_norm_plain(x, WEIGHT.double(), 1e-5), [(7, 6)]),
    (frozen_ops.swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, [(7, 6), (7, 6)]),
    (frozen_ops.swiglu_plain, lambda gate, up: gate * torch.sigmoid(gate) * up, [(7, 6), (7, 6)]),
], ids=["rms_norm", "swiglu", "swiglu_plain"])
def test_value_and_gradient_are_those_of_the_plain_expression(ours, plain, shapes):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, reference = ours(*inputs), plain(*wide)
    grad = torch.randn(out.shape)
    out.backward(grad)
    reference.backward(grad.double())
    torch.testing.assert_close(out, reference.float(), rtol=1e-5, atol=1e-6)
    for x, y in zip(inputs, wide):
        torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-5, atol=1e-6)
