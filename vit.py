"""CLIP's vision transformer: preprocessing, the [cls] tokens of chosen layers, and loading of the official weights.

Source   Dosovitskiy et al. 2021 (arXiv 2010.11929) with CLIP's changes (Radford et al. 2021, arXiv 2103.00020):
         a LayerNorm right after the embeddings, quick-GELU, no bias in the patch embedding.
Names    are those of the Hugging Face checkpoints, including the typo `pre_layrnorm`.

Nothing here is trained, so the [cls] tokens of a photo are computed only once.  This file knows nothing about language.

Shapes   P photos   S = 1 + patches tokens   V width   d = V / heads   K [cls] tokens of a photo
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from base.checkpoint import check_fields, check_file, load_strict, read_json, read_state_dict
from base.console import UserError

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


# ------------------------------------------------------------------------------------------------ preprocessing


def preprocess(image, size=224):
    """CLIP's preprocessing of an RGB image: (3, size, size), fp32, each channel normalised."""
    return normalize(crop(image, size))


def crop(image, size=224):
    """The part of an RGB image that CLIP sees: (size, size, 3), uint8.

    The shorter side is resized to `size` (bicubic), the longer side in proportion, rounded down.  Then the centre is
    cropped; an odd margin is larger at the right and at the bottom.  All as in transformers' CLIP processor.
    """
    width, height = image.size
    short = min(width, height)
    # Integer arithmetic: a float could fall just below a whole number.
    width, height = size * width // short, size * height // short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalize(pixels):
    """(..., size, size, 3), uint8 -> (..., 3, size, size), fp32: each channel with CLIP's mean and deviation."""
    pixels = (np.float32(pixels) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).movedim(-1, -3)


# ------------------------------------------------------------------------------------------------ the forward pass


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
    """Self-attention without a mask.  Queries: the first n_queries tokens; the last layer needs [cls] alone."""

    def __init__(self, config):
        super().__init__()
        V = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(V, V) for _ in range(4))

    def forward(self, x, n_queries):
        q = self.q_proj(x[:, :n_queries]).unflatten(-1, (self.heads, -1)).transpose(1, 2)      # (P, heads, n_queries, d)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)                     # (P, heads, S, d)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)                     # (P, heads, S, d)
        out = F.scaled_dot_product_attention(q, k, v)                           # softmax(q k^T / sqrt(d)) v
        return self.out_proj(out.transpose(1, 2).flatten(2))                    # (P, n_queries, V)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))                           # quick-GELU, CLIP's own


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, n_queries=None):
        """(P, S, V) -> (P, n_queries, V); None: all S tokens."""
        x = x[:, :n_queries] + self.self_attn(self.layer_norm1(x), n_queries)
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
        """Photos (P, 3, size, size) -> (P, K, V): the [cls] token after each layer in `cls_layers` (counted from 1)."""
        x = self.pre_layrnorm(self.embeddings(pixels))                          # (P, S, V)
        cls_tokens = []
        for depth, block in enumerate(self.layers[:max(cls_layers)], start=1):
            x = block(x, n_queries=1 if depth == max(cls_layers) else None)
            if depth in cls_layers:
                cls_tokens.append(x[:, 0])                                      # (P, V)   [cls] is token 0
        return torch.stack(cls_tokens, dim=1)                                   # (P, K, V)


# ------------------------------------------------------------------------------------------------ official weights


def official_name(name):
    """The name of our parameter in a Hugging Face checkpoint, without the prefix `vision_model.`"""
    return f"encoder.{name}" if name.startswith("layers.") else name


OPENAI_NAMES = (                                        # OpenAI's and open_clip's names -> Hugging Face's
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".c_fc.", ".fc1."),
    (".c_proj.", ".fc2."),
)


