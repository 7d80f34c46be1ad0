"""Train EIVEN, then score it on the test split:  python train.py --dataset general --labels 50

Section 4.1 gives AdamW and 15 epochs.  The rest is LaVIN's (Luo et al. 2023b), which the paper cites for its adapters: betas
(0.9, 0.95), weight decay 0.02, batch 32, peak learning rate 9e-3 * batch / 256, warm-up over 2 epochs.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from base.console import Progress, UserError, duration  # before PyTorch: Ctrl-C while that loads ends in one line, too

# isort: split

import torch

from base.checkpoint import check_frozen
from base.duplicates import note_duplicates
from data import Epoch, encode_examples, fingerprint, read_split, sample_labels, values_of
from evaluate import evaluate
from support import processes
from support.answering import Run, check_lengths, prepare_photos
from support.config import Config, add_flags, build_model, choose_device, describe, find_sources
from support.run_folder import SAVE_EVERY, TrainingState, check_weights, new_run_folder, only_process, read_config, write_config
from support.threads import choose_threads
from support.values import hold_out, without

# ------------------------------------------------------------------------------------------------ the loop


def train(run, products):
    """The training of section 4.1 on these labelled products; saves state on the way, and the trained weights at the end."""
    model, config = run.model, run.config
    peak_lr = config.lr or 9e-3 * config.batch_size / 256
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler(enabled=model.llama.compute_dtype == torch.float16)      # gradients underflow in fp16

    def epoch_of(number):
        return Epoch(products, config.seed, number, config.lbc, config.lbc_ratio, config.text)

    steps_per_epoch = math.ceil(len(epoch_of(0)) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    state = TrainingState(run.folder, model, optimizer, scaler, steps)
    count = sum(p.numel() for p in model.trainable_parameters().values())
    before = f", {state.step:,} steps are done" if state.step else ""
    print(f"training {count:,} parameters on {len(products):,} labelled products: {config.epochs} epochs of "
          f"{steps_per_epoch:,} steps of {config.batch_size} examples{before}")
    start = time.monotonic()
    with Progress("training", steps, "steps", state.step) as progress:
        for step in range(state.step, steps):
            epoch, i = divmod(step, steps_per_epoch)
            if i == 0 or step == state.step:
                examples = epoch_of(epoch)
            lr = learning_rate(step, steps, steps_per_epoch, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            first = i * config.batch_size               # the last batch of an epoch may be smaller
            batch = [examples[k] for k in range(first, min(first + config.batch_size, len(examples)))]
            try:
                loss, tokens = train_step(run, optimizer, scaler, batch)
            except FloatingPointError as error:
                state.save(step)                        # all values are still finite: the step was not taken
                check_frozen(model.llama, run.sources.llama)    # damaged weights are named; no learning rate helps them
                raise UserError(
                    f"the loss is {error} in step {step + 1}: epoch {epoch + 1}, examples {first + 1} to {first + len(batch)}, "
                    f"the first of them {batch[0].prompt[:160]!r}. The step was not taken, and the state before it is in "
                    f"{state.path}; start a new run with a smaller --lr or with --dtype fp32") from None
            state.record(step + 1, step + 1 == steps, epoch=epoch + 1, loss=round(loss, 6), lr=lr, tokens=tokens)
            progress.step(note=f"epoch {epoch + 1}  loss {loss:.3f}")
    if processes.rank() == 0:
        model.save(run.folder / "adapter.safetensors")
    print(f"trained in {duration(time.monotonic() - start)}; saved {run.folder / 'adapter.safetensors'}")


def train_step(run, optimizer, scaler, examples):
    """One optimizer step on a batch of examples; (loss, number of tokens).

    The batch can be split over processes (torchrun), and into micro-batches to save memory.  The accumulated gradient equals
    that of the full batch.
    FloatingPointError, and no step, if the loss or a gradient is not finite (in fp16 the scaler skips such a step itself).
    """
    model, config = run.model, run.config
    optimizer.zero_grad(set_to_none=True)
    total, tokens = 0.0, 0
    for part, weight in processes.micro_batches(examples, config.micro_batch_size):
        batch, photos = encode_examples(part, model.tokenizer, config.image)
        cls_tokens = run.photo_features.read(photos, model.device) if run.photo_features else None
        loss = model(batch, cls_tokens) * weight        # the average over the full batch
        scaler.scale(loss).backward()
        total += loss.item()
        tokens += sum(len(example.prompt) + len(example.answer) for example in batch) if weight else 0
    total, tokens = processes.sum_over_processes(list(model.trainable_parameters().values()), total, tokens)
    gradients = [p.grad for p in model.trainable_parameters().values() if p.grad is not None]
    # The largest of all: one check instead of one for each tensor.  In fp16 gradients may overflow.
    finite = scaler.is_enabled() or torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()
    if not math.isfinite(total) or not finite:
        raise FloatingPointError(total if not math.isfinite(total) else f"{total}, but its gradients are not finite,")
    scaler.step(optimizer)
    scaler.update()
    return total, tokens


def learning_rate(step, steps, steps_per_epoch, peak):
    """Linear warm-up over 2 epochs (at most half of the training), then cosine decay to 0."""
    warm_up = min(2 * steps_per_epoch, max(1, steps // 2))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model):
    """AdamW over the trainable parameters; no weight decay on the biases."""
    parameters = model.trainable_parameters()
    biases = [p for name, p in parameters.items() if name.endswith("bias")]
    weights = [p for name, p in parameters.items() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.02}, {"params": biases, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------------ the command


def parse(argv=None):
    """(Config, run folder or None for a new one) from the command line."""
    parser = argparse.ArgumentParser(description="Train EIVEN, then score it on the test split.", allow_abbrev=False,
                                     epilog="The environment variable EIVEN_CACHE names another folder than cache/ for "
                                            "photo features and the demo world.")
    parser.add_argument("--resume", metavar="RUN", nargs="?", const=True,
                        help="continue the run in this folder (or in --out), exactly as if it had never stopped")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if resume is None:
        return Config(**given), None
    if resume is True and "out" not in given:
        parser.error("--resume: name the run folder")
    folder = Path(given.pop("out") if resume is True else resume)
    if "out" in given:
        parser.error("--resume RUN continues in RUN: leave --out out")
    config, _ = read_config(folder)
    # Only these may change: paths, device, threads, and how memory is saved (the last bits of gradients may then differ).
    movable = ("data", "llama", "vit", "device", "threads", "micro_batch_size", "grad_checkpoint", "shard")
    for name, value in given.items():
        if name in movable:
            setattr(config, name, value)
        elif value != getattr(config, name):
            raise UserError(f"--resume {folder}: the run has {name} = {getattr(config, name)}, but {value} is given; "
                            "a resumed run keeps its settings: leave the flag out")
    return config, folder


def main(argv=None):
    config, folder = parse(argv)
    # Fail early if the folder holds a run already, or is in use.
    with processes.in_process_0(only_process(folder) if folder else new_run_folder(config)) as locked:
        train_and_score(config, locked, resumed=folder is not None)


def train_and_score(config, folder, resumed):
    """The run in its folder: everything is checked before the first step, and val and test are scored at the end."""
    sources = find_sources(config)
    print(describe(config, sources), flush=True)
    products = sample_labels(read_split(sources.data, config.dataset, "train"), config.labels, config.seed)
    values = values_of(products)
    held_out = hold_out(values, config.holdout_values, config.seed)
    for attribute, several in held_out.items():
        print(f"held out of training and val: {attribute}: {', '.join(several)}")
    products = without(products, held_out)
    # Val is sampled like train: the same number of products per value.
    val = without(sample_labels(read_split(sources.data, config.dataset, "val"), config.labels, config.seed), held_out)
    test = read_split(sources.data, config.dataset, "test")
    data = {split: fingerprint(p) for split, p in (("train", products), ("val", val), ("test", test))}
    note_duplicates({"train": products, "val": val, "test": test})
    if resumed:
        record = read_config(folder)[1]
        check_weights(folder, record, sources)
        if record["data_fingerprint"] != data:
            raise UserError(f"--resume {folder}: the data in {sources.data} is not what this run was started with")
    model, photo_features = build_model(config, sources, choose_device(config.device))
    choose_threads(config, model)
    run = Run(folder, config, values, sources, model, photo_features, held_out)
    for some in (products, val, test):
        prepare_photos(run, some)
        check_lengths(run, some, compared=some is products and config.lbc != "none")
    if not resumed:
        write_config(folder, config, sources, values=values, held_out=held_out, data_fingerprint=data)
    print(f"run folder: {folder}")

    if not (folder / "adapter.safetensors").exists():
        try:
            train(run, products)
        except KeyboardInterrupt:
            print(f"\ninterrupted; at most {SAVE_EVERY} s of work and the current step are lost. Continue with: "
                  f"python train.py --resume {folder}", file=sys.stderr)
            raise SystemExit(130) from None
    else:
        model.load(folder / "adapter.safetensors")
    evaluate(run, val, "val", folder / "val")
    evaluate(run, test, "test", folder)
    print(f"\nresults: {folder / 'report.html'}")


if __name__ == "__main__":
    processes.run(main)
