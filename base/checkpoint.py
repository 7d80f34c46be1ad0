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

from base.console import Progress, UserError, read_json, reading, whole_file
from base.linear import quantize


def shard_files(folder, what):
    """The safetensors files of a folder in the Hugging Face layout: model.safetensors, or the shards that
    its index names.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index, f"the index of {what}")
    with reading(index, f"the index of {what}"):
        shards = sorted(set(weight_map["weight_map"].values()))
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise ValueError(f"it names {outside[0]!r}, which is not in its own folder")
    return [folder / name for name in shards]


def open_tensors(path, what, run_id=None):
    """{name: tensor} of a safetensors file.  The tensors are mapped: a byte is read when it is used.

    run_id  which the file's metadata must hold, or None
    """
    with reading(path, what), safe_open(path, framework="pt") as file:
        check_run((file.metadata() or {}).get("run"), run_id)
        return {name: file.get_tensor(name) for name in file.keys()}


def check_run(found, run_id):
    """ValueError if the run id found in a file is not that of the run whose folder it is in; None: any will
    do.
    """
    if run_id is not None and found is None:
        raise ValueError("it does not say which run it is of: an older version wrote it; train again")
    if run_id is not None and found != run_id:
        raise ValueError("it is of another run than the config.json beside it; put the right file back")


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
    parameters = {names(name): (name, parameter.shape) for name, parameter in module.named_parameters()}
    problems = [f"{name} is missing" for name in parameters if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in parameters]
    for name, (_, shape) in parameters.items():
        tensor = tensors.get(name)
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in FLOATS):
            problems.append(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shape)} "
                            "of fp16, bf16 or fp32")
    if problems:
        raise UserError(f"{where}: {len(problems)} tensors do not fit the model that the config describes: "
                        f"{'; '.join(problems[:3])}. Are config and weights of the same model?")
    with Progress("loading", len(parameters), "tensors") as progress:
        for official, (name, _) in parameters.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            tensor = tensors.pop(official)
            if leaf == "weight" and isinstance(owner, int8):
                tensor, scale = quantize(tensor.to(device))
                owner.scale = nn.Parameter(scale, requires_grad=False)
            else:
                tensor = tensor.to(device=device, dtype=dtype)
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
            progress.step()


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def restore(parameters, tensors, where):
    """Copy `tensors` into the trained `parameters`, both {name: tensor}.

    Errors  UserError if names or shapes differ, or a value is not finite.  Nothing was copied then.
    """
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differ = sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name))
    if differ:
        name = differ[0]
        raise UserError(f"{where}: does not fit this model in {len(differ)} tensors: {name} is "
                        f"{shapes.get(name, 'absent')} here and {expected.get(name, 'absent')} in the model. "
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
