"""LLaMA, written out: config, tokenizer, the forward pass with its cache, and the official weights.

Source   Touvron et al. 2023 (arXiv 2302.13971): RMSNorm before each sublayer, rotary positions, SwiGLU feed-forward.
         Names are those of the Hugging Face checkpoints, so that loading is strict and needs no table but one prefix.

This file knows nothing of images or of what an adapter does.  A block has one open place, `adapter`, the identity
until somebody puts a module there.

Shapes   B rows   T tokens of the longest row   N real tokens of all rows together   A tokens that are asked for
         D width   F feed-forward width   H query heads   G key/value heads   d width of a head
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from console import UserError
from weights import check_file, fill, map_safetensors, read_json, shard_files


# ------------------------------------------------------------------------------------------------ config, tokenizer


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA, under the names of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048


def read_config(path):
    """LlamaConfig from a config.json.  What this file cannot compute is refused by name, never run wrongly."""
    raw = read_json(path, "LLaMA's config")

    def refuse(what, allowed):
        raise UserError(f"{path}: {what}, which is not supported; {allowed}")

    if raw.get("model_type") != "llama":
        refuse(f"model_type is {raw.get('model_type')!r}", "only 'llama' is")
    rope = raw.get("rope_parameters") or {}             # newer transformers keep the rotary settings in here
    for scaling in (raw.get("rope_scaling") or {}, rope):
        if not isinstance(scaling, dict):
            refuse(f"rope scaling {scaling!r}", "only plain rotary positions are")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            refuse(f"rope scaling {kind!r}", "only plain rotary positions are")
    for key, fine in (("hidden_act", "silu"), ("mlp_bias", False), ("quantization_config", None),
                      ("partial_rotary_factor", 1.0), ("pretraining_tp", 1), ("sliding_window", None)):
        if raw.get(key, fine) not in (fine, None):
            refuse(f"{key} is {raw[key]!r}", f"only {fine!r} is")
    try:
        heads = raw["num_attention_heads"]
        config = LlamaConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
            attention_bias=raw.get("attention_bias") or False,
            tie_word_embeddings=raw.get("tie_word_embeddings") or False,
            max_position_embeddings=raw.get("max_position_embeddings") or 2048,
        )
    except KeyError as error:
        raise UserError(f"{path}: has no {error}; a LLaMA's config.json gives it") from None
    except (TypeError, ZeroDivisionError):
        raise UserError(f"{path}: hidden_size and num_attention_heads must be positive numbers, but are "
                        f"{raw['hidden_size']!r} and {raw['num_attention_heads']!r}") from None
    sizes = {k: v for k, v in vars(config).items() if k not in ("attention_bias", "tie_word_embeddings")}
    wrong = {k: v for k, v in sizes.items() if isinstance(v, bool) or not isinstance(v, (int, float)) or v <= 0}
    wrong |= {k: v for k, v in sizes.items() if isinstance(v, float) and k not in ("rms_norm_eps", "rope_theta")}
    if wrong:
        raise UserError(f"{path}: sizes must be positive whole numbers, but it gives {wrong}")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(f"{path}: {config.num_attention_heads} query heads must be a multiple of "
                        f"{config.num_key_value_heads} key/value heads, and head_dim {config.head_dim} even")
    return config


class Tokenizer:
    """LLaMA's SentencePiece model: text to ids and back, without begin or end tokens.

    bos_id and eos_id are the ids that begin a text and end an answer.
    """

    def __init__(self, path):
        check_file(path, "a SentencePiece model (tokenizer.model)")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: is not a SentencePiece model ({str(error)[:80]}); "
                            "LLaMA's tokenizer.model is wanted, not tokenizer.json") from None
        self.vocab_size = self.pieces.vocab_size()
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.adds_space = self.pieces.encode("a", out_type=str)[0].startswith("\u2581")
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path}: has no begin or no end token; a LLaMA's tokenizer has both")

    def encode(self, text, new_word=False):
        """Ids of a text.  new_word: it goes on after another text as a new word, so a space belongs in front; LLaMA's
        own SentencePiece model puts one in front of everything, others do not."""
        return self.pieces.encode(" " + text if new_word and not self.adds_space else text)

    def decode(self, ids):
        return self.pieces.decode(ids)


# ------------------------------------------------------------------------------------------------ rows without padding


@dataclass
class Layout:
    """Where the tokens of B rows lie in one matrix of N tokens that holds no padding.

    Every product with a weight matrix runs on the (N, D) matrix; only attention needs rows, and gets them by index,
    rows of like length together: a short row among long ones would be padded to their length, squared.
    `pack` stores what several rows have in common at their start once: the hidden states there are the same.
    The rows [1, 5, 6] and [1, 5, 7] are ids [1, 5, 6, 7], position [0, 1, 2, 2], rows [[[0, 1, 2], [0, 1, 3]]].

    ids       (N,)    token ids
    position  (N,)    rotary positions: places in their rows
    rows      for each group of rows a table (b, T): which of the N tokens is row b's t-th; past a row's end it is 0,
              whose answer nobody reads
    back      (N,)    where a token stands when the groups' rows are put end to end, in any one row that has it
    asked     the A tokens that answers are wanted for, (A,) of the N, row after row
    ask       their own Layout, (b, A of the row) tables with the same rows in the same groups; None if all are asked
    whole     whether the tokens are the beginnings of their rows, so that a plain causal mask does; later ones alone
              are masked by their positions
    """

    ids: torch.Tensor
    position: torch.Tensor
    rows: list
    back: torch.Tensor
    asked: torch.Tensor = None
    ask: "Layout" = None
    whole: bool = True

    def to_rows(self, x):
        """(N, ...) -> for each group (b, T, ...)"""
        # As a matrix: the gradient of index_select on more dimensions is several times slower.
        flat = x.flatten(1)
        return [flat.index_select(0, table.view(-1)).view(*table.shape, *x.shape[1:]) for table in self.rows]

    def to_tokens(self, groups):
        """For each group (b, T, D) -> (N, D)"""
        return torch.cat([x.flatten(0, 1) for x in groups]).index_select(0, self.back)


def pack(rows, asked=None, device="cpu", groups=True):
    """Layout of rows (lists of ids, any lengths), each token that rows share as a common beginning stored once.

    asked   per row, for how many of its last tokens an answer is wanted; None: for all tokens
    groups  whether attention may take rows of like length together (a cache needs them all in one)
    Sharing is exact: with causal attention a token's hidden state depends on itself and what stands before it,
    so equal beginnings have equal states.  Questions begin alike ("What is the Boot Style of"), and so do all
    candidates for one product's answer.
    """
    known = {}                                      # (token before it in the matrix, id) -> place in the matrix
    ids, position, places = [], [], []
    for row in rows:
        before, own = -1, []
        for t, token_id in enumerate(row):
            before = known.setdefault((before, token_id), len(ids))
            if before == len(ids):                  # not seen before
                ids.append(token_id)
                position.append(t)
            own.append(before)
        places.append(own)
    alike = defaultdict(list)                       # rows whose lengths differ by a factor of less than sqrt 2
    for b, row in enumerate(rows):
        alike[int(2 * math.log2(len(row))) if groups else 0].append(b)

    def layout(ids, position, places):
        tables, back, offset = [], [0] * len(ids), 0
        for group in alike.values():
            longest = max(len(places[b]) for b in group)
            for i, b in enumerate(group):
                for t, place in enumerate(places[b], start=offset + i * longest):
                    back[place] = t
            tables.append([places[b] + [0] * (longest - len(places[b])) for b in group])
            offset += len(group) * longest
        return Layout(*(torch.tensor(x, device=device) for x in (ids, position)),
                      [torch.tensor(x, device=device) for x in tables], torch.tensor(back, device=device))

    packed = layout(ids, position, places)
    if asked is not None:
        wanted = [place for own, n in zip(places, asked) for place in own[len(own) - n:]]
        starts = itertools.accumulate(asked, initial=0)
        packed.asked = torch.tensor(wanted, device=device)
        packed.ask = layout([ids[p] for p in wanted], [position[p] for p in wanted],
                            [list(range(start, start + n)) for start, n in zip(starts, asked)])
        packed.ask.whole = False
    return packed


class Cache:
    """Keys and values of what has been read, for decoding one token a row at a time.

    keys, values  per layer (B, S, G, d), S places a row
    length        (B,) how many of them are filled, None in an empty cache.  The caller sets it after the beginnings
                  are read, and counts it on after each token
    longest       at most so many are filled in any row
    """

    def __init__(self, config, rows, places, dtype, device):
        shape = (rows, places, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.length, self.longest = None, 0

    def put(self, layer, keys, values):
        """Store (B, T, G, d), the whole beginnings of rows, or once those are in, the next token of each (T = 1).

        Returns what the new tokens can attend to: keys and values (B, T or as far as any row is filled, G, d).
        """
        if self.length is None:
            T = self.longest = keys.shape[1]
            self.keys[layer][:, :T], self.values[layer][:, :T] = keys, values
            return keys, values
        rows = torch.arange(len(keys), device=keys.device)
        self.keys[layer][rows, self.length], self.values[layer][rows, self.length] = keys[:, 0], values[:, 0]
        if layer == 0:
            self.longest += 1
        return self.keys[layer][:, :self.longest], self.values[layer][:, :self.longest]

    def keep(self, rows):
        """Go on with these rows (indices) alone; the others have ended."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]
        self.length = self.length[rows]


