"""The ViT against transformers (or a file recorded from it), in every layout; its pixels against CLIP's."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vit
from base.checkpoint import load_strict
from base.console import UserError
from base.photo import open_photo
from random_weights import write_vit
from vit import ViT, load_vit, preprocess


@torch.no_grad()
def cls_tokens(model, cls_layers=(3, 6)):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model(pixels, cls_layers)


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_cls_tokens_are_those_of_transformers(vit_dir):
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPVisionModel.from_pretrained(vit_dir, dtype=torch.float32).eval()
    ours = cls_tokens(load_vit(vit_dir))
    theirs = cls_tokens(lambda pixels, layers: peer(pixels, output_hidden_states=True).hidden_states)
    assert ours.shape == (2, 2, 24)                     # (P, K, V)
    close(ours, torch.stack([theirs[3][:, 0], theirs[6][:, 0]], 1))


def test_cls_tokens_are_those_recorded_from_transformers():
    """The file is that of tests/make_golden.py."""
    path = Path(__file__).parent / "golden" / "vit.safetensors"
    with safe_open(path, "pt") as file:
        config = vit.ViTConfig(**json.loads(file.metadata()["config"]))
    tensors = load_file(path)
    pixels, expected = tensors.pop("pixels"), tensors.pop("cls")
    with torch.device("meta"):
        model = ViT(config)
    load_strict(model, vit.vision_tower(tensors), path, vit.official_name)
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


def openai_names(tensors, prefix):
    """A tower under OpenAI's names, q, k and v stacked, written out by hand from openai/CLIP's model.py."""
    ours = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    theirs = {"class_embedding": ours["embeddings.class_embedding"],
              "positional_embedding": ours["embeddings.position_embedding.weight"],
              "conv1.weight": ours["embeddings.patch_embedding.weight"],
              "proj": torch.ones(4, 4)}
    for part in ("weight", "bias"):
        theirs[f"ln_pre.{part}"] = theirs[f"ln_post.{part}"] = ours[f"pre_layrnorm.{part}"]
        for i in range(sum(name.endswith("mlp.fc1.bias") for name in ours)):
            mine, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            stacked = [ours[f"{mine}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            theirs[f"{block}.attn.in_proj_{part}"] = torch.cat(stacked)
            theirs[f"{block}.attn.out_proj.{part}"] = ours[f"{mine}.self_attn.out_proj.{part}"]
            theirs[f"{block}.ln_1.{part}"] = ours[f"{mine}.layer_norm1.{part}"]
            theirs[f"{block}.ln_2.{part}"] = ours[f"{mine}.layer_norm2.{part}"]
            theirs[f"{block}.mlp.c_fc.{part}"] = ours[f"{mine}.mlp.fc1.{part}"]
            theirs[f"{block}.mlp.c_proj.{part}"] = ours[f"{mine}.mlp.fc2.{part}"]
    return {prefix + name: tensor.clone() for name, tensor in theirs.items()}


LAYOUTS = {
    "vision tower": dict,
    "without prefix": lambda t: {name.removeprefix("vision_model."): tensor for name, tensor in t.items()},
    "compiled": lambda t: {f"module._orig_mod.{name}": tensor for name, tensor in t.items()},
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
    ("config.json", {"layer_norm_eps": "abc"}, "abc"),
    ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, "quick_gelu is not set"),
    ("open_clip_config.json", {"model_cfg": {"quick_gelu": "yes"}}, "quick_gelu is not set"),
])
def test_a_config_that_does_not_fit_is_refused(vit_dir, tmp_path, name, config, said):
    save_file(load_file(vit_dir / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        load_vit(tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"vision_model.encoder.layers.2.mlp.fc1.bias": None}, "encoder.layers.2.mlp.fc1.bias is missing"),
    ({"vision_model.surprise": torch.ones(2)}, "surprise is unexpected"),
    ({"vision_model.pre_layrnorm.bias": torch.ones(7)}, r"pre_layrnorm.bias is \(7,\).*expected \(24,\)"),
    ({"vision_model.embeddings.class_embedding": None}, "holds no CLIP vision transformer"),
    ({"vision_model.embeddings.patch_embedding.weight": torch.ones(24, 3, 0, 0)}, "model.safetensors"),
])
def test_weights_that_do_not_fit_are_refused_by_name(vit_dir, tmp_path, change, said):
    tensors = load_file(vit_dir / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((vit_dir / "config.json").read_text())
    with pytest.raises(UserError, match=said):
        load_vit(tmp_path)


@pytest.mark.parametrize("name, content, said", [
    (".", None, "holds neither model.safetensors nor pytorch_model.bin"),
    ("absent.safetensors", None, "does not exist"),
    ("page.bin", b"<!DOCTYPE html><html>", "an HTML"),
    ("text.bin", b"not weights at all", "state dict"),
])
def test_a_file_that_is_no_weights_is_named(tmp_path, name, content, said):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_vit(tmp_path / name)


# ---------------------------------------------------------------------------------------- pixels


def test_preprocessing_by_hand():
    image = Image.new("RGB", (448, 224), (255, 0, 128))
    image.paste((0, 0, 0), (0, 0, 112, 224))            # what the crop cuts off
    colour = torch.tensor([1.0, 0.0, 128 / 255])
    expected = (colour - torch.tensor(vit.CLIP_MEAN)) / torch.tensor(vit.CLIP_STD)
    close(preprocess(image)[:, :, 3:], expected[:, None, None].expand(3, 224, 221))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 4), dtype=np.uint8), "RGBA")


@pytest.mark.parametrize("picture", [
    NOISE.resize((300, 200)), NOISE.resize((225, 517)), NOISE.resize((640, 333)).convert("RGB"),
    NOISE.convert("L"), NOISE.convert("LA"), NOISE.quantize(64)], ids=str)
def test_pixels_are_those_of_transformers(picture, tmp_path):
    """Equal to CLIP's processor on Pillow, which lays a picture that it is given on white."""
    transformers = pytest.importorskip("transformers")
    picture.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        theirs = transformers.CLIPImageProcessorPil()(opened)["pixel_values"][0]
    close(preprocess(open_photo(tmp_path / "x.png")), torch.as_tensor(np.asarray(theirs)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_upright_as_in_transformers(orientation, tmp_path):
    """It turns a photo when it opens the file itself."""
    transformers = pytest.importorskip("transformers")
    exif = Image.Exif()
    exif[0x0112] = orientation
    NOISE.convert("RGB").save(tmp_path / "x.jpg", exif=exif)
    theirs = transformers.CLIPImageProcessorPil()(str(tmp_path / "x.jpg"))["pixel_values"][0]
    close(preprocess(open_photo(tmp_path / "x.jpg")), torch.as_tensor(np.asarray(theirs)))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_of_16_bits_by_hand(name, tmp_path):
    """0x12FF of 0xFFFF is 0x12 of 0xFF."""
    Image.fromarray(np.array([[0, 0x00FF, 0x12FF, 0xFFFF]], dtype=np.uint16)).save(tmp_path / name)
    assert np.asarray(open_photo(tmp_path / name))[0].tolist() == [[0] * 3, [0] * 3, [0x12] * 3, [255] * 3]


def test_damage_around_whole_pixels_does_not_cost_the_photo(tmp_path):
    """EXIF that is none; a text in a PNG whose checksum is wrong."""
    red = Image.new("RGB", (40, 40), "red")
    red.save(tmp_path / "x.jpg", exif=b"Exif\0\0no TIFF header at all")
    assert open_photo(tmp_path / "x.jpg").size == (40, 40)
    red.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[:33] + b"\0\0\0\3iCCPabc\0\0\0\0" + data[33:])
    assert open_photo(tmp_path / "x.png").tobytes() == red.tobytes()


@pytest.mark.parametrize("name, content, said", [
    ("page.jpg", b"<html>404</html>", "HTML"),
    ("noise.jpg", b"\xff\xd8\xff" + b"noise" * 30, "cannot be read as a photo"),
    ("cut.jpg", jpeg()[:500], "cannot be read as a photo"),
    ("strip.png", Image.new("1", (1, 101)), "1 : 100"),
    ("giant.png", Image.new("1", (10_001, 10_000)), "at most 100,000,000 are read"),
    ("int.tif", Image.new("I", (4, 4), 1), "32 bits a pixel, and nothing says which value is white"),
])
def test_what_is_no_photo_is_refused_by_name(tmp_path, name, content, said):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content.save(tmp_path / name)
    with pytest.raises(UserError, match=said):
        open_photo(tmp_path / name)
