"""The same arithmetic as its plain expressions, with less time or memory, where the weights are frozen.

Each operation has its plain expression beside it; tests/test_frozen_ops.py holds value and gradient of the two together.
What each of them saves: docs/speed.md.
"""

import torch
import torch.nn.functional as F

STRIP = 512                                             # rows of a 16-bit matrix that are widened at a time


def frozen_linear(x, weight):
    """x @ weight.T for a frozen weight: (N, in), (out, in) -> (N, out), in the dtype of x.

    On a CPU the weight may have 16 bits and x 32.  Then STRIP rows of the weight at a time are widened: a strip fits the
    processor's cache, so this is as fast as with a 32-bit weight, and takes half of its memory.
    """
    return x @ weight.T if x.dtype == weight.dtype else WidenedLinear.apply(x, weight)


def linear_plain(x, weight):
    return x @ weight.to(x.dtype).T


class WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight                             # the gradient of x needs only the weight
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
