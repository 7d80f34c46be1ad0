"""LLaMA: config, tokenizer, the forward pass, and loading of the official weights.

Source   Touvron et al. 2023 (arXiv 2302.13971): RMSNorm before each sublayer, rotary positions, SwiGLU
         feed-forward.
Names    are those of the Hugging Face checkpoints, which have `model.` before each name but lm_head's.

This file knows nothing about images or about what an adapter computes.  Each block has one slot, `adapter`:
nn.Identity, until EIVEN puts a module there.

The tokens of a batch are one matrix (N, D) without padding; a prefix that sequences share is in it once.
Only attention needs whole sequences.  Before it, `tokens.pad` (base/packing.py) makes (B, heads, T, d): a row
for each sequence, padded at its end.  After it, `tokens.unpad` returns to the N tokens.  In training shorter
and longer sequences are padded apart, in two buckets: that is less padding.

Shapes   N tokens   B sequences of a bucket   T tokens of its longest   S keys that attention reads
         D width   H query heads   G key/value heads   d head dimension   M tokens whose logits are used
"""

from dataclasses import dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from base.checkpoint import load_strict, open_tensors, shard_files
from base.console import UserError, reading, reading_json
from base.linear import frozen_linear
from base.packing import next_tokens, pack

# ---------------------------------------------------------------------------------------- config, tokenizer


@dataclass(frozen=True)
class LlamaConfig:
    """The settings of a LLaMA, under the names of its config.json."""

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


LLAMA_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-6)

# Settings that would change the forward pass: only these values are supported.
SUPPORTED = {"hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1,
             "sliding_window": None, "quantization_config": None, "partial_rotary_factor": 1,
             "rope_type": "default", "type": "default"}  # rope_type and type are keys inside rope_scaling


def read_config(path):
    """LlamaConfig from a config.json.  UserError for every setting that this file does not support."""
    with reading_json(path, "LLaMA's config.json") as config:
        if config["model_type"] != "llama":
            raise ValueError(f"model_type is {config['model_type']!r}, but only 'llama' is supported")
        # rope_parameters is newer, and holds rope_theta as well
        for rope in ("rope_scaling", "rope_parameters"):
            config |= config.get(rope) or {}
        config = {name: value for name, value in config.items() if value is not None}
        for name, supported in SUPPORTED.items():
            if config.get(name, supported) != supported:
                raise ValueError(f"{name} is {config[name]!r}, but only {supported!r} is supported")
        if "num_key_value_heads" not in config:
            config["num_key_value_heads"] = config["num_attention_heads"]
        if "head_dim" not in config:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        sizes = LlamaConfig(**{f.name: config[f.name] for f in fields(LlamaConfig) if f.name in config})
        for f in fields(LlamaConfig):
            size = getattr(sizes, f.name)
            valid = type(size) is bool if f.type is bool else type(size) in (int, f.type) and 0 < size < 1e12
            if not valid:
                raise ValueError(f"{f.name} is {size!r}, but must be of type {f.type.__name__}, above 0")
        if sizes.num_attention_heads % sizes.num_key_value_heads or sizes.head_dim % 2 \
                or sizes.num_hidden_layers > 1000:
            raise ValueError("the query heads must be a multiple of the key/value heads, head_dim even, and "
                             "the layers at most 1,000")
        return sizes


class Tokenizer:
    """LLaMA's SentencePiece model: text to ids and back, without BOS and EOS.

    bos_id starts every text; eos_id ends every answer.
    """

    def __init__(self, path):
        with reading(path, "LLaMA's tokenizer.model, a SentencePiece model (not tokenizer.json)"):
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = self.pieces.vocab_size()
            self.pieces.id_to_piece(list(range(self.vocab_size)))               # each must be UTF-8
            self.adds_space = self.pieces.encode("a", out_type=str)[0].startswith("\u2581")
            self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
            if min(self.bos_id, self.eos_id) < 0:
                raise ValueError("it has no BOS or no EOS token")

    def encode(self, text, new_word=False):
        """Ids of a text.

        new_word  the text continues another text and needs a leading space.  LLaMA's own SentencePiece model
                  adds this space to every text; other models do not.
        """
        return self.pieces.encode(" " + text if new_word and not self.adds_space else text)

    def decode(self, ids):
        return self.pieces.decode(ids)


