"""What fits into a GPU: bytes held for the backward pass per token, on LLaMA-7B's shape, in 16 bits and in int8.

    python -m experiments.memory_7b

Counts what autograd keeps, on the meta device: shapes alone, no memory, no GPU.  What is transient comes on top.  Where there
is a GPU with enough memory, the same passes run there with random weights, and what they allocate is printed beside.
"""

import argparse
from unittest import mock

import torch
import torch.nn.functional as F

from base.frozen_ops import quantize
from base.packing import pack
from eiven import EIVEN
from experiments.random_weights import LLAMA_7B
from llama import Linear, LLaMA

GB = 1e9
GPUS = {"V100, 32 GB": 32, "RTX 4090": 24, "V100, 16 GB": 16, "T4": 15}      # GiB that they show
CONTEXT = 1.0 * GB                                      # CUDA's context and cuBLAS workspaces, about
COMPARISON = 130                                        # tokens


class GpuAttention(torch.autograd.Function):
    """What a GPU's attention keeps for its gradient.  On the meta device PyTorch would keep the (T, T) weights, too, in fp32."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def forward(model, tokens, answer=8):
    """The loss of one sequence of this many tokens."""
    device, dtype, width = model.device, model.llama.embed_tokens.weight.dtype, model.llama.config.hidden_size
    packed = pack([list(range(tokens))], [answer], device)
    x = torch.zeros(tokens, width, dtype=dtype, device=device, requires_grad=True)      # visual tokens learn
    return F.cross_entropy(model.llama.logits(model.llama(x, packed)), packed.needed_index)


def held(model, tokens):
    """Bytes that the forward pass of one sequence keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage              # holding it keeps its address from being used again
        return tensor

    with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: GpuAttention.apply(q, k, v)), \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, tokens)
    return sum(storage.nbytes() for storage in kept.values())


def allocated(model, tokens):
    """(bytes on the GPU after the forward pass of one sequence, at most in a training step), without what was there before."""
    for p in model.trainable_parameters().values():
        p.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = forward(model, tokens)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return kept, torch.cuda.max_memory_allocated() - before


def per_token(measure, model):
    """Bytes a token, from two lengths, so that what does not grow is left out."""
    return (measure(model, 1152) - measure(model, 128)) / 1024


def print_measured(model):
    """The figures of a GPU beside those that were counted."""
    model = model.to_empty(device="cuda")
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.02)
    print(f"measured on {torch.cuda.get_device_name()}: frozen weights and adapters {torch.cuda.memory_allocated() / GB:.2f} GB")
    for checkpointed in (False, True):
        model.llama.grad_checkpoint = checkpointed
        kept, most = (per_token(lambda model, n, i=i: allocated(model, n)[i], model) for i in (0, 1))
        print(f"{'with' if checkpointed else 'without'} --grad-checkpoint: {kept / 1e3:,.0f} kB kept per token, "
              f"{most / 1e3:,.0f} kB at most in a step")


def model_7b(int8):
    """EIVEN with LLaMA-7B on the meta device, in fp16 or with int8 matrices."""
    with torch.device("meta"):
        model = EIVEN(LLaMA(LLAMA_7B).half(), None, 768)
        for linear in (m for m in model.llama.modules() if int8 and isinstance(m, Linear)):
            linear.weight, linear.scale = (torch.nn.Parameter(x, requires_grad=False) for x in quantize(linear.weight))
    return model


def main():
    argparse.ArgumentParser(prog="python -m experiments.memory_7b", description=__doc__.split("\n")[0]).parse_args()
    for int8 in (False, True):
        model = model_7b(int8)
        weights = [p for p in model.llama.parameters() if not p.requires_grad]
        frozen = sum(p.nbytes for p in weights)
        widened = 2 * max(p.numel() for p in weights) if int8 else 0            # one matrix at a time, in 16 bits
        trained = sum(p.numel() for p in model.trainable_parameters().values())
        state = 16 * trained                            # fp32: itself, its gradient, and AdamW's two moments
        print(f"{'int8' if int8 else '16 bits'}: frozen weights {frozen / GB:.2f} GB, {trained:,} trained parameters with "
              f"gradient and moments {state / GB:.2f} GB, context about {CONTEXT / GB:.0f} GB, a widened matrix "
              f"{widened / GB:.2f} GB")
        kept = per_token(held, model)
        model.llama.grad_checkpoint = True              # the layer that is computed again is held in full
        again = kept / LLAMA_7B.num_hidden_layers
        least = per_token(held, model) + again
        print(f"  kept per token {kept / 1e3:,.0f} kB; with --grad-checkpoint {least / 1e3:,.0f} kB, of which "
              f"{again / 1e3:,.0f} kB are for the layer that is computed again")
        for name, size in GPUS.items():
            left = size * 2 ** 30 - frozen - state - CONTEXT - widened
            plain, checkpointed = (max(0, int(left / each)) for each in (kept, least))
            print(f"  {name:11}  {left / GB:5.2f} GB left: {plain:6,} tokens, {plain // COMPARISON} comparisons; with "
                  f"--grad-checkpoint {checkpointed:6,} tokens, {checkpointed // COMPARISON} comparisons")
    if torch.cuda.is_available():
        print_measured(model_7b(int8=False))


if __name__ == "__main__":
    main()
