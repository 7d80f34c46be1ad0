"""The adapters of EIVEN (section 2.2, Appendix D), and how a linear adapter is merged into the weights after
it.

An adapter stands before each attention and adds a small change to its input:
    h' = h + s * (up sigma(down h + b_down) + b_up)          (N, width) -> (N, width)
    rep         RepAdapter (Luo et al. 2023, arXiv 2302.08106): no sigma, up in two groups   1.70M at LLaMA-7B
    mlp         MLP-Adapter (Houlsby et al. 2019): sigma is ReLU, up dense                    2.23M
    mlp-linear  MLP-Adapter-L: no sigma, up dense                                             2.23M
down is (r, width) and up (width, r), with a small rank r.  "In two groups" means that up is block-diagonal:
each half of the r features feeds one half of the width.

The paper leaves open on which side of the RMSNorm the adapter stands.  Here it comes after the RMSNorm, as in
LaVIN.  Only there can it be merged: attention's first step is a matrix product with h', and two matrices in a
row are one matrix.  An adapter before the RMSNorm could not be merged, because the norm divides by a number
that depends on its input.  The adapter changes only attention's input; the residual connection around
attention goes past it.

up and b_up start at zero, so at step 0 the model is exactly LLaMA.  LaVIN, on which EIVEN is built, has a
router that mixes two adapters for each input.  A router is not linear and could not be merged, so there is
none here.

Parameters and arithmetic are fp32, whatever the dtype of the frozen model: with a learning rate of 1e-3 most
updates would be too small to change a 16-bit parameter.
"""

import torch
import torch.nn.functional as F
from torch import nn

from base.console import UserError

KINDS = ("rep", "mlp", "mlp-linear")


class Adapter(nn.Module):
    """The formula above: (N, width) -> (N, width).

    kind       one of KINDS
    dimension  r, the rank: the width between down and up (paper: 8)
    scale      s, a constant factor (LaVIN: 1)
    """

    def __init__(self, kind, width, dimension=8, scale=1.0):
        super().__init__()
        self.kind, self.scale = kind, scale
        groups = 2 if kind == "rep" else 1
        if kind not in KINDS:
            raise ValueError(f"adapter is {kind!r}, but must be one of {', '.join(KINDS)}")
        if dimension % groups or width % groups:
            raise UserError(f"a RepAdapter has {groups} groups: its dimension (--adapter-dim {dimension}) "
                            f"and the model's width ({width}) must be multiples of {groups}")
        self.down = nn.Linear(width, dimension)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        # Group g of `up` maps r / groups features to width / groups features.
        self.up_weight = nn.Parameter(torch.zeros(groups, width // groups, dimension // groups))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def up_matrix(self):
        """up, (width, r): the groups are blocks on the diagonal.  r is small, so the dense matrix costs no
        time.
        """
        return torch.block_diag(*self.up_weight)

    def forward(self, h):
        z = self.down(h.float())                                        # (N, r)
        if self.kind == "mlp":
            z = F.relu(z)
        return h + (self.scale * F.linear(z, self.up_matrix(), self.up_bias)).to(h.dtype)


def merge(adapter, linear):
    """Merge a linear adapter into the `linear` layer after it, in place (RepAdapter's re-parameterisation):

        W (h + s (up (down h + b_down) + b_up)) = [W + s W up down] h + s W (up b_down + b_up)

    Computed in fp64 and rounded once.  Afterwards `linear` has a bias.
    Errors  UserError: the adapter is not linear, or the weight is int8, which would lose what is merged into
            it
    """
    if adapter.kind == "mlp":
        raise UserError("MLP-Adapter has a non-linearity and cannot be merged; rep and mlp-linear can")
    if linear.weight.dtype == torch.int8:
        raise UserError("an int8 weight cannot hold a merged adapter; load LLaMA with 16 or 32 bits")
    dtype = linear.weight.dtype
    with torch.no_grad():
        W = linear.weight.double()                                      # (out, width)
        W_up = adapter.scale * W @ adapter.up_matrix().double()         # (out, r)   s W up
        bias = W_up @ adapter.down.bias.double() + adapter.scale * W @ adapter.up_bias.double()       # (out,)
        if linear.bias is not None:
            bias = bias + linear.bias.double()
        merged = W + W_up @ adapter.down.weight.double()
    linear.weight = nn.Parameter(merged.to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
