"""CLIP's vision transformer: preprocessing, the [cls] tokens of chosen layers, loading of official weights.

Source   Dosovitskiy et al. 2021 (arXiv 2010.11929) with CLIP's changes (Radford et al. 2021, arXiv
         2103.00020): a LayerNorm right after the embeddings, quick-GELU, no bias in the patch embedding.
Names    are those of the Hugging Face checkpoints, including the typo `pre_layrnorm`.

Nothing here is trained, so the [cls] tokens of a photo are computed only once.  This file knows nothing about
language.

Shapes   P photos   S = 1 + patches tokens   V width   d = V / heads   K [cls] tokens of a photo
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from base.checkpoint import load_strict, read_state_dict
from base.console import UserError, reading, reading_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # of CLIP's training photos, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """The sizes of a ViT; the defaults are those of ViT-B/16."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    layer_norm_eps: float = 1e-5


# ---------------------------------------------------------------------------------------- preprocessing


def preprocess(image, size=224):
    """CLIP's preprocessing of an RGB image: (3, size, size), fp32, each channel normalised."""
    return normalize(crop(image, size))


def crop(image, size=224):
    """The part of an RGB image that CLIP sees: (size, size, 3), uint8.

    The shorter side is resized to `size` (bicubic), the longer side in proportion, rounded down.  Then the
    centre is cropped; an odd margin is larger at the right and at the bottom.  All as in transformers' CLIP
    processor.
    """
    width, height = image.size
    short = min(width, height)
    # Integer arithmetic: a float could fall just below a whole number.
    width, height = size * width // short, size * height // short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalize(pixels):
    """(..., size, size, 3), uint8 -> (..., 3, size, size), fp32: each channel with CLIP's mean and
    deviation.
    """
    pixels = (np.float32(pixels) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).movedim(-1, -3)


# ---------------------------------------------------------------------------------------- the forward pass


