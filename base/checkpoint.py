"""Reading configs and weight files strictly: memory-mapped, not copied; whatever does not fit is named in the error.

A wrong weight file rarely fails by itself; the model then gives fluent, wrong answers.  So all weights go through
`load_strict`: it requires every tensor of the model, no others, and each in its shape.  What was trained goes through
`restore`, and every field that is read from a JSON file through `check_fields`.
"""

import ctypes
import hashlib
import json
import mmap
import reprlib
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from base.console import Progress, UserError, first_line, whole_file
from base.frozen_ops import quantize

BROKEN = "Download it again (a browser or git without LFS leaves such files)."
JSON_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}


def what_is(path):
    """What a file really is, in a few words, if it is not what its name says; else None.

    Failed downloads leave git-LFS pointers, HTML error pages or macOS resource forks instead of weights and photos.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer: a text of three lines where the real file should be"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "an HTML or XML page, such as a server sends with an error"
    if head.startswith(b"\x00\x05\x16\x07"):
        return "a macOS resource fork (`._` file), not the file itself"
    if text.startswith((b'{"error', b"entry not found", b"access to model")):
        return "a server's error message"
    return None


def check_file(path, kind):
    """UserError if `path` does not exist or is something else; kind says what it should be ("LLaMA weights")."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: not found; {kind} should be there")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise UserError(f"{path}: is {what}, but {kind} should be an ordinary file")
    impostor = what_is(path)
    if impostor:
        raise UserError(f"{path}: should be {kind}, but is {impostor}. {BROKEN}")


def read_json(path, kind):
    """A JSON object from a file, or a UserError that names file and line."""
    check_file(path, kind)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {kind} should be JSON, but the file is not text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {kind} is not valid JSON: {error.msg}. {BROKEN}") from None
    except (ValueError, RecursionError) as error:       # a number of more than 4,300 digits; brackets nested too deeply
        raise UserError(f"{path}: {kind} cannot be read as JSON ({first_line(error)}). {BROKEN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {kind} should be a JSON object, but is a {type(value).__name__}")
    return value


def check_fields(record, table, where):
    """{name: value} of the fields in `table`, from a JSON object.  Other fields of the object are ignored.

    table   {name: (type, allowed, default)}.  allowed: (least, greatest) of a number, a tuple of values for other types
            (none: only null), or None for any value.  A field without a default must be there; null counts as absent.
    where   the start of an error: the file
    Errors  UserError for the first field that is absent, of another type, or not allowed
    """
    found = {}
    for name, (kind, allowed, *default) in table.items():
        value, number = record.get(name), allowed and kind in (int, float)
        if value is None:
            if not default:
                raise UserError(f"{where}: has no {name!r}, which must be there")
            found[name] = default[0]
            continue
        fits = type(value) is kind or (kind is float and type(value) is int)
        if fits and allowed is not None:                # a NaN fits nowhere
            fits = allowed[0] <= value <= allowed[1] if number else value in allowed
        if not fits:
            if allowed is None:
                fine = f"must be {JSON_NAMES[kind]}"
            elif number:
                fine = f"must be a {'whole ' if kind is int else ''}number from {allowed[0]:,} to {allowed[1]:,}"
            else:
                fine = f"only {' or '.join(map(repr, allowed)) or 'null'} is supported"
            raise UserError(f"{where}: {name} is {reprlib.repr(value)}, but {fine}")
        found[name] = value
    return found


def shard_files(folder, kind):
    """The safetensors files of a model folder: the one model.safetensors, or those that the index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".gguf"))
            found = f" It holds {', '.join(others[:3])}, which is another format." if others else ""
            raise UserError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json "
                            f"({kind} in the Hugging Face layout).{found}")
        return [single]
    names = check_fields(read_json(index, f"the index of {kind}"), {"weight_map": (dict, None)}, index)["weight_map"]
    shards = sorted({str(name) for name in names.values()})
    if any(Path(name).name != name for name in shards):
        raise UserError(f"{index}: names files outside its own folder: {shards[:3]}")
    absent = [name for name in shards if not (folder / name).exists()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of the {len(shards)} files named in {index.name} are absent: "
                        f"{', '.join(absent[:4])}. Finish the download.")
    return [folder / name for name in shards]


def map_safetensors(path, kind):
    """{name: tensor} of one safetensors file.  The tensors are mapped: no byte is read before it is used."""
    check_file(path, kind)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); it has {Path(path).stat().st_size:,} "
                        f"bytes. A download that was cut short looks like this: fetch it again.") from None


@contextmanager
def tensor_file(path):
    """whole_file for torch.save and safetensors' save_file: their own errors of a full disk become a UserError."""
    with whole_file(path) as partial:
        try:
            yield partial
        except (SafetensorError, RuntimeError) as error:        # RuntimeError: of torch's writer
            raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0][:160]}). Is the disk full?") from None


