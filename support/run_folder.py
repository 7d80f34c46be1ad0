"""A run folder: its config.json and the id of the run, the state to resume from, and the log."""

import hashlib
import itertools
import json
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from shlex import quote

import torch

from base.checkpoint import check_run, fingerprint, restore, shard_files
from base.console import PROJECT, UserError, locked, reading, reading_json, whole_file, write_json, write_text
from support import processes
from support.config import Config, fits
from vit import weight_file

SAVE_EVERY = 60  # seconds: what a power cut costs at most, besides a step

# ---------------------------------------------------------------------------------------- config.json


@contextmanager
def new_run_folder(config):
    """The folder of a new run, locked: --out, which must be new or empty, or the next free
    runs/DATASET-LABELS-N.
    """
    name = f"{Path(config.dataset).name}-{config.labels or 'all'}"
    for number in itertools.count(1):                   # two runs that start together take two numbers
        folder = Path(config.out or PROJECT / "runs" / f"{name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=bool(config.out))
            break
        except FileExistsError:
            if config.out:
                raise UserError(f"--out {folder}: is a file; name a folder") from None
    with locked(folder, "training"):
        if any(folder.glob("[!.]*")):                   # a hidden file is of a process that was killed
            raise UserError(f"--out {folder}: is not empty; take another, or --resume the run in it")
        try:
            yield folder
        finally:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()                          # nothing was written: an error at the start


def write_config(folder, config, **more):
    """Write config.json: every flag, and what else is needed to repeat the run; the run's id."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    record = {**asdict(config), "versions": versions, **more}
    run_id = None
    if processes.rank() == 0:
        write_json(folder / "config.json", record)
        run_id = read_config(folder)[1]["id"]
    return processes.broadcast(run_id)


def read_config(folder):
    """(Config, the whole of config.json as a dict) of a run folder.

    The dict's "id" is a hash of the file: the same in adapter.safetensors, state.pt and calibration.json of
    the run.
    """
    path = Path(folder) / "config.json"
    with reading_json(path, "a run's config.json (train.py writes it)") as record:
        # A run of an older version lacks the newer flags: it has what is their default now.
        settings = {f.name: record.get(f.name, f.default) for f in fields(Config)}
        for f in fields(Config):
            if not fits(f, settings[f.name]):
                raise ValueError(f"{f.name} is {settings[f.name]!r}, which is not allowed")
        for name in ("values", "held_out", "data_fingerprint", "weights_fingerprint"):
            if not isinstance(record[name], dict):
                raise ValueError(f"{name} is {record[name]!r}, but must be an object")
        return Config(**settings), record | {"id": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def check_still_there(folder, run_id):
    """UserError if the folder does not hold this run any more: it was moved or removed meanwhile."""
    if not (folder / "config.json").exists() or read_config(folder)[1]["id"] != run_id:
        raise UserError(f"{folder}: this run is not here any more; was its folder moved? Go on with the new "
                        "name (train.py --resume)")


def weights_fingerprint(sources):
    """{"llama": ..., "vit": ...}: which weights a run was trained with.

    With other weights of the same shape its adapters would load, and the answers would be nonsense.
    """
    llama = [sources.llama / "config.json", sources.llama / "tokenizer.model"]
    llama += shard_files(sources.llama)
    prints = {"llama": fingerprint(llama), "vit": None}
    if sources.vit:
        weights = weight_file(sources.vit)
        prints["vit"] = fingerprint(p for p in (weights.parent / "config.json", weights) if p.exists())
    return prints


def check_weights(folder, record, sources):
    """UserError if these are not the weights that the run was trained with."""
    for name, digest in weights_fingerprint(sources).items():
        if record["weights_fingerprint"].get(name) != digest:
            raise UserError(f"{folder}: was trained with another {name} than {getattr(sources, name)}; "
                            f"name the right one with --{name}, or train again")


def load_init(config, sources, model):
    """Give a new model what the run of --init has trained; that run's id.  UserError if it does not fit."""
    other, record = read_config(config.init)
    for name in ("image", "features", "adapter", "adapter_dim", "projector_dim"):
        if getattr(other, name) != getattr(config, name):
            raise UserError(f"--init {config.init}: that run has {name} = {getattr(other, name)}, this one "
                            f"{getattr(config, name)}; give it the same flag, or leave --init out")
    check_weights(config.init, record, sources)
    trained = Path(config.init) / "adapter.safetensors"
    if not trained.exists():
        raise UserError(f"--init {config.init}: its training is not finished; --resume it first")
    model.load(trained, record["id"])
    return record["id"]


# ---------------------------------------------------------------------------------------- state, log


class TrainingState:
    """The state of a training run on the disk, and its log.  Process 0 writes both.

    All that the rest of the run depends on, besides config and data, is in state.pt; random draws depend only
    on the seed and the epoch.  step: how many of the run's `steps` were done before this start.
    """

    def __init__(self, run, optimizer, scaler, steps):
        self.run, self.optimizer, self.scaler, self.steps = run, optimizer, scaler, steps
        self.path, self.log_path = run.folder / "state.pt", run.folder / "log.jsonl"
        self.step = self.load() if self.path.exists() else 0
        self.start = self.saved = time.monotonic()
        if processes.rank() == 0:                       # the steps after the state will be done again
            kept = [json.dumps(line) + "\n" for line in read_log(run.folder) if line["step"] <= self.step]
            write_text(self.log_path, "".join(kept))

    def record(self, step, **line):
        """Log a finished step; save the state every SAVE_EVERY seconds and after the last step."""
        if processes.rank() > 0:
            return
        line = {"step": step, **line, "seconds": round(time.monotonic() - self.start, 2)}
        check_still_there(self.run.folder, self.run.id)
        with open(self.log_path, "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if step == self.steps or time.monotonic() - self.saved > SAVE_EVERY:
            self.save(step)

    def save(self, step):
        if processes.rank() > 0:
            return
        with whole_file(self.path) as partial:
            torch.save({"run": self.run.id, "step": step, "trained": self.run.model.trainable_parameters(),
                        "optimizer": self.optimizer.state_dict(),
                        "scaler": self.scaler.state_dict()}, partial)
        self.saved = time.monotonic()

    def load(self):
        """Restore everything; the number of steps done.  UserError if it is not a state of this run."""
        with reading(self.path, "the state of this run, to resume from"):
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            check_run(state["run"], self.run.id)
            if not 0 <= state["step"] <= self.steps:
                raise ValueError(f"step is {state['step']}, but the run has {self.steps} steps; start a new "
                                 "run")
            restore(self.run.model.trainable_parameters(), state["trained"], self.path)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:        # a run that comes from a CPU has none
                self.scaler.load_state_dict(state["scaler"])
            return state["step"]


def read_log(folder):
    """The lines of a run's log.jsonl as dicts; none if there is no log.

    A line that is cut off ends it, and is named: after a power cut it is the last one.
    """
    path, lines = folder / "log.jsonl", []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"note: {path}, line {len(lines) + 1}: is not a whole line; it ends the log",
                  file=sys.stderr)
            break
    return lines


# ---------------------------------------------------------------------------------------- calibration


def read_temperature(folder, run_id):
    """The calibration.json that support.confidence.calibrate wrote, or None if nothing was fitted yet.
    UserError for a file that does not hold it.
    """
    path = folder / "calibration.json"
    if not path.exists():
        return None
    with reading_json(path, "the temperature of a run's values") as calibration:
        check_run(calibration["run"], run_id)
        if not calibration["temperature"] > 0:
            raise ValueError("its temperature is not above 0; delete it, and fit it again: "
                             f"python evaluate.py {quote(str(folder))} --constrain --split val")
        return calibration
