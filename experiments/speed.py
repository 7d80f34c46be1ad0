"""Speed against transformers, doing the same work in the same run:

    pip install transformers==5.23.0                    the only extra package, for this file and count.py
    python -m experiments.speed                         the demo's model
    python -m experiments.speed --llama SMOLLM2 --data ROOT --dataset footwear [--no-image]
    python -m experiments.speed --device cuda --dtype bf16 --models demo smollm2 wide           on a GPU

transformers' LlamaForCausalLM has the same adapters as forward hooks.  Its sequences are padded to the
longest of the batch, and it computes logits for every token; answers come from its `generate` on left-padded
batches.  Weights and sequences are the same, and both sides must agree: the loss and every trained gradient
to 1e-4 of its size, the answers token for token (in bf16 to a fifth, and answers may differ).  The two sides
take turns.  A figure is the median ratio of their seconds, with its minimum and maximum: seconds depend on
the machine and the hour, ratios much less.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import nn

from base import console
from base.console import UserError
from base.linear import quantize
from base.packing import pack
from data import base_question, encode_examples, epoch, read_split, sample_labels
from eiven import EIVEN
from experiments.peer import Peer
from llama import LLAMA_7B, Linear, LLaMA, LlamaConfig, Tokenizer, load_llama
from support.config import DTYPES, Config, add_flags, choose_device, find_sources, number
from train import make_optimizer

# Models with random weights.
SHAPES = {"smollm2": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, tie_word_embeddings=True),
          "wide": replace(LLAMA_7B, num_hidden_layers=4), "7b": LLAMA_7B}


def make_subject(name, device, dtype=torch.float32, int8=False, **flags):
    """(model, the batches of 32 examples of an epoch, 64 questions to answer, [cls] tokens of 64 photos).

    name   demo: the demo's model; llama: that of `flags`, on their data or the demo's; or one of SHAPES.
           Only the number of [cls] tokens matters, so they are random numbers
    dtype  of the weights; None: as in the files of a LLaMA, or bf16
    """
    config = Config(demo="data" not in flags, vit="demo", **flags)
    sources = find_sources(config)
    if name in SHAPES:
        llama = random_llama(SHAPES[name], device, dtype or torch.bfloat16, int8)
        tokenizer = Tokenizer(sources.llama / "tokenizer.model")
        tokenizer.vocab_size = llama.config.vocab_size  # so that logits are computed for all of it
    else:
        llama, tokenizer = load_llama(sources.llama, dtype, device, int8)
    model = EIVEN(llama, tokenizer, 64 if config.image else None)
    labelled = sample_labels(read_split(sources.data, config.dataset, "train"), 10, 0)
    test = read_split(sources.data, config.dataset, "test")
    examples = epoch(labelled, 0, 0)
    # In each batch photos are numbered anew.
    batches = [encode_examples(examples[start:start + 32], tokenizer, config.image)[0]
               for start in range(0, len(examples), 32)]
    questions, _ = encode_examples([base_question(p) for p in test[:64]], tokenizer, config.image)
    with torch.no_grad():                               # the zeros of step 0 would hide gradients
        for p in model.trainable_parameters().values():
            p += 0.02 * torch.randn_like(p)
    cls_tokens = torch.randn(64, 4, 64, device=device) if config.image else None
    return model, batches, questions, cls_tokens


def random_llama(config, device, dtype, int8):
    """A LLaMA with random weights, made on the device."""
    with torch.device("meta"):
        llama = LLaMA(config).to(dtype)
    llama.to_empty(device=device)
    for p in llama.parameters():
        p.fill_(1) if p.dim() == 1 else p.normal_(0, 0.02)
    for module in llama.modules():
        if int8 and isinstance(module, Linear):
            weight, module.scale = quantize(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return llama.eval()


def seconds(do):
    """Seconds of do(), until the GPU, if one is used, has finished."""
    start = time.perf_counter()
    do()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(what, rounds, ours, theirs, note):
    """Print the quotients of two sides' seconds, round by round: the median, least and greatest.  Each side
    has been called before.
    """
    ratios = []
    for _ in range(rounds):
        ours_s = seconds(ours)
        ratios.append(seconds(theirs) / ours_s)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} ({len(ratios)})"
    print(f"{what + ', transformers / ours':50} {statistics.median(ratios):8.2f} x  {spread:22}  {note}",
          flush=True)


def agree(what, ours, theirs, tolerance):
    """Both sides' results must be the same, up to this part of the greatest number."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item(), msg=(
        f"{what}: ours and that of transformers differ; their times cannot be compared"))


def stepper(model, loss_of, cls_tokens):
    """A function that does a training step on a batch; it returns the loss."""
    optimizer = make_optimizer(model)

    def step(batch):
        optimizer.zero_grad()
        loss = loss_of(batch, cls_tokens)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def padding(batches):
    """Places in attention for each token, over the batches of an epoch."""
    lengths = [[len(e.prompt) + len(e.answer) + 4 * len(e.photos) for e in batch] for batch in batches]
    places = sum(B * T for row in lengths for B, T in pack([[0] * n for n in row], bucketed=True).buckets)
    return places / sum(map(sum, lengths))


def bench_train(rounds, name, model, batches, cls_tokens):
    peer = Peer(model)
    batch = batches[0]
    ours, theirs = stepper(model, model, cls_tokens), stepper(peer.model, peer.loss, cls_tokens)
    tolerance = 1e-4 if model.llama.compute_dtype == torch.float32 else 0.2
    agree(f"{name}: loss", ours(batch), theirs(batch), tolerance)
    peer_trained = peer.model.trainable_parameters()
    for parameter, p in model.trainable_parameters().items():
        agree(f"{name}: gradient of {parameter}", p.grad, peer_trained[parameter].grad, tolerance)
    compare(f"{name}: training step", rounds, lambda: ours(batch), lambda: theirs(batch),
            f"{len(batch)} sequences; in an epoch {padding(batches):.2f} places in attention for each token")


def bench_generate(rounds, name, model, batch, cls_tokens):
    peer = Peer(model)
    limit = max(len(example.answer) for example in batch)       # tokens, as the longest true answer has

    def ours():
        return [ids for ids, _ in model.generate(batch, cls_tokens, temperature=0, limit=limit)]

    def theirs():
        return peer.generate(batch, cls_tokens, limit)

    equal = sum(a == b for a, b in zip(ours(), theirs()))
    if equal < len(batch) and model.llama.compute_dtype == torch.float32:
        raise UserError(f"{name}: transformers gives other answers; their times cannot be compared")
    compare(f"{name}: answers", rounds, ours, theirs,
            f"{len(batch)} products, {limit} tokens at most, {equal} answers the same")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=("demo", *SHAPES), default=["demo"],
                        help="default: demo; the others have random weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: on a GPU alone")
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=10, help="default: %(default)s")
    add_flags(parser, ("llama", "data", "dataset", "image", "device"))      # but device: for the model llama
    flags = vars(parser.parse_args())
    models, dtype, rounds = (flags.pop(name) for name in ("models", "dtype", "rounds"))
    device = choose_device(flags.pop("device", None))
    if dtype == "bf16" and device.type == "cpu":
        parser.error("bf16 needs a GPU: on a CPU, activations are fp32")
    print(f"{torch.get_num_threads()} threads, device {device}, {dtype}")
    for name in ["llama"] if "llama" in flags else models:
        model, batches, questions, cls_tokens = make_subject(name, device, DTYPES[dtype], **flags)
        bench_train(rounds, name, model, batches, cls_tokens)
        bench_generate(rounds, name, model, questions, cls_tokens)


if __name__ == "__main__":
    console.run(main)
