"""Weight files: read strictly, so that whatever does not fit is named in the error; written whole.

A wrong weight file rarely fails by itself: the model then gives fluent, wrong answers.  So all pretrained
weights go through `load_strict`, and all that was trained goes through `restore`.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from base.console import Progress, UserError, reading, reading_json, whole_file
from base.linear import quantize


def shard_files(folder):
    """The safetensors files of a folder in the Hugging Face layout: model.safetensors, or the shards that
    its index names (in its own folder, whatever path it gives).
    """
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return [folder / "model.safetensors"]
    with reading_json(path, "the index of LLaMA's weights") as index:
        names = {Path(name).name for name in index["weight_map"].values()}
        return [folder / name for name in sorted(names)]


def open_tensors(path, what, run_id=None):
    """{name: tensor} of a safetensors file.  The tensors are mapped: a byte is read when it is used.

    run_id  which the file's metadata must hold, or None
    """
    with reading(path, what), safe_open(path, framework="pt") as file:
        if run_id:
            check_run((file.metadata() or {}).get("run"), run_id)
        return {name: file.get_tensor(name) for name in file.keys()}


def check_run(found, run_id):
    """ValueError if the run id found in a file is not that of the run whose folder it is in."""
    if found != run_id:
        raise ValueError("it is of another run than the config.json beside it, or of an older version; put "
                         "the right file back, or train again")


def read_state_dict(path, what):
    """{name: tensor} of a safetensors file, or of a pickled state dict (.bin, .pt), which is read with
    weights_only.
    """
    if path.suffix == ".safetensors":
        return open_tensors(path, what)
    with reading(path, f"{what}, a PyTorch state dict"):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError("it holds something other than tensors")
        return tensors


def load_strict(module, tensors, where, names=lambda name: name, dtype=None, device=None, int8=()):
    """Replace the parameters of `module`, which may be on the meta device, by `tensors`, one at a time.

    tensors  {official name: tensor}; emptied on the way, so that each is given back before the next is read
    names    maps a parameter's name in `module` to its official name
    dtype    of the parameters; None keeps the file's
    int8     kinds of modules whose `weight` becomes int8, with an fp32 `scale` (base/linear.py)
    Errors   UserError that names tensors that are missing, unexpected, of another shape, or not
             floating-point
    """
    parameters = dict(module.named_parameters())
    problems = differences({names(name): parameter for name, parameter in parameters.items()}, tensors)
    problems += [f"{name} is {tensor.dtype}, expected fp16, bf16 or fp32"
                 for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if problems:
        raise UserError(f"{where}: {len(problems)} tensors do not fit the model that the config describes: "
                        f"{'; '.join(problems[:3])}. Are config and weights of the same model?")
    with Progress("loading", len(parameters), "tensors") as progress:
        for name in parameters:
            owner_name, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            tensor = tensors.pop(names(name))
            if leaf == "weight" and isinstance(owner, int8):
                tensor, scale = quantize(tensor.to(device))
                owner.scale = nn.Parameter(scale, requires_grad=False)
            else:
                tensor = tensor.to(device=device, dtype=dtype)
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
            progress.step()


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def differences(parameters, tensors):
    """What differs in the names and shapes of {name: parameter} and {name: tensor}, as a list of texts."""
    model = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return [f"{name} is {here.get(name, 'absent')} here and {model.get(name, 'absent')} in the model"
            for name in model | here if here.get(name) != model.get(name)]


def restore(parameters, tensors, where):
    """Copy `tensors` into the trained `parameters`, both {name: tensor}.

    Errors  UserError if names or shapes differ, or a value is not finite.  Nothing was copied then.
    """
    problems = differences(parameters, tensors)
    if problems:
        raise UserError(f"{where}: does not fit this model in {len(problems)} tensors: {problems[0]}. "
                        "Was it trained with another LLaMA, ViT or adapter?")
    check_finite(tensors, where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_finite(tensors, where):
    """UserError if one of the tensors holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: is damaged: {name} holds NaN or infinity. Download or save it again.")


def check_frozen(module, where):
    """UserError if a frozen weight is not finite: called when a loss or logits are not, to name the
    reason.
    """
    check_finite({name: p for name, p in module.named_parameters() if not p.requires_grad}, where)


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as one whole safetensors file.  metadata: {name: text}"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata)


def fingerprint(paths):
    """A short hash that identifies weight files without reading gigabytes: the size of each, and 64
    pieces of 16 kB.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with open(path, "rb") as file:
            for position in range(0, size, max(1 << 14, size // 64)):
                file.seek(position)
                digest.update(file.read(1 << 14))
    return digest.hexdigest()[:16]
