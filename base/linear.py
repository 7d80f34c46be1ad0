"""Multiplication by a frozen weight, which may have 8 or 16 bits where the input has 32.

The plain expression is   x @ (scale[:, None] * weight).to(x.dtype).T   - but it would keep a 32-bit copy of
                          every weight
for the backward pass.  Here one strip of the weight at a time is cast, and cast again in the backward pass.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks

STRIP = 512  # rows of a weight that are cast together: they fit the CPU's cache
# oneDNN's x @ weight.T, as PyTorch calls it in compiled models: at LLaMA-7B's width with a few rows two to
# five times as fast as `@`.  Its rounding error is 1.5 times as large, and it has no backward pass.
ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
FEW_ROWS = 128
LARGE = 1 << 18                                         # weights of a matrix for which it is worth it


def quantize(weight):
    """(int8 weight, fp32 scale) of a matrix, one scale for each row: scale[:, None] * int8 weight is within
    scale / 2.

    The largest absolute value of a row becomes 127 or -127; the others are rounded to the nearest multiple of
    the scale.
    """
    scale = torch.cat([strip.abs().amax(1).float() for strip in weight.split(STRIP)]) / 127         # (out,)
    scale.clamp_(min=torch.finfo(torch.float32).tiny)   # a row of zeros stays one
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part, strip, s in zip(rounded.split(STRIP), weight.split(STRIP), scale.split(STRIP)):
        part.copy_((strip / s[:, None]).round_())
    return rounded, scale


def frozen_linear(x, weight, scale=None):
    """x @ weight.T: (N, in), (out, in) -> (N, out), in the dtype of x.  The weight gets no gradient.

    scale  (out,), fp32: of an int8 weight
    """
    if weight.dtype == x.dtype:
        return matmul(x, weight.T)
    rows = STRIP if x.device.type == "cpu" else len(weight)
    strips = weight.split(rows)
    scales = [None] * len(strips) if scale is None else scale.split(rows)
    return torch.cat([cast_and_matmul(x, *strip) for strip in zip(strips, scales)], 1)


def cast_and_matmul(x, weight, scale):
    """matmul, with a weight of another dtype.

    For its backward pass `x @ wide.T` would keep wide.T.  These hooks keep nothing, and cast the weight
    again.
    """
    dtype = x.dtype                                     # not x: the hooks would keep it

    def transposed(_=None):
        # int8 numbers need no cast: their product with a wider dtype is of that dtype.
        wide = weight.to(dtype) if scale is None else weight * scale[:, None].to(dtype)
        return wide.T                                   # (in, out)

    with saved_tensors_hooks(lambda saved: None, transposed):
        return matmul(x, transposed())


def matmul(x, transposed):
    """x @ transposed: (N, in), (in, out) -> (N, out), by oneDNN where that is faster."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    suits = on_cpu and len(x) <= FEW_ROWS and transposed.numel() >= LARGE
    if ONEDNN and suits and not (torch.is_grad_enabled() and x.requires_grad):
        return ONEDNN(x, transposed.T, None, "none", [], "")
    return x @ transposed