class Embeddings(nn.Module):
    """Patches and the class token plus their position embeddings: (P, 3, size, size) -> (P, S, V)."""

    def __init__(self, config):
        super().__init__()
        V, side = config.hidden_size, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(V))
        self.patch_embedding = nn.Conv2d(3, V, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + side * side, V)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)       # (P, S - 1, V)
        cls = self.class_embedding.expand(len(pixels), 1, -1)                   # (P, 1, V)
        return torch.cat((cls, patches), dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Self-attention without a mask: every token sees every token."""

    def __init__(self, config):
        super().__init__()
        V = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(V, V) for _ in range(4))

    def forward(self, x):
        """(P, S, V) -> (P, S, V)"""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))       # (P, heads, S, d) each
        y = F.scaled_dot_product_attention(q, k, v)                             # softmax(q k^T / sqrt(d)) v
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with quick-GELU, CLIP's own activation, between them."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        """(P, S, V) -> (P, S, V)"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViT(nn.Module):
    """The vision tower without its final LayerNorm and projection: I_k is the output of a block."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.requires_grad_(False)

    def forward(self, pixels, cls_layers):
        """Photos (P, 3, size, size) -> (P, K, V): the [cls] token after each layer in `cls_layers` (counted
        from 1).
        """
        x = self.pre_layrnorm(self.embeddings(pixels))                          # (P, S, V)
        cls_tokens = []
        for depth, block in enumerate(self.layers[:max(cls_layers)], start=1):
            x = block(x)
            if depth in cls_layers:
                cls_tokens.append(x[:, 0])                                      # (P, V)   [cls] is token 0
        return torch.stack(cls_tokens, dim=1)                                   # (P, K, V)


# ---------------------------------------------------------------------------------------- official weights


def official_name(name):
    """The name of our parameter in a Hugging Face checkpoint, without the prefix `vision_model.`"""
    return f"encoder.{name}" if name.startswith("layers.") else name


OPENAI_NAMES = {                                        # OpenAI's and open_clip's names -> Hugging Face's
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def from_openai(tensors):
    """Tensors in OpenAI's layout (q, k and v stacked) -> the same under Hugging Face's names."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in OPENAI_NAMES.items():
            name = name.replace(theirs, ours)
        if "in_proj_" in name:                          # (3V, V) or (3V,)
            for part, piece in zip(("q_proj.", "k_proj.", "v_proj."), tensor.chunk(3)):
                renamed[name.replace("in_proj_", part)] = piece
        else:
            renamed[name] = tensor
    return renamed


def vision_tower(tensors):
    """The ViT's tensors under Hugging Face's names without prefix, from any of the layouts; ValueError if
    there are none.

    The text tower of a whole CLIP, and everything after the last block, are not used here.
    """
    found = [name for name in tensors if name.endswith("class_embedding")]
    if not found:
        raise ValueError("it has neither vision_model.embeddings.class_embedding (Hugging Face) nor "
                         "visual.class_embedding (OpenAI, open_clip), so it holds no CLIP vision transformer")
    # `vision_model.` or `visual.` or nothing; before it stands what torch.compile and DataParallel add.
    prefix = found[0].removesuffix("class_embedding").removesuffix("embeddings.")
    tower = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if "class_embedding" in tower:
        tower = from_openai(tower)
    unused = ("post_layernorm.weight", "post_layernorm.bias", "proj", "embeddings.position_ids")
    return {name: tensor for name, tensor in tower.items() if name not in unused}


def weight_file(path):
    """The file with the weights: `path` itself, or the weight file in the folder `path`."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "open_clip_model.safetensors",
                 "pytorch_model.bin", "open_clip_pytorch_model.bin"):
        if (path / name).exists():
            return path / name
    raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, CLIP's weights")


def read_settings(folder):
    """(heads or None, layer_norm_eps) from the config beside the weights.  UserError: the activation is not
    quick-GELU.

    Weights show neither.  Without a config the activation is taken to be quick-GELU, as in OpenAI's weights.
    """
    open_clip, path = folder / "open_clip_config.json", folder / "config.json"
    if open_clip.exists():
        with reading_json(open_clip, "open_clip's config") as config:
            if config["model_cfg"].get("quick_gelu") is not True:
                raise ValueError("quick_gelu is not set, and only quick-GELU is supported, not GELU")
    if not path.exists():
        if not open_clip.exists():
            print(f"note: {folder} has no config.json; the ViT is taken to have quick-GELU, as OpenAI's",
                  file=sys.stderr)
        return None, 1e-5
    with reading_json(path, "CLIP's config.json") as config:
        config |= config.get("vision_config") or {}     # of a whole CLIP
        if config.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError(f"hidden_act is {config['hidden_act']!r}, but only 'quick_gelu' is supported")
        return config.get("num_attention_heads"), float(config.get("layer_norm_eps", 1e-5))


def load_vit(path, device="cpu"):
    """ViT in fp32 from official CLIP weights: a file, or a folder with one (and its config.json, if there is
    one).

    Layouts  Hugging Face (a whole CLIP or the vision tower), and OpenAI's names (`visual.…`), as open_clip
             writes them; not OpenAI's own .pt file, which holds code
    Sizes    are read from the weights; the number of heads from config.json, else it is V / 64 as in every
             ViT of CLIP
    Errors   UserError for whatever is missing, broken, unsupported, or does not fit
    """
    file = weight_file(path)
    heads, eps = read_settings(file.parent)
    with reading(file, "CLIP's ViT weights"):
        tensors = vision_tower(read_state_dict(file, "CLIP's ViT weights"))
        V, _, _, patch_size = tensors["embeddings.patch_embedding.weight"].shape
        positions = len(tensors["embeddings.position_embedding.weight"])
        config = ViTConfig(
            hidden_size=V,
            intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in tensors if name.startswith("encoder.")}),
            num_attention_heads=heads or V // 64,
            patch_size=patch_size,
            image_size=patch_size * math.isqrt(positions - 1),
            layer_norm_eps=eps,
        )
        heads = config.num_attention_heads
        if type(heads) is not int or heads < 1 or V % heads or not 0 < eps < 1:
            raise ValueError(f"{heads!r} heads do not divide the width {V}, or layer_norm_eps is {eps}")
        with torch.device("meta"):
            vit = ViT(config)
    load_strict(vit, tensors, file, official_name, torch.float32, device)
    return vit.eval()
