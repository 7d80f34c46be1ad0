"""EIVEN, section 2 of the paper: a frozen LLaMA reads four projected [cls] tokens of a photo, and answers a question.

    photo --ViT--> I: [cls] of layers 3, 6, 9, 12 --projector--> I' --+
    question ---------------------------------------------------> Q --+--> X = [I', Q, C] --LLaMA with adapters--> answer R
    title and category -----------------------------------------> C --+

Only the adapters (theta_a) and the projector (theta_p) are trained.  The ViT is not part of this class: it is frozen, so
support/features.py runs it once for each photo.  What the paper leaves open, and what we do:
    X           starts with the BOS token, as in LLaMA's pretraining
    projector   SwiGLU has its gate, as Shazeer 2020 (arXiv 2002.05202) defines it; LaVIN (Luo et al. 2023b, cited for
                the projector) has the plain swish
    I_k         is the output of a ViT block, without CLIP's final LayerNorm
    R           ends with the EOS token, which is part of the loss

Shapes   B examples of a batch   N tokens of all sequences   M tokens whose logits are needed (those that predict the answers)
         P photos   K [cls] tokens of a photo (4)   V ViT width (768)   D LLaMA width (4096)
The paper's D is our V, and its D_text our D.  In figure 3 of the paper, I' and C' belong to the second product.
"""

import math
import random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from adapters import Adapter, merge
from base.checkpoint import map_safetensors, restore, tensor_file
from base.console import UserError
from base.packing import KVCache, next_tokens, pack

TEMPERATURE, TOP_P = 0.1, 0.75                          # section 4.1
CLS_EVERY = 3                                           # M in section 2.1; section 4.1: a [cls] token after every third layer


def cls_layers(vit_layers):
    """The layers of the ViT (counted from 1) whose [cls] token is I_k in section 2.1: 3, 6, 9, 12 for ViT-B/16."""
    if vit_layers % CLS_EVERY:
        raise UserError(f"the ViT has {vit_layers} layers; EIVEN takes the [cls] token after every {CLS_EVERY} layers, "
                        f"so their number must be a multiple of {CLS_EVERY}")
    return tuple(range(CLS_EVERY, vit_layers + 1, CLS_EVERY))


class Projector(nn.Module):
    """I' = (swish(I Wg + bg) * (I Wd + bd)) Wu + bu, section 2.1 with SwiGLU's gate Wg: (P, K, V) -> (P, K, D), fp32.

    hidden is d_h, the width in the middle (paper: 128).  swish is PyTorch's silu.
    """

    def __init__(self, visual_width, width, hidden=128):
        super().__init__()
        self.gate = nn.Linear(visual_width, hidden)
        self.down = nn.Linear(visual_width, hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, cls_tokens):
        return self.up(F.silu(self.gate(cls_tokens)) * self.down(cls_tokens))


def nucleus(logits, temperature, top_p, uniform):
    """Top-p sampling (Holtzman et al. 2020): one token for each row, (B, vocab) -> (B,).

    The nucleus is the smallest set of most probable tokens whose total probability reaches top_p.  `uniform`, one number
    in [0, 1) for each row, draws from the renormalised nucleus by inverse transform sampling, most probable token first.
    temperature 0 is greedy decoding.
    """
    token = logits.argmax(-1)                                                   # (B,)
    if temperature == 0:
        return token
    p = (logits / temperature).softmax(-1)                                      # (B, vocab)
    unsure = p.amax(-1) < top_p                         # in the other rows the best token is the whole nucleus
    if unsure.any():                                    # sorting a large vocabulary takes longer than all the rest
        p, order = p[unsure].sort(dim=-1, descending=True, stable=True)         # (rows, vocab)
        mass_before = p.cumsum(-1) - p                  # total probability of the more probable tokens
        p[mass_before >= top_p] = 0
        u = torch.tensor(uniform, device=p.device, dtype=p.dtype)[unsure, None] * p.sum(-1, keepdim=True)
        rank = (p.cumsum(-1) <= u).sum(-1, keepdim=True)                        # (rows, 1)
        rank = torch.minimum(rank, (p > 0).sum(-1, keepdim=True) - 1)           # rounding must not leave the nucleus
        token[unsure] = order.gather(1, rank).squeeze(1)
    return token


