"""A run folder: its config.json, the state to resume from, the log, and the lock that keeps a second process out."""

import itertools
import json
import math
import os
import platform
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

try:
    import fcntl
except ImportError:                                     # not on Windows: there a run folder is not locked
    fcntl = None

import torch

from base.checkpoint import check_fields, not_finite, read_json, restore, sample_digest, shard_files, tensor_file
from base.console import UserError, first_line, naming, write_text
from support import processes
from support.config import FIELDS, PROJECT, Config
from support.threads import StepTimes
from vit import weight_file

LATER = {"holdout_values": 0, "held_out": {}, "shard": False, "threads": None}     # of older run folders, which do not have them
SAVE_EVERY = 60                                         # seconds: what a power cut costs at most, besides the current step

# What config.json holds besides the flags: {field: (type, allowed, default)}
RECORD = {"values": (dict, None), "held_out": (dict, None), "data_fingerprint": (dict, None), "weights_fingerprint": (dict, None)}
SPLITS = {"train": (str, None), "val": (str, None), "test": (str, None)}
WEIGHTS = {"llama": (str, None), "vit": (str, None, None)}
STATE = {"trained": (dict, None), "optimizer": (dict, None), "scaler": (dict, None)}       # and step, of state.pt
START_AGAIN = "start the run again in another folder"


# ------------------------------------------------------------------------------------------------ the folder, config.json


@contextmanager
def new_run_folder(config):
    """The folder of a new run, locked: --out, which must not hold a run yet, or the next free runs/DATASET-LABELS-N.

    A folder that was made here is removed again if nothing was written into it.
    """
    base = PROJECT / "runs" / f"{config.dataset}-{config.labels or 'all'}"
    for number in itertools.count(1):                   # two runs that start together take two numbers
        run = Path(config.out or base.with_name(f"{base.name}-{number}"))
        made = not run.exists()
        try:
            run.mkdir(parents=True, exist_ok=bool(config.out))
            break
        except FileExistsError:
            if config.out:
                raise UserError(f"--out {run}: is a file; name a folder") from None
        except OSError as error:
            raise UserError(f"--out {run}: cannot be made ({error.strerror}); name another folder with --out") from None
    with only_process(run):
        if (run / "config.json").exists():
            raise UserError(f"--out {run}: holds a run already; continue it with --resume {run}, or name another folder")
        try:
            yield run
        finally:
            if made:
                with suppress(OSError):                 # it is not empty
                    run.rmdir()