def from_openai(tensors):
    """Tensors in OpenAI's layout (q, k and v stacked) -> the same under Hugging Face's names."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in OPENAI_NAMES:
            name = name.replace(theirs, ours)
        if "in_proj_" in name:                          # (3V, V) or (3V,)
            for part, piece in zip(("q_proj.", "k_proj.", "v_proj."), tensor.chunk(3)):
                renamed[name.replace("in_proj_", part)] = piece
        else:
            renamed[name] = tensor
    return renamed


def vision_tower(tensors, file):
    """The ViT's tensors under Hugging Face's names without prefix, from any of the layouts; UserError if there are none.

    The text tower of a whole CLIP, and everything after the last block, are not used here.
    """
    def with_prefix(prefix):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    for prefix in ("vision_model.", ""):                # transformers 5 omits it for a vision tower alone
        if f"{prefix}embeddings.class_embedding" in tensors:
            found = with_prefix(prefix)
            break
    else:
        for prefix in ("visual.", ""):
            if f"{prefix}class_embedding" in tensors and f"{prefix}conv1.weight" in tensors:
                found = from_openai(with_prefix(prefix))
                break
        else:
            raise UserError(f"{file}: holds no CLIP vision transformer: neither vision_model.embeddings.class_embedding "
                            "(Hugging Face) nor visual.class_embedding (OpenAI, open_clip) is in it")
    unused = ("post_layernorm.", "proj", "embeddings.position_ids")
    return {name: tensor for name, tensor in found.items() if not (name.startswith(unused[0]) or name in unused)}


def weight_file(path):
    """The file with the weights: `path` itself, or the weight file in the folder `path`."""
    path = Path(path)
    if path.is_dir():
        for name in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"):
            if (path / name).exists():
                return path / name
        raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, CLIP's weights")
    check_file(path, "CLIP's ViT weights")
    return path


SETTINGS = {                                            # of config.json: {field: (type, allowed, default)}
    "hidden_act": (str, ("quick_gelu",), "quick_gelu"),
    "num_attention_heads": (int, (1, 1024), None),
    "layer_norm_eps": (float, (1e-30, 1), 1e-5),
}


def read_settings(folder):
    """{field of SETTINGS: value} from the configs beside the weights; UserError if the activation is not quick-GELU."""
    open_clip, clip = folder / "open_clip_config.json", folder / "config.json"
    if open_clip.exists():
        model = check_fields(read_json(open_clip, "open_clip's config"), {"model_cfg": (dict, None, {})}, open_clip)["model_cfg"]
        if model.get("quick_gelu") is not True:
            raise UserError(f"{open_clip}: quick_gelu is not set, so this ViT has the plain GELU, which is not supported; "
                            "only CLIP's quick-GELU is (OpenAI's weights have it)")
    raw = read_json(clip, "CLIP's config") if clip.exists() else {}
    raw |= check_fields(raw, {"vision_config": (dict, None, {})}, clip)["vision_config"]        # of a whole CLIP
    return check_fields(raw, SETTINGS, clip)


def load_vit(path, device="cpu"):
    """ViT in fp32 from official CLIP weights: a file, or a folder with one (and its config.json, if there is one).

    Layouts  Hugging Face (a whole CLIP or the vision tower), OpenAI and open_clip (`visual.…`)
    Sizes    are read from the weights.  Weights do not show the number of heads: it comes from config.json, else it is
             V / 64 as in every ViT of CLIP.  They do not show the activation either: it is quick-GELU, as in OpenAI's
             weights; if a config says otherwise, that is an error.
    Errors   UserError for whatever is missing, broken, unsupported, or does not fit
    """
    file = weight_file(path)
    tensors = vision_tower(read_state_dict(file, "CLIP's ViT weights"), file)
    patch = tensors.get("embeddings.patch_embedding.weight")
    position = tensors.get("embeddings.position_embedding.weight")
    fc1 = tensors.get("encoder.layers.0.mlp.fc1.weight")
    if (patch is None or position is None or fc1 is None or (patch.dim(), position.dim(), fc1.dim()) != (4, 2, 2)
            or min(*patch.shape, *fc1.shape, len(position) - 1) < 1):
        raise UserError(f"{file}: its patch embedding, position embedding or first layer is missing or misshapen")
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    settings = read_settings(file.parent)
    config = ViTConfig(
        hidden_size=patch.shape[0],
        intermediate_size=len(fc1),
        num_hidden_layers=len(layers),
        num_attention_heads=settings["num_attention_heads"] or max(1, patch.shape[0] // 64),
        patch_size=patch.shape[-1],
        image_size=patch.shape[-1] * math.isqrt(len(position) - 1),
        layer_norm_eps=settings["layer_norm_eps"],
    )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(f"{file}: {config.num_attention_heads} heads do not divide the width {config.hidden_size}")
    with torch.device("meta"):
        vit = ViT(config)
    load_strict(vit, tensors, file, official_name, torch.float32, device)
    return vit.eval()
