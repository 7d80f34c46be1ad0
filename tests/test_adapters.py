"""Adapters against their equations, and the merge against the adapters."""

import pytest
import torch
from torch import nn

from adapters import KINDS, Adapter, merge
from llama import Linear


def randomized(kind, width=12, dimension=4, scale=0.7):
    adapter = Adapter(kind, width, dimension, scale)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_exactly_the_identity(kind):
    h = torch.randn(5, 12)
    assert torch.equal(Adapter(kind, 12, 4)(h), h)


@pytest.mark.parametrize("kind", KINDS)
def test_h_plus_s_up_sigma_down(kind):
    """Feature by feature; in a RepAdapter's `up`, half the output features see half of the rank."""
    adapter, h = randomized(kind), torch.randn(5, 12)
    groups = 2 if kind == "rep" else 1
    expected = h.clone()
    for n in range(5):
        z = [sum(adapter.down.weight[r, i] * h[n, i] for i in range(12)) + adapter.down.bias[r] for r in range(4)]
        if kind == "mlp":
            z = [max(x, torch.tensor(0.0)) for x in z]
        for i in range(12):
            group, row = divmod(i, 12 // groups)
            some = z[group * 4 // groups:(group + 1) * 4 // groups]
            up = sum(w * x for w, x in zip(adapter.up_weight[group, row], some)) + adapter.up_bias[i]
            expected[n, i] += 0.7 * up
    torch.testing.assert_close(adapter(h), expected)


@pytest.mark.parametrize("kind, count", [("rep", 53_256), ("mlp", 69_640), ("mlp-linear", 69_640)])
def test_parameters_of_a_layer_at_7b(kind, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Adapter(kind, 4096, 8).parameters()) == count


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rep", "mlp-linear"])
def test_merge(kind, bias):
    adapter, linear, h = randomized(kind), Linear(12, 9, bias), torch.randn(5, 12)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    before = linear(adapter(h))
    merge(adapter, linear)
    torch.testing.assert_close(linear(h), before, rtol=1e-5, atol=1e-5)
    assert not linear.weight.requires_grad and not linear.bias.requires_grad


def test_an_int8_weight_cannot_be_merged_into():
    linear = Linear(12, 9)
    linear.weight = nn.Parameter(torch.ones(9, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="linear has an int8 weight"):
        merge(randomized("rep"), linear)


def test_merge_rounds_once():
    """In bf16 the merged weight is the exact one's nearest neighbour, not a sum of rounded parts."""
    adapter, linear = randomized("rep"), Linear(12, 9)
    nn.init.normal_(linear.weight)
    linear = linear.to(torch.bfloat16)
    W, U, D = linear.weight.double(), adapter.up_matrix().double(), adapter.down.weight.double()
    exact = W @ (torch.eye(12, dtype=torch.float64) + 0.7 * U @ D)
    merge(adapter, linear)
    torch.testing.assert_close(linear.weight.double(), exact, rtol=2 ** -8, atol=1e-6)
    assert (linear.weight.double() != exact.to(torch.bfloat16).double()).float().mean() < 0.02     # ties of fp64 sums


def test_a_nonlinear_adapter_is_not_merged():
    with pytest.raises(ValueError, match="non-linearity"):
        merge(Adapter("mlp", 12, 4), Linear(12, 9))


def test_sizes_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="multiples of 2"):
        Adapter("rep", 12, 3)


def test_16_bit_input_is_computed_in_fp32_and_returned_as_it_came():
    adapter, h = randomized("rep"), torch.randn(5, 12).bfloat16()
    out = adapter(h)
    assert out.dtype == torch.bfloat16
    exact = h + (0.7 * (nn.functional.linear(adapter.down(h.float()), adapter.up_matrix(), adapter.up_bias))).bfloat16()
    assert torch.equal(out, exact)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_sizes_that_two_groups_do_not_divide_are_refused():
    for width, dimension in ((33, 4), (32, 3)):
        with pytest.raises(ValueError, match="must be multiples of 2"):
            Adapter("rep", width, dimension)


def test_down_starts_as_xavier_and_zero():
    """Xavier's bound sqrt(6 / (width + r)); PyTorch's own start would be within 1 / sqrt(width)."""
    down = Adapter("rep", 512, 8).down
    bound = (6 / (512 + 8)) ** 0.5
    assert 0.9 * bound < down.weight.abs().max() <= bound and not down.bias.any()
