"""LLaMA: config, tokenizer, the forward pass, and loading of the official weights.

Source   Touvron et al. 2023 (arXiv 2302.13971): RMSNorm before each sublayer, rotary positions, SwiGLU feed-forward.
Names    are those of the Hugging Face checkpoints: loading only adds a prefix to each name.

This file knows nothing about images or about what an adapter computes.  Each block has one slot, `adapter`: nn.Identity,
until EIVEN puts a module there.

The sequences of a batch are stored without padding, as one matrix of N tokens.  Each layer gets a `tokens` object
(base/packing.py): it knows which tokens form a sequence, and holds the masks and the KV cache.  The same attention for one
sequence, with loops and nothing else, is in experiments/plain.py.

Shapes   N tokens of all sequences   M tokens whose logits are needed   D hidden size   F feed-forward size
         H query heads   G key/value heads   d head dimension
         in attention, for a group of sequences: b sequences   T queries   S keys
"""

from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from base.checkpoint import check_fields, check_file, load_strict, map_safetensors, read_json, shard_files
from base.console import UserError, first_line
from base.frozen_ops import frozen_linear, rms_norm, swiglu
from base.packing import KVCache, next_tokens, pack

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


# What a LLaMA's config.json may say, {field: (type, allowed, default)}: its sizes, and settings that nothing else fits.
SIZES = {
    "num_attention_heads": (int, (1, 1024)),
    "num_key_value_heads": (int, (1, 1024), None),
    "head_dim": (int, (2, 4096), None),
    "hidden_size": (int, (1, 10 ** 5)),
    "intermediate_size": (int, (1, 10 ** 6)),
    "num_hidden_layers": (int, (1, 1000)),
    "vocab_size": (int, (1, 10 ** 7)),
    "max_position_embeddings": (int, (1, 10 ** 8), 2048),
    "rms_norm_eps": (float, (1e-30, 1)),
    "rope_theta": (float, (1, 1e12), 10000.0),
    "attention_bias": (bool, (False, True), False),
    "tie_word_embeddings": (bool, (False, True), False),
}
SUPPORTED = {
    "model_type": (str, ("llama",)),
    "hidden_act": (str, ("silu",), "silu"),
    "mlp_bias": (bool, (False,), False),
    "quantization_config": (dict, (), None),
    "sliding_window": (int, (), None),
    "pretraining_tp": (int, (1, 1), 1),
    "partial_rotary_factor": (float, (1, 1), 1.0),
    "rope_type": (str, ("default",), "default"),        # of rope_scaling
    "type": (str, ("default",), "default"),             # its older name
}


def read_config(path):
    """LlamaConfig from a config.json.  UserError for every setting that this file does not support."""
    raw = read_json(path, "LLaMA's config")
    for name in ("rope_scaling", "rope_parameters"):    # the second is newer, and holds rope_theta, too
        raw |= check_fields(raw, {name: (dict, None, {})}, path)[name]
    check_fields(raw, SUPPORTED, path)
    sizes = check_fields(raw, SIZES, path)
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or heads
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // heads
    config = LlamaConfig(**sizes)
    if heads % config.num_key_value_heads or config.head_dim % 2 or config.head_dim < 2:
        raise UserError(f"{path}: {heads} query heads must be a multiple of {config.num_key_value_heads} key/value heads, "
                        f"and head_dim {config.head_dim} even")
    return config


class Tokenizer:
    """LLaMA's SentencePiece model: text to ids and back, without BOS and EOS.

    bos_id starts every text; eos_id ends every answer.
    """

    def __init__(self, path):
        check_file(path, "a SentencePiece model (tokenizer.model)")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = self.pieces.vocab_size()
            self.pieces.id_to_piece(list(range(self.vocab_size)))       # each must be UTF-8
            self.adds_space = self.pieces.encode("a", out_type=str)[0].startswith("\u2581")
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise UserError(f"{path}: is not a SentencePiece model ({first_line(error)}); "
                            "LLaMA's tokenizer.model is needed, not tokenizer.json") from None
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path}: has no BOS or no EOS token; a LLaMA's tokenizer has both")

    def encode(self, text, new_word=False):
        """Ids of a text.

        new_word  the text continues another text and needs a leading space.  LLaMA's own SentencePiece model adds this
                  space to every text; other models do not.
        """
        return self.pieces.encode(" " + text if new_word and not self.adds_space else text)

    def decode(self, ids):
        return self.pieces.decode(ids)


# ------------------------------------------------------------------------------------------------ the forward pass


