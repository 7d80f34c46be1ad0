"""A run folder: its config.json, the state to resume from, the log, and the lock that keeps a second process out."""

import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

try:
    import fcntl
except ImportError:                                     # not on Windows: there a run folder is not locked
    fcntl = None

import torch

from base.checkpoint import read_json, sample_digest, shard_files
from base.console import UserError, whole_file, write_text
from support.config import PROJECT, Config
from vit import weight_file

LATER = {"holdout_values": 0, "held_out": {}}           # what older run folders do not have, and how they were run
SAVE_EVERY = 60                                         # seconds: what a power cut costs at most, besides the current step


# ------------------------------------------------------------------------------------------------ the folder, config.json


def new_run_folder(config):
    """The folder of a new run: --out, which must not hold a run yet, or the next free runs/DATASET-LABELS-N."""
    if config.out:
        run = Path(config.out)
        if (run / "config.json").exists():
            raise UserError(f"--out {run}: holds a run already; continue it with --resume {run}, or name another folder")
        if run.exists() and not run.is_dir():
            raise UserError(f"--out {run}: is a file; name a folder")
        return run
    base = PROJECT / "runs" / f"{config.dataset}-{config.labels or 'all'}"
    number = 1
    while True:                                         # two runs that start together take two numbers
        run = base.with_name(f"{base.name}-{number}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1


def write_config(run, config, sources, **more):
    """Write config.json: every flag, and what else is needed to repeat the run."""
    # The last bits of sums depend on the number of threads, so it is recorded, too.
    versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    record = {**asdict(config), "versions": versions, **more, "weights_fingerprint": weights_fingerprint(sources)}
    write_text(run / "config.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_config(run):
    """(Config, the whole of config.json as a dict) of a run folder."""
    path = Path(run) / "config.json"
    if not Path(run).is_dir() or not path.exists():
        raise UserError(f"{run}: is not a run folder: it has no config.json. train.py writes one (--out RUN)")
    record = LATER | read_json(path, "a run's config")
    absent = [f.name for f in fields(Config) if f.name not in record]
    if absent:
        raise UserError(f"{path}: lacks {', '.join(absent)}; was it written by another version?")
    return Config(**{f.name: record[f.name] for f in fields(Config)}), record


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
    if "weights_fingerprint" not in record:
        raise UserError(f"{run}: its config.json does not say which weights it was trained with; was it written by another "
                        "version?")
    for name, now in weights_fingerprint(sources).items():
        if record["weights_fingerprint"][name] != now:
            raise UserError(f"{run}: was trained with another {name} than the one in {getattr(sources, name)}; name the right "
                            f"folder with --{name}, or train again")


# ------------------------------------------------------------------------------------------------ state, log, lock


class TrainingState:
    """The state of a training run on the disk, and its log.

    Everything that the rest of the run depends on, besides config and data, is in state.pt; random draws depend only on
    (seed, epoch).  step: how many steps were done before this start.
    """

    def __init__(self, folder, model, optimizer, scaler):
        self.path, self.log_path = folder / "state.pt", folder / "log.jsonl"
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.step = self.load() if self.path.exists() else 0
        if self.log_path.exists():                      # the steps after the state will be done again
            lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self.log_path, "".join(lines[:self.step]))
        self.log = open(self.log_path, "a", encoding="utf-8")
        self.start = self.saved = time.monotonic()

    def record(self, step, last, **line):
        """Log a finished step; save the state every SAVE_EVERY seconds and after the last step."""
        self.log.write(json.dumps({"step": step, **line, "seconds": round(time.monotonic() - self.start, 2)}) + "\n")
        self.log.flush()
        if time.monotonic() - self.saved > SAVE_EVERY or last:
            os.fsync(self.log.fileno())
            self.save(step)
            self.saved = time.monotonic()

    def save(self, step):
        trained = {name: p.detach() for name, p in self.model.trainable_parameters().items()}
        with whole_file(self.path) as partial:
            torch.save({"trained": trained, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                        "step": step}, partial)

    def load(self):
        """Restore everything; the number of steps done."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, parameter in self.model.trainable_parameters().items():
                    parameter.copy_(state["trained"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:        # a run that comes from a CPU has none
                self.scaler.load_state_dict(state["scaler"])
            return state["step"]
        except Exception as error:                      # torch raises a dozen kinds for a broken file
            raise UserError(f"{self.path}: cannot be read as the state of this run ({str(error).splitlines()[0][:100]}); "
                            "start the run again") from None


def read_losses(folder):
    """The training loss of each step, from the log of a run; [] if there is no log."""
    path = folder / "log.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


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
def only_process(run):
    """While one process trains in a run folder, starting a second one there is an error."""
    with open(run / "config.json", "rb") as held:
        try:
            if fcntl:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)       # released when the process ends, however it ends
        except BlockingIOError:
            raise UserError(f"{run}: another process is training in this folder; wait for it, or stop it") from None
        yield
