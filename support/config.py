"""The config of a run: its flags, where data and weights come from, device and dtype."""

import argparse
import ctypes
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from adapters import KINDS
from base.console import UserError
from data import STRATEGIES
from demo import world
from eiven import EIVEN
from llama import LLaMA, load_llama, read_config
from support.features import PhotoFeatures

PROJECT = Path(__file__).resolve().parent.parent
DATA, LLAMA, VIT = PROJECT / "data", PROJECT / "weights" / "llama-7b", PROJECT / "weights" / "clip-vit-b-16"
FEATURE_CACHE = PROJECT / "cache" / "features.sqlite"


def positive(kind):
    """A parser of positive numbers for argparse."""
    def parse(text):
        value = kind(text)
        if not value > 0 or value == float("inf"):
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2 ** 63:
        raise ValueError
    return value


def labels(text):
    """--labels: a positive number, or `all`, which is None."""
    return None if text == "all" else positive(int)(text)


not_negative.__name__, labels.__name__ = "number of 0 or more", "positive int or 'all'"
seed.__name__ = "int of 0 or more"


def flag(default, help, **argparse_words):
    return field(default=default, metadata={"help": help, **argparse_words})


@dataclass
class Config:
    """Every flag of a run; the defaults are the paper's.  Saved in the run folder and read by evaluate.py."""

    dataset: str = flag("general", "data set: a folder in ROOT (clothing, footwear, general)")
    labels: int | None = flag(None, "labelled products per attribute value, a number or 'all'", type=labels, metavar="N")
    holdout_values: int = flag(0, "values per attribute kept out of training and val, to be answered unseen (default: none)",
                               type=positive(int), metavar="N")
    data: str | None = flag(None, "folder of data sets and images/ (default: data/, else the demo world)", metavar="ROOT")
    llama: str | None = flag(None, "LLaMA's folder (default: weights/llama-7b/; 'demo': the small one)", metavar="DIR")
    vit: str | None = flag(None, "CLIP ViT's file or folder (default: weights/clip-vit-b-16/; 'demo')", metavar="PATH")
    demo: bool = flag(False, "use the embedded demo world with its small backbones")
    lbc: str = flag("judge_last", "Learning-by-Comparison strategy", choices=STRATEGIES)
    lbc_ratio: float = flag(1.0, "comparisons per product and epoch", type=not_negative, metavar="X")
    features: str = flag("multi", "[cls] of every third ViT layer, or of the last one", choices=("multi", "single"))
    image: bool = flag(True, "leave the photos out", off=True)
    text: bool = flag(True, "leave title and category out", off=True)
    adapter: str = flag("rep", "adapter before each attention", choices=KINDS)
    adapter_dim: int = flag(8, "its rank", type=positive(int), metavar="R")
    projector_dim: int = flag(128, "hidden width of the projector", type=positive(int), metavar="N")
    epochs: int = flag(15, "passes over the labelled products", type=positive(int), metavar="N")
    batch_size: int = flag(32, "examples a step", type=positive(int), metavar="N")
    micro_batch_size: int | None = flag(None, "examples held in memory at once (default: the whole batch)",
                                        type=positive(int), metavar="N")
    lr: float | None = flag(None, "peak learning rate (default: 9e-3 * batch size / 256)", type=positive(float), metavar="X")
    seed: int = flag(0, "seed of everything random", type=seed, metavar="N")
    device: str | None = flag(None, "cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    dtype: str = flag("auto", "of the frozen weights; what is trained is always fp32",
                      choices=("auto", "fp32", "bf16", "fp16"))
    grad_checkpoint: bool = flag(False, "recompute each layer in the backward pass: less memory, more time")
    out: str | None = flag(None, "run folder (default: runs/DATASET-LABELS, numbered)", metavar="RUN")


def add_flags(parser, names=None):
    """Add the flags of Config to a parser.  Flags that the user does not give are not in the parsed result."""
    for f in fields(Config):
        if names and f.name not in names:
            continue
        words = dict(f.metadata)
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0][:100]}); "
                        "cpu always can") from None
    return device


def choose_dtype(name, device, llama):
    """The dtype of the frozen weights, or None for the dtype of their files.

    auto: on a GPU bf16 if its compute capability is 8.0 or more (torch.cuda.is_bf16_supported is also true for emulation),
    else fp16; on a CPU fp32 if that takes at most 60 % of the memory, else the dtype of the files.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaMA(read_config(llama / "config.json")).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")           # the limit of a container
    if limit.exists() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    return torch.float32 if 4 * parameters <= 0.6 * memory else None


def keep_freed_memory():
    """Let glibc keep large blocks after they are freed, for the next tensor; otherwise each tensor gets new pages from the
    system.  Saves 5 % of a CPU training step of a 135M LLaMA.  Without glibc it does nothing."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)        # M_MMAP_THRESHOLD: smaller blocks are not mapped one by one
    mallopt(-1, 2 ** 31 - 1)                            # M_TRIM_THRESHOLD: the heap's free end is not given back


def build_model(config, sources, device):
    """(EIVEN with fresh adapters, PhotoFeatures or None) as the config says."""
    keep_freed_memory()
    photo_features = None
    if config.image:
        photo_features = PhotoFeatures(FEATURE_CACHE, sources.vit, sources.data / "images",
                                       config.features == "single", device)
    llama, tokenizer = load_llama(sources.llama, choose_dtype(config.dtype, device, sources.llama), device)
    llama.grad_checkpoint = config.grad_checkpoint
    torch.manual_seed(config.seed)                      # the initial values of adapters and projector
    try:
        model = EIVEN(llama, tokenizer, photo_features.width if photo_features else None,
                      config.adapter, config.adapter_dim, config.projector_dim)
    except ValueError as error:
        raise UserError(f"--adapter-dim {config.adapter_dim}: {error}") from None
    return model, photo_features
