"""The ViT against what transformers computed, in every layout; its pixels against CLIP's."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from make_golden import GOLDEN, VIT
from PIL import Image, ImageOps
from random_weights import write_vit
from safetensors.torch import load_file, save_file
from test_llama import close

import vit
from base.checkpoint import load_strict
from base.console import UserError
from base.photo import open_photo
from vit import ViT, load_vit, preprocess


@torch.no_grad()
def cls_tokens(model, cls_layers=(3, 6)):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model(pixels, cls_layers)


def test_cls_tokens_are_those_recorded_from_transformers():
    """The file is that of tests/make_golden.py."""
    tensors = load_file(GOLDEN / "vit.safetensors")
    pixels, expected = tensors.pop("pixels"), tensors.pop("cls")            # the second is (P, K, V)
    with torch.device("meta"):
        model = ViT(VIT)
    load_strict(model, vit.vision_tower(tensors), "vit", vit.official_name)
    close(model(pixels, (3, 6)), expected)


def test_layers_after_the_last_tap_are_not_computed(vit_dir):
    model = load_vit(vit_dir)
    both = cls_tokens(model)
    shapes = []
    for block in model.layers:
        block.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    close(cls_tokens(model, (3,))[:, 0], both[:, 0])
    assert shapes == [(2, 17, 24)] * 3                  # (P, S, V); S is [cls] and 16 patches


# ---------------------------------------------------------------------------------------- layouts


# Hugging Face's names, and those of openai/CLIP's model.py.
OPENAI = """
embeddings.class_embedding              class_embedding
embeddings.position_embedding.weight    positional_embedding
embeddings.patch_embedding              conv1
pre_layrnorm                            ln_pre
encoder.layers                          transformer.resblocks
self_attn                               attn
layer_norm1                             ln_1
layer_norm2                             ln_2
mlp.fc1                                 mlp.c_fc
mlp.fc2                                 mlp.c_proj
"""


def openai_names(tensors, prefix):
    """A tower under OpenAI's names, q, k and v stacked; with what stands there after the last block."""
    renamed = {f"{prefix}proj": torch.ones(4, 4), f"{prefix}ln_post.bias": torch.ones(4)}
    for name, tensor in tensors.items():
        name = name.removeprefix("vision_model.")
        for ours, theirs in map(str.split, OPENAI.strip().splitlines()):
            name = name.replace(ours, theirs)
        renamed[prefix + name] = tensor
    for name in [name for name in renamed if "q_proj" in name]:
        stacked = [renamed.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(stacked)
    return renamed


LAYOUTS = {
    "vision tower": dict,
    "without prefix": lambda t: {name.removeprefix("vision_model."): tensor for name, tensor in t.items()},
    "whole CLIP": lambda t: t | {
        "vision_model.embeddings.position_ids": torch.arange(17),
        "vision_model.post_layernorm.bias": torch.ones(24),
        "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(8), "logit_scale": torch.ones(1)},
    "OpenAI": lambda t: openai_names(t, "visual.") | {
        "positional_embedding": torch.ones(77, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)},
    "OpenAI's tower": lambda t: openai_names(t, ""),
    "fp16": lambda t: {name: tensor.half() for name, tensor in t.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(layout, vit_dir, tmp_path):
    """As .safetensors and .bin, a file or a folder; the config, too, of a tower or a whole CLIP."""
    tensors = LAYOUTS[layout](load_file(vit_dir / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 3}}')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text('{"num_attention_heads": 3}')
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "bin" / "pytorch_model.bin")
    expected = cls_tokens(load_vit(vit_dir))
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "bin"):
        close(cls_tokens(load_vit(path)), expected, 2e-2 if layout == "fp16" else 1e-5)


def test_sizes_come_from_the_weights_and_the_config(tmp_path, capsys):
    """Without a config a head is 64 wide, and a note says what is taken for granted."""
    config = vit.ViTConfig(hidden_size=128, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                           patch_size=8, image_size=32, layer_norm_eps=0.001)
    write_vit(tmp_path, config)
    model = load_vit(tmp_path)
    assert model.config == config
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.001}
    (tmp_path / "config.json").unlink()
    assumed = dataclasses.replace(config, num_attention_heads=2, layer_norm_eps=1e-5)
    assert load_vit(tmp_path).config == assumed
    assert "taken to have quick-GELU" in capsys.readouterr().err


@pytest.mark.parametrize("name, config, said", [
    ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
    ("config.json", {"num_attention_heads": 5}, "5 heads do not divide the width 24"),
    ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, "quick_gelu is not set"),
])
def test_a_config_that_does_not_fit_is_refused(vit_dir, tmp_path, name, config, said):
    save_file(load_file(vit_dir / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        load_vit(tmp_path)


@pytest.mark.parametrize("name, tensor, said", [
    ("encoder.layers.2.mlp.fc1.bias", None, "layers.2.mlp.fc1.bias is absent here"),
    ("surprise", torch.ones(2), r"surprise is \(2,\) here and absent in the model"),
    ("pre_layrnorm.bias", torch.ones(7), r"pre_layrnorm.bias is \(7,\) here and \(24,\)"),
    ("embeddings.class_embedding", None, "holds no CLIP vision transformer"),
])
def test_weights_that_do_not_fit_are_refused_by_name(vit_dir, tmp_path, name, tensor, said):
    with pytest.raises(UserError, match="holds neither model.safetensors nor pytorch_model.bin"):
        load_vit(tmp_path)
    tensors = load_file(vit_dir / "model.safetensors") | {f"vision_model.{name}": tensor}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    with pytest.raises(UserError, match=said):
        load_vit(tmp_path)


# ---------------------------------------------------------------------------------------- pixels


def test_preprocessing_by_hand():
    image = Image.new("RGB", (448, 224), (255, 0, 128))
    image.paste((0, 0, 0), (0, 0, 112, 224))            # what the crop cuts off
    colour = torch.tensor([1.0, 0.0, 128 / 255])
    expected = (colour - torch.tensor(vit.CLIP_MEAN)) / torch.tensor(vit.CLIP_STD)
    close(preprocess(image)[:, :, 3:], expected[:, None, None].expand(3, 224, 221))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 4), dtype=np.uint8), "RGBA")


