"""What fits into a GPU: bytes that are kept for the backward pass per token, on LLaMA-7B's shape in 16 bits.

    python -m experiments.memory_7b

Counts what autograd keeps, on the meta device: shapes alone, no memory, no GPU.  What is transient comes on
top, and so do the weights (full_size measures them).
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from base.packing import pack
from eiven import EIVEN
from experiments.random_weights import LLAMA_7B
from llama import LLaMA


class GpuAttention(torch.autograd.Function):
    """What a GPU's attention keeps.  On the meta device PyTorch would keep (T, T) weights, too."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class OnGpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return GpuAttention.apply(*args)
        return function(*args, **(kwargs or {}))


def kept(model, tokens=16384):
    """kB for each token that the forward pass of a long sequence keeps for the backward pass, parameters not
    counted.
    """
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage              # holding it keeps its address from being used again
        return tensor

    packed = pack([list(range(tokens))], [8], model.device)
    x = model.llama.embed(packed.ids).requires_grad_()  # visual tokens learn
    with OnGpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.llama.logits(model.llama(x, packed)).logsumexp(-1)
    return sum(s.nbytes() for address, s in storages.items() if address not in known) / tokens / 1e3


def main():
    with torch.device("meta"):
        model = EIVEN(LLaMA(LLAMA_7B).half(), None, 768)
    whole = kept(model)
    model.llama.grad_checkpoint = True
    layer = whole / LLAMA_7B.num_hidden_layers          # the layer that is computed again is held in full
    print(f"kept per token: {whole:,.0f} kB; with --grad-checkpoint {kept(model) + layer:,.0f} kB, "
          f"of which {layer:,.0f} kB are for the layer that is computed again")


if __name__ == "__main__":
    main()