class Linear(nn.Module):
    """x W^T (+ bias) with a frozen weight: (N, in_features) -> (N, out_features).

    W is `weight`; or, if that is int8, scale[:, None] * weight, with one fp32 scale for each row (base/frozen_ops.py).
    """

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.scale = None                               # (out_features,), where load_llama makes the weight int8

    def forward(self, x):
        y = frozen_linear(x, self.weight, self.scale)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the dtype of x: (N, D) -> (N, D)."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rotary_table(position, head_dim, theta):
    """cos and sin, (N, 1, d/2) each, fp32: the angle of pair i is position * theta^(-2i/d) (RoFormer, eq. 15)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)
    angle = position.float()[:, None] * frequency       # (N, d/2)
    return angle.cos()[:, None], angle.sin()[:, None]


def apply_rotary(x, cos, sin):
    """Rotate each pair (i, i + d/2) by its angle, in fp32: (N, heads, d) -> (N, heads, d).

    These are the pairs of Hugging Face checkpoints; in Meta's own files they are (2i, 2i + 1).
    """
    a, b = x.float().chunk(2, dim=-1)                   # (N, heads, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions.  Each key/value head serves H / G query heads (grouped-query attention)."""

    def __init__(self, config):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = Linear(D, config.num_attention_heads * config.head_dim, bias)
        self.k_proj = Linear(D, config.num_key_value_heads * config.head_dim, bias)
        self.v_proj = Linear(D, config.num_key_value_heads * config.head_dim, bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, D, bias)

    def forward(self, x, tokens):
        """(N, D) -> (M, D).  M = N, except in the last layer: there only the needed tokens are queries."""
        q = self.q_proj(tokens.needed(x)).unflatten(-1, (-1, self.head_dim))    # (M, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))                   # (N, G, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))                   # (N, G, d)
        q = apply_rotary(q, tokens.needed(tokens.cos), tokens.needed(tokens.sin))
        k = apply_rotary(k, tokens.cos, tokens.sin)
        out = []
        for q_b, k_b, v_b, mask in tokens.sequences(q, k, v):                   # (b, H, T, d), (b, G, S, d), (b, G, S, d)
            out.append(F.scaled_dot_product_attention(                          # softmax(q k^T / sqrt(d)) v
                q_b, k_b, v_b, attn_mask=mask, is_causal=mask is None, enable_gqa=q_b.shape[1] != k_b.shape[1]))
        return self.o_proj(tokens.unpad(out))                                   # (M, D)


class MLP(nn.Module):
    """SwiGLU feed-forward: (silu(x Wg) * x Wu) Wd, with sizes D -> F -> D."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.adapter = nn.Identity()                    # EIVEN replaces it: the only place where adapters enter
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, tokens):
        """(N, D) -> (M, D).  tokens.needed is the identity, except in the last layer."""
        x = tokens.needed(x) + self.self_attn(self.adapter(self.input_layernorm(x)), tokens)
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
        """Dtype of the activations: that of the weights on a GPU; fp32 on a CPU, few of which have 16-bit units."""
        weight = self.embed_tokens.weight
        return torch.float32 if weight.device.type == "cpu" else weight.dtype

    def embed(self, ids):
        """(N,) ids -> (N, D)"""
        return self.embed_tokens(ids).to(self.compute_dtype)

    def forward(self, x, tokens):
        """Embeddings (N, D) of `tokens` (base/packing.py) -> final hidden states (M, D) of those whose logits are needed."""
        cos, sin = rotary_table(tokens.position, self.config.head_dim, self.config.rope_theta)
        for i, block in enumerate(self.layers):
            in_layer = tokens.at_layer(i, cos, sin, last=i == len(self.layers) - 1)
            if self.grad_checkpoint and torch.is_grad_enabled():
                # use_reentrant=True would give the adapters no gradient where x needs none: without photos.
                x = checkpoint(block, x, in_layer, use_reentrant=False)
            else:
                x = block(x, in_layer)
        return self.norm(x)

    def logits(self, h):
        """Hidden states (M, D) -> logits (M, vocab), fp32."""
        tied = self.config.tie_word_embeddings
        return (frozen_linear(h, self.embed_tokens.weight) if tied else self.lm_head(h)).float()


# ------------------------------------------------------------------------------------------------ official weights


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
    shard = None                                        # drop this reference, so that load_strict can free each tensor
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys():
        if not torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]):
            raise UserError(f"{folder}: config.json ties lm_head to the embeddings, but lm_head.weight differs")
    with torch.device("meta"):
        llama = LLaMA(config)
    load_strict(llama, tensors, folder, official_name, dtype, device, int8=Linear if int8 else ())
    return llama.eval(), tokenizer


def greedy_continuation(llama, ids, n):
    """Greedy decoding with LLaMA alone: the n next ids after `ids`, one at a time, with the KV cache."""
    device = llama.embed_tokens.weight.device
    cache = KVCache(llama.config, 1, len(ids) + n, llama.compute_dtype, device)
    tokens, out = pack([ids], [1], device, cache), []
    with torch.no_grad():
        while len(out) < n:
            h = llama(llama.embed(tokens.ids), tokens)                          # (1, D)
            out.append(int(llama.logits(h).argmax()))
            tokens = next_tokens(torch.tensor(out[-1:], device=device), [len(ids) + len(out) - 1], cache)
    return out
