"""EIVEN, section 2 of the paper: a frozen LLaMA reads four projected [cls] tokens of a photo, and answers a
question.

    photo --ViT--> I: [cls] of layers 3, 6, 9, 12 --projector--> I' --+
    question --------------------------------------------------> Q  --+--> X = [I', Q, C] --LLaMA--> answer R
    title and category ----------------------------------------> C  --+         (with adapters)

Only the adapters (theta_a) and the projector (theta_p) are trained.  The ViT is not part of this class: it is
frozen, so support/features.py runs it once for each photo.  What the paper leaves open, and what we do:
    X           starts with the BOS token, as in LLaMA's pretraining
    projector   SwiGLU has its gate, as Shazeer 2020 (arXiv 2002.05202) defines it; LaVIN (Luo et al. 2023b,
                cited for the projector) has the plain swish
    I_k         is the output of a ViT block, without CLIP's final LayerNorm
    R           ends with the EOS token, which is part of the loss

Shapes   B examples of a batch   N tokens (base/packing.py)   M tokens whose logits are used: they predict the
         answers
         P photos   K [cls] tokens of a photo (4)   V ViT width (768)   D LLaMA width (4096)
         vocab: rows of the embeddings   pieces: those of them that the tokenizer has
The paper's D is our V, and its D_text our D.  The paper writes I' for two things; here I' are projected
tokens, and I_2 and C_2 are the photo and the text of the second product of figure 3 (so I_2 is no I_k).
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

from adapters import Adapter, merge
from base.checkpoint import open_tensors, restore, save_tensors
from base.console import UserError
from base.packing import next_tokens, pack, to_device

TEMPERATURE, TOP_P = 0.1, 0.75                          # section 4.1
CLS_EVERY = 3                                           # the M of section 2.1 (not ours); 3 in 4.1


def cls_layers(vit_layers):
    """The ViT's layers (counted from 1) whose [cls] token is I_k in section 2.1: 3, 6, 9, 12 for ViT-B/16."""
    if vit_layers % CLS_EVERY:
        raise UserError(f"the ViT has {vit_layers} layers; EIVEN takes the [cls] of every third layer, so "
                        "their number must be a multiple of 3")
    return tuple(range(CLS_EVERY, vit_layers + 1, CLS_EVERY))


class Projector(nn.Module):
    """I' = (swish(I Wg + bg) * (I Wd + bd)) Wu + bu, section 2.1 with SwiGLU's gate Wg.

    (P, K, V) -> (P, K, D), in fp32.  hidden is d_h, the width in the middle (paper: 128).  swish is PyTorch's
    silu.
    """

    def __init__(self, visual_width, width, hidden=128):
        super().__init__()
        self.gate = nn.Linear(visual_width, hidden)
        self.down = nn.Linear(visual_width, hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, cls_tokens):
        return self.up(F.silu(self.gate(cls_tokens)) * self.down(cls_tokens))


