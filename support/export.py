"""Export a trained run as an ordinary Hugging Face LLaMA: adapters merged, the projector beside it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from base.checkpoint import check_frozen, tensor_file
from base.console import UserError, whole_file, write_text
from data import base_question, encode_examples, read_split
from llama import official_name
from support.answering import prepare_photos

SHARD_BYTES = 5_000_000_000                             # of one safetensors file


def export_readme(model, layers, text):
    """How to use an export: of a run that saw the [cls] of the ViT layers `layers` (none: no photos), and texts or not."""
    context = "\\nContext: {title}, {category}" if text else ""
    lines = ["An EIVEN run, its adapters merged: an ordinary LLaMA (Hugging Face layout, attention_bias)"
             + (" and its projector." if layers else "."),
             f'Prompt: "Question: What is the {{attribute}} of this product?{context}\\nAnswer:", behind the begin token',
             "", '    llama = transformers.AutoModelForCausalLM.from_pretrained(".", dtype="auto")']
    if layers:
        lines += ['    p = safetensors.torch.load_file("projector.safetensors")',
                  f"    # cls: (K, V) = {len(layers), model.projector.gate.in_features}, the [cls] after ViT layer "
                  + ", ".join(map(str, layers)),
                  "    linear = torch.nn.functional.linear",
                  '    gate, down = [linear(cls, p[f"{n}.weight"], p[f"{n}.bias"]) for n in ("gate", "down")]',
                  '    image = linear(torch.nn.functional.silu(gate) * down, p["up.weight"], p["up.bias"])     # (K, D)']
    image = "image.to(llama.dtype), " if layers else ""
    return "\n".join(lines + [
        "    text = llama.get_input_embeddings()                          # ids: the begin token, then the prompt's",
        f"    x = torch.cat([text(ids[:1]), {image}text(ids[1:])])",
        "    llama.generate(inputs_embeds=x[None], max_new_tokens=32)", ""])


def export(model, llama_folder, out, readme):
    """Write a merged model to the new folder `out` as an ordinary Hugging Face LLaMA, and the projector beside it.

    model   its adapters are merged already
    readme  the text of export_readme
    Files   config.json (the source's, with attention_bias), tokenizer.model, safetensors in shards of 5 GB with an index,
            projector.safetensors, README.md.  Either the whole folder appears or nothing.
    """
    out, llama_folder = Path(out), Path(llama_folder)
    if out.exists():
        raise UserError(f"--export {out}: exists already; name a folder that does not")
    tensors = {official_name(name): p.detach().cpu() for name, p in model.llama.named_parameters()}
    for i in range(model.llama.config.num_hidden_layers):       # transformers' attention_bias means o_proj's, too
        weight = tensors[f"model.layers.{i}.self_attn.o_proj.weight"]
        tensors.setdefault(f"model.layers.{i}.self_attn.o_proj.bias", torch.zeros(len(weight), dtype=weight.dtype))
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards, size = shards + [{}], 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    config = json.loads((llama_folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(model.llama.embed_tokens.weight.dtype).removeprefix("torch.")
    config |= {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "torch_dtype": dtype}
    config.pop("dtype", None)
    with whole_file(out) as folder:
        folder.mkdir()
        for name, shard in zip(names, shards):
            with tensor_file(folder / name) as file:
                save_file(shard, file, metadata={"format": "pt"})
        if len(shards) > 1:
            write_text(folder / "model.safetensors.index.json", json.dumps({
                "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}}, indent=2) + "\n")
        if model.projector is not None:
            with tensor_file(folder / "projector.safetensors") as file:
                save_file({n: p.detach().cpu().contiguous() for n, p in model.projector.named_parameters()}, file)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        shutil.copyfile(llama_folder / "tokenizer.model", folder / "tokenizer.model")
        write_text(folder / "README.md", readme)


def export_run(run, out):
    """Merge, write the folder `out`, and print how much merging changes the logits of answers to test products."""
    if out.exists():
        raise UserError(f"--export {out}: exists already; name a folder that does not")
    products = read_split(run.sources.data, run.config.dataset, "test")[:32]
    prepare_photos(run, products)
    batch, photos = encode_examples([base_question(p, run.config.text) for p in products], run.model.tokenizer, run.config.image)
    cls_tokens = run.photo_features.read(photos, run.model.device) if run.photo_features else None
    with torch.no_grad():
        before = run.model.answer_logits(batch, cls_tokens)
        after = run.model.merge_adapters().answer_logits(batch, cls_tokens)
    check_frozen(run.model.llama, run.sources.llama)    # merged: a NaN would go into every answer of the exported model
    layers = run.photo_features.cls_layers if run.photo_features else ()
    export(run.model, run.sources.llama, out, export_readme(run.model, layers, run.config.text))
    print(f"{out}: merged LLaMA{' and projector' if layers else ''} written; the greatest difference of logits, merged "
          f"against unmerged, is {(after - before).abs().max():.2e} (logits to {before.abs().max():.0f}; answers to "
          f"{len(batch)} test products)")
