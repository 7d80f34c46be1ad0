"""Speed against transformers, doing the same work in the same run:

    pip install transformers==5.23.0                    the only extra package, for this file alone
    python -m experiments.speed                         the demo's model, and LLaMA-7B's width
    python -m experiments.speed train generate --models llama --llama SMOLLM2 --data ROOT --dataset footwear
    python -m experiments.speed --device cuda           on a GPU, in fp32, too

transformers' LlamaForCausalLM has the same adapters as forward hooks.  Its sequences are padded to the
longest of the batch (or, as LaVIN does, to 512), and it computes logits for every token; answers come from
its `generate` on left-padded batches.  Weights and sequences are the same, and both sides must agree: the
loss and every trained gradient to 1e-4 of its size, the answers token for token.  The two sides take
turns.  A figure is the median ratio of their seconds, with its minimum and maximum: seconds depend on the
machine and the hour, ratios much less.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from base import console
from base.console import UserError
from data import base_question, encode_examples, epoch, read_split, sample_labels
from eiven import EIVEN
from experiments.peer import Peer
from experiments.random_weights import LLAMA_7B
from llama import LLaMA
from support.config import Config, add_flags, build_model, choose_device, find_sources

SECTIONS = ("train", "generate")
# model: examples of a step, products to answer.  At the width of LLaMA-7B a round takes minutes.
MODELS = {"demo": (32, 64), "llama": (32, 64), "wide": (16, 16)}
LAVIN_LENGTH = 512                                      # LaVIN pads every sequence to this many tokens
MATMULS = (torch.ops.aten.mm.default, torch.ops.mkldnn._linear_pointwise.default)


def make_subject(name, flags):
    """(model, examples to train on, questions to answer, [cls] tokens of all their photos) of one of MODELS.

    The demo's has photos, whose [cls] tokens are random.
    """
    config = Config(demo=True, image=name == "demo", dtype="fp32", device=flags.get("device"))
    if name == "llama":
        config = Config(**flags, image=False, dtype="fp32")
    sources = find_sources(config)
    model, _ = build_model(config, sources, choose_device(config.device))
    if name == "wide":
        model.tokenizer.vocab_size = LLAMA_7B.vocab_size        # so that logits are computed for all of it
        model = EIVEN(wide_llama(model.device), model.tokenizer, None)
    n_examples, n_questions = MODELS[name]
    labelled = sample_labels(read_split(sources.data, config.dataset, "train"), 10, 0)
    test = read_split(sources.data, config.dataset, "test")
    examples = epoch(labelled, 0, 0)[:n_examples] + [base_question(p) for p in test[:n_questions]]
    encoded, photos = encode_examples(examples, model.tokenizer, config.image)
    with torch.no_grad():                               # the zeros of step 0 would hide gradients
        for p in model.trainable_parameters().values():
            p += 0.02 * torch.randn_like(p)
    cls_tokens = torch.randn(len(photos), 4, 64, device=model.device) if photos else None
    return model, encoded[:n_examples], encoded[n_examples:], cls_tokens


def wide_llama(device):
    """Four layers of LLaMA-7B's width with random weights."""
    with torch.device(device):
        llama = LLaMA(replace(LLAMA_7B, num_hidden_layers=4))
    for p in llama.parameters():
        p.fill_(1) if p.dim() == 1 else p.normal_(0, 0.02)
    return llama.eval()


# ---------------------------------------------------------------------------------------- measuring


def seconds(do):
    """Seconds of do(), until the GPU, if one is used, has finished."""
    start = time.perf_counter()
    do()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(rounds, **sides):
    """{side: its seconds in each round}.  The sides take turns.

    Where a round takes less than four seconds, there are more rounds, up to 25.  Each side has been called
    before.
    """
    table = []
    while len(table) < rounds:
        table.append([seconds(side) for side in sides.values()])
        rounds = max(rounds, min(25, int(20 / sum(table[0]))))
    return dict(zip(sides, zip(*table)))


def show(section, what, took, over, under, unit="x", note=""):
    """Print the quotients of two sides' seconds, round by round: the median, least and greatest.

    took  of `turns`;  unit  "x", or "%" for 100 times the quotient
    """
    values = [a / b * (100 if unit == "%" else 1) for a, b in zip(took[over], took[under])]
    spread = f"{min(values):.2f} to {max(values):.2f} ({len(values)})"
    print(f"{section:8}  {what:60} {statistics.median(values):8.2f} {unit}  {spread:22}  {note}", flush=True)


