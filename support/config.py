"""The config of a run: its flags, where data and weights come from, device, dtype and threads."""

import argparse
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch.utils.benchmark import Timer

from adapters import KINDS
from base.console import PROJECT, UserError, reason
from data import STRATEGIES
from demo import world
from eiven import EIVEN
from llama import LLaMA, load_llama, read_config
from support import processes
from support.features import PhotoFeatures

DATA = PROJECT / "data"
LLAMA = PROJECT / "weights" / "llama-7b"
VIT = PROJECT / "weights" / "clip-vit-b-16"
# Flags of a run that need not be those of its training: it may be used on another machine.
MACHINE = ("data", "llama", "vit", "device", "dtype", "threads")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---------------------------------------------------------------------------------------- flags


def number(kind, least, greatest, word=None):
    """A type for argparse: an int or float from `least` to `greatest`, or `word`, which becomes None."""
    def parse(text):
        if text == word:
            return None
        with suppress(ValueError):
            if least <= (value := kind(text)) <= greatest:
                return value
        allowed = f"a {'whole ' if kind is int else ''}number from {least:,} to {greatest:,}"
        allowed += f" or {word!r}" if word else ""
        raise argparse.ArgumentTypeError(f"must be {allowed}, but is {text[:40]!r}")
    return parse


def flag(default, help, allowed=None, **words):
    """A field of Config.

    allowed  (least, greatest) of a number, or the texts to choose from
    words    for argparse; but group is the (title, description) of the group in --help that begins here
    """
    return field(default=default, metadata={"help": help, "allowed": allowed, **words})


def path_flag(help, metavar):
    return flag(None, help, metavar=metavar, type=os.path.expanduser)  # a shell leaves --out=~/x as it is


@dataclass
class Config:
    """Every flag of a run; the defaults are the paper's, or LaVIN's where it gives none.  Saved with the
    run.
    """

    dataset: str = flag("general", "data set: a folder in ROOT (clothing, footwear, general)",
                        group=("data and weights", "e.g. python train.py --data shop --dataset dresses"))
    labels: int | None = flag(None, "labelled products per attribute value, a number or 'all' (default: all)",
                              (1, 1_000_000_000))
    holdout_values: int = flag(0, "values per attribute kept out of training and val, to be answered unseen",
                               (0, 1_000_000))
    data: str | None = path_flag("folder of data sets and images/ (default: data/, else the demo)", "ROOT")
    llama: str | None = path_flag("LLaMA's folder (default: weights/llama-7b/; 'demo': the small one)", "DIR")
    vit: str | None = path_flag("CLIP ViT's file or folder (default: weights/clip-vit-b-16/; 'demo')", "PATH")
    demo: bool = flag(False, "use the embedded demo world with its small backbones")
    features: str = flag("multi", "[cls] of every third ViT layer, or of the last one", ("multi", "single"),
                         group=("model", "e.g. python train.py --adapter mlp-linear --no-text"))
    skip_missing_photos: bool = flag(False, "leave out products without a photo (else: an error)")
    image: bool = flag(True, "leave the photos out")
    text: bool = flag(True, "leave title and category out")
    adapter: str = flag("rep", "adapter before each attention", KINDS)
    adapter_dim: int = flag(8, "its rank", (1, 4096))
    projector_dim: int = flag(128, "hidden width of the projector", (1, 65536))
    lbc: str = flag("judge_last", "Learning-by-Comparison strategy", STRATEGIES,
                    group=("training", "e.g. python train.py --init runs/dresses-all-1 --epochs 5"))
    lbc_ratio: float = flag(1.0, "comparisons per product and epoch", (0, 100))
    init: str | None = path_flag("begin with the adapters and projector of this run (default: new)", "RUN")
    epochs: int = flag(15, "passes over the labelled products", (1, 1_000_000))
    batch_size: int = flag(32, "examples a step", (1, 65536))
    lr: float | None = flag(None, "peak learning rate (default: 9e-3 * batch size / 256)", (1e-12, 100))
    seed: int = flag(0, "seed of everything random", (0, 2 ** 63))
    out: str | None = path_flag("run folder (default: runs/DATASET-LABELS, numbered)", "RUN")
    device: str | None = flag(None, "cpu, cuda, cuda:1, … (default: a GPU if there is one)",
                              group=("machine", "e.g. python train.py --dtype int8 --micro-batch-size 4"))
    dtype: str = flag("auto", "of the frozen weights (int8: LLaMA's matrices, in 7 GB at 7B); what is "
                      "trained is always fp32", ("auto", *DTYPES, "int8"))
    threads: int | None = flag(None, "CPU threads (default: measured at the start)", (1, 1024))
    micro_batch_size: int | None = flag(None, "examples held in memory at once (default: the whole batch)",
                                        (1, 65536))
    grad_checkpoint: bool = flag(False, "recompute each layer in the backward pass: less memory, more time")

    @property
    def drawn(self):
        """Whether the data is the demo world's, whose photos are drawn when they are needed."""
        return self.demo and not self.data