def nucleus(logits, temperature, top_p, uniform):
    """Top-p sampling (Holtzman et al. 2020): one token for each row, (B, pieces) -> (B,).

    The nucleus is the smallest set of most probable tokens whose total probability reaches top_p.  One of
    them is drawn in proportion to their probabilities.  An example with top_p = 0.75:

        tokens, most probable first      Plaid    Argyle   Dots     Stripe
        probability                      0.50     0.20     0.15     0.15
        cumulative, on a number line   0 ---- 0.50 -- 0.70 -- 0.85 -- 1
        nucleus                        [ Plaid | Argyle | Dots )      0.70 is not enough, 0.85 is

    uniform      one number u in [0, 1) for each row.  The token whose part of the line holds u * 0.85 is
                 drawn.
    temperature  divides the logits first; 0 is greedy decoding
    """
    token = logits.argmax(-1)                                                   # (B,)
    if temperature == 0:
        return token
    p = (logits / temperature).softmax(-1)                                      # (B, pieces)
    # Where the best token alone is the nucleus, nothing is sorted: that would take longer than all the rest.
    # A GPU sorts every row: to know which rows need it, the CPU would have to wait for the GPU.
    unsure = torch.arange(len(p), device=p.device)                              # (b,)
    if p.device.type == "cpu":
        unsure = unsure[p.amax(-1) < top_p]
    if len(unsure):
        p, order = p[unsure].sort(dim=-1, descending=True, stable=True)         # (b, pieces)
        cumulative = p.cumsum(-1)
        # A token belongs to the nucleus if the tokens before it do not reach top_p.
        size = (cumulative - p < top_p).sum(-1, keepdim=True)                   # (b, 1)
        mass = cumulative.gather(1, size - 1)                                   # (b, 1)
        point = to_device(uniform, p.device, p.dtype)[unsure, None] * mass
        rank = (cumulative <= point).sum(-1, keepdim=True)                          # (b, 1)
        rank = torch.minimum(rank, size - 1)  # where rounding lets the point reach the end of the nucleus
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
        return {f"{part}.{name}": parameter for part, module in parts.items()
                for name, parameter in module.named_parameters()}

    # -------------------------------------------------------------------------------------------- figure 2

    def forward(self, batch, cls_tokens=None):
        """The training objective L of section 2.2: a scalar, in nats.

        batch       B examples (data.Encoded): .photos (indices into cls_tokens), .prompt ([Q, C] as ids), and
                    .answer (R as ids, with EOS)
        cls_tokens  (P, K, V), I of each photo, from the frozen ViT
        """
        # -1/B sum_i sum_t log p(R_t | X, R_<t).  Summed over the tokens of an answer, averaged over the
        # batch: PyTorch's default would be the mean over all tokens.
        return -self.answer_log_probs(batch, cls_tokens).sum() / len(batch)

    def answer_log_probs(self, batch, cls_tokens=None):
        """log p(R_t | X, R_<t) of each token of each answer, example after example: (M,), in nats."""
        R = to_device([token for example in batch for token in example.answer], self.device)    # (M,)
        return -F.cross_entropy(self.answer_logits(batch, cls_tokens), R, reduction="none")

    def answer_logits(self, batch, cls_tokens=None):
        """Logits (M, pieces) that predict the tokens of each answer, example after example: figure 2, top to
        bottom.

        Teacher forcing: R_t is predicted from [X, R_<t] with the true answer as R_<t, so all tokens of an
        answer are predicted in one forward pass.  The last token of an answer predicts nothing and is no
        input.
        """
        if not batch or not all(example.answer for example in batch):
            raise ValueError("the batch is empty, or an example has no answer: nothing to learn from")
        visual_tokens = self.project(cls_tokens)                                # (P, K, D)   I'
        X = [self.input_ids(example, visual_tokens, len(example.answer)) for example in batch]  # [I', Q, C]
        sequences = [x + example.answer[:-1] for x, example in zip(X, batch)]
        tokens = pack(sequences, [len(example.answer) for example in batch], self.device, bucketed=True)
        h = self.llama(self.embed(tokens.ids, visual_tokens), tokens)           # (N, D) -> (M, D)
        return self.logits(h)

    def project(self, cls_tokens):
        """I -> I', section 2.1: (P, K, V) -> (P, K, D), or None if cls_tokens is None."""
        if cls_tokens is None:
            return None
        if self.projector is None:
            raise ValueError("cls_tokens is given, but a model with visual_width=None has no projector")
        return self.projector(to_device(cls_tokens, self.device, torch.float32))

    def input_ids(self, example, visual_tokens, answer_length):
        """X = [BOS, I', Q, C] as ids.  Visual token k of photo p gets the id vocab + p K + k, so that X is
        one list of ids.
        """
        P, K = (0, 0) if visual_tokens is None else visual_tokens.shape[:2]
        if not all(0 <= p < P for p in example.photos):
            raise ValueError(f"cls_tokens holds {P} photos, but an example names the photos {example.photos}")
        vocab = self.llama.config.vocab_size
        visual_ids = [vocab + p * K + k for p in example.photos for k in range(K)]
        X = [self.tokenizer.bos_id, *visual_ids, *example.prompt]
        length, limit = len(X) + answer_length, self.llama.config.max_position_embeddings
        if length > limit:
            raise UserError(f"a question and its answer have {length:,} tokens, but this LLaMA reads at most "
                            f"{limit:,}: {self.tokenizer.decode(example.prompt)[:120]!r}…; shorten the title")
        return X

    def embed(self, ids, visual_tokens):
        """(N,) ids -> (N, D): text tokens from LLaMA's embeddings, visual tokens from I'."""
        vocab = self.llama.config.vocab_size
        if visual_tokens is None:
            return self.llama.embed(ids)
        is_visual = ids >= vocab                                                # (N,)
        x = self.llama.embed(ids.masked_fill(is_visual, 0))                     # (N, D)
        # For a text token this is row 0, which `where` drops.
        visual = visual_tokens.flatten(0, 1).index_select(0, (ids - vocab).clamp(min=0))        # (N, D)
        return torch.where(is_visual[:, None], visual.to(x.dtype), x)

    def logits(self, h):
        """(M, D) -> (M, pieces).  Embeddings beyond the tokenizer's pieces are padding, and never an
        answer.
        """
        return self.llama.logits(h)[:, :self.tokenizer.vocab_size]

    # -------------------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def generate(self, batch, cls_tokens=None, seeds=None, temperature=TEMPERATURE, top_p=TOP_P, limit=32,
                 observe=None):
        """Free answers to a batch (its .answer is not used): a list of (ids without EOS, probability of that
        answer).

        seeds     one for each example, so that its draws do not depend on the rest of the batch
        temperature, top_p   nucleus sampling, temperature first (section 4.1)
        limit     an answer is cut off after this many tokens, or where it fills max_position_embeddings
        observe   called at each step with (logits, uniform numbers, drawn tokens, the examples whose answers
                  have not ended)
        The probability is the product over all tokens of the answer, with EOS unless it was cut off, at
        temperature 1 and top-p 1.
        Errors    FloatingPointError if the logits are not finite
        """
        seeds = seeds or [0] * len(batch)
        if not batch or len(seeds) != len(batch):
            raise ValueError(f"there are {len(seeds)} seeds for {len(batch)} examples; each needs one")
        rngs = [random.Random(seed) for seed in seeds]
        visual_tokens = self.project(cls_tokens)                                # (P, K, D)
        X = [self.input_ids(example, visual_tokens, answer_length=1) for example in batch]
        lengths = [len(x) for x in X]
        limits = [min(limit, self.llama.config.max_position_embeddings - length) for length in lengths]
        cache = self.llama.new_cache()
        tokens = pack(X, [1] * len(batch), self.device)
        h = self.llama(self.embed(tokens.ids, visual_tokens), tokens, cache)    # (B, D)   fills the cache

        answers = [[] for _ in batch]
        log_p = [0.0] * len(batch)
        # Examples whose answer has not ended.  The others stay in the batch: what they draw is not used.
        running = set(range(len(batch)))
        for step in range(max(limits)):
            logits = self.logits(h)                                             # (B, pieces)
            uniform = [rng.random() for rng in rngs]
            drawn = nucleus(logits, temperature, top_p, uniform)                # (B,)
            if observe:
                observe(logits, uniform, drawn, running)
            drawn_log_p = logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)       # (B,)
            # One transfer of both, because the CPU waits here for a GPU; as fp32, ids are exact up to 2^24.
            drawn_ids, drawn_log_p = torch.stack((drawn, drawn_log_p)).tolist()
            for b in sorted(running):
                if math.isnan(drawn_log_p[b]):
                    raise FloatingPointError(f"the logits of example {b} are not finite")
                log_p[b] += drawn_log_p[b]
                ended = drawn_ids[b] == self.tokenizer.eos_id
                if not ended:
                    answers[b].append(int(drawn_ids[b]))
                if ended or len(answers[b]) == limits[b]:
                    running.remove(b)
            if not running:
                break
            tokens = next_tokens(drawn, lengths, step, self.llama.compute_dtype)
            h = self.llama(self.llama.embed(drawn), tokens, cache)              # (B, D)   one step
        return [(answer, math.exp(lp)) for answer, lp in zip(answers, log_p)]

    @torch.no_grad()
    def score(self, batch, cls_tokens=None):
        """log p(R | X) of the answer of each example: a list of floats, in nats.

        One forward pass.  Examples with one prompt share it: base/packing.py stores it once.
        Errors   FloatingPointError if the logits are not finite
        """
        token_log_p = self.answer_log_probs(batch, cls_tokens).cpu()            # (M,)
        if token_log_p.isnan().any():
            raise FloatingPointError("the logits are not finite")
        return [answer.sum().item() for answer in token_log_p.split([len(e.answer) for e in batch])]

    # ---------------------------------------------------------------------------------------- merge, files

    def merge_adapters(self):
        """Merge the adapters into q, k and v (Appendix D): what remains is an ordinary LLaMA with biases."""
        for block in self.llama.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                merge(block.adapter, linear)
            block.adapter = nn.Identity()
        return self

    def save(self, path, run_id):
        """Write the trained parameters to one safetensors file, with the id of the run that they belong
        to.
        """
        save_tensors(path, self.trainable_parameters(), {"run": run_id})

    def load(self, path, run_id):
        """Read what `save` wrote, strictly.  UserError if it is of another run, or of another model."""
        tensors = open_tensors(path, "what a run has trained (adapter.safetensors)", run_id)
        restore(self.trainable_parameters(), tensors, path)