# ------------------------------------------------------------------------------------------------ the forward pass


class FrozenProduct(torch.autograd.Function):
    """x W^T for a W that never learns, (N, in) -> (N, out): the backward pass needs W alone, so x is not kept.

    On a CPU, W may be stored in 16 bits under an fp32 x.  It is then widened some rows at a time: a strip of W fits
    the processor's cache, and the product runs at the speed of fp32 weights in half of their memory.
    """

    STRIP = 512

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        if x.dtype == weight.dtype:
            return x @ weight.T
        out = x.new_empty(len(x), len(weight))
        for part, strip in zip(out.split(FrozenProduct.STRIP, dim=1), FrozenProduct.widened(weight, x.dtype)):
            torch.mm(x, strip.T, out=part)
        return out

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        if grad.dtype == weight.dtype:
            return grad @ weight, None
        grad_x = grad.new_zeros(len(grad), weight.shape[1])
        for part, strip in zip(grad.split(FrozenProduct.STRIP, dim=1), FrozenProduct.widened(weight, grad.dtype)):
            grad_x.addmm_(part, strip)
        return grad_x, None

    @staticmethod
    def widened(weight, dtype):
        """The strips of W, one after the other, in the same piece of memory: new pages would cost as much as the product."""
        wide = torch.empty(FrozenProduct.STRIP, weight.shape[1], dtype=dtype, device=weight.device)
        for strip in weight.split(FrozenProduct.STRIP):
            yield wide[:len(strip)].copy_(strip)