@pytest.mark.parametrize("picture", [
    NOISE.resize((225, 517)), NOISE.resize((640, 333)), NOISE.convert("L"), NOISE.convert("LA"),
    NOISE.quantize(64)], ids=str)
def test_pixels_are_those_of_transformers(picture, tmp_path):
    """Equal to CLIP's processor on Pillow, which lays a picture that it is given on white."""
    transformers = pytest.importorskip("transformers")
    picture.save(tmp_path / "x.png")
    theirs = transformers.CLIPImageProcessorPil()(Image.open(tmp_path / "x.png"))["pixel_values"][0]
    close(preprocess(open_photo(tmp_path / "x.png")), torch.as_tensor(np.asarray(theirs)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    NOISE.convert("RGB").save(tmp_path / "x.png", exif=exif)
    ours, theirs = open_photo(tmp_path / "x.png"), ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    assert (ours.size, ours.tobytes()) == (theirs.size, theirs.tobytes())


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_of_16_bits_by_hand(name, tmp_path):
    """0x12FF of 0xFFFF is 0x12 of 0xFF."""
    Image.fromarray(np.array([[0, 0x00FF, 0x12FF, 0xFFFF]], dtype=np.uint16)).save(tmp_path / name)
    assert np.asarray(open_photo(tmp_path / name))[0].tolist() == [[0] * 3, [0] * 3, [0x12] * 3, [255] * 3]


@pytest.mark.parametrize("picture, said", [
    (Image.new("1", (1, 101)), "1 : 100"),
    (Image.new("1", (10_001, 10_000)), "at most 100,000,000 are read"),
    (Image.new("I", (4, 4)), "32 bits a pixel, and nothing says which value is white"),
])
def test_what_is_no_photo_is_refused_by_name(picture, said, tmp_path):
    picture.save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=said):
        open_photo(tmp_path / "x.tif")
