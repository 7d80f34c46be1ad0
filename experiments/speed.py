"""Speed and memory against transformers, doing the same work in the same run:

    pip install transformers==5.23.0                    the only extra package, for this file alone
    python -m experiments.speed                                     the demo's model, and random weights of LLaMA-7B's width
    python -m experiments.speed --llama SMOLLM2 --data ROOT --dataset footwear --vit VIT --weights-7b DIR        everything
    python -m experiments.speed --device cuda                       on a GPU, in fp32, too

The peer is transformers' LlamaForCausalLM with adapters as forward hooks.  Its sequences are padded to the longest of the
batch (or, as LaVIN does, to 512), and it computes logits for every token; answers come from its `generate` on left-padded
batches.  Both sides have the same weights and the same sequences, and must agree: the loss and every trained gradient to
1e-4 of its size, the answers token for token.  Only the order differs: we answer in order of length, the peer in the order
of the data.  The two sides take turns.  A figure is the median ratio of their seconds, with its minimum and maximum: seconds
depend on the machine and the hour, ratios much less.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from base import console
from base.console import UserError, write_text
from base.frozen_ops import frozen_linear
from base.packing import pack
from data import Encoded, Epoch, base_question, encode_examples, read_split, sample_labels
from demo import world
from eiven import EIVEN, cls_layers
from experiments.measuring import Report, agree, head_of, now, passes_of, turns
from experiments.peer import Peer, import_transformers
from experiments.speed_memory import bench_load, bench_memory
from llama import LLaMA, LlamaConfig, Tokenizer, load_llama
from support.config import FEATURE_CACHE, PROJECT, choose_device, keep_freed_memory
from support.features import PhotoFeatures
from support.threads import choose_threads
from train import make_optimizer
from vit import load_vit

SECTIONS = ("train", "busy", "generate", "load", "features", "scaling", "memory")
MODELS = ("demo", "llama", "wide")
BATCH, WIDE_BATCH = 32, 16                              # rows of a step; of the wide model, where a row takes seconds
LAVIN_LENGTH = 512                                      # LaVIN pads every row to this many tokens
WIDE = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4,
                   num_attention_heads=32, num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-6)


# ------------------------------------------------------------------------------------------------ what is measured on


class Subject:
    """A model with rows to train on and questions to answer.  goals: the ratios that are wanted of it."""

    def __init__(self, name, goals, model, examples, questions, cls_tokens=None, question_cls_tokens=None):
        self.name, self.goals, self.model = name, goals, model
        self.examples, self.cls_tokens = examples, cls_tokens
        self.questions, self.question_cls_tokens = questions, question_cls_tokens
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():                           # the zeros of step 0 would hide gradients
            for p in model.trainable_parameters().values():
                p += 0.02 * torch.randn(p.shape, generator=draw).to(p.device)


def subjects(args):
    """The models that are asked for, one after the other: the wide one alone takes 4 GB."""
    demo_root = world.write_dataset()
    root = Path(args.data) if args.data else demo_root

    def examples(root, dataset, batch, questions):
        epoch = Epoch(sample_labels(read_split(root, dataset, "train"), 10, 0), 0, 0)       # as train.py by default
        return [epoch[n] for n in range(batch)], [base_question(p) for p in read_split(root, dataset, "test")[:questions]]

    def text_only(tokenizer, examples, vocabulary):
        # The wide model has LLaMA's 32,000 pieces, the tokenizer perhaps more.
        return [Encoded((), *([t % vocabulary for t in ids] for ids in example[1:]))
                for example in encode_examples(examples, tokenizer, image=False)[0]]

    if "demo" in args.models:
        llama, tokenizer = load_llama(world.LLAMA, torch.float32, args.device)
        some, asked = examples(demo_root, "general", BATCH, 128)
        photo_features = PhotoFeatures(FEATURE_CACHE, world.VIT, demo_root / "images", device=args.device)
        names = [name for example in some + asked for name in example.photos]
        world.draw_photos(demo_root, names)
        photo_features.prepare(names)
        (batch, photos), (questions, shown) = encode_examples(some, tokenizer), encode_examples(asked, tokenizer)
        yield Subject("demo's model", {"train": 1.8, "generate": 1.8}, EIVEN(llama, tokenizer, photo_features.width), batch,
                      questions, photo_features.read(photos, args.device), photo_features.read(shown, args.device))
    if "llama" in args.models and args.llama:
        llama, tokenizer = load_llama(args.llama, torch.float32, args.device)
        some, asked = examples(root, args.dataset, BATCH, 64)
        vocabulary = llama.config.vocab_size
        yield Subject(Path(args.llama).name, {"train": 1.8, "generate": 2.0}, EIVEN(llama, tokenizer, None),
                      text_only(tokenizer, some, vocabulary), text_only(tokenizer, asked, vocabulary))
    if "wide" in args.models:
        tokenizer = Tokenizer(Path(args.llama or world.LLAMA) / "tokenizer.model")
        with torch.device("meta"):
            llama = LLaMA(WIDE)
        llama = llama.to_empty(device=args.device).eval()
        draw = torch.Generator(args.device).manual_seed(0)
        for name, p in llama.named_parameters():
            nn.init.ones_(p) if "norm" in name else nn.init.normal_(p, 0, 0.02, generator=draw)
        some, asked = examples(root, args.dataset, WIDE_BATCH, 16)
        goals = {"train": 2.0, "generate": 1.6, "limit": 85, "answer limit": 70}
        yield Subject("7B width x 4 layers", goals, EIVEN(llama, tokenizer, None),
                      text_only(tokenizer, some, WIDE.vocab_size), text_only(tokenizer, asked, WIDE.vocab_size))


# ------------------------------------------------------------------------------------------------ train


def both_sides(subject, rows=None, length=None):
    """(the peer, {side: a function that does one training step with the first `rows` examples})

    length  that the peer pads to; None: the longest
    """
    model, batch, cls_tokens = subject.model, subject.examples[:rows], subject.cls_tokens
    peer = Peer(model)
    X = [model.input_ids(example, model.project(cls_tokens)) for example in batch]

    def stepper(trainee, loss_of):
        optimizer = make_optimizer(trainee)
        for group in optimizer.param_groups:
            group["lr"] = 1e-5

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return loss.detach()
        return step

    return peer, {"ours": stepper(model, lambda: model(batch, cls_tokens)),
                  "usual": stepper(peer, lambda: peer.loss(X, batch, cls_tokens, length))}


def bench_train(subject, report, rounds):
    model, batch = subject.model, subject.examples
    peer, sides = both_sides(subject)
    agree(f"{subject.name}: loss", sides["ours"](), sides["usual"]())
    for (name, a), b in zip(model.trainable_parameters().items(), peer.trainable_parameters().values()):
        agree(f"{subject.name}: gradient of {name}", a.grad, b.grad)
    sequences = [model.input_ids(example, model.project(subject.cls_tokens)) + example.answer[:-1] for example in batch]
    lengths, computed = [len(sequence) for sequence in sequences], len(pack(sequences).ids)
    matmuls, limits = matmul_times(model, [(computed, sum(len(example.answer) for example in batch))], backward=True), []
    took = turns(rounds, **sides, matmuls=lambda: limits.append(matmuls()))
    note = f"{len(batch)} rows: {computed:,} tokens computed, {sum(lengths):,} real, {len(batch) * max(lengths):,} padded"
    report.ratio("train", f"{subject.name}: step, peer / ours", took["usual"], took["ours"], at_least=subject.goals["train"],
                 note=note)

    report.ratio("train", f"{subject.name}: share of the matmul limit, computed tokens", [100 * s for s in limits],
                 took["ours"], "%", at_least=subject.goals.get("limit"))
    report.ratio("train", f"{subject.name}: the same, all tokens", [100 * s * sum(lengths) / computed for s in limits],
                 took["ours"], "%", note="a shared prefix counts for every sequence that has it")

    if "limit" not in subject.goals:                    # at the 7B's width a row of 512 takes half a minute
        _, sides = both_sides(subject, 8, LAVIN_LENGTH)
        agree(f"{subject.name}: loss, padded", sides["ours"](), sides["usual"]())
        took = turns(rounds, **sides)
        report.ratio("train", f"{subject.name}: step of 8 rows, peer padded to {LAVIN_LENGTH} / ours", took["usual"],
                     took["ours"], at_least=10)


def matmul_times(model, passes, backward=False):
    """A function that measures the seconds of the matmuls with frozen weights alone.

    passes    what passes_of returns
    backward  the gradients of the inputs, too
    In the last layer, keys and values are for all tokens, the rest for needed tokens only.  Each layer's own weights are
    used, so that they are read from memory, and the same matmuls.  Attention, norms and all other operations are not counted.
    """
    llama, head = model.llama, head_of(model.llama)
    matmuls = []                                        # (layer, rows)
    for tokens, needed in passes:
        for block in llama.layers:
            attention, mlp = block.self_attn, block.mlp
            rows = needed if block is llama.layers[-1] else tokens
            matmuls += [(attention.k_proj, tokens), (attention.v_proj, tokens)]
            matmuls += [(layer, rows) for layer in (attention.q_proj, attention.o_proj, *mlp.children())]
        matmuls.append((head, needed))
    inputs = {(rows, width): torch.ones(rows, width, device=model.device, requires_grad=backward)
              for rows, width in {(rows, layer.weight.shape[1]) for layer, rows in matmuls}}

    def measure():
        start = now()
        for layer, rows in matmuls:
            x = inputs[rows, layer.weight.shape[1]]
            y = frozen_linear(x, layer.weight)
            if backward:
                torch.autograd.grad(y, x, y.detach())
        return now() - start
    return measure


def bench_busy(subject, report, rounds):
    """A training step beside a busy process: a loop of matmuls with PyTorch's default number of threads.

    Both sides have as many threads as train.py chooses there.
    """
    _, sides = both_sides(subject)
    agree(f"{subject.name}: loss", sides["ours"](), sides["usual"]())
    idle = turns(rounds, **sides)
    busy = subprocess.Popen([sys.executable, "-c", "import torch\na = torch.randn(500, 500)\nwhile True: a @ a"])
    most = torch.get_num_threads()
    try:
        time.sleep(5)                                   # until it computes
        choose_threads(SimpleNamespace(threads=None, shard=False), subject.model)
        threads = torch.get_num_threads()
        took = turns(rounds, **sides)
    finally:
        busy.kill()
        busy.wait()
        torch.set_num_threads(most)
    note, shared = f"{threads} of {most} threads", min(len(took["ours"]), len(idle["ours"]))     # rounds
    report.ratio("busy", f"{subject.name}: step beside a busy process / idle", took["ours"][:shared], idle["ours"][:shared],
                 at_most=2.7, note=note)
    report.ratio("busy", f"{subject.name}: step there, peer / ours", took["usual"], took["ours"], note=note)


# ------------------------------------------------------------------------------------------------ generate


def bench_generate(subject, report, rounds):
    model, batch, cls_tokens = subject.model, subject.questions, subject.question_cls_tokens
    peer = Peer(model)
    limit = max(len(example.answer) for example in batch)        # tokens: as many as the longest true answer has
    batches = [range(i, min(i + 64, len(batch))) for i in range(0, len(batch), 64)]
    order = sorted(range(len(batch)), key=lambda i: len(batch[i].prompt))       # as support/answering.py does
    X = [model.input_ids(example, model.project(cls_tokens)) for example in batch]

    def answers(model):
        found = {}
        for chosen in batches:
            some = [order[n] for n in chosen]
            written = model.generate([batch[i] for i in some], cls_tokens, temperature=0, limit=limit)
            found.update((i, ids) for i, (ids, _) in zip(some, written))
        return [found[i] for i in range(len(batch))]

    def usual():
        return [ids for chosen in batches for ids in peer.generate([X[i] for i in chosen], cls_tokens, limit)]

    ours, passes = passes_of(model.llama, lambda: answers(model))
    same = sum(a == b for a, b in zip(ours, usual()))
    if same != len(batch):
        raise UserError(f"{subject.name}: {same} of {len(batch)} answers are the peer's; their times cannot be compared")
    matmuls, limits = matmul_times(model, passes), []
    took = turns(rounds, ours=lambda: answers(model), usual=usual, matmuls=lambda: limits.append(matmuls()))
    report.ratio("generate", f"{subject.name}: products a second, ours / peer", took["usual"], took["ours"],
                 at_least=subject.goals["generate"], note=f"{len(batch)} products, {limit} tokens at most, all answers the same")
    report.ratio("generate", f"{subject.name}: share of the matmul limit, answering", [100 * s for s in limits], took["ours"],
                 "%", at_least=subject.goals.get("answer limit"), note=f"{len(passes)} forward passes")

    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}      # shared, not copied
    plain = copy.deepcopy(model, dict(frozen))
    for block in plain.llama.layers:                    # adapters that do nothing: merged and plain write the same
        nn.init.zeros_(block.adapter.up_weight)
        nn.init.zeros_(block.adapter.up_bias)
    merged = copy.deepcopy(plain, dict(frozen)).merge_adapters()
    for block in plain.llama.layers:
        block.adapter = nn.Identity()
    if answers(merged) != answers(plain):
        raise UserError(f"{subject.name}: merged adapters that do nothing change answers")
    took = turns(rounds, merged=lambda: answers(merged), plain=lambda: answers(plain))
    report.ratio("generate", f"{subject.name}: merged / LLaMA without adapters, time", took["merged"], took["plain"],
                 at_most=1.02)


# ------------------------------------------------------------------------------------------------ features


def bench_features(report, args):
    """How much of an epoch goes into photos, and the ViT against transformers'."""
    root = world.write_dataset()
    products = sample_labels(read_split(root, "general", "train"), 10, 0)
    world.draw_photos(root, [p.image for p in products])
    photo_features = PhotoFeatures(FEATURE_CACHE, world.VIT, root / "images", device=args.device)
    photo_features.prepare(p.image for p in products)
    llama, tokenizer = load_llama(world.LLAMA, torch.float32, args.device)
    model = EIVEN(llama, tokenizer, photo_features.width)
    optimizer = make_optimizer(model)

    def step(examples):
        """Seconds that a step spends on photos."""
        batch, photos = encode_examples(examples, tokenizer)
        start = now()
        read = photo_features.read(photos, args.device)
        took = now() - start
        model(batch, read).backward()
        optimizer.step()
        return took

    shares = []
    for number in range(args.rounds + 1):
        epoch = Epoch(products, 0, number)
        batches = [[epoch[i] for i in range(k, min(k + BATCH, len(epoch)))] for k in range(0, len(epoch), BATCH)]
        start = now()
        photos = sum(map(step, batches))
        shares.append(100 * photos / (now() - start))
    report.add("features", "demo's model: share of a later epoch spent on photos", shares[1:], "%", at_most=1,
               note=f"{len(products)} products, from memory; the first epoch, from the disk: {shares[0]:.2f} %")

    folder = Path(args.vit) if args.vit else world.VIT
    vit, transformers = load_vit(folder, args.device), import_transformers()
    peer = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval().to(args.device)
    draw = torch.Generator(args.device).manual_seed(0)
    pixels = torch.randn(16, 3, vit.config.image_size, vit.config.image_size, generator=draw, device=args.device)
    layers = cls_layers(vit.config.num_hidden_layers)
    with torch.no_grad():
        def usual():
            states = peer(pixels, output_hidden_states=True).hidden_states
            return torch.stack([states[k][:, 0] for k in layers], 1)
        agree("[cls] tokens", vit(pixels, layers), usual())
        took = turns(args.rounds, ours=lambda: vit(pixels, layers), usual=usual)
    report.ratio("features", f"{folder.name}: photos a second, ours / peer", took["usual"], took["ours"], note="16 photos")