class EIVEN(nn.Module):
    """The whole method.  The same class trains, evaluates and answers.

    llama          frozen; each of its blocks gets an adapter
    visual_width   V of the [cls] tokens, or None for a model without images
    adapter        "rep", "mlp" or "mlp-linear", with rank adapter_dim
    """

    def __init__(self, llama, tokenizer, visual_width=768, adapter="rep", adapter_dim=8, projector_dim=128):
        super().__init__()
        self.llama, self.tokenizer = llama, tokenizer
        width, device = llama.config.hidden_size, llama.embed_tokens.weight.device
        for block in llama.layers:
            block.adapter = Adapter(adapter, width, adapter_dim).to(device)
        self.projector = Projector(visual_width, width, projector_dim).to(device) if visual_width else None

    @property
    def device(self):
        return self.llama.embed_tokens.weight.device

    def trainable_parameters(self):
        """{name: parameter} of theta_a and theta_p: all that is trained, and nothing frozen."""
        parts = {f"adapters.{i}": block.adapter for i, block in enumerate(self.llama.layers)}
        if self.projector is not None:
            parts["projector"] = self.projector
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    # ------------------------------------------------------------------------------------------------ figure 2

    def forward(self, batch, cls_tokens=None):
        """The training objective L of section 2.2: a scalar, in nats.

        batch       B examples (data.Encoded): .photos (indices into cls_tokens), .prompt ([Q, C] as ids), and .answer (R as
                    ids, with EOS)
        cls_tokens  (P, K, V), I of each photo, from the frozen ViT
        """
        # Summed over the tokens of an answer, averaged over the batch: not PyTorch's default, the mean over all tokens.
        return -self.answer_log_probs(batch, cls_tokens).sum() / len(batch)     # -1/B sum_i sum_t log p(R_t | X, R_<t)

    def answer_log_probs(self, batch, cls_tokens=None):
        """log p(R_t | X, R_<t) of each token of each answer, example after example: (M,), in nats."""
        R = torch.tensor([token for example in batch for token in example.answer], device=self.device)      # (M,)
        return -F.cross_entropy(self.answer_logits(batch, cls_tokens), R, reduction="none")

    def answer_logits(self, batch, cls_tokens=None):
        """Logits (M, vocab) that predict the tokens of each answer, example after example: figure 2, bottom to top."""
        if not batch:
            raise ValueError("batch is empty")
        for b, example in enumerate(batch):
            if not example.answer:
                raise ValueError(f"example {b} of the batch has no answer: nothing to learn from")
        visual_tokens = self.project(cls_tokens)                                # (P, K, D)   I'
        X = [self.input_ids(example, visual_tokens) for example in batch]       # [I', Q, C]
        # R_t is predicted from [X, R_<t], so the last token of an answer is never an input.
        sequences = [x + example.answer[:-1] for x, example in zip(X, batch)]
        tokens = pack(sequences, [len(example.answer) for example in batch], self.device)     # ids of the N tokens
        h = self.llama(self.embed(tokens.ids, visual_tokens), tokens)           # (N, D) -> (M, D)
        return self.llama.logits(h)                                             # (M, vocab)

    def project(self, cls_tokens):
        """I -> I', section 2.1: (P, K, V) -> (P, K, D), or None without photos."""
        if cls_tokens is not None and self.projector is None:
            raise ValueError("cls_tokens is given, but the model has no projector: it was made with visual_width=None")
        return None if cls_tokens is None else self.projector(cls_tokens.float())

    def input_ids(self, example, visual_tokens):
        """X = [I', Q, C] as ids.  Visual token k of photo p gets the id vocab + p K + k, so that X is one list of ids."""
        P, K = (0, 0) if visual_tokens is None else visual_tokens.shape[:2]
        if not all(0 <= p < P for p in example.photos):
            raise ValueError(f"cls_tokens has the features of {P} photos, but an example names the photos {example.photos}")
        vocab = self.llama.config.vocab_size
        visual_ids = [vocab + p * K + k for p in example.photos for k in range(K)]
        X = [self.tokenizer.bos_id, *visual_ids, *example.prompt]
        length, most = len(X) + len(example.answer), self.llama.config.max_position_embeddings
        if length > most:
            raise UserError(f"a question and its answer have {length:,} tokens, but this LLaMA was trained to read {most:,} at "
                            f"most: {self.tokenizer.decode(example.prompt)[:120]!r}…; shorten the title")
        return X

    def embed(self, ids, visual_tokens):
        """(N,) ids -> (N, D): text tokens from LLaMA's embeddings, visual tokens from I'."""
        vocab = self.llama.config.vocab_size
        is_visual = ids >= vocab                                                # (N,)
        x = self.llama.embed(ids.masked_fill(is_visual, 0))                     # (N, D)
        if visual_tokens is not None and is_visual.any():
            x[is_visual] = visual_tokens.flatten(0, 1)[ids[is_visual] - vocab].to(x.dtype)
        return x

    # ------------------------------------------------------------------------------------------------ answers

    @torch.no_grad()
    def generate(self, batch, cls_tokens=None, seeds=None, temperature=TEMPERATURE, top_p=TOP_P, limit=32):
        """Free answers to a batch (its .answer is not used): a list of (ids without EOS, probability of that answer).

        seeds     one for each example, so that its answer does not depend on the rest of the batch
        temperature, top_p   nucleus sampling, temperature first (section 4.1)
        limit     an answer is cut off after this many tokens, or where it fills max_position_embeddings
        The probability includes EOS and is that of the unmodified model: temperature 1, top-p 1.
        Errors    FloatingPointError if the logits are not finite
        """
        B, device = len(batch), self.device
        seeds = seeds or [0] * B
        if not batch:
            raise ValueError("batch is empty")
        if len(seeds) != B:
            raise ValueError(f"seeds holds {len(seeds)}, but must hold one for each of the {B} examples")
        rngs = [random.Random(seed) for seed in seeds]
        visual_tokens = self.project(cls_tokens)                                # (P, K, D)
        X = [self.input_ids(example._replace(answer=[self.tokenizer.eos_id]), visual_tokens) for example in batch]
        room = [min(limit, self.llama.config.max_position_embeddings - len(x)) for x in X]      # tokens of each answer
        cache = KVCache(self.llama.config, B, max(map(len, X)) + max(room), self.llama.compute_dtype, device)
        tokens = pack(X, [1] * B, device, cache)
        h = self.llama(self.embed(tokens.ids, visual_tokens), tokens)           # (B, D)   fills the cache

        answers, log_p = [[] for _ in batch], [0.0] * B
        live, ended = list(range(B)), set()             # live[i]: the example in row i of the cache; ended: finished examples
        for step in range(max(room)):
            logits = self.llama.logits(h)               # (live, vocab)
            token = nucleus(logits, temperature, top_p, [rngs[b].random() for b in live])          # (live,)
            token_log_prob = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1).tolist()
            for b, t, lp in zip(live, token.tolist(), token_log_prob):
                if b in ended:
                    continue
                if math.isnan(lp):
                    raise FloatingPointError(f"the logits of example {b} are not finite")
                log_p[b] += lp
                if t != self.tokenizer.eos_id:
                    answers[b].append(t)
                if t == self.tokenizer.eos_id or step + 1 == room[b]:
                    ended.add(b)
            if len(ended) == B:
                break
            going = [i for i, b in enumerate(live) if b not in ended]
            if 2 * len(going) <= len(live):             # drop finished examples once they are half of the rows
                cache.keep(torch.tensor(going, device=device))
                token, live = token[going], [live[i] for i in going]
            tokens = next_tokens(token, [len(X[b]) + step for b in live], cache)
            h = self.llama(self.llama.embed(token), tokens)                     # (live, D)   one step with the cache
        return [(answer, math.exp(p)) for answer, p in zip(answers, log_p)]

    @torch.no_grad()
    def score(self, batch, candidates, cls_tokens=None):
        """log p(R | X) of given answers: for each example of the batch a list of floats, in nats, one for each candidate.

        candidates  for each example a list of answers R (ids with EOS), of any lengths
        One forward pass.  The candidates of an example share its prompt, which base/packing.py stores once.
        Errors      FloatingPointError if the logits are not finite
        """
        if len(candidates) != len(batch) or not all(candidates):
            raise ValueError("candidates must hold, for each example of the batch, at least one answer")
        examples = [example._replace(answer=R) for example, several in zip(batch, candidates) for R in several]
        token_log_prob = self.answer_log_probs(examples, cls_tokens)            # (M,)
        if token_log_prob.isnan().any():
            raise FloatingPointError("the logits are not finite")
        log_p = iter([part.sum().item() for part in token_log_prob.split([len(e.answer) for e in examples])])
        return [[next(log_p) for _ in several] for several in candidates]

    # ------------------------------------------------------------------------------------------------ merge, files

    def merge_adapters(self):
        """Merge the adapters into q, k and v (Appendix D): what remains is an ordinary LLaMA with biases."""
        for block in self.llama.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                merge(block.adapter, linear)
            block.adapter = nn.Identity()
        return self

    def save(self, path):
        """Write the trained parameters to one safetensors file."""
        with tensor_file(path) as partial:
            save_file({name: p.detach().cpu().contiguous() for name, p in self.trainable_parameters().items()}, partial)

    def load(self, path):
        """Read what `save` wrote, strictly."""
        tensors = map_safetensors(path, "what was trained (adapter.safetensors)")
        restore(self.trainable_parameters(), tensors, path, "was it trained with another LLaMA, ViT or adapter?")
