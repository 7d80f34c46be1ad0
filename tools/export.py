"""Export a run as an ordinary Hugging Face LLaMA: its adapters merged, the projector beside it.

    python -m tools.export RUN DIR

Prints how much merging changes the logits.  config.json is written last: a folder without it is no whole
export.
"""

import shutil

import torch

from base import console
from base.checkpoint import check_frozen, save_tensors
from base.console import UserError, parse_flags, read_json, user_path, write_json, write_text
from data import Product, base_question, encode_examples
from evaluate import load_run, run_parser
from llama import official_name


def readme(model, layers, text):
    """How to use the export of a run that saw the [cls] of the ViT's `layers` (none: no photos), and texts or
    not.
    """
    context = "\\nContext: {title}, {category}" if text else ""
    image = project = ""
    if layers:
        image = "image.to(llama.dtype), "
        project = f"""
    # cls: (K, V) = {len(layers), model.projector.gate.in_features}, the [cls] after ViT layer {layers}
    p = safetensors.torch.load_file("projector.safetensors")
    linear = torch.nn.functional.linear
    gate, down = [linear(cls, p[f"{{n}}.weight"], p[f"{{n}}.bias"]) for n in ("gate", "down")]
    image = linear(torch.nn.functional.silu(gate) * down, p["up.weight"], p["up.bias"])     # (K, D)"""
    return f"""An EIVEN run, its adapters merged: an ordinary LLaMA (Hugging Face layout, attention_bias).

    prompt = "Question: What is the {{attribute}} of this product?{context}\\nAnswer:"
    ids = transformers.AutoTokenizer.from_pretrained(".")(prompt, return_tensors="pt").input_ids[0]
    llama = transformers.AutoModelForCausalLM.from_pretrained(".", dtype="auto"){project}
    text = llama.get_input_embeddings()(ids)                     # the first is the begin token
    x = torch.cat([text[:1], {image}text[1:]])
    llama.generate(inputs_embeds=x[None], max_new_tokens=32)
"""


def export(run, folder):
    """Write a run whose adapters are merged into a new or empty folder."""
    model, source = run.model, run.sources.llama
    tensors = {official_name(name): parameter for name, parameter in model.llama.named_parameters()}
    for layer in range(len(model.llama.layers)):        # transformers' attention_bias means o_proj's, too
        prefix = f"model.layers.{layer}.self_attn.o_proj"
        tensors.setdefault(f"{prefix}.bias", torch.zeros_like(tensors[f"{prefix}.weight"][:, 0]))
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    layers = ()
    if model.projector:
        layers = run.photo_features.cls_layers
        save_tensors(folder / "projector.safetensors", dict(model.projector.named_parameters()))
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = model.tokenizer
    # Without this file Hugging Face's tokenizer would not put the begin token first.
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": tokenizer.pieces.id_to_piece(tokenizer.bos_id),
        "eos_token": tokenizer.pieces.id_to_piece(tokenizer.eos_id)})
    write_text(folder / "README.md", readme(model, layers, run.config.text))
    config = read_json(source / "config.json", "LLaMA's config.json")
    config.pop("dtype", None)
    write_json(folder / "config.json", config | {
        "architectures": ["LlamaForCausalLM"], "attention_bias": True,
        "torch_dtype": str(model.llama.embed_tokens.weight.dtype).removeprefix("torch.")})


def main():
    parser = run_parser("Merge a run's adapters, and write an ordinary Hugging Face LLaMA.")
    parser.add_argument("folder", metavar="DIR", type=user_path, help="new or empty folder")
    args = parse_flags(parser)
    if args.folder.exists() and any(args.folder.iterdir()):
        raise UserError(f"{args.folder}: is not empty; name a new folder")
    run, _ = load_run(args)
    model = run.model
    questions = [base_question(Product("", "", "", "", attribute, value))
                 for attribute, values in run.values.items() for value in values]
    batch, _ = encode_examples(questions, model.tokenizer, image=False)
    try:
        with torch.no_grad():
            before = model.answer_logits(batch)
            after = model.merge_adapters().answer_logits(batch)
    except UserError as error:
        raise UserError(f"{args.run}: cannot be merged: {error}") from None
    check_frozen(model.llama, run.sources.llama)        # a NaN would go into every answer of the export
    export(run, args.folder)
    print(f"{args.folder}: merged LLaMA{' and projector' if model.projector else ''} written; the greatest "
          f"difference of logits, merged against unmerged, is {(after - before).abs().max():.2e} (logits to "
          f"{before.abs().max():.0f}; {len(batch)} known values as answers)")


if __name__ == "__main__":
    console.run(main)