def kind_of(f):
    """The type of a field of Config: int of `int | None`."""
    return (get_args(f.type) or (f.type,))[0]


def fits(f, value):
    """Whether a value of a config.json has the type of this field of Config, and is one of its texts."""
    choices = f.metadata["allowed"] if kind_of(f) is str else None
    return isinstance(value, f.type) and (not choices or value in choices)


def add_flags(parser, names=None):
    """Add the flags of Config to a parser.  Flags that the user does not give are not in the parsed
    result.  With all of them, they are in groups.
    """
    place = parser
    for f in fields(Config):
        if names and f.name not in names:
            continue
        words = dict(f.metadata) | {"default": argparse.SUPPRESS, "dest": f.name}
        allowed = words.pop("allowed")
        group = words.pop("group", None)
        if group and not names:
            place = parser.add_argument_group(*group)
        no = "no-" if f.default is True else ""         # --no-image sets image to False
        if kind_of(f) is bool:
            words["action"] = "store_false" if no else "store_true"
        else:
            if f.default is not None:
                words["help"] += f" (default: {f.default})"
            if kind_of(f) is str:
                words["choices"] = allowed
            else:
                words["type"] = number(kind_of(f), *allowed, word="all" if f.name == "labels" else None)
                words["metavar"] = "N"
        place.add_argument(f"--{no}{f.name.replace('_', '-')}", **words)


# ---------------------------------------------------------------------------------------- data and weights


class Sources(NamedTuple):
    """Folders and files that a run reads.  vit is None without photos."""

    data: Path
    llama: Path
    vit: Path | None


def find_sources(config):
    """Sources: a path given wins, then the project's own folders, then the demo world.

    The demo world is used if nothing is given and nothing is there, with --demo, or by the name `demo`.  Real
    and demo data are never mixed unless you ask for it.  What was found is written into the config, so the
    run keeps using it.  data.read_split reports a data folder that is not there.
    """
    real_data = any(DATA.glob("[!.]*"))                 # `dataset build` begins with a hidden folder
    there = (config.data, config.llama, config.vit, real_data, LLAMA.exists(), VIT.exists())
    config.demo = config.demo or not any(there)
    if config.demo:
        config.llama = config.llama or "demo"
        config.vit = config.vit or "demo"

    def find(name, default, small, what, how):
        path = getattr(config, name)
        if path == "demo":
            return small
        path = Path(os.path.abspath(path or default))   # links stay: a Hugging Face cache is made of them
        if not path.exists():
            raise UserError(f"--{name}: {what} should be in {path}, which does not exist; {how}. "
                            "Everything from the demo world: --demo")
        setattr(config, name, str(path))
        return path

    if config.drawn:
        with processes.one_first():
            data = world.write_dataset()
    else:
        data = Path(os.path.abspath(config.data or DATA))
        config.data = str(data)
    llama = find("llama", LLAMA, world.LLAMA, "LLaMA-7B's weights",
                 "put them there (docs/weights.md), name another folder, or take the small one: --llama demo")
    vit = None
    if config.image:
        vit = find("vit", VIT, world.VIT, "CLIP ViT-B/16's weights",
                   "put them there (docs/weights.md), name another folder, take the small one: --vit demo, "
                   "or leave photos out: --no-image")
    return Sources(data, llama, vit)