# ------------------------------------------------------------------------------------------------ scaling


def bench_scaling(subject, report, rounds, sizes=(256, 1024, 8192), repeats=(4, 2, 1), length=64):
    """Seconds of a step against the real tokens in it: rows of one length that have nothing in common.

    Each size's seconds a token against the geometric mean of all sizes': proportional growth would be 0 everywhere.
    """
    model, draw = subject.model, torch.Generator().manual_seed(0)
    steps = {}
    for size, times in zip(sizes, repeats):
        ids = torch.randint(3, model.llama.config.vocab_size, (size // length, length), generator=draw).tolist()
        batch = [Encoded((), row[:-5], row[-5:]) for row in ids]        # with BOS, without the last: 64 read
        steps[size, times] = lambda batch=batch, times=times: [model(batch).backward() for _ in range(times)]
    steps[sizes[0], repeats[0]]()
    took = turns(rounds, **{str(size): do for (size, _), do in steps.items()})
    each = {size: [s / (size * times) for s in took[str(size)]] for size, times in steps}
    common = [statistics.geometric_mean(round_) for round_ in zip(*each.values())]
    for size, per_token in each.items():
        report.add("scaling", f"{subject.name}: {size:,} tokens, seconds a token against all sizes'",
                   [100 * (s / c - 1) for s, c in zip(per_token, common)], "%", at_least=-15, at_most=15,
                   note=f"{1e3 * size * statistics.median(per_token):,.0f} ms a step")


# ------------------------------------------------------------------------------------------------ the command


def main():
    parser = argparse.ArgumentParser(description="Speed and memory against transformers, in the same run.", allow_abbrev=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS,
                        help="of train, generate, scaling (default: all); busy is for demo alone")
    parser.add_argument("--llama", metavar="DIR", help="a LLaMA of the official layout, e.g. SmolLM2-135M")
    parser.add_argument("--data", metavar="ROOT", help="whose prompts are used (default: the demo world's)")
    parser.add_argument("--dataset", default="general", help="which of its data sets (default: %(default)s)")
    parser.add_argument("--vit", metavar="DIR", help="a ViT of the official layout (default: the demo's)")
    parser.add_argument("--weights-7b", metavar="DIR", help="a LLaMA-7B, for loading (random weights will do)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s); memory is the CPU's")
    parser.add_argument("--rounds", type=int, default=5, help="how often the sides take turns, at least (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, default=PROJECT / "runs" / "bench.json",
                        help="where the figures are written (default: runs/bench.json)")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown or args.rounds < 1:
        parser.error(f"sections are {', '.join(SECTIONS)}; --rounds is 1 or more")
    wanted = args.sections or SECTIONS
    device = choose_device(args.device)
    import_transformers()
    keep_freed_memory()                                 # as train.py does; here it serves both sides
    for path in (args.llama, args.vit, args.weights_7b):
        if path and not Path(path).is_dir():
            raise UserError(f"{path}: there is no such folder")
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "device": torch.cuda.get_device_name(device) if device.type == "cuda" else args.device,
               "torch": torch.__version__, "transformers": import_transformers().__version__, "python": platform.python_version()}
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    print(f"{'section':8}  {'what':58}  {'median':>8}     {'spread (rounds)':22}  goal")
    report = Report()
    try:
        measure(wanted, report, args)
    finally:                                            # what was measured before an error or Ctrl-C is kept
        asked = vars(args) | {"json": str(args.json)}
        write_text(args.json, json.dumps({"machine": machine, "arguments": asked, "figures": report.lines}, indent=2) + "\n")
        print(f"written: {args.json}")


def measure(wanted, report, args):
    """The sections, in order; scaling on the first model that is large enough for overheads not to count."""
    if {"train", "busy", "generate", "scaling"} & set(wanted):
        if "llama" in args.models and not args.llama:
            print("the model `llama` needs --llama: skipped")
        to_scale = "scaling" in wanted
        for subject in subjects(args):
            if "train" in wanted:
                bench_train(subject, report, args.rounds)
            if "busy" in wanted and subject.name == "demo's model":
                bench_busy(subject, report, args.rounds)
            if "generate" in wanted:
                bench_generate(subject, report, args.rounds)
            if to_scale and (subject.name != "demo's model" or args.models == ["demo"]):
                bench_scaling(subject, report, args.rounds)
                to_scale = False
        if to_scale:
            print("scaling   needs a larger model than the demo's: --llama DIR, or `wide` among --models")
    if "load" in wanted:
        bench_load(report, args)
    if "features" in wanted:
        bench_features(report, args)
    if "memory" in wanted:
        bench_memory(report)


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    console.run(main)
