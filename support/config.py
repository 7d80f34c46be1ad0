"""The config of a run: its flags, where data and weights come from, device and dtype."""

import argparse
import ctypes
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from adapters import KINDS
from base.console import UserError, cache_folder, first_line
from data import STRATEGIES
from demo import world
from eiven import EIVEN
from llama import LLaMA, load_llama, read_config
from support import processes
from support.features import PhotoFeatures

PROJECT = Path(__file__).resolve().parent.parent
DATA, LLAMA, VIT = PROJECT / "data", PROJECT / "weights" / "llama-7b", PROJECT / "weights" / "clip-vit-b-16"
FEATURE_CACHE = cache_folder() / "features.sqlite"


def number(kind, least, greatest, word=None):
    """A parser for argparse: a number from `least` to `greatest`, or `word`, which is None."""
    def parse(text):
        try:
            value = None if text == word else kind(text)
            if value is None or least <= value <= greatest:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a {'whole ' if kind is int else ''}number from {least:,} to {greatest:,}"
                                         f"{f' or {word!r}' if word else ''}, but is {text[:40]!r}")
    return parse


def utf8_text(text):
    """A parser for argparse: a text without bytes that are no UTF-8, since files and tokenizers cannot hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, but is {text[:40]!r}") from None
    return text


def flag(default, help, allowed=None, **argparse_words):
    """A field of Config.  allowed: (least, greatest) of a number, or the texts to choose from."""
    return field(default=default, metadata={"help": help, "allowed": allowed, **argparse_words})


@dataclass
class Config:
    """Every flag of a run; the defaults are the paper's, or LaVIN's where it gives none.  Saved with the run, read by evaluate.py."""

    dataset: str = flag("general", "data set: a folder in ROOT (clothing, footwear, general)", type=utf8_text)
    labels: int | None = flag(None, "labelled products per attribute value, a number or 'all' (default: all)", (1, 10 ** 9), metavar="N")
    holdout_values: int = flag(0, "values per attribute kept out of training and val, to be answered unseen (default: none)",
                               (0, 10 ** 6), metavar="N")
    data: str | None = flag(None, "folder of data sets and images/ (default: data/, else the demo world)", metavar="ROOT")
    llama: str | None = flag(None, "LLaMA's folder (default: weights/llama-7b/; 'demo': the small one)", metavar="DIR")
    vit: str | None = flag(None, "CLIP ViT's file or folder (default: weights/clip-vit-b-16/; 'demo')", metavar="PATH")
    demo: bool = flag(False, "use the embedded demo world with its small backbones")
    lbc: str = flag("judge_last", "Learning-by-Comparison strategy", STRATEGIES)
    lbc_ratio: float = flag(1.0, "comparisons per product and epoch", (0, 100), metavar="X")
    features: str = flag("multi", "[cls] of every third ViT layer, or of the last one", ("multi", "single"))
    image: bool = flag(True, "leave the photos out", off=True)
    text: bool = flag(True, "leave title and category out", off=True)
    adapter: str = flag("rep", "adapter before each attention", KINDS)
    adapter_dim: int = flag(8, "its rank", (1, 4096), metavar="R")
    projector_dim: int = flag(128, "hidden width of the projector", (1, 65536), metavar="N")
    epochs: int = flag(15, "passes over the labelled products", (1, 10 ** 6), metavar="N")
    batch_size: int = flag(32, "examples a step", (1, 65536), metavar="N")
    micro_batch_size: int | None = flag(None, "examples held in memory at once (default: the whole batch)", (1, 65536),
                                        metavar="N")
    lr: float | None = flag(None, "peak learning rate (default: 9e-3 * batch size / 256)", (1e-12, 100), metavar="X")
    seed: int = flag(0, "seed of everything random", (0, 2 ** 63 - 1), metavar="N")
    device: str | None = flag(None, "cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    dtype: str = flag("auto", "of the frozen weights (int8: LLaMA's matrices, in 7 GB at 7B); what is trained is always fp32",
                      ("auto", "fp32", "bf16", "fp16", "int8"))
    threads: int | None = flag(None, "CPU threads (default: measured at the start)", (1, 1024), metavar="N")
    grad_checkpoint: bool = flag(False, "recompute each layer in the backward pass: less memory, more time")
    shard: bool = flag(False, "spread LLaMA's layers over the processes of torchrun, for GPUs that cannot hold it")
    out: str | None = flag(None, "run folder (default: runs/DATASET-LABELS, numbered)", metavar="RUN")


def kind_of(f):
    """The type of a field of Config: int of `int | None`."""
    return (get_args(f.type) or (f.type,))[0]


# What a run's config.json may say, for base.checkpoint.check_fields: the same as its flags.
FIELDS = {f.name: (kind_of(f), f.metadata["allowed"], *([None] if get_args(f.type) else [])) for f in fields(Config)}


def add_flags(parser, names=None):
    """Add the flags of Config to a parser.  Flags that the user does not give are not in the parsed result."""
    for f in fields(Config):
        if names and f.name not in names:
            continue
        words = dict(f.metadata)
        allowed = words.pop("allowed")
        if kind_of(f) in (int, float):
            words["type"] = number(kind_of(f), *allowed, word="all" if f.name == "labels" else None)
        elif allowed:
            words["choices"] = allowed
        name = "--" + f.name.replace("_", "-")
        if words.pop("off", False):
            parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false",
                                default=argparse.SUPPRESS, help=words["help"])
        elif f.type is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=words["help"])
        else:
            shown = "" if f.default is None or "default" in words["help"] else f" (default: {f.default})"
            words["help"] = (words["help"] + shown).replace("%", "%%")
            parser.add_argument(name, default=argparse.SUPPRESS, **words)


# ------------------------------------------------------------------------------------------------ data and weights


class Sources(NamedTuple):
    """Folders and files that a run reads.  vit is None without photos."""

    data: Path
    llama: Path
    vit: Path | None


def find_sources(config, data_needed=True):
    """Sources: a path given wins, then the project's own folders, then the demo world.

    The demo world is used if nothing is given and nothing is there, with --demo, or by the name `demo`.  Real and demo
    data are never mixed unless you ask for it.  What was found is written into the config, so the run keeps using it.
    data_needed  whether anything will be read from the data's folder
    """
    nothing = not (config.data or config.llama or config.vit or DATA.exists() or LLAMA.exists() or VIT.exists())
    config.demo = config.demo or nothing
    if config.demo:
        config.llama, config.vit = config.llama or "demo", config.vit or "demo"
    sources = []
    for name, default, small, what, how in (
            ("data", DATA, None, "the data sets", "build or import them with python -m dataset (docs/data.md)"),
            ("llama", LLAMA, world.LLAMA, "LLaMA-7B's weights", "put them there (see README), or name another folder, "
                                                               "or take the small demo one with --llama demo"),
            ("vit", VIT, world.VIT, "CLIP ViT-B/16's weights", "put them there (see README), or name another folder, or "
                                                              "take the demo one with --vit demo, or leave photos out "
                                                              "with --no-image")):
        given = getattr(config, name)
        if name == "vit" and not config.image:
            sources.append(None)
        elif given == "demo" and small:
            sources.append(small)
        elif name == "data" and config.demo and not given:
            with processes.one_first():
                sources.append(world.write_dataset())
        else:
            path = Path(given or default)
            if not path.exists() and (data_needed or name != "data"):
                raise UserError(f"--{name}: {what} should be in {path}, which does not exist; {how}. "
                                "Everything from the demo world: --demo")
            sources.append(path.resolve())
            setattr(config, name, str(path.resolve()))
    return Sources(*sources)


def describe(config, sources):
    """The first line that a run prints: which data and which weights it uses."""
    data, llama, vit = f"data {sources.data}", f"LLaMA {sources.llama}", f"ViT {sources.vit}"
    if config.demo and not config.data:
        data = "DEMO WORLD (drawn products)"
    if sources.llama == world.LLAMA:
        llama = "DEMO LLaMA"
    if sources.vit is None:
        vit = "no photos"
    elif sources.vit == world.VIT:
        vit = "DEMO ViT"
    warning = "  These figures are not the paper's." if "DEMO" in data + llama + vit else ""
    return f"{data}, data set {config.dataset}; {llama}; {vit}.{warning}"


def choose_device(name):
    """torch.device by name, or the GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()            # a number that comes back: the meta device keeps none
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name}: cannot be used here ({first_line(error)}); cpu always can") from None
    here, gpus = processes.size_here(), torch.cuda.device_count()
    if device.type == "cuda" and here > gpus:
        raise UserError(f"--device {device}: torchrun started {here} processes on this machine, but it has {gpus} GPU(s); start one "
                        "for each GPU, or take --device cpu")
    return device