class Linear(nn.Module):
    """x W^T (+ bias) with frozen weights: (N, features_in) -> (N, features_out)."""

    def __init__(self, features_in, features_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features_out, features_in), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(features_out), requires_grad=False) if bias else None

    def forward(self, x):
        y = FrozenProduct.apply(x, self.weight)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


class Normalize(torch.autograd.Function):
    """x / rms(x) * weight for a weight that never learns, (N, D) -> the same.  Its gradient in one expression takes half
    of the time that autograd needs for the operations one by one: 0.5 ms instead of 1.1 at (1500, 128)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()                                # in fp32 whatever the dtype of x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)         # (N, 1)   1 / rms
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return (wide * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        wide, dtype = x.float(), grad.dtype
        grad = grad.float() * ctx.weight.float()
        along = (grad * wide).mean(-1, keepdim=True).mul_(scale ** 3)           # (N, 1)   what of it only changes the rms
        return grad.mul_(scale).addcmul_(wide, along, value=-1).to(dtype), None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the dtype of x: (N, D) -> (N, D)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x):
        return Normalize.apply(x, self.weight, self.eps)


def rotary_table(position, head_dim, theta):
    """cos and sin, each (N, 1, d/2) in fp32: position times theta^(-2i/d) for the pair i (RoFormer, eq. 15)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)
    angle = position.float()[:, None] * inverse         # (N, d/2)
    return angle.cos()[:, None], angle.sin()[:, None]


