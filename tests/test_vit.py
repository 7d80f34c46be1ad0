"""The ViT against transformers (or a golden file recorded from it), from every layout; preprocessing against CLIP's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file

import vit
from base.checkpoint import load_strict
from base.console import UserError
from base.photo import open_photo
from experiments.random_weights import TINY_VIT, write_vit
from vit import CLIP_STD, ViT, load_vit, preprocess


def cls_tokens(model, pixels, cls_layers=(3, 6)):
    with torch.no_grad():
        return model(pixels, cls_layers)


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_cls_tokens_are_those_of_transformers(vit_dir, pixels):
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPVisionModel.from_pretrained(vit_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        states = peer(pixels, output_hidden_states=True).hidden_states
    ours = cls_tokens(load_vit(vit_dir), pixels)
    assert ours.shape == (2, 2, 24)
    for k, depth in enumerate((3, 6)):
        torch.testing.assert_close(ours[:, k], states[depth][:, 0], rtol=1e-5, atol=1e-5)


def test_cls_tokens_are_those_recorded_from_transformers():
    golden = load_file(Path(__file__).parent / "golden" / "vit.safetensors")
    pixels, *expected = (golden.pop(name) for name in ("pixels", "cls.3", "cls.6"))
    with torch.device("meta"):
        model = ViT(TINY_VIT)
    load_strict(model, vit.vision_tower(golden, "golden"), "golden", vit.official_name)
    torch.testing.assert_close(cls_tokens(model, pixels), torch.stack(expected, 1), rtol=1e-5, atol=1e-5)


def test_the_last_tap_computes_less_and_the_same(vit_dir, pixels):
    model = load_vit(vit_dir)
    computed = []
    for block in model.layers:
        block.mlp.register_forward_hook(lambda _, inputs, output: computed.append(output.shape[1]))
    torch.testing.assert_close(cls_tokens(model, pixels, (3,))[:, 0], cls_tokens(model, pixels, (3, 6))[:, 0])
    assert computed == [17, 17, 1] + [17] * 5 + [1]     # 16 patches and [cls]; of the last layer that is needed, [cls] alone


# ------------------------------------------------------------------------------------------------ layouts


def hugging_face(folder):
    return load_file(folder / "model.safetensors")


def openai_names(tensors, prefix):
    """A vision tower under OpenAI's names, q, k and v stacked, written out by hand from openai/CLIP's model.py."""
    theirs, ours = {}, {n.removeprefix("vision_model."): t for n, t in tensors.items()}
    width = len(ours["embeddings.class_embedding"])
    theirs["class_embedding"] = ours["embeddings.class_embedding"]
    theirs["positional_embedding"] = ours["embeddings.position_embedding.weight"]
    theirs["conv1.weight"] = ours["embeddings.patch_embedding.weight"]
    for part in ("weight", "bias"):
        theirs[f"ln_pre.{part}"] = ours[f"pre_layrnorm.{part}"]
        theirs[f"ln_post.{part}"] = torch.ones(width)
        for i in range(sum(n.endswith("mlp.fc1.bias") for n in ours)):
            mine, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            stacked = [ours[f"{mine}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            theirs[f"{block}.attn.in_proj_{part}"] = torch.cat(stacked)
            theirs[f"{block}.attn.out_proj.{part}"] = ours[f"{mine}.self_attn.out_proj.{part}"]
            theirs[f"{block}.ln_1.{part}"] = ours[f"{mine}.layer_norm1.{part}"]
            theirs[f"{block}.ln_2.{part}"] = ours[f"{mine}.layer_norm2.{part}"]
            theirs[f"{block}.mlp.c_fc.{part}"] = ours[f"{mine}.mlp.fc1.{part}"]
            theirs[f"{block}.mlp.c_proj.{part}"] = ours[f"{mine}.mlp.fc2.{part}"]
    theirs["proj"] = torch.ones(width, 16)
    return {prefix + name: tensor for name, tensor in theirs.items()}


TEXT_TOWER = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6),
              "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(8), "visual_projection.weight": torch.ones(4, 24)}
OPENAI_TEXT = {"positional_embedding": torch.ones(77, 8), "token_embedding.weight": torch.ones(9, 8), "logit_scale": torch.tensor(4.6),
               "transformer.resblocks.0.ln_1.weight": torch.ones(8), "text_projection": torch.ones(8, 4), "ln_final.weight": torch.ones(8)}
LAYOUTS = {
    "vision tower": hugging_face,
    "vision tower without prefix": lambda f: {n.removeprefix("vision_model."): t for n, t in hugging_face(f).items()},
    "whole CLIP": lambda f: hugging_face(f) | TEXT_TOWER | {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "vision_model.post_layernorm.weight": torch.ones(24), "vision_model.post_layernorm.bias": torch.ones(24)},
    "OpenAI": lambda f: openai_names(hugging_face(f), "visual.") | OPENAI_TEXT,
    "OpenAI's tower alone": lambda f: openai_names(hugging_face(f), ""),
    "fp16": lambda f: {n: t.half() for n, t in hugging_face(f).items()},
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(layout, kind, vit_dir, tmp_path, pixels):
    tensors = {n: t.contiguous() for n, t in LAYOUTS[layout](vit_dir).items()}
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (save_file if kind == "safetensors" else torch.save)(tensors, tmp_path / name)
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 3}}')  # 24 wide: not a CLIP's heads
    expected = cls_tokens(load_vit(vit_dir), pixels)
    tolerance = 1e-5 if layout != "fp16" else 2e-2
    for path in (tmp_path, tmp_path / name):
        torch.testing.assert_close(cls_tokens(load_vit(path), pixels), expected, rtol=tolerance, atol=tolerance)


def test_without_a_config_a_head_is_64_wide(tmp_path):
    write_vit(tmp_path, vit.ViTConfig(hidden_size=128, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
                                      patch_size=8, image_size=32))
    (tmp_path / "config.json").unlink()
    assert load_vit(tmp_path).config.num_attention_heads == 2


def broken(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_what_does_not_fit_is_named(vit_dir, tmp_path):
    tensors = hugging_face(vit_dir)
    with pytest.raises(UserError, match="1 missing: encoder.layers.2.mlp.fc1.bias"):
        load_vit(broken(tmp_path, {n: t for n, t in tensors.items() if n != "vision_model.encoder.layers.2.mlp.fc1.bias"}))
    with pytest.raises(UserError, match="1 unexpected: surprise"):
        load_vit(broken(tmp_path, tensors | {"vision_model.surprise": torch.ones(2)}))
    with pytest.raises(UserError, match="pre_layrnorm.bias is .7,., expected .24,."):
        load_vit(broken(tmp_path, tensors | {"vision_model.pre_layrnorm.bias": torch.ones(7)}))
    with pytest.raises(UserError, match="holds no CLIP vision transformer"):
        load_vit(broken(tmp_path, TEXT_TOWER))


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load_vit(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="holds neither model.safetensors nor pytorch_model.bin"):
        load_vit(tmp_path)
    for name, content, said in (
            ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS pointer"),
            ("page.bin", b"<!DOCTYPE html><html>", "an HTML"),
            ("nothing.bin", b"", "an empty file"),
            ("text.bin", b"not weights at all", "not a whole PyTorch state dict"),
            ("short.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{}", "not a whole safetensors file")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            load_vit(tmp_path / name)


def test_another_activation_is_refused(vit_dir, tmp_path):
    save_file(hugging_face(vit_dir), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu", "num_attention_heads": 3}}))
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        load_vit(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 512}}')
    with pytest.raises(UserError, match="quick_gelu is not set"):
        load_vit(tmp_path)


@pytest.mark.parametrize("name, raw, said", [
    ("config.json", {"num_attention_heads": "3"}, "num_attention_heads is '3', but must be a whole number from 1 to 1,024"),
    ("config.json", {"num_attention_heads": -3}, "num_attention_heads is -3, but must be"),
    ("config.json", {"vision_config": {"num_attention_heads": 10 ** 30}}, "num_attention_heads is 1000.*, but must be"),
    ("config.json", {"vision_config": [3]}, r"vision_config is \[3\], but must be an object"),
    ("config.json", {"layer_norm_eps": "abc"}, "layer_norm_eps is 'abc', but must be a number from 1e-30 to 1"),
    ("config.json", {"hidden_act": ["quick_gelu"]}, r"hidden_act is \['quick_gelu'\], but only 'quick_gelu' is supported"),
    ("config.json", [1], "should be a JSON object, but is a list"),
    ("open_clip_config.json", [1], "should be a JSON object, but is a list"),
    ("open_clip_config.json", {"model_cfg": [1]}, r"model_cfg is \[1\], but must be an object"),
    ("open_clip_config.json", {"model_cfg": {"quick_gelu": "yes"}}, "quick_gelu is not set"),
])
def test_a_field_of_another_type_or_size_is_refused_by_name(vit_dir, tmp_path, name, raw, said):
    save_file(hugging_face(vit_dir), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=said) as error:
        load_vit(tmp_path)
    assert name in str(error.value)


def test_heads_and_eps_are_those_of_the_config(vit_dir, tmp_path):
    save_file(hugging_face(vit_dir), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 6, "layer_norm_eps": 0.001}}')
    model = load_vit(tmp_path)
    assert model.config.num_attention_heads == 6
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.001}
    (tmp_path / "config.json").write_text('{"num_attention_heads": 5}')
    with pytest.raises(UserError, match="5 heads do not divide the width 24"):
        load_vit(tmp_path)


@pytest.mark.parametrize("name, shape", [("embeddings.patch_embedding.weight", (24, 3, 0, 0)),
                                         ("embeddings.position_embedding.weight", (0, 24)),
                                         ("embeddings.position_embedding.weight", (1, 24)),
                                         ("encoder.layers.0.mlp.fc1.weight", (0, 24))])
def test_an_empty_tensor_is_refused(vit_dir, tmp_path, name, shape):
    with pytest.raises(UserError, match="is missing or misshapen"):
        load_vit(broken(tmp_path, hugging_face(vit_dir) | {f"vision_model.{name}": torch.ones(shape)}))


# ------------------------------------------------------------------------------------------------ preprocessing


def photos(tmp_path):
    draw = np.random.default_rng(0)
    for i, (width, height, mode) in enumerate([(300, 200, "RGB"), (225, 517, "RGB"), (224, 224, "RGB"), (61, 83, "RGB"),
                                               (640, 333, "L"), (250, 301, "RGBA")]):
        channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
        path = tmp_path / f"{i}.png"
        Image.fromarray(draw.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode).save(path)
        yield path
    if (SHARED / "data" / "photos" / "images").is_dir():
        yield from sorted((SHARED / "data" / "photos" / "images").glob("*.jpg"))[::40]


def test_preprocessing_is_clips(tmp_path):
    """Equal to transformers' CLIP processor, which is built here on Pillow alone, as ours is."""
    transformers = pytest.importorskip("transformers")
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:
        Processor = transformers.CLIPImageProcessor
    processor = Processor()
    levels = torch.tensor(CLIP_STD)[:, None, None] * 255
    for path in photos(tmp_path):
        theirs = torch.as_tensor(np.asarray(processor(Image.open(path))["pixel_values"][0]))
        assert ((preprocess(open_photo(path)) - theirs) * levels).abs().max() < 1e-3, path      # of one grey level