def agree(what, ours, theirs):
    """Both sides' results must be the same, to 1e-4 of the greatest number."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item(), msg=(
        f"{what}: ours and that of transformers differ; their times cannot be compared"))


class Matmuls(TorchDispatchMode):
    """Records the matmuls that are done meanwhile.  `again` does them alone: the limit of the time."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in MATMULS:
            self.calls.append((operation, args))
        return operation(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self):
        for operation, args in self.calls:
            operation(*args)


# ---------------------------------------------------------------------------------------- train


def make_steps(name, model, batch, cls_tokens, length=0):
    """{side: a function that does a training step on the examples}, after one on which both agreed.

    length  to which transformers pads; 0: the longest
    """
    peer = Peer(model)
    trained = model.trainable_parameters()
    peer_trained = peer.model.trainable_parameters()

    def stepper(parameters, loss_of):
        optimizer = torch.optim.AdamW(parameters, 1e-5)

        def step():
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return loss.detach()
        return step

    ours = stepper(trained.values(), lambda: model(batch, cls_tokens))
    theirs = stepper(peer_trained.values(), lambda: peer.loss(batch, cls_tokens, length))
    agree(f"{name}: loss", ours(), theirs())
    for parameter, p in trained.items():
        agree(f"{name}: gradient of {parameter}", p.grad, peer_trained[parameter].grad)
    return {"ours": ours, "theirs": theirs}


def bench_train(rounds, name, model, batch, cls_tokens):
    steps = make_steps(name, model, batch, cls_tokens)
    with Matmuls() as matmuls:
        steps["ours"]()
    took = turns(rounds, **steps, matmuls=matmuls.again)
    show("train", f"{name}: step, transformers / ours", took, "theirs", "ours",
         note=f"{len(batch)} sequences")
    show("train", f"{name}: share of the matmul limit", took, "matmuls", "ours", "%")
    if name != "wide":                                  # there, a sequence of 512 takes half a minute
        took = turns(rounds, **make_steps(name, model, batch[:8], cls_tokens, LAVIN_LENGTH))
        show("train", f"{name}: step of 8, transformers padded to {LAVIN_LENGTH} / ours", took, "theirs",
             "ours")


# ---------------------------------------------------------------------------------------- generate


def bench_generate(rounds, name, model, batch, cls_tokens):
    peer = Peer(model)
    limit = max(len(example.answer) for example in batch)       # tokens, as the longest true answer has

    def answers(model):
        return [ids for ids, _ in model.generate(batch, cls_tokens, temperature=0, limit=limit)]

    def theirs():
        return peer.generate(batch, cls_tokens, limit)

    if answers(model) != theirs():
        raise UserError(f"{name}: transformers gives other answers; their times cannot be compared")
    with Matmuls() as matmuls:
        answers(model)
    took = turns(rounds, ours=lambda: answers(model), theirs=theirs, matmuls=matmuls.again)
    show("generate", f"{name}: answers a second, ours / transformers", took, "theirs", "ours",
         note=f"{len(batch)} products, {limit} tokens at most, all answers the same")
    show("generate", f"{name}: share of the matmul limit", took, "matmuls", "ours", "%")

    for block in peer.model.llama.layers:               # a copy of our model
        block.adapter.scale = 0.0                       # merged or left out, such adapters change nothing
    merged = peer.model.merge_adapters()
    for block in model.llama.layers:
        block.adapter = nn.Identity()
    if answers(merged) != answers(model):
        raise UserError(f"{name}: merged adapters that do nothing change answers")
    took = turns(rounds, merged=lambda: answers(merged), plain=lambda: answers(model))
    show("generate", f"{name}: merged / LLaMA without adapters, time", took, "merged", "plain")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="turns, at least (default: %(default)s)")
    add_flags(parser, ("llama", "data", "dataset", "device"))       # data and dataset: of the model llama
    flags = vars(parser.parse_args())
    sections, models, rounds = (flags.pop(name) for name in ("sections", "models", "rounds"))
    if set(sections) - set(SECTIONS):
        parser.error(f"sections are {', '.join(SECTIONS)}")
    import transformers                                 # not needed for --help
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, device "
          f"{choose_device(flags.get('device'))}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")
    for name in models:
        if name == "llama" and "llama" not in flags:
            continue
        model, examples, questions, cls_tokens = make_subject(name, flags)
        if "train" in (sections or SECTIONS):
            bench_train(rounds, name, model, examples, cls_tokens)
        if "generate" in (sections or SECTIONS):
            bench_generate(rounds, name, model, questions, cls_tokens)


if __name__ == "__main__":
    console.run(main)