class Rotate(torch.autograd.Function):
    """Turn each pair of features by its angle: (N, heads, d) -> the same.  Its gradient is turned back.

    A pair is (i, i + d/2), the halves, as the rows of q_proj and k_proj in Hugging Face checkpoints are laid out
    (Meta's own files have (2i, 2i + 1)).
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.cos, ctx.sin = cos, sin
        a, b = x.float().chunk(2, dim=-1)               # (N, heads, d/2) each
        out = torch.empty(x.shape, device=x.device)
        left, right = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=left).sub_(b * sin)       # half of the passes over memory that joining the halves takes
        torch.mul(b, cos, out=right).add_(a * sin)      # (addcmul_ rounds otherwise than the reference: 1e-4 in logits)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, b = grad.float().chunk(2, dim=-1)
        out = torch.empty(grad.shape, device=grad.device)
        left, right = out.chunk(2, dim=-1)
        torch.mul(a, ctx.cos, out=left).addcmul_(b, ctx.sin)
        torch.mul(b, ctx.cos, out=right).addcmul_(a, ctx.sin, value=-1)
        return out.to(grad.dtype), None, None


class Gated(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; G < H key/value heads are shared by groups of query heads."""

    def __init__(self, config):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = Linear(D, config.num_attention_heads * config.head_dim, bias)
        self.k_proj = Linear(D, config.num_key_value_heads * config.head_dim, bias)
        self.v_proj = Linear(D, config.num_key_value_heads * config.head_dim, bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, D, bias)

    def keys_values(self, h, layout, table):
        """(N, D) -> keys and values, for each group of rows (b, T, G, d)"""
        k = self.k_proj(h).unflatten(-1, (-1, self.head_dim))                   # (N, G, d)
        v = self.v_proj(h).unflatten(-1, (-1, self.head_dim))                   # (N, G, d)
        return layout.to_rows(Rotate.apply(k, *table)), layout.to_rows(v)

    def forward(self, h, keys, values, layout, table):
        """The tokens `h` of `layout` ask keys and values of their rows, (b, S, G, d) a group: (A, D) -> (A, D).

        Causal: the token at a position attends to the places 0 to there.  No mask hides padding, because a row's
        padding stands after its last token.
        """
        q = self.q_proj(h).unflatten(-1, (-1, self.head_dim))                   # (A, H, d)
        asking, out = layout.to_rows(Rotate.apply(q, *table)), []
        for q, k, v, rows in zip(asking, keys, values, layout.rows):            # a group at a time
            mask = None
            if not layout.whole:
                place = torch.arange(k.shape[1], device=h.device)               # (S,)
                mask = place <= layout.position[rows][:, None, :, None]         # (b, 1, A of the row, S)
            out.append(F.scaled_dot_product_attention(                          # softmax(q k / sqrt d) v, in fp32
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),        # (b, H, T, d), (b, G, S, d) twice
                attn_mask=mask, is_causal=layout.whole, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2))
        return self.o_proj(layout.to_tokens([o.flatten(2) for o in out]))       # (A, D)


