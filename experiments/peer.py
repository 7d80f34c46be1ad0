"""The same model the usual way: transformers' LlamaForCausalLM, adapters by forward hooks, padded batches."""

import copy

import torch

from llama import official_name


class Peer:
    """Our model in transformers, with a copy of adapters and projector.  Frozen weights are shared."""

    def __init__(self, model):
        import transformers                             # the tests can do without it
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, frozen)
        config = transformers.LlamaConfig(**vars(model.llama.config))
        with torch.device(model.device):
            self.llama = transformers.LlamaForCausalLM(config)
        weights = {official_name(n): p for n, p in model.llama.named_parameters() if ".adapter." not in n}
        self.llama.load_state_dict(weights, assign=True, strict=not config.tie_word_embeddings)
        self.llama.tie_weights()
        self.llama.requires_grad_(False).eval()
        for layer, block in zip(self.llama.model.layers, self.model.llama.layers):
            layer.input_layernorm.register_forward_hook(lambda norm, x, h, adapter=block.adapter: adapter(h))

    def inputs(self, batch, answers, cls_tokens):
        """Inputs of transformers' LLaMA: [I', Q, C, R], padded on the left to the longest."""
        visual_tokens = self.model.project(cls_tokens)
        rows = [self.model.input_ids(example, visual_tokens, 0) + R for example, R in zip(batch, answers)]
        T = max(map(len, rows))
        # (B, T) and (B, T, D)
        ids = torch.tensor([[-1] * (T - len(row)) + row for row in rows], device=self.model.device)
        x = self.model.embed(ids.clamp(min=0).flatten(), visual_tokens).unflatten(0, ids.shape)
        return {"inputs_embeds": x, "attention_mask": (ids >= 0).long()}

    def loss(self, batch, cls_tokens):
        """The training objective."""
        answers = [example.answer for example in batch]
        inputs = self.inputs(batch, answers, cls_tokens)
        T = inputs["attention_mask"].shape[1]
        labels = torch.tensor([[-100] * (T - len(R)) + R for R in answers], device=self.model.device)
        out = self.llama(**inputs, labels=labels, use_cache=False)
        return out.loss * sum(map(len, answers)) / len(batch)   # transformers has the mean over all tokens

    @torch.no_grad()
    def generate(self, batch, cls_tokens, limit):
        """Greedy answers: lists of ids without EOS."""
        eos_id = self.model.tokenizer.eos_id
        inputs = self.inputs(batch, [[]] * len(batch), cls_tokens)
        out = self.llama.generate(**inputs, do_sample=False, max_new_tokens=limit, eos_token_id=eos_id,
                                  pad_token_id=eos_id)
        return [[token for token in row if token != eos_id] for row in out.tolist()]
