"""Three operations of LLaMA that take less time or memory than their plain expressions, for frozen weights.

The plain expression stands below each of them; tests/test_frozen_ops.py compares values and gradients.  docs/speed.md says
what each of them saves.
"""

import itertools

import torch
import torch.nn.functional as F

STRIP = 512                                             # rows that are cast at a time in the backward pass, and quantised
FORWARD = 1 << 21                                       # weights that are cast at a time in the forward pass: 512 rows of 4,096
# oneDNN's x @ weight.T, as PyTorch calls it in compiled models.  None where PyTorch was built without oneDNN.
ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
LARGE = 1 << 18                                         # weights of a matrix that is large enough for oneDNN
FEW = 128                                               # rows with which oneDNN saves most


def quantize(weight):
    """(int8 weight, fp32 scale) of a matrix, one scale for each row: weight = scale[:, None] * int8 weight, within scale / 2.

    The largest absolute value of a row becomes 127 or -127; the others are rounded to the nearest multiple of the scale.
    """
    strips = weight.split(STRIP)                        # the whole matrix in fp32 would take four times the int8 one
    scale = torch.cat([strip.abs().amax(1).float() for strip in strips]) / 127
    scale.clamp_(min=torch.finfo(torch.float32).tiny)   # a row of zeros stays one
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part, strip, s in zip(values.split(STRIP), strips, scale.split(STRIP)):
        part.copy_((strip / s[:, None]).round_())
    return values, scale


def frozen_linear(x, weight, scale=None):
    """x @ weight.T for a frozen weight: (N, in), (out, in) -> (N, out), in the dtype of x.

    scale  (out,), fp32, of an int8 weight: see `quantize`
    On a CPU the weight may have 16 bits and x 32, and int8 is narrower than x everywhere.  Then a strip of the weight at a
    time is cast to the dtype of x: a strip fits the CPU cache, so this is about as fast as a 32-bit weight, with half of its
    memory or a quarter.

    oneDNN is up to three times as fast as `@`, but its rounding error is 1.5 times as large (docs/speed.md).  So it multiplies
    only a few rows, and strips: casting from 8 or 16 bits has lost more.
    """
    if x.dtype == weight.dtype and not (len(x) <= FEW and suits_onednn(x, weight)):
        return x @ weight.T
    return FrozenLinear.apply(x, weight, scale)


def linear_plain(x, weight, scale=None):
    return x @ (weight if scale is None else weight * scale[:, None]).to(x.dtype).T


def suits_onednn(x, matrix):
    return ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu" and matrix.numel() >= LARGE


class FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.weight, ctx.scale = weight, scale           # x is not kept: its gradient needs only the weight
        height = max(FORWARD // weight.shape[1], 1)
        parts = [times(x, strip.T) for strip in widened(weight, scale, x.dtype, height)]        # (N, height) each
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        grad_x, start = None, 0
        for strip in widened(ctx.weight, ctx.scale, grad.dtype, STRIP):
            part = times(grad[:, start:start + len(strip)], strip)              # (N, in)
            grad_x, start = part if grad_x is None else grad_x.add_(part), start + len(strip)
        return grad_x, None, None


def times(x, matrix):
    """x @ matrix: (N, in), (in, out) -> (N, out), by oneDNN if it can."""
    return ONEDNN(x, matrix.T, None, "none", [], "") if suits_onednn(x, matrix) else x @ matrix


def widened(weight, scale, dtype, height):
    """Yields strips of the weight in `dtype`, `height` rows at a time, all in one buffer: fresh memory would take as long as
    the matmul.  The whole matrix at once if it has that dtype, or on a GPU, which has no such cache."""
    if weight.dtype == dtype:
        yield weight
        return
    height = min(height, len(weight)) if weight.device.type == "cpu" else len(weight)
    wide = torch.empty(height, weight.shape[1], dtype=dtype, device=weight.device)
    scales = itertools.repeat(None) if scale is None else scale[:, None].split(height)
    for strip, s in zip(weight.split(height), scales):
        strip = wide[:len(strip)].copy_(strip)
        yield strip if s is None else strip.mul_(s)


def rms_norm(x, weight, eps):
    """x / rms(x) * weight, in fp32 whatever the dtype of x: (N, D), (D,) -> (N, D)."""
    return RMSNorm.apply(x, weight, eps)


def rms_norm_plain(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)         # (N, 1)   1 / rms
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return (wide * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        wide, dtype = x.float(), grad.dtype
        grad = grad.float() * ctx.weight.float()
        along = (grad * wide).mean(-1, keepdim=True).mul_(scale ** 3)           # (N, 1)   d(1 / rms) / dx = -x / (D rms^3)
        return grad.mul_(scale).addcmul_(wide, along, value=-1).to(dtype), None, None


def swiglu(gate, up):
    """silu(gate) * up: (N, F) twice -> (N, F).  Saves only gate and up for the backward pass."""
    return SwiGLU.apply(gate, up)


def swiglu_plain(gate, up):
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
