"""Speed against transformers, doing the same work in the same run:

    pip install transformers==5.23.0                    the only extra package, for this file and count.py
    python -m experiments.speed                         the demo's model, and LLaMA-7B's width
    python -m experiments.speed --models llama --llama SMOLLM2 --data ROOT --dataset footwear
    python -m experiments.speed --device cuda --dtype bf16 --models demo smollm2 wide           on a GPU

transformers' LlamaForCausalLM has the same adapters as forward hooks.  Its sequences are padded to the
longest of the batch, and it computes logits for every token; answers come from its `generate` on left-padded
batches.  Weights and sequences are the same, and both sides must agree: the loss and every trained gradient
to 1e-4 of its size, the answers token for token (in bf16 to a fifth, and answers may differ).  The two sides
take turns.  A figure is the median ratio of their seconds, with its minimum and maximum: seconds depend on
the machine and the hour, ratios much less.
"""

import argparse
import os
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

# Examples of a step, and products to answer.  At LLaMA-7B's width a round takes minutes on a CPU.
MODELS = {"demo": (32, 64), "llama": (32, 64), "smollm2": (32, 64), "wide": (16, 16), "7b": (32, 64)}
SHAPES = {"smollm2": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, tie_word_embeddings=True),
          "wide": replace(LLAMA_7B, num_hidden_layers=4), "7b": LLAMA_7B}


def make_subject(name, flags, device, dtype=torch.float32, int8=False):
    """(model, examples to train on, questions to answer, [cls] tokens of all their photos) of one of MODELS.

    name   demo: the demo's model; llama: that of `flags`, without photos, on their data or the demo's; those
           of SHAPES have random weights
    """
    given = flags if name == "llama" else {}
    config = Config(demo="data" not in given, image=name != "llama", **given)
    sources = find_sources(config)
    if name in SHAPES:
        llama = random_llama(SHAPES[name], device, dtype, int8)
        tokenizer = Tokenizer(sources.llama / "tokenizer.model")
        tokenizer.vocab_size = llama.config.vocab_size  # so that logits are computed for all of it
    else:
        llama, tokenizer = load_llama(sources.llama, dtype, device, int8)
    model = EIVEN(llama, tokenizer, 64 if config.image else None)
    n_examples, n_questions = MODELS[name]
    labelled = sample_labels(read_split(sources.data, config.dataset, "train"), 10, 0)
    test = read_split(sources.data, config.dataset, "test")
    examples = epoch(labelled, 0, 0)[:n_examples] + [base_question(p) for p in test[:n_questions]]
    encoded, photos = encode_examples(examples, model.tokenizer, config.image)
    with torch.no_grad():                               # the zeros of step 0 would hide gradients
        for p in model.trainable_parameters().values():
            p += 0.02 * torch.randn_like(p)
    cls_tokens = torch.randn(len(photos), 4, 64, device=device) if photos else None
    return model, encoded[:n_examples], encoded[n_examples:], cls_tokens


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


def bench_train(rounds, name, model, batch, cls_tokens):
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
    theirs = stepper(peer_trained.values(), lambda: peer.loss(batch, cls_tokens))
    tolerance = 1e-4 if model.llama.compute_dtype == torch.float32 else 0.2
    agree(f"{name}: loss", ours(), theirs(), tolerance)
    for parameter, p in trained.items():
        agree(f"{name}: gradient of {parameter}", p.grad, peer_trained[parameter].grad, tolerance)
    lengths = [4 * len(example.photos) + len(example.prompt) + len(example.answer) for example in batch]
    places = sum(B * T for B, T in pack([[0] * n for n in lengths], grouped=True).groups)
    compare(f"{name}: training step", rounds, ours, theirs,
            f"{len(batch)} sequences, {places / sum(lengths):.2f} places in attention for each token")


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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wide"],
                        help="default: demo wide; llama: that of --llama; the others have random weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: on a GPU alone")
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=10, help="default: %(default)s")
    add_flags(parser, ("llama", "data", "dataset", "device"))       # data and dataset: of the model llama
    flags = vars(parser.parse_args())
    models, dtype, rounds = (flags.pop(name) for name in ("models", "dtype", "rounds"))
    device = choose_device(flags.pop("device", None))
    if dtype == "bf16" and device.type == "cpu" or "llama" in models and "llama" not in flags:
        parser.error("bf16 needs a GPU (on a CPU, activations are fp32), and the model llama needs --llama")
    import transformers                                 # not needed for --help
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device}, {dtype}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}")
    for name in models:
        model, examples, questions, cls_tokens = make_subject(name, flags, device, DTYPES[dtype])
        bench_train(rounds, name, model, examples, cls_tokens)
        bench_generate(rounds, name, model, questions, cls_tokens)


if __name__ == "__main__":
    console.run(main)