def describe(config, sources):
    """The first line that a run prints: which data and which weights it uses."""
    data = "DEMO WORLD (drawn products)" if config.drawn else f"data {sources.data}"
    llama = "DEMO LLaMA" if sources.llama == world.LLAMA else f"LLaMA {sources.llama}"
    vit = f"ViT {sources.vit}" if sources.vit else "no photos"
    if sources.vit == world.VIT:
        vit = "DEMO ViT"
    warning = "  These figures are not the paper's." if "DEMO" in data + llama + vit else ""
    return f"{data}, data set {config.dataset}; {llama}; {vit}.{warning}"


# ---------------------------------------------------------------------------------------- device, model


def choose_device(name):
    """torch.device by name, or the GPU if there is one."""
    # On an H100 or H200, PyTorch would take cuDNN's attention in 16 bits.  It builds a plan for each new
    # shape, so for nearly every batch (docs/speed.md).
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()            # a number that comes back: the meta device keeps none
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name}: cannot be used here ({reason(error)}); cpu always can") from None
    started, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device.type == "cuda" and started > gpus:
        raise UserError(f"--device {device}: torchrun started {started} processes on this machine, but "
                        f"it has {gpus} GPU(s); start one for each GPU, or take --device cpu")
    return device


def choose_dtype(name, device, llama):
    """The dtype of the frozen weights, or None for the dtype of their files.  With int8: of those not
    quantised.

    auto: on a GPU bf16 if its compute capability is 8.0 or more (torch.cuda.is_bf16_supported is also true
    for emulation), else fp16; on a CPU fp32 if that takes at most 60 % of the memory, else the dtype of the
    files.
    """
    if name in DTYPES:
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name == "int8":
        return None
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaMA(read_config(llama / "config.json")).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):                 # the limit of a container, if it has one
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return torch.float32 if 4 * parameters <= 0.6 * memory else None


def choose_threads(config, model, stream=None):
    """Set PyTorch's number of CPU threads and write it to config.threads; a measured choice is printed to
    `stream`.

    It is --threads (or the number that a resumed run started with), else OMP_NUM_THREADS, else one or all,
    whichever computes LLaMA's first feed-forward faster now: beside another busy process, threads wait for
    each other. The last bits of sums depend on the number.
    """
    all_threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ and model.device.type == "cpu" and all_threads > 1:
        call = {"mlp": model.llama.layers[0].mlp, "x": torch.ones(64, model.llama.config.hidden_size)}

        def seconds(threads):
            return Timer("mlp(x)", globals=call, num_threads=threads).blocked_autorange().median

        best = min((1, all_threads), key=seconds)
        torch.set_num_threads(best)
        print(f"CPU threads: {best} of {all_threads}, measured; --threads N sets another number", file=stream,
              flush=True)
    config.threads = torch.get_num_threads()


def build_model(config, sources, device):
    """(EIVEN with fresh adapters, PhotoFeatures or None) as the config says."""
    photo_features = None
    if config.image:
        photo_features = PhotoFeatures(sources.vit, sources.data / "images", config.features == "single",
                                       device)
    dtype = choose_dtype(config.dtype, device, sources.llama)
    llama, tokenizer = load_llama(sources.llama, dtype, device, int8=config.dtype == "int8")
    llama.grad_checkpoint = config.grad_checkpoint
    torch.manual_seed(config.seed)                      # the initial values of adapters and projector
    model = EIVEN(llama, tokenizer, photo_features.width if photo_features else None,
                  config.adapter, config.adapter_dim, config.projector_dim)
    return model, photo_features
