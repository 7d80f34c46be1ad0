"""The same model the usual way: transformers' LlamaForCausalLM, adapters by forward hooks, rows padded, all logits."""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from base.console import UserError
from llama import official_name


def import_transformers():
    try:
        import transformers
    except ImportError:
        raise UserError("experiments.speed compares with transformers, which is not installed: "
                        "pip install transformers==5.23.0") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class Peer(nn.Module):
    """Our model in transformers.  Frozen weights are shared with ours, not copied."""

    def __init__(self, model):
        super().__init__()
        transformers = import_transformers()
        ours = model.llama.config
        config = transformers.LlamaConfig(
            **{k: v for k, v in vars(ours).items() if k != "rope_theta"}, use_cache=True,
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta})
        with torch.device("meta"):
            self.llama = transformers.LlamaForCausalLM(config)
        weights = {official_name(n): p for n, p in model.llama.named_parameters() if ".adapter." not in n}
        self.llama.load_state_dict(weights, assign=True, strict=not ours.tie_word_embeddings)
        self.llama.tie_weights()
        rotary = type(self.llama.model.rotary_emb)(config)                      # its table is in no checkpoint
        self.llama.model.rotary_emb = rotary.to(model.device)
        self.llama.requires_grad_(False).eval()
        self.adapters = nn.ModuleList(copy.deepcopy(block.adapter) for block in model.llama.layers)
        for layer, adapter in zip(self.llama.model.layers, self.adapters):
            layer.input_layernorm.register_forward_hook(lambda module, x, out, adapter=adapter: adapter(out))
        self.projector = copy.deepcopy(model.projector)
        self.eos_id, self.device = model.tokenizer.eos_id, model.device

    def trainable_parameters(self):
        parts = {f"adapters.{i}": adapter for i, adapter in enumerate(self.adapters)}
        if self.projector is not None:
            parts["projector"] = self.projector
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def embed(self, ids, cls_tokens):
        """(B, T) ids, visual tokens from vocab_size on -> (B, T, D)"""
        vocab = self.llama.config.vocab_size
        x = self.llama.model.embed_tokens(ids.masked_fill(ids >= vocab, 0))
        if cls_tokens is not None:
            x = x.clone()
            x[ids >= vocab] = self.projector(cls_tokens).flatten(0, 1)[ids[ids >= vocab] - vocab]
        return x

    def loss(self, X, batch, cls_tokens, length=None):
        """X, [I', Q, C] of each example as ids, padded on the right to the longest or to `length`."""
        T = length or max(len(x) + len(example.answer) for x, example in zip(X, batch))
        ids, target = torch.zeros(len(X), T, dtype=torch.long), torch.full((len(X), T), -100)
        mask = torch.zeros(len(X), T, dtype=torch.long)
        for b, (x, example) in enumerate(zip(X, batch)):
            whole = x + example.answer
            ids[b, :len(whole)], mask[b, :len(whole)] = torch.tensor(whole), 1
            target[b, len(x):len(whole)] = torch.tensor(example.answer)
        ids, target, mask = ids.to(self.device), target.to(self.device), mask.to(self.device)
        logits = self.llama(inputs_embeds=self.embed(ids, cls_tokens), attention_mask=mask, use_cache=False).logits
        following = F.pad(target[:, 1:], (0, 1), value=-100)            # as transformers' own loss does it
        return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum") / len(X)

    @torch.no_grad()
    def generate(self, X, cls_tokens, limit):
        """Greedy answers, padded on the left: lists of ids without EOS."""
        T = max(map(len, X))
        ids = torch.tensor([[0] * (T - len(x)) + x for x in X], device=self.device)
        mask = torch.tensor([[0] * (T - len(x)) + [1] * len(x) for x in X], device=self.device)
        out = self.llama.generate(inputs_embeds=self.embed(ids, cls_tokens), attention_mask=mask, do_sample=False,
                                  max_new_tokens=limit, eos_token_id=self.eos_id, pad_token_id=self.eos_id)
        return [list(itertools.takewhile(lambda t: t != self.eos_id, row)) for row in out.tolist()]
