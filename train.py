"""Train EIVEN, then score it on the test split:  python train.py --dataset general --labels 50

Section 4.1 gives AdamW and 15 epochs.  The rest is LaVIN's (Luo et al. 2023b), which the paper cites for its
adapters: betas (0.9, 0.95), weight decay 0.02, batch 32, peak learning rate 9e-3 * batch / 256, warm-up over
2 epochs.
"""

import argparse
import math
import sys
import time
from functools import lru_cache
from shlex import quote

import torch

from base.checkpoint import check_frozen
from base.console import Progress, UserError, duration, locked, parse_flags, user_path
from base.duplicates import note_duplicates
from data import encode_examples, epoch, fingerprint, hold_out, values_of, without
from evaluate import evaluate
from support import processes
from support.answering import check_questions, prepare_photos, split_products
from support.config import (Config, add_flags, build_model, choose_device, choose_threads, describe,
                            find_sources)
from support.run import Run
from support.run_folder import (SAVE_EVERY, TrainingState, check_weights, load_init, new_run_folder,
                                read_config, weights_fingerprint, write_config)

# ---------------------------------------------------------------------------------------- the loop


def train(run, products):
    """The training of section 4.1 on these labelled products; saves its state on the way, and the result at
    the end.
    """
    model, config = run.model, run.config

    @lru_cache(1)
    def examples_of(number):
        return epoch(products, config.seed, number, config.lbc, config.lbc_ratio, config.text)

    steps_per_epoch = math.ceil(len(examples_of(0)) / config.batch_size)
    steps = config.epochs * steps_per_epoch
    peak_lr = config.lr or 9e-3 * config.batch_size / 256
    optimizer = make_optimizer(model)
    # In fp16, small gradients would become 0.
    scaler = torch.amp.GradScaler(enabled=model.llama.compute_dtype == torch.float16)
    state = TrainingState(run, optimizer, scaler, steps)
    if config.init and state.step == 0:
        state.save(0)                                   # a resumed run reads this state, not the other run
    count = sum(p.numel() for p in model.trainable_parameters().values())
    print(f"training {count:,} parameters on {len(products):,} labelled products: {config.epochs} epochs of "
          f"{steps_per_epoch:,} steps of {config.batch_size} examples; {state.step:,} steps are done")
    start = time.monotonic()
    with Progress("training", steps, "steps", state.step) as progress:
        for step in range(state.step, steps):
            epoch_number, i = divmod(step, steps_per_epoch)
            examples = examples_of(epoch_number)
            batch = examples[i * config.batch_size:(i + 1) * config.batch_size]  # the last one may be smaller
            lr = learning_rate(step, steps, steps_per_epoch, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                loss, tokens = train_step(run, optimizer, scaler, batch)
            except FloatingPointError as error:
                state.save(step)                        # all values are still finite: the step was not taken
                check_frozen(model.llama, run.sources.llama)    # another learning rate would not help then
                raise UserError(f"step {step + 1} (epoch {epoch_number + 1}) was not taken: {error}. Its "
                                f"batch begins with {batch[0].prompt[:150]!r}. The state before it is in "
                                f"{state.path}. Start anew with a smaller --lr or --dtype fp32") from None
            state.record(step + 1, epoch=epoch_number + 1, loss=round(loss, 6), lr=lr, tokens=tokens)
            progress.step(note=f"epoch {epoch_number + 1}  loss {loss:.3f}")
    if processes.rank() == 0:
        model.save(run.folder / "adapter.safetensors", run.id)
    print(f"trained in {duration(time.monotonic() - start)}; saved {run.folder / 'adapter.safetensors'}")


def train_step(run, optimizer, scaler, examples):
    """One optimizer step on a batch of examples; (loss, number of tokens).

    The batch can be split over processes (torchrun), and into micro-batches to save memory.  The accumulated
    gradient equals that of the full batch.
    FloatingPointError, and no step, if the loss or a gradient is not finite (in fp16 the scaler skips such a
    step).
    """
    model, config = run.model, run.config
    parameters = list(model.trainable_parameters().values())
    optimizer.zero_grad(set_to_none=True)
    losses, tokens = [], 0
    for part, share in processes.micro_batches(examples, config.micro_batch_size):
        batch, photos = encode_examples(part, model.tokenizer, config.image)
        cls_tokens = run.photo_features.read(photos) if run.photo_features else None
        part_loss = model(batch, cls_tokens) * share    # of the average over the full batch
        scaler.scale(part_loss).backward()
        losses.append(part_loss.detach())               # read later: here the CPU would wait for a GPU
        tokens += sum(len(example.prompt) + len(example.answer) for example in batch) if share else 0
    loss = sum(torch.stack(losses).tolist())
    loss, tokens = processes.sum_over_processes(parameters, loss, tokens)
    gradients = [p.grad for p in parameters if p.grad is not None]
    largest = 0
    if not scaler.is_enabled():                         # in fp16 the scaler looks at the gradients itself
        largest = torch.nn.utils.get_total_norm(gradients, math.inf).item()
    if not math.isfinite(loss + largest):
        raise FloatingPointError(f"its loss is {loss}, its largest gradient {largest or 'not known'}")
    scaler.step(optimizer)
    scaler.update()
    return loss, int(tokens)


def learning_rate(step, steps, steps_per_epoch, peak):
    """Linear warm-up over 2 epochs (at most half of the training), then cosine decay to 0."""
    warm_up = min(2 * steps_per_epoch, max(1, steps // 2))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model):
    """AdamW over the trainable parameters; no weight decay on the biases."""
    parameters = model.trainable_parameters().values()
    biases = [p for p in parameters if p.dim() == 1]
    weights = [p for p in parameters if p.dim() > 1]
    groups = [{"params": weights, "weight_decay": 0.02}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------------------------------- the command


def parse(argv=None):
    """(Config, run folder or None for a new one) from the command line."""
    parser = argparse.ArgumentParser(
        description="Train EIVEN, then score it on the test split.", allow_abbrev=False,
        epilog="The environment variable EIVEN_CACHE names another folder than cache/ for photo features and "
               "the demo world.")
    parser.add_argument("--resume", metavar="RUN", type=user_path,
                        help="continue the run in this folder, exactly as if it had never stopped")
    add_flags(parser)
    flags = vars(parse_flags(parser, argv))
    folder = flags.pop("resume")
    if folder is None:
        return Config(**flags), None
    config, _ = read_config(folder)
    # Only these may change: paths, device, and how time and memory are saved (the last bits may then differ).
    movable = ("data", "llama", "vit", "device", "threads", "micro_batch_size", "grad_checkpoint")
    for name, value in flags.items():
        if name not in movable and value != getattr(config, name):
            raise UserError(f"--resume {folder}: the run has {name} = {getattr(config, name)}, not {value}. "
                            "It keeps its settings: leave the flag out")
        setattr(config, name, value)
    return config, folder


def main(argv=None):
    config, folder = parse(argv)
    # Fail early if the folder holds a run already, or is in use.
    lock = locked(folder, "training") if folder else new_run_folder(config)
    processes.check_same("flags", vars(config))
    with processes.in_process_0(lock) as run_folder:
        train_and_score(config, run_folder, resumed=folder is not None)


def note_changed(values, tokenizer):
    """Print a line for each of {attribute: values} that the tokenizer changes."""
    for value in sorted(set().union(*values.values())):
        answer = tokenizer.decode(tokenizer.encode(value, new_word=True)).strip()
        if answer != value:
            print(f"note: this LLaMA's tokenizer turns the value {value!r} into {answer!r}: no free "
                  "answer can be right", file=sys.stderr)


def train_and_score(config, folder, resumed):
    """The run in its folder: everything is checked before the first step, and val and test are scored at the
    end.
    """
    sources = find_sources(config)
    print(describe(config, sources), flush=True)
    products = split_products(config, sources, "train")
    values = values_of(products)
    held_out = hold_out(values, config.holdout_values, config.seed)
    for attribute, names in held_out.items():
        print(f"held out of training and val: {attribute}: {', '.join(names)}")
    products = without(products, held_out)
    val = without(split_products(config, sources, "val"), held_out)
    test = split_products(config, sources, "test")
    splits = {"train": products, "val": val, "test": test}
    note_duplicates(splits)

    model, photo_features = build_model(config, sources, choose_device(config.device))
    # Before the first state is saved, a run begins as --init says; from then on the state has its values.
    init_id = None
    if config.init and not (folder / "state.pt").exists():
        init_id = load_init(config, sources, model)
        print(f"adapters and projector start as those of {config.init}")
    note_changed(values, model.tokenizer)
    run = Run(folder, "", config, values, sources, model, photo_features, held_out)
    for split in splits.values():
        prepare_photos(run, split)
        check_questions(run, split, compared=split is products and config.lbc != "none")
    photo_keys = photo_features.keys if photo_features else {}
    data = {name: fingerprint(split, photo_keys) for name, split in splits.items()}
    weights = weights_fingerprint(sources)
    processes.check_same("data or weights", data | weights | {"init": init_id})
    choose_threads(config, model)
    if resumed:
        record = read_config(folder)[1]
        check_weights(folder, record, sources)
        if record["data_fingerprint"] != data:
            raise UserError(f"--resume {folder}: the products or photos in {sources.data} are not those that "
                            "this run was started with (with --skip-missing-photos, a photo that came later "
                            "adds its product)")
        if init_id not in (None, record["init_id"]):
            raise UserError(f"--resume {folder}: {config.init} is not the run any more that this one starts "
                            "from, and no step of this one was saved; start it anew")
        run.id = record["id"]
    else:
        run.id = write_config(folder, config, values=values, held_out=held_out, data_fingerprint=data,
                              weights_fingerprint=weights, init_id=init_id)
    print(f"run folder: {folder}")

    if (folder / "adapter.safetensors").exists():
        model.load(folder / "adapter.safetensors", run.id)
    else:
        try:
            train(run, products)
        except KeyboardInterrupt:
            print(f"\nat most {SAVE_EVERY} s of work and the current step are lost. Continue with: "
                  f"python train.py --resume {quote(str(folder))}", file=sys.stderr)
            raise
    evaluate(run, val, "val", folder / "val", fit=True)
    evaluate(run, test, "test", folder)
    print(f"\nresults: {folder / 'report.html'}")


if __name__ == "__main__":
    processes.run(main)
