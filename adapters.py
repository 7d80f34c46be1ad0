"""The adapters of EIVEN (section 2.2 and Appendix D), and how a linear adapter is merged into the weights after it.

An adapter is placed before each attention and adds a small change to its input.  The paper leaves open on which side of the
RMSNorm; here it comes after the RMSNorm, as in LaVIN: only there can it be merged.  The residual stream is not changed.
    h' = h + s * U sigma(D h + d) + s * u            (N, width) -> (N, width)
    rep         RepAdapter (Luo et al. 2023, arXiv 2302.08106): no sigma, U in two groups   1.70M at LLaMA-7B
    mlp         MLP-Adapter (Houlsby et al. 2019): sigma is ReLU, U dense                    2.23M
    mlp-linear  MLP-Adapter-L: no sigma, U dense                                             2.23M
U and u start at zero, so at step 0 the model is exactly LLaMA.  LaVIN, on which EIVEN is built, has a router that mixes
two adapters for each input.  A router is not linear and could not be merged, so there is none here.

Parameters and arithmetic are fp32, whatever the dtype of the frozen model: with a learning rate of 1e-3 most updates would
be too small to change a 16-bit parameter.
"""

import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("rep", "mlp", "mlp-linear")


class Adapter(nn.Module):
    """h + s * up(sigma(down(h))): (N, width) -> (N, width).

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
            raise ValueError(f"a RepAdapter has {groups} groups: its dimension ({dimension}) and the model's width "
                             f"({width}) must be multiples of {groups}")
        self.down = nn.Linear(width, dimension)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        # Group g of `up` maps r / groups features to width / groups features.
        self.up_weight = nn.Parameter(torch.zeros(groups, width // groups, dimension // groups))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def up_matrix(self):
        """U, (width, r): the groups are blocks on the diagonal.  The dense matrix is not slower, because r is small."""
        return torch.block_diag(*self.up_weight)

    def forward(self, h):
        z = self.down(h.float())                                        # (N, r)
        if self.kind == "mlp":
            z = F.relu(z)
        return h + (self.scale * F.linear(z, self.up_matrix(), self.up_bias)).to(h.dtype)


def merge(adapter, linear):
    """Merge a linear adapter into the `linear` layer after it, in place (RepAdapter's re-parameterisation):

        W (h + s U (D h + d) + s u) = [W (I + s U D)] h + s W (U d + u)

    Computed in fp64 and rounded once.  Afterwards `linear` has a bias.
    Errors  ValueError: the adapter is not linear, or the weight is int8, which would lose what is merged into it
    """
    if adapter.kind == "mlp":
        raise ValueError("MLP-Adapter has a non-linearity and cannot be merged; rep and mlp-linear can")
    if linear.weight.dtype == torch.int8:
        raise ValueError("linear has an int8 weight, which cannot hold a merged adapter; load it with 16 or 32 bits")
    with torch.no_grad():
        W = linear.weight.double()                                      # (out, width)
        U, D = adapter.up_matrix().double(), adapter.down.weight.double()
        bias = adapter.scale * (W @ (U @ adapter.down.bias.double() + adapter.up_bias.double()))
        if linear.bias is not None:
            bias = bias + linear.bias.double()
        merged = W + adapter.scale * (W @ U) @ D
        linear.weight = nn.Parameter(merged.to(linear.weight.dtype), requires_grad=False)
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
