"""What a GPU will have to do, counted without one: on the meta device tensors have shapes, but no values.

    python -m experiments.count

Operations are those that PyTorch starts, without views; a norm or an attention is one, as on a GPU.  Bytes
are those that operations read and write, whether or not they stay in the GPU's cache.  The optimizer, the
same on both sides, is left out.  transformers' token has no KV cache and no mask here, which take more.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from base import console
from base.packing import next_tokens, pack
from experiments.peer import Peer
from experiments.speed import make_subject
from support.config import DTYPES

aten = torch.ops.aten
FREE = (aten.detach, aten.empty, aten.empty_like, aten.new_empty, aten._unsafe_view)


class Fused(torch.autograd.Function):
    """A norm or an attention: one operation forward, one backward.  Attention keeps what it returns, too."""

    @staticmethod
    def forward(ctx, x, *others):
        y = x.clone()
        ctx.save_for_backward(*((x, *others, y) if others else (x,)))
        return y

    @staticmethod
    def backward(ctx, grad):
        _, *others = ctx.saved_tensors
        return grad.clone(), *map(torch.empty_like, others[:-1])


class OnGpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.rms_norm:
            return Fused.apply(args[0])
        if function is F.scaled_dot_product_attention:
            return Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations and their bytes.  A truth value that the CPU reads is False."""

    started = 0
    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is aten._local_scalar_dense.default:
            return False
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((result, args, kwargs)) if isinstance(x, torch.Tensor)]
        if tensors[0].is_meta and not operation.is_view and operation.overloadpacket not in FREE:
            self.started += 1
            self.bytes += sum(x.nbytes for x in tensors)
        return result


def show(what, do):
    """Print the counts of do()."""
    with FlopCounterMode(display=False) as flops, OnGpu(), Operations() as operations:
        do()
    print(f"{what:40} {operations.started:6,} operations {operations.bytes / 1e9:8.2f} GB "
          f"{flops.get_total_flops() / 1e12:8.3f} TFLOP", flush=True)


def kept(model, tokens=16384):
    """kB for each token that the forward pass of a long sequence keeps for the backward pass, parameters not
    counted.
    """
    kept_tensors = {}

    def keep(tensor):
        kept_tensors[tensor.untyped_storage()._cdata] = tensor      # so its address is not used again
        return tensor

    packed = pack([list(range(tokens))], [8], model.device)
    x = model.llama.embed(packed.ids).requires_grad_()  # visual tokens learn
    with OnGpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.llama.logits(model.llama(x, packed)).logsumexp(-1)
    for p in model.parameters():
        kept_tensors.pop(p.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept_tensors.values()) / tokens / 1e3


def count(what, model, peer, examples, n, cls_tokens):
    """Show a training step, and a token of n products."""
    show(f"{what}: training step", lambda: model(examples, cls_tokens).backward())
    show(f"{what}: the same, transformers", lambda: peer.loss(examples, cls_tokens).backward())
    ids = torch.ones(n, dtype=torch.long, device="meta")
    cache = model.llama.new_cache()
    prompts = pack([[1] * 63] * n, [1] * n, "meta")
    with torch.no_grad():
        model.llama(model.llama.embed(prompts.ids), prompts, cache)

        def token():
            tokens = next_tokens(ids, [63] * n, 0, model.llama.compute_dtype)
            return model.logits(model.llama(model.llama.embed(ids), tokens, cache)).argmax(-1)

        show(f"{what}: a token of {n} products", token)
        show(f"{what}: the same, transformers", lambda: peer.llama(ids[:, None]).logits.argmax(-1))


def main():
    for name in ("demo", "smollm2", "7b"):
        for dtype in ("fp32", "bf16"):
            model, batches, questions, cls_tokens = make_subject(name, "meta", DTYPES[dtype])
            count(f"{name} {dtype}", model, Peer(model), batches[0], len(questions), cls_tokens)
    whole = kept(model)
    model.llama.grad_checkpoint = True
    layer = whole / len(model.llama.layers)             # the layer that is computed again is held in full
    print(f"LLaMA-7B keeps {whole:,.0f} kB for each token for the backward pass; with --grad-checkpoint "
          f"{kept(model) + layer:,.0f} kB, of which {layer:,.0f} kB are for the layer that is computed again")


if __name__ == "__main__":
    console.run(main)
