"""Train EIVEN, then score it on the test split:  python train.py --dataset general --labels 50

Defaults are the paper's (section 4.1) and, where it is silent, LaVIN's, which its authors built on: 15 epochs,
AdamW (0.9, 0.95) with weight decay 0.02, batch 32, peak learning rate 9e-3 * batch / 256, warm-up over 2 epochs.
"""

import argparse
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:                                     # not on Windows: there a run folder is not locked
    fcntl = None

import torch

import console
from config import (PROJECT, Config, add_flags, build_model, check_weights, choose_device, config_text, describe, find_sources,
                    read_run, weights_fingerprint)
from console import Progress, UserError, duration, whole_file, write_text
from data import Epoch, fingerprint, read_split, rows_of, sample_labels, values_of
from evaluate import check_lengths, evaluate, prepare_photos

SAVE_EVERY = 60                                         # seconds; a power cut costs so much work, and the step under way


def learning_rate(step, steps, steps_per_epoch, peak):
    """Linear warm-up over 2 epochs (at most half of the training), then half a cosine down to 0."""
    warm_up = min(2 * steps_per_epoch, max(1, steps // 2))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model):
    """AdamW over what is trained; biases, known by their names, do not decay."""
    trained = model.trained()
    biases = [p for name, p in trained.items() if name.endswith("bias")]
    weights = [p for name, p in trained.items() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.02}, {"params": biases, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), fused=True)     # one operation for all: 2 ms of the demo's 100 a step


def train_step(model, optimizer, scaler, examples, features, config):
    """One step of the optimizer on the examples of a batch; (loss, real tokens).

    The batch may be cut into micro-batches that fit in memory: the gradient is that of the whole.
    FloatingPointError, and no step, where the loss or a gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    size = config.micro_batch_size or len(examples)
    total, tokens = 0.0, 0
    for start in range(0, len(examples), size):
        rows, photos = rows_of(examples[start:start + size], model.tokenizer, config.image)
        loss = model(rows, features.read(photos, model.device) if features else None)
        loss = loss * (len(rows) / len(examples))       # the paper's average over the batch
        scaler.scale(loss).backward()
        total += loss.item()
        tokens += sum(len(row.prompt) + len(row.answer) for row in rows)
    # fp16's scaler meets infinite gradients now and then, and leaves out their step by itself.
    fine = scaler.is_enabled() or all(p.grad.isfinite().all() for p in model.trained().values() if p.grad is not None)
    if not math.isfinite(total) or not fine:
        raise FloatingPointError(total if not math.isfinite(total) else f"{total}, but its gradients are not finite,")
    scaler.step(optimizer)
    scaler.update()
    return total, tokens


def save_state(path, model, optimizer, scaler, step):
    """All that the rest of the run depends on besides config and data; what is random follows from (seed, epoch)."""
    with whole_file(path) as partial:
        torch.save({"trained": {name: p.detach() for name, p in model.trained().items()},
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step}, partial)


def load_state(path, model, optimizer, scaler):
    """Put everything back; the number of steps done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in model.trained().items():
                parameter.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:     # a run that comes from a CPU has none
            scaler.load_state_dict(state["scaler"])
        return state["step"]
    except Exception as error:                          # torch raises a dozen kinds for a broken file
        raise UserError(f"{path}: cannot be read as the state of this run ({str(error).splitlines()[0][:100]}); "
                        "start the run again") from None


def train(model, features, products, config, run):
    """The loop: every epoch, every step; saves the state as it goes, and what was trained at the end."""
    peak = config.lr or 9e-3 * config.batch_size / 256
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler(enabled=model.llama.compute_dtype == torch.float16)   # fp16's gradients underflow
    state, log_path = run / "state.pt", run / "log.jsonl"
    done = load_state(state, model, optimizer, scaler) if state.exists() else 0
    keep_log(log_path, done)

    def epoch_of(number):
        return Epoch(products, config.seed, number, config.lbc, config.lbc_ratio, config.text)

    steps_per_epoch = math.ceil(len(epoch_of(0)) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    count = sum(p.numel() for p in model.trained().values())
    print(f"training {count:,} parameters on {len(products):,} labelled products: {config.epochs} epochs of "
          f"{steps_per_epoch:,} steps of {config.batch_size} examples" + (f", {done:,} steps done before" if done else ""))
    start = saved = time.monotonic()
    with open(log_path, "a", encoding="utf-8") as log, Progress("training", steps, "steps", done) as progress:
        for step in range(done, steps):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0 or step == done:
                examples = epoch_of(epoch)
            lr = learning_rate(step, steps, steps_per_epoch, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            first = place * config.batch_size           # the last batch of an epoch may be smaller: it counts, too
            batch = [examples[i] for i in range(first, min(first + config.batch_size, len(examples)))]
            try:
                loss, tokens = train_step(model, optimizer, scaler, batch, features, config)
            except FloatingPointError as error:
                save_state(state, model, optimizer, scaler, step)       # of finite values alone: see train_step
                raise UserError(
                    f"the loss is {error} in step {step + 1}: epoch {epoch + 1}, examples {first + 1} to "
                    f"{first + len(batch)}, the first of them {batch[0].prompt[:160]!r}. The step was not taken, and the "
                    f"state before it is in {state}; start a new run with a smaller --lr or with --dtype fp32") from None
            log.write(json.dumps({"step": step + 1, "epoch": epoch + 1, "loss": round(loss, 6), "lr": lr,
                                  "tokens": tokens, "seconds": round(time.monotonic() - start, 2)}) + "\n")
            log.flush()
            progress.step(note=f"epoch {epoch + 1}  loss {loss:.3f}")
            if time.monotonic() - saved > SAVE_EVERY or step + 1 == steps:
                os.fsync(log.fileno())
                save_state(state, model, optimizer, scaler, step + 1)
                saved = time.monotonic()
    model.save(run / "adapter.safetensors")
    print(f"trained in {duration(time.monotonic() - start)}; saved {run / 'adapter.safetensors'}")


def keep_log(path, done):
    """Drop the log's lines of steps after `done`: they are about to be made again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(lines[:done]))


@contextmanager
def alone_in(run):
    """While a process trains in a run folder, another one that is started there is an error."""
    with open(run / "config.json", "rb") as held:
        try:
            if fcntl:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)       # let go when the process ends, however it ends
        except BlockingIOError:
            raise UserError(f"{run}: another process is training in this folder; wait for it, or stop it") from None
        yield


# ------------------------------------------------------------------------------------------------ the command


def run_folder(config):
    """A new run folder: --out, which must not hold a run yet, or the next free runs/DATASET-LABELS-N."""
    if config.out:
        run = Path(config.out)
        if (run / "config.json").exists():
            raise UserError(f"--out {run}: holds a run already; go on with it by --resume {run}, or name another folder")
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


def parse(argv=None):
    """(Config, run folder or None for a new one, whether it is resumed) from the command line."""
    parser = argparse.ArgumentParser(description="Train EIVEN, then score it on the test split.", allow_abbrev=False)
    parser.add_argument("--resume", metavar="RUN", nargs="?", const=True,
                        help="go on with the run in this folder (or in --out), exactly as if it had never stopped")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if resume is None:
        return Config(**given), None, False
    if resume is True and "out" not in given:
        parser.error("--resume: name the run folder")
    run = Path(given.pop("out") if resume is True else resume)
    if "out" in given:
        parser.error("--resume RUN goes on in RUN: leave --out out")
    config, _ = read_run(run)
    # A run may go on where its files have moved to, and with less memory (the gradients' last bits may differ).
    movable = ("data", "llama", "vit", "device", "micro_batch_size", "grad_checkpoint")
    for name, value in given.items():
        if name in movable:
            setattr(config, name, value)
        elif value != getattr(config, name):
            raise UserError(f"--resume {run}: the run has {name} = {getattr(config, name)}, but {value} is given; "
                            "a resumed run keeps its settings: leave the flag out")
    return config, run, True


def main(argv=None):
    config, run, resumed = parse(argv)
    if config.out and not resumed:
        run = run_folder(config)                        # a folder that is taken is an error before any work
    sources = find_sources(config)
    print(describe(config, sources), flush=True)

    products = sample_labels(read_split(sources.data, config.dataset, "train"), config.labels, config.seed)
    # Few labels are few for validation, too: as many a value as for training.
    val = sample_labels(read_split(sources.data, config.dataset, "val"), config.labels, config.seed)
    test = read_split(sources.data, config.dataset, "test")
    data = {split: fingerprint(p) for split, p in (("train", products), ("val", val), ("test", test))}
    if resumed:
        raw = read_run(run)[1]
        check_weights(run, raw, sources)
        if raw["data_fingerprint"] != data:
            raise UserError(f"--resume {run}: the data in {sources.data} is not what this run was started with")
    device = choose_device(config.device)
    model, features = build_model(config, sources, device)
    if features:
        prepare_photos(features, [products, val, test], config, sources)
    check_lengths(model, features, products, config, compared=config.lbc != "none")
    check_lengths(model, features, val, config)
    check_lengths(model, features, test, config)
    if not resumed:
        run = run or run_folder(config)
        write_text(run / "config.json", config_text(config, values=values_of(products), data_fingerprint=data,
                                                    weights_fingerprint=weights_fingerprint(sources)))
    print(f"run folder: {run}")

    if not (run / "adapter.safetensors").exists():
        try:
            with alone_in(run):
                train(model, features, products, config, run)
        except KeyboardInterrupt:
            print(f"\ninterrupted; at most {SAVE_EVERY} s of work and the step under way are lost. Go on with: python train.py --resume {run}",
                  file=sys.stderr)
            raise SystemExit(130) from None
    else:
        model.load(run / "adapter.safetensors")
    evaluate(model, features, val, config, sources, "val", run / "val")
    evaluate(model, features, test, config, sources, "test", run)
    print(f"\nresults: {run / 'report.html'}")


if __name__ == "__main__":
    console.run(main)
