"""Each operation of base/frozen_ops.py against its plain expression in fp64: value and gradient."""

import pytest
import torch

from base import frozen_ops

WEIGHT = 0.5 + torch.arange(6) / 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_linear(dtype, monkeypatch):
    monkeypatch.setattr(frozen_ops, "STRIP", 3)
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(8, 7).to(dtype)
    torch.testing.assert_close(frozen_ops.frozen_linear(x, weight), frozen_ops.linear_plain(x, weight))
    grad = torch.randn(5, 8)
    [ours] = torch.autograd.grad(frozen_ops.frozen_linear(x, weight), x, grad)
    [plain] = torch.autograd.grad(frozen_ops.linear_plain(x, weight), x, grad)
    torch.testing.assert_close(ours, plain)


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
