"""Three operations of LLaMA that take less time or memory than their plain expressions, for frozen weights.

The plain expression stands below each of them; tests/test_frozen_ops.py compares values and gradients.  docs/speed.md says
what each of them saves.
"""

import torch
import torch.nn.functional as F

STRIP = 512                                             # rows of a 16-bit matrix that are cast at a time


def frozen_linear(x, weight):
    """x @ weight.T for a frozen weight: (N, in), (out, in) -> (N, out), in the dtype of x.

    On a CPU the weight may have 16 bits and x 32.  Then STRIP rows of the weight at a time are cast to 32 bits: a strip fits
    the CPU cache, so this is as fast as a 32-bit weight, with half of its memory.
    """
    return x @ weight.T if x.dtype == weight.dtype else WidenedLinear.apply(x, weight)


def linear_plain(x, weight):
    return x @ weight.to(x.dtype).T


class WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight                             # x is not kept: its gradient needs only the weight
        out = x.new_empty(len(x), len(weight))
        for part, strip in zip(out.split(STRIP, dim=1), widened(weight, x.dtype)):
            torch.mm(x, strip.T, out=part)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad.new_zeros(len(grad), ctx.weight.shape[1])
        for part, strip in zip(grad.split(STRIP, dim=1), widened(ctx.weight, grad.dtype)):
            grad_x.addmm_(part, strip)
        return grad_x, None


def widened(weight, dtype):
    """Strips of the weight in `dtype`, all in one buffer: fresh memory would take as long as the matmul."""
    wide = torch.empty(STRIP, weight.shape[1], dtype=dtype, device=weight.device)
    for strip in weight.split(STRIP):
        yield wide[:len(strip)].copy_(strip)


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