def choose_dtype(name, device, llama):
    """The dtype of the frozen weights, or None for the dtype of their files.  With int8: of those that stay unquantised.

    auto: on a GPU bf16 if its compute capability is 8.0 or more (torch.cuda.is_bf16_supported is also true for emulation),
    else fp16; on a CPU fp32 if that takes at most 60 % of the memory, else the dtype of the files.
    """
    if name in ("fp32", "bf16", "fp16"):
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name == "int8":
        return None
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaMA(read_config(llama / "config.json")).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")           # the limit of a container
    if limit.exists() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    return torch.float32 if 4 * parameters <= 0.6 * memory else None


def keep_freed_memory(keep=True):
    """Let glibc keep large blocks after they are freed, for the next tensor; otherwise each tensor gets new pages from the
    system.  Saves 5 % of a CPU training step of a 135M LLaMA.  Without glibc it does nothing.

    keep  False, for --shard: give them back at once.  Otherwise the gathered layers leave holes, as large as the whole model.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if not keep:
        mallopt(-3, 1 << 20)                            # M_MMAP_THRESHOLD: larger blocks are mapped one by one
        return
    mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)
    mallopt(-1, 2 ** 31 - 1)                            # M_TRIM_THRESHOLD: the heap's free end is not given back


def build_model(config, sources, device, feature_cache=True):
    """(EIVEN with fresh adapters, PhotoFeatures or None) as the config says."""
    keep_freed_memory(not config.shard)
    photo_features = None
    if config.image:
        photo_features = PhotoFeatures(FEATURE_CACHE if feature_cache else None, sources.vit, sources.data / "images",
                                       config.features == "single", device)
    load = processes.load_shard if config.shard else load_llama
    llama, tokenizer = load(sources.llama, choose_dtype(config.dtype, device, sources.llama), device, int8=config.dtype == "int8")
    llama.grad_checkpoint = config.grad_checkpoint
    torch.manual_seed(config.seed)                      # the initial values of adapters and projector
    try:
        model = EIVEN(llama, tokenizer, photo_features.width if photo_features else None,
                      config.adapter, config.adapter_dim, config.projector_dim)
    except ValueError as error:
        raise UserError(f"--adapter-dim {config.adapter_dim}: {error}") from None
    return model, photo_features
