"""One product, followed from its photo to its answer: every step, as it was computed.

    python -m tools.explain RUN ID
    python -m tools.explain RUN --image shoe.jpg --text "Elastic sided boot, Shoes" --attribute "Boot Style"

prints the steps, and writes them as a page with pictures into RUN/explain/.  Forward hooks keep what the
adapters and the ViT compute while the run answers.  Fused attention does not return its weights, so they are
computed again from its recorded input.
"""

import math
import re
import sys
from contextlib import ExitStack, contextmanager

import torch

from base import console
from base.console import UserError, write_text
from base.photo import open_photo
from data import base_question, read_split
from eiven import TEMPERATURE, TOP_P
from evaluate import load_run, run_parser
from llama import apply_rotary, rotary_table
from support.answering import answer_batch, prepare_photos
from support.config import describe
from tools import explain_page
from tools.answer import parse_product
from vit import crop, normalize

SPLITS = ("test", "val", "train")


@contextmanager
def first_calls(modules):
    """Yield a dict that gets {module: (its first input, its output)} of the first call of each module."""
    calls = {}

    def keep(module, inputs, output):
        calls.setdefault(module, (inputs[0], output))

    with ExitStack() as hooks:                          # which are removed at its end
        for module in modules:
            hooks.enter_context(module.register_forward_hook(keep))
        yield calls


def attention_weights(module, x, d, position, rotate=lambda x: x):
    """softmax(q k^T / sqrt(d)) of one query of an attention module with input x (S, width): (H, S), fp32.

    rotate  turns queries and keys (S, heads, d) by their positions.  A key serves H / G query heads.
    """
    q, k = (rotate(linear(x).float().unflatten(-1, (-1, d))) for linear in (module.q_proj, module.k_proj))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)                    # (S, H, d)
    return (torch.einsum("hd,shd->hs", q[position], k) / math.sqrt(d)).softmax(-1).cpu()


@torch.no_grad()
def explain(run, product):
    """(the Answer, a list of Steps) of a run's free answer to one product.

    No other thread may use the run's model meanwhile.
    """
    model, photos, steps, draws = run.model, run.photo_features, [], []
    tokenizer = model.tokenizer
    prepare_photos(run, [product])

    def observe(logits, uniform, drawn, rows):
        draws.append((logits[0].cpu(), uniform[0], int(drawn[0])))

    # The first calls read X, the others read tokens of the answer.
    with first_calls([block.adapter for block in model.llama.layers]) as calls:
        answer = answer_batch(run, [product], [0], None, TEMPERATURE, TOP_P, observe)[0]
    tokens = [("<s>", "begin")]
    if photos:
        photo, attention = look(photos, product)
        cls_tokens = photos.read([product.image])                               # (1, K, V)
        tokens += [(f"I′{k}", f"I′{k}") for k in range(1, len(attention) + 1)]
        steps = explain_page.image_steps(photo, attention, cls_tokens[0], model.project(cls_tokens)[0])
    prompt = tokenizer.encode(base_question(product, run.config.text).prompt)
    tokens += label_prompt(prompt, run.config.text, tokenizer)
    return answer, [*steps, explain_page.input_step(tokens),
                    explain_page.layers_step(tokens, *answering_position(model.llama, calls)),
                    explain_page.draws_step(draws, TEMPERATURE, TOP_P, tokenizer),
                    explain_page.answer_step(answer, product.value)]


def answering_position(llama, calls):
    """For each layer (H, N), attention weights of the last position of X; and |h' - h| / |h| of its
    adapter.
    """
    attention, changes, d = [], [], llama.config.head_dim

    def rotate(x):
        position = torch.arange(len(x), device=x.device)
        return apply_rotary(x, *rotary_table(position, d, llama.config.rope_theta))

    for block in llama.layers:
        h, changed = calls[block.adapter]                                       # (N, D) each
        attention.append(attention_weights(block.self_attn, changed, d, -1, rotate))
        changes.append(((changed - h).float().norm() / h.float().norm()).item())
    return attention, changes


def look(photos, product):
    """The ViT reads the photo again: (size, size, 3) uint8, and {layer: attention weights of [cls]}."""
    photo = crop(open_photo(photos.images / product.image), photos.vit.config.image_size)
    modules = {layer: photos.vit.layers[layer - 1].self_attn for layer in photos.cls_layers}
    with first_calls(modules.values()) as calls:
        photos.vit(normalize(photo)[None].to(photos.device), photos.cls_layers)
    return photo, {layer: attention_weights(module, calls[module][0][0], photos.width // module.heads, 0)
                    for layer, module in modules.items()}                       # token 0 is [cls]


def label_prompt(prompt, text, tokenizer):
    """The ids of [Q, C] as [(text, part)]: a line for Q, one for C if the run reads texts, and "Answer:"."""
    parts = ["Q", *["C"] * text, "Answer:"]
    tokens = []
    for token in prompt:
        tokens.append((explain_page.token_text(token, tokenizer), parts[0]))
        if "\n" in tokenizer.decode([token]) and len(parts) > 1:
            parts.pop(0)
    return tokens


# ---------------------------------------------------------------------------------------- the command


def main():
    parser = run_parser("Follow one product from its photo to its answer; writes a page to RUN/explain/.")
    parser.add_argument("id", metavar="ID", nargs="?", help="of a product; or give --image and --text")
    args = parse_product(parser)
    run, _ = load_run(args, sys.stderr)
    if args.id:                                         # without --attribute all that it has
        products = [p for split in SPLITS for p in read_split(run.sources.data, run.config.dataset, split)
                    if p.id == args.id and args.attribute.lower() in ("", p.attribute.lower())]
    else:
        products = [run.product(args.image, args.text, args.attribute)]
    if not products:
        raise UserError(f"{args.id}: no product of {run.config.dataset} has this ID and this attribute; the "
                        "IDs are in its TSV files")
    for product in products:
        _, steps = explain(run, product)
        name = re.sub(r"\W", "-", f"{product.id} {product.attribute}")[-60:]        # at most 240 bytes
        path = run.folder / "explain" / f"{name}.html"
        write_text(path, explain_page.page_html(product, steps, describe(run.config, run.sources)))
        print(*explain_page.summary(product, steps), f"as a page: {path}", sep="\n")


if __name__ == "__main__":
    console.run(main)