def test_transparent_and_turned_photos_as_transformers_sees_them(tmp_path):
    """transformers turns a photo upright when it opens the file itself, and lays it on white when it is given a picture."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 4), dtype=np.uint8), "RGBA")
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        noise.convert("RGB").save(path, exif=exif)
        theirs = torch.as_tensor(np.asarray(processor(str(path))["pixel_values"][0]))
        torch.testing.assert_close(preprocess(open_photo(path)), theirs, rtol=0, atol=1e-5)
    for name, picture in (("rgba", noise), ("la", noise.convert("LA")), ("p", noise.quantize(64))):
        path = tmp_path / f"{name}.png"
        picture.save(path)
        with Image.open(path) as opened:
            theirs = torch.as_tensor(np.asarray(processor(opened)["pixel_values"][0]))
        torch.testing.assert_close(preprocess(open_photo(path)), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [16, 32])
def test_grey_photos_of_more_than_8_bits(tmp_path, depth):
    """16 bits by hand: 0x12FF is 0x12 of 255.  32 bits do not say which value is white."""
    if depth == 16:
        for name in ("x.png", "x.tif"):
            Image.fromarray(np.array([[0, 0x00FF, 0x12FF, 0xFFFF]], dtype=np.uint16)).save(tmp_path / name)
            assert np.asarray(open_photo(tmp_path / name))[0].tolist() == [[0] * 3, [0] * 3, [0x12] * 3, [255] * 3]
    else:
        for mode in ("I", "F"):
            Image.new(mode, (4, 4), 1).save(tmp_path / "x.tif")
            with pytest.raises(UserError, match="32 bits a pixel, and nothing says which value is white"):
                open_photo(tmp_path / "x.tif")


def test_unreadable_exif_does_not_cost_the_photo(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0no TIFF header at all")
    assert open_photo(tmp_path / "x.jpg").size == (40, 40)


@pytest.mark.parametrize("size", [(1, 101), (1010, 10), (7072, 7072)])
def test_strips_and_giants_are_refused(tmp_path, size):
    Image.new("1", size).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="pixels; at most 50,000,000 are read, and sides of at most 1 : 100"):
        open_photo(tmp_path / "x.png")


def test_preprocessing_by_hand():
    image = Image.new("RGB", (448, 224), (255, 0, 128))
    image.paste((0, 0, 0), (0, 0, 112, 224))            # what the crop cuts off
    x = preprocess(image)
    assert x.shape == (3, 224, 224)
    expected = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(vit.CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(x[:, 100, 100], expected)
    torch.testing.assert_close(x[:, :, 3:], expected[:, None, None].expand(3, 224, 221))


def test_a_file_that_is_no_photo_is_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "noise.jpg").write_bytes(b"\xff\xd8\xff" + b"noise" * 30)
    (tmp_path / "._fork.jpg").write_bytes(b"\x00\x05\x16\x07" + bytes(40))
    for name, said in (("page.jpg", "HTML"), ("noise.jpg", "cannot be read as a photo"), ("._fork.jpg", "resource fork")):
        with pytest.raises(UserError, match=said):
            open_photo(tmp_path / name)