def read_state_dict(path, kind):
    """{name: tensor} of a safetensors file, or of a pickled state dict (.bin, .pt), which is read with weights_only."""
    if path.suffix == ".safetensors":
        return map_safetensors(path, kind)
    check_file(path, kind)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:                          # torch raises many kinds of errors for a broken file
        raise UserError(f"{path}: is not a whole PyTorch state dict ({first_line(error)}); OpenAI's own .pt archive is "
                        "TorchScript and is not supported: use the safetensors or pytorch_model.bin") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path}: holds something other than a dict of tensors")
    return tensors


def sample_digest(paths):
    """A short hash that identifies weights without reading gigabytes: the size of each file, and 64 evenly spread pieces of
    16 kB; small files are read completely."""
    digest, pieces, piece = hashlib.sha256(), 64, 1 << 14
    for path in paths:
        size = Path(path).stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with open(path, "rb") as file:
            for place in range(0, size, max(piece, size // pieces)):
                file.seek(place)
                digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def load_strict(module, tensors, where, names=lambda name: name, dtype=None, device=None, int8=()):
    """Replace the parameters of `module`, which may be on the meta device, by `tensors`.

    tensors  {official name: tensor}; emptied on the way, so a mapped tensor that is converted is freed before the next
             one is read
    names    maps a parameter's name in `module` to its official name
    dtype    of the parameters; None keeps the file's
    int8     kinds of modules whose `weight` becomes int8, and their `scale` fp32 (base.frozen_ops.quantize)
    Errors   UserError that lists what is missing, unexpected, of another shape, or not floating-point
    """
    wanted = {names(name): (name, parameter) for name, parameter in module.named_parameters()}
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    shapes = [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
              for name, (_, parameter) in wanted.items() if name in tensors and tensors[name].shape != parameter.shape]
    integers = [f"{name} is {tensors[name].dtype}" for name in wanted
                if name in tensors and tensors[name].dtype not in (torch.float16, torch.bfloat16, torch.float32)]
    problems = []
    for what, found in (("missing", missing), ("unexpected", extra), ("of another shape", shapes),
                        ("not of fp16, bf16 or fp32", integers)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            problems.append(f"{len(found)} {what}: {'; '.join(found[:3])}{more}")
    if problems:
        raise UserError(f"{where}: the tensors do not fit the model that its sizes describe: " + " | ".join(problems))
    mappings = file_mappings()
    with Progress("loading", len(wanted), "tensors") as progress:
        for official, (name, _) in wanted.items():
            owner, _, leaf = name.rpartition(".")
            owner, tensor = module.get_submodule(owner), tensors.pop(official)
            if leaf == "weight" and isinstance(owner, int8):
                kept, scale = quantize(tensor.to(device))
                owner.scale = torch.nn.Parameter(scale, requires_grad=False)
            else:
                kept = tensor.to(device=device, dtype=dtype)
            if kept is not tensor:
                forget_pages(tensor, mappings)
            setattr(owner, leaf, torch.nn.Parameter(kept, requires_grad=False))
            progress.step()


def file_mappings():
    """[(start, end)]: the addresses in this process that files are mapped to; [] on a system that does not list them."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    return [tuple(int(x, 16) for x in addresses.split("-")) for addresses, _, _, _, inode, *_ in lines if inode != "0"]


def forget_pages(tensor, mappings):
    """Give back the pages of a mapped tensor, without waiting for the rest of its file.  Read again, they come back.

    Otherwise all pages that were read stay part of this process's memory while any tensor of the file is in use.
    """
    page, start, end = mmap.PAGESIZE, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if any(low <= start and end <= high for low, high in mappings):     # memory that is no file's would be lost
        start = start // page * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def restore(parameters, tensors, where, hint):
    """Copy `tensors` into trained `parameters`, both {name: tensor}.

    where, hint  the start and the end of an error: the file, and what to do
    Errors       UserError if names or shapes differ or a value is not finite.  Nothing was copied then.
    """
    wrong = [f"{name} is {shape_of(tensors, name)} in the file and {shape_of(parameters, name)} in the model"
             for name in sorted(parameters.keys() | tensors.keys()) if shape_of(tensors, name) != shape_of(parameters, name)]
    if wrong:
        raise UserError(f"{where}: does not fit this model in {len(wrong)} tensors: {wrong[0]}; {hint}")
    broken = not_finite(tensors)
    if broken:
        raise UserError(f"{where}: {broken} holds NaN or infinity; {hint}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def shape_of(tensors, name):
    """The shape of a tensor as a tuple, "absent", or the type of what is not a floating-point tensor."""
    value = tensors.get(name, "absent")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value if value == "absent" else str(getattr(value, "dtype", type(value).__name__))
    return tuple(value.shape)


def not_finite(tensors):
    """The name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def check_frozen(module, where):
    """UserError if a frozen weight of `module` is NaN or infinite: called once a loss or logits are, to name the reason."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    # A DTensor is part of a weight that several processes share (--shard); each checks its own rows.
    broken = not_finite({name: p.to_local() if hasattr(p, "to_local") else p for name, p in frozen.items()})
    if broken:
        raise UserError(f"{where}: the weights are damaged: {broken} holds NaN or infinity; download them again, or take others")
