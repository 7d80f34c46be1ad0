"""The same arithmetic as its plain expressions, with less time or memory, where the weights are frozen.

Each operation has its plain expression beside it; tests/test_frozen_ops.py holds value and gradient of the two together.
What each of them saves: docs/speed.md.
"""

import torch
import torch.nn.functional as F

STRIP = 512                                             # rows of a 16-bit matrix that are widened at a time


def frozen_linear(x, weight):
    """x @ weight.T for a frozen weight: (N, in), (out, in) -> (N, out), in the dtype of x.

    The gradient of x needs only the weight, so x is not kept for the backward pass.  On a CPU the weight may have 16 bits
    and x 32: then STRIP rows of the weight at a time are widened.  A strip fits the processor's cache, so this is as fast
    as with a 32-bit weight, and takes half of its memory.
    """
    return FrozenLinear.apply(x, weight)


def linear_plain(x, weight):
    return x @ weight.to(x.dtype).T


class FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        if x.dtype == weight.dtype:
            return x @ weight.T
        out = x.new_empty(len(x), len(weight))
        for part, strip in zip(out.split(STRIP, dim=1), widened(weight, x.dtype)):
            torch.mm(x, strip.T, out=part)
        return out

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        if grad.dtype == weight.dtype:
            return grad @ weight, None
        grad_x = grad.new_zeros(len(grad), weight.shape[1])
        for part, strip in zip(grad.split(STRIP, dim=1), widened(weight, grad.dtype)):
            grad_x.addmm_(part, strip)
        return grad_x, None


def widened(weight, dtype):
    """Strips of the weight in `dtype`, one after the other in the same memory: new pages would cost as much as the matmul."""
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
        along = (grad * wide).mean(-1, keepdim=True).mul_(scale ** 3)           # (N, 1)   component along x: the norm removes it
        return grad.mul_(scale).addcmul_(wide, along, value=-1).to(dtype), None, None


def apply_rotary(x, cos, sin):
    """Rotate each pair (i, i + d/2) by its angle, in fp32: (N, heads, d), (N, 1, d/2) twice -> (N, heads, d)."""
    return Rotary.apply(x, cos, sin)


def rotary_plain(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.cos, ctx.sin = cos, sin
        a, b = x.float().chunk(2, dim=-1)               # (N, heads, d/2) each
        out = torch.empty(x.shape, device=x.device)
        left, right = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=left).sub_(b * sin)
        torch.mul(b, cos, out=right).add_(a * sin)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, b = grad.float().chunk(2, dim=-1)
        out = torch.empty(grad.shape, device=grad.device)
        left, right = out.chunk(2, dim=-1)
        torch.mul(a, ctx.cos, out=left).addcmul_(b, ctx.sin)
        torch.mul(b, ctx.cos, out=right).addcmul_(a, ctx.sin, value=-1)
        return out.to(grad.dtype), None, None


def swiglu(gate, up):
    """silu(gate) * up, which keeps only its two inputs for the backward pass: (N, F) twice -> (N, F)."""
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