# ---------------------------------------------------------------------------------------- the forward pass


class Linear(nn.Module):
    """x W^T (+ bias) with a frozen weight: (N, in_features) -> (N, out_features).

    W is `weight`; or, if that is int8, scale[:, None] * weight, with one fp32 scale for each row
    (base/linear.py).
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.scale = None                               # (out_features,) where the weight is int8

    def forward(self, x):
        y = frozen_linear(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with rms(x) = sqrt(mean(x^2) + eps) in fp32: (N, D) -> (N, D)."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_table(position, head_dim, theta):
    """cos and sin, (N, 1, d) each, fp32; the first half of sin is negated.

    The angle of pair i = 0 ... d/2 - 1 is position * theta^(-2i/d) (RoFormer, eq. 15).
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)
    angle = position.float()[:, None, None] * frequency                         # (N, 1, d/2)
    return torch.cat((angle, angle), dim=-1).cos(), torch.cat((-angle, angle), dim=-1).sin()


def apply_rotary(x, cos, sin):
    """Rotate each pair (i, i + d/2) by its angle, in fp32: (N, heads, d) -> (N, heads, d).

    A pair (a, b) becomes (a cos - b sin, b cos + a sin) = (a, b) cos + (b, a) (-sin, sin).
    These are the pairs of Hugging Face checkpoints; in Meta's own files they are (2i, 2i + 1).
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class KVCache:
    """Rotated keys and values of one layer, kept for later steps, so that no token is computed twice.

    keys, values  (B, G, S, d): first the prompts, each padded at its end (next_tokens masks the padding);
                  then, for each step, one new token of every sequence
    """

    keys = values = None

    def append(self, k, v):
        """Add k and v of new tokens, (B, G, T, d) each; return all, (B, G, S, d) each."""
        if self.keys is not None:
            k = torch.cat((self.keys, k), dim=2)
            v = torch.cat((self.values, v), dim=2)
        self.keys, self.values = k, v
        return k, v


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d) + mask) v: q (B, H, T, d), k and v (B, G, S, d) -> (B, H, T, d).

    Without a mask (training, prompts; S = T) no query sees later keys, so no token sees the padding after its
    sequence.  In a cached step (T = 1) the mask hides the padding of the prompts.
    """
    heads = q.shape[1]
    if heads > k.shape[1] and q.device.type != "cpu":
        # A GPU's fast kernels need G = H: each key/value head is repeated for its H / G query heads.
        k, v = (z.repeat_interleave(heads // z.shape[1], dim=1) for z in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=heads != k.shape[1])


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    Grouped-query attention: each of G key/value heads serves H / G query heads.  In LLaMA-7B, G = H.
    """

    def __init__(self, config):
        super().__init__()
        D, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.qkv_heads = d, (H, G, G)
        self.q_proj = Linear(D, H * d, bias)
        self.k_proj = Linear(D, G * d, bias)
        self.v_proj = Linear(D, G * d, bias)
        self.o_proj = Linear(H * d, D, bias)

    def forward(self, x, tokens, cos, sin, cache=None):
        """(N, D) -> (N, D)"""
        # q and k are rotated in one call, and q, k and v padded in one: faster than a call for each.
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1)                # (N, (H + G) d)
        qk = apply_rotary(qk.unflatten(-1, (-1, self.head_dim)), cos, sin)      # (N, H + G, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))                   # (N, G, d)
        y = []
        for bucket in tokens.pad(torch.cat((qk, v), dim=1)):                    # (B, H + 2 G, T, d)
            q, k, v = bucket.split(self.qkv_heads, dim=1)       # (B, H, T, d), (B, G, T, d), (B, G, T, d)
            if cache is not None:
                k, v = cache.append(k, v)                                       # (B, G, S, d)
            y.append(attend(q, k, v, tokens.mask))                              # (B, H, T, d)
        return self.o_proj(tokens.unpad(y))                                     # (N, H d) -> (N, D)


class MLP(nn.Module):
    """SwiGLU feed-forward: (silu(x Wg) * x Wu) Wd, with the sizes D -> intermediate_size -> D."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.adapter = nn.Identity()                    # EIVEN replaces it; adapters enter nowhere else
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, tokens, cos, sin, cache=None):
        """(N, D) -> (N, D)"""
        x = x + self.self_attn(self.adapter(self.input_layernorm(x)), tokens, cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """Embeddings in, hidden states or logits out.  `load_llama` loads its weights."""

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
        """Dtype of the activations: the weights' on a GPU; fp32 on a CPU, which is slow in 16 bits."""
        weight = self.embed_tokens.weight
        return torch.float32 if weight.device.type == "cpu" else weight.dtype

    def embed(self, ids):
        """(N,) ids -> (N, D)"""
        return self.embed_tokens(ids).to(self.compute_dtype)

    def new_cache(self):
        """An empty KV cache: one KVCache a layer."""
        return [KVCache() for _ in self.layers]

    def forward(self, x, tokens, cache=None):
        """Embeddings (N, D) of `tokens` -> final hidden states (M, D) of the tokens whose logits are used."""
        cos, sin = rotary_table(tokens.position, self.config.head_dim, self.config.rope_theta)
        for block, layer_cache in zip(self.layers, cache or [None] * len(self.layers)):
            if self.grad_checkpoint and torch.is_grad_enabled():
                # The first x may need no gradient; use_reentrant=True would then give the adapters none.
                x = checkpoint(block, x, tokens, cos, sin, use_reentrant=False)
            else:
                x = block(x, tokens, cos, sin, layer_cache)
        return self.norm(x.index_select(0, tokens.needed))                      # (N, D) -> (M, D)

    def logits(self, h):
        """Hidden states (M, D) -> logits (M, vocab), fp32."""
        tied = self.config.tie_word_embeddings
        return (frozen_linear(h, self.embed_tokens.weight) if tied else self.lm_head(h)).float()


# ---------------------------------------------------------------------------------------- official weights


def official_name(name):
    """The name of our parameter in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load_llama(folder, dtype=None, device="cpu", int8=False):
    """(LLaMA, Tokenizer) from a folder with config.json, tokenizer.model and safetensors, one file or shards.

    dtype   of the weights in memory; None: as in the files, which a CPU then memory-maps instead of copying
    int8    quantise the weight of each Linear as it is read; embeddings, norms and biases keep `dtype`
    Errors  UserError for whatever is missing, broken, unsupported, or does not fit
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: tokenizer.model has {tokenizer.vocab_size:,} pieces, but config.json "
                        f"has {config.vocab_size:,}; they are not of the same model")
    tensors = {}
    for path in shard_files(folder):
        tensors |= open_tensors(path, "LLaMA's weights in the Hugging Face layout (safetensors)")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        if not torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]):
            raise UserError(f"{folder}: config.json ties lm_head to the embeddings, but they differ")
    with torch.device("meta"):
        llama = LLaMA(config)
    load_strict(llama, tensors, folder, official_name, dtype, device, int8=Linear if int8 else ())
    return llama.eval(), tokenizer


@torch.no_grad()
def greedy_continuation(llama, ids, n):
    """Greedy decoding with LLaMA alone and the KV cache: the n next ids after `ids`; EOS does not stop it."""
    device = llama.embed_tokens.weight.device
    cache = llama.new_cache()
    tokens = pack([ids], [1], device)
    out = []
    for step in range(n):
        h = llama(llama.embed(tokens.ids), tokens, cache)                       # (1, D)
        token = llama.logits(h).argmax(-1)                                      # (1,)
        out.append(token.item())
        tokens = next_tokens(token, [len(ids)], step, llama.compute_dtype)
    return out
