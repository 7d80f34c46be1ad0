"""Adapters against their equation, and the merge against the adapters."""

import pytest
import torch
from test_llama import close
from torch import nn

from adapters import KINDS, Adapter, merge
from base.console import UserError
from llama import Linear


def randomized(kind):
    adapter = Adapter(kind, width=12, dimension=4, scale=0.7)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_h_plus_s_up_sigma_down(kind):
    """In a RepAdapter, `up` is block-diagonal: each half of the output sees half of the rank."""
    adapter = randomized(kind)
    h = torch.randn(5, 12)
    z = h @ adapter.down.weight.T + adapter.down.bias
    if kind == "mlp":
        z[z < 0] = 0
    U = adapter.up_weight[0]                            # (width, r)
    if kind == "rep":
        U = torch.zeros(12, 4)
        U[:6, :2], U[6:, 2:] = adapter.up_weight
    close(adapter(h), h + 0.7 * (z @ U.T + adapter.up_bias))


def test_down_starts_as_xavier_and_zero():
    """Xavier's bound is sqrt(6 / (width + r)); PyTorch's own start stays within 1 / sqrt(width)."""
    down = Adapter("rep", 512).down
    bound = (6 / (512 + 8)) ** 0.5
    assert 0.9 * bound < down.weight.abs().max() <= bound
    assert not down.bias.any()


def test_16_bit_input_is_computed_in_fp32_and_returned_as_it_came():
    adapter = randomized("rep")
    h = torch.randn(5, 12).bfloat16()
    close(adapter(h), adapter(h.float()).bfloat16(), 0.01)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rep", "mlp-linear"])
def test_merge(kind, bias):
    adapter, linear = randomized(kind), Linear(12, 9, bias)
    h = torch.randn(5, 12)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    before = linear(adapter(h))
    merge(adapter, linear)
    close(linear(h), before)
    assert not linear.weight.requires_grad and not linear.bias.requires_grad


def test_merge_rounds_once():
    """In bf16 the merged weight is the nearest neighbour of the exact one, not a sum of rounded parts."""
    adapter, linear = randomized("rep"), Linear(12, 9)
    linear.weight.data = torch.randn(9, 12).bfloat16()
    up_down = adapter.up_matrix().double() @ adapter.down.weight.double()
    exact = linear.weight.double() @ (torch.eye(12).double() + 0.7 * up_down)
    merge(adapter, linear)
    assert linear.weight.dtype == linear.bias.dtype == torch.bfloat16
    assert linear.weight.equal(exact.bfloat16())


@pytest.mark.parametrize("kind, dtype, said", [
    ("mlp", torch.float32, "non-linearity"), ("rep", torch.int8, "int8")])
def test_what_cannot_be_merged_is_refused(kind, dtype, said):
    linear = Linear(12, 9)
    linear.weight.data = torch.ones(9, 12, dtype=dtype)
    with pytest.raises((UserError, ValueError), match=said):
        merge(randomized(kind), linear)


@pytest.mark.parametrize("kind, width, dimension, said", [
    ("rep", 33, 4, "multiples of 2"), ("rep", 32, 3, "multiples of 2"), ("foo", 32, 4, "one of rep, mlp")])
def test_an_adapter_that_cannot_be_built_is_refused(kind, width, dimension, said):
    with pytest.raises((UserError, ValueError), match=said):
        Adapter(kind, width, dimension)