def write_config(run, config, sources, **more):
    """Write config.json: every flag, and what else is needed to repeat the run.  Process 0 writes it, as all of a run folder."""
    if processes.rank() > 0:
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    record = {**asdict(config), "versions": versions, **more, "weights_fingerprint": weights_fingerprint(sources)}
    write_text(run / "config.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_config(run):
    """(Config, the whole of config.json as a dict) of a run folder."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise UserError(f"{run}: is not a run folder: it has no config.json. train.py writes one (--out RUN)")
    record = LATER | read_json(path, "a run's config")
    absent = [name for name in [*FIELDS, *RECORD] if name not in record]
    if absent:
        raise UserError(f"{path}: lacks {', '.join(absent)}; was it written by another version?")
    settings = check_fields(record, FIELDS, path) | {"shard": False}    # each start says it anew, with its own processes
    check_fields(record, RECORD, path)
    check_fields(record["data_fingerprint"], SPLITS, f"{path}: data_fingerprint")
    check_fields(record["weights_fingerprint"], WEIGHTS, f"{path}: weights_fingerprint")
    if not record["values"]:
        raise UserError(f"{path}: values is empty; it must hold each attribute of the training data with its values")
    for attribute, values in record["values"].items():
        if not (isinstance(values, list) and values and all(isinstance(v, str) and v.strip() for v in values)):
            raise UserError(f"{path}: the values of {attribute!r} must be a list of texts, none of them empty")
    return Config(**settings), record


def weights_fingerprint(sources):
    """{"llama": ..., "vit": ...}: which weights a run was trained with.  With other weights of the same shape its adapters
    would load, and the answers would be nonsense."""
    def beside(folder, *names):
        return [folder / name for name in names if (folder / name).exists()]

    llama = [*beside(sources.llama, "config.json", "tokenizer.model"), *shard_files(sources.llama, "LLaMA weights")]
    vit = sources.vit and weight_file(sources.vit)
    return {"llama": sample_digest(llama),
            "vit": sample_digest([*beside(vit.parent, "config.json"), vit]) if vit else None}


def check_weights(run, record, sources):
    """UserError if these are not the weights that the run was trained with."""
    for name, now in weights_fingerprint(sources).items():
        if record["weights_fingerprint"].get(name) != now:
            raise UserError(f"{run}: was trained with another {name} than the one in {getattr(sources, name)}; name the right "
                            f"folder with --{name}, or train again")


# ------------------------------------------------------------------------------------------------ state, log, lock


class TrainingState:
    """The state of a training run on the disk, and its log.

    Everything that the rest of the run depends on, besides config and data, is in state.pt; random draws depend only on
    (seed, epoch).  steps: of the whole run.  step: how many steps were done before this start.
    """

    def __init__(self, folder, model, optimizer, scaler, steps):
        self.path, self.log_path = folder / "state.pt", folder / "log.jsonl"
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.step = self.load(steps) if self.path.exists() else 0
        self.first = processes.rank() == 0              # it alone writes
        if not self.first:
            return
        if self.log_path.exists():                      # the steps after the state will be done again
            kept = [json.dumps(line) + "\n" for line in read_log(folder) if line["step"] <= self.step]
            write_text(self.log_path, "".join(kept))
        self.log = open(self.log_path, "a", encoding="utf-8")
        self.start = self.saved = time.monotonic()
        self.times = StepTimes(torch.get_num_threads() if model.device.type == "cpu" else 1)

    def record(self, step, last, **line):
        """Log a finished step; save the state every SAVE_EVERY seconds and after the last step."""
        if not self.first:
            return
        self.times.step(line["tokens"])
        with naming(self.log_path):
            self.log.write(json.dumps({"step": step, **line, "seconds": round(time.monotonic() - self.start, 2)}) + "\n")
            self.log.flush()
        if time.monotonic() - self.saved > SAVE_EVERY or last:
            os.fsync(self.log.fileno())
            self.save(step)
            self.saved = time.monotonic()

    def save(self, step):
        if not self.first:
            return
        trained = {name: p.detach() for name, p in self.model.trainable_parameters().items()}
        with tensor_file(self.path) as partial:
            torch.save({"trained": trained, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                        "step": step}, partial)

    def load(self, steps):
        """Restore everything; the number of steps done.  UserError, if it is not a state of this run."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            check_fields(state, STATE | {"step": (int, (0, steps))}, self.path)
            moments = self.moments(state)
            restore(self.model.trainable_parameters(), state["trained"], self.path, START_AGAIN)
            # Settings of the optimizer come from train.py, not from the file.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            if self.scaler.is_enabled() and state["scaler"]:        # a run that comes from a CPU has none
                self.scaler.load_state_dict(state["scaler"])
            return state["step"]
        except UserError:
            raise
        except Exception as error:                      # torch raises a dozen kinds for a broken file
            raise UserError(f"{self.path}: cannot be read as the state of this run ({first_line(error)}); "
                            f"{START_AGAIN}") from None

    def moments(self, state):
        """AdamW's state from the file: for each trained parameter its two moments and how many steps it was updated in.

        PyTorch does not compare shapes with those of the parameters, and AdamW would write beyond the end of a moment.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = state["optimizer"]["state"]           # empty before the first update
        if moments and moments.keys() != set(range(len(parameters))):
            raise UserError(f"{self.path}: the optimizer's state is not that of {len(parameters)} parameters; {START_AGAIN}")
        for i, moment in moments.items():
            shape = tuple(parameters[i].shape)
            found = {name: tuple(tensor.shape) for name, tensor in moment.items()}
            if found != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
                raise UserError(f"{self.path}: the optimizer's state of parameter {i} does not fit this model: {found}; "
                                f"{START_AGAIN}")
            if not_finite(moment) or moment["exp_avg_sq"].min() < 0 or not 1 <= moment["step"] <= state["step"]:
                raise UserError(f"{self.path}: the optimizer's state of parameter {i} is not one that training writes; "
                                f"{START_AGAIN}")
        return moments


def read_log(folder):
    """The lines of a run's log.jsonl as dicts; none if there is no log.

    A line that is cut off or damaged ends it, and is named: after a power cut it is the last one.
    """
    path, lines = folder / "log.jsonl", []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int or not math.isfinite(line["loss"]):
                raise ValueError
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            print(f"note: {path}, line {number}: is not a whole line of a log; it is left out, with all that follows",
                  file=sys.stderr)
            break
        lines.append(line)
    return lines


def read_losses(folder):
    """The training loss of each step, from the log of a run; [] if there is no log."""
    return [line["loss"] for line in read_log(folder)]


def save_temperature(folder, temperature, n, values):
    """Write RUN/calibration.json: a temperature that was fitted on n products of val, which chose from so many values."""
    calibration = {"temperature": temperature, "split": "val", "n": n, "values": values}
    write_text(folder / "calibration.json", json.dumps(calibration, indent=2) + "\n")
    return calibration


def read_temperature(folder):
    """What save_temperature wrote, or None if nothing was fitted yet.  UserError for a file that does not hold it."""
    path = folder / "calibration.json"
    if not path.exists():
        return None
    calibration = read_json(path, "the temperature of a run's values")
    temperature, n, values = (calibration.get(name) for name in ("temperature", "n", "values"))
    fine = isinstance(temperature, (int, float)) and 0 < temperature < float("inf")
    if not (fine and isinstance(n, int) and isinstance(values, int)):
        raise UserError(f"{path}: should hold a temperature above 0, n and values, but holds {str(calibration)[:100]}; delete "
                        f"it, and fit the temperature again: python evaluate.py {folder} --constrain --split val")
    return calibration


@contextmanager
def only_process(run, doing="training"):
    """While one process works in a run folder (or another folder), starting a second one there is an error.

    The folder itself is locked: unlike the files in it, it is never replaced.  The lock ends with the process, however it
    ends.  Where a file system has no locks, there is none.
    """
    if fcntl is None:
        yield run
        return
    held = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = run.exists() and os.path.samestat(os.fstat(held), os.stat(run))      # it was not removed meanwhile
        except OSError as error:
            free = not isinstance(error, BlockingIOError)
        if not free:
            raise UserError(f"{run}: another process is {doing} in this folder; wait for it, or stop it")
        yield run
    finally:
        os.close(held)
