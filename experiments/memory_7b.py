"""What fits a 32 GB V100: bytes held for the backward pass per token, on LLaMA-7B's shape in fp16.

    python -m experiments.memory_7b

Counts what autograd keeps, on the meta device: shapes alone, no memory, no GPU.  What is transient comes on top.
"""

import torch
import torch.nn.functional as F

from base.packing import pack
from eiven import EIVEN
from experiments.random_weights import LLAMA_7B
from llama import LLaMA

GB = 1e9
GPU, CONTEXT = 32 * 2 ** 30, 1.0 * GB                   # a V100; CUDA's context and cuBLAS workspaces, about


def held(model, tokens, answer=8):
    """Bytes that the forward pass of one row keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage              # holding it keeps its address from being used again
        return tensor

    with torch.device("meta"):
        packed = pack([list(range(tokens))], [answer], "meta")
        x = torch.empty(tokens, LLAMA_7B.hidden_size, dtype=torch.float16, requires_grad=True)     # visual tokens learn
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            h = model.llama(x, packed)
            F.cross_entropy(model.llama.logits(h), packed.needed_index)
    return sum(storage.nbytes() for storage in kept.values())


def main():
    with torch.device("meta"):
        model = EIVEN(LLaMA(LLAMA_7B).half(), None, 768)
    frozen = sum(p.nbytes for p in model.llama.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    state = 16 * trained                                # fp32: itself, its gradient, and AdamW's two moments
    print(f"frozen weights {frozen / GB:.2f} GB, {trained:,} trained parameters with gradient and moments {state / GB:.2f} GB, "
          f"context about {CONTEXT / GB:.0f} GB: {(GPU - frozen - state - CONTEXT) / GB:.2f} GB of {GPU / GB:.2f} GB are left")
    again = 0                                           # with checkpoints, one layer is computed again and held in full
    for checkpointed in (False, True):
        model.llama.grad_checkpoint = checkpointed
        per_token = (held(model, 1152) - held(model, 128)) / 1024
        tokens = (GPU - frozen - state - CONTEXT) / (per_token + again)
        print(f"{'with' if checkpointed else 'without'} --grad-checkpoint: {per_token / 1e3:,.0f} kB held per token"
              f"{f', and {again / 1e3:,.0f} kB for the layer that is computed again' if again else ''}: "
              f"{tokens:,.0f} tokens, i.e. micro-batches of {tokens // 130:.0f} comparisons of 130 tokens or {tokens // 60:.0f} "
              f"base questions of 60")
        again = per_token / LLAMA_7B.num_hidden_layers


if __name__ == "__main__":
    main()