class MLP(nn.Module):
    """SwiGLU feed-forward: (silu(x Wg) * x Wu) Wd, D -> F -> D."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: x + attention(adapter(norm(x))), then x + feed-forward(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.adapter = nn.Identity()                    # the one place where adapters enter
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layout, table, last=False, cache=None, layer=None):
        """(N, D) -> (N, D).  In the last layer (A, D), for the tokens that are asked for alone: there nothing is
        done for the others but the keys and values that those attend to."""
        h = self.adapter(self.input_layernorm(x))
        keys, values = self.self_attn.keys_values(h, layout, table)
        if cache is not None:
            keys, values = ([part] for part in cache.put(layer, *keys, *values))
        if last and layout.ask is not None:             # from here on, go on with the asked tokens alone
            x, h = x.index_select(0, layout.asked), h.index_select(0, layout.asked)     # (A, D)
            table = [part[layout.asked] for part in table]
            layout = layout.ask
        x = x + self.self_attn(h, keys, values, layout, table)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """Embeddings in, hidden states or logits out.  Built empty; `load_llama` fills it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.grad_checkpoint = False
        self.requires_grad_(False)

    @property
    def compute_dtype(self):
        """What activations are in: the weights' dtype on a GPU; on a CPU fp32, since CPUs multiply 16 bits slowly."""
        weight = self.embed_tokens.weight
        return torch.float32 if weight.device.type == "cpu" else weight.dtype

    def embed(self, ids):
        """(N,) ids -> (N, D)"""
        return self.embed_tokens(ids).to(self.compute_dtype)

    def forward(self, x, layout, cache=None):
        """Embeddings (N, D) -> final hidden states (A, D) of the tokens that the layout asks for, or of all N.

        With a cache, the keys and values of x are stored in it, and x is either the whole beginning of each row or
        one more token of each.
        """
        table = rotary_table(layout.position, self.config.head_dim, self.config.rope_theta)
        last = len(self.layers) - 1
        for layer, block in enumerate(self.layers):
            arguments = x, layout, table, layer == last, cache, layer
            if self.grad_checkpoint and torch.is_grad_enabled():
                # Not re-entrant: the re-entrant kind gives adapters no gradient where x itself needs none.
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.norm(x)

    def logits(self, h):
        """Hidden states (A, D) -> fp32 logits (A, vocab)."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return FrozenProduct.apply(h, weight).float()


# ------------------------------------------------------------------------------------------------ official weights


def official_name(name):
    """The name of our parameter in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load_llama(folder, dtype=None, device="cpu"):
    """(LLaMA, Tokenizer) from a folder with config.json, tokenizer.model and safetensors, one file or shards.

    dtype  of the weights in memory; None keeps the files' own, and on a CPU those bytes are then mapped, not copied.
    Errors UserError for whatever is missing, broken, unsupported, or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; LLaMA's config.json, tokenizer.model and safetensors "
                        "should be in it")
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: tokenizer.model has {tokenizer.vocab_size:,} pieces, but the embeddings are for "
                        f"{config.vocab_size:,}; they are not of the same model")
    tensors = {}
    for path in shard_files(folder, "LLaMA weights"):
        shard = map_safetensors(path, "LLaMA weights")
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise UserError(f"{path}: holds {twice[0]}, which another shard holds too")
        tensors.update(shard)
    shard = None                                        # `fill` lets go of each tensor that it converts
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys():
        if not torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]):
            raise UserError(f"{folder}: config.json ties lm_head to the embeddings, but lm_head.weight differs")
    with torch.device("meta"):
        llama = LLaMA(config)
    fill(llama, tensors, folder, official_name, dtype, device)
    return llama.eval(), tokenizer


def next_tokens(ids, position):
    """Layout of one more token (B,) of each row of a cache, at its position (B,)."""
    each = torch.arange(len(ids), device=ids.device)
    return Layout(ids, position, [each[:, None]], each, whole=False)


def greedy_continuation(llama, ids, n):
    """The n most probable next ids after `ids`, one at a time through the cache: LLaMA alone, for tests and eyes."""
    device = llama.embed_tokens.weight.device
    cache = Cache(llama.config, 1, len(ids) + n, llama.compute_dtype, device)
    layout, out = pack([ids], [1], device, groups=False), []
    with torch.no_grad():
        while len(out) < n:
            h = llama(llama.embed(layout.ids), layout, cache)
            cache.length = torch.tensor([len(ids) + len(out)], device=device)
            out.append(int(llama.logits(h).argmax()))
            layout = next_tokens(torch.tensor(out[-1:], device=device), cache.length)
    return out
