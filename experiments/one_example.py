"""One example, token by token: writes docs/one-example.md and its pictures.

    python -m experiments.one_example              the page and its pictures
    python -m experiments.one_example --run RUN    docs/demo.svg and docs/product-card.svg, with answers of a
                                                   run in the demo world

A picture is a list of entries (x, y, width, height, kind, line of text, line of text ...), 400 units wide.
The kind chooses the colours.  Ids, positions and shapes come from the functions that the page names.
"""

import argparse
import base64
import io
from html import escape
from textwrap import wrap

import torch

from base import console
from base.console import PROJECT, user_path, write_text
from base.packing import pack
from base.tsv import read_tsv
from data import base_question, comparison, encode_examples, read_split
from demo import world
from eiven import EIVEN, cls_layers
from llama import load_llama
from tools.explain import label_prompt
from tools.explain_page import token_text
from vit import load_vit, preprocess

CARD = "DEMO04291"                                      # the product on the product card
HEADINGS = {"B": "BOS, then I′: four visual tokens a photo", "Q": "Q, the question",
            "C": "C, title and category", "A": "“Answer:”, then R: the loss is on R alone"}
# The tokens' colours are Okabe and Ito's, a little lighter: colour-blind readers can tell them apart.
STYLE = """
text { font: 13px -apple-system, Segoe UI, Helvetica, Arial, sans-serif; fill: #1b1b1b; text-anchor: middle }
.note text { text-anchor: start } .note rect { fill: none } .pad rect { fill: none; stroke: #888 }
.page { fill: #fff } .B rect, .A rect { fill: #aaa } .I rect { fill: #e69f00 } .Q rect { fill: #56b4e9 }
.C rect { fill: #2bb58a } .R rect { fill: #e08fc0 } .loss rect { fill: #b8437f }
@media (prefers-color-scheme: dark) {
text { fill: #eee } .page { fill: #16191d } .loss rect { fill: #f08cc0 }
}
.B text, .A text, .I text, .Q text, .C text, .R text { font: 12px ui-monospace, monospace; fill: #111 }
"""


# ---------------------------------------------------------------------------------------- drawing


def svg(entries):
    """A picture as the text of its file."""
    height = max(y + height for _, y, _, height, *_ in entries) + 8
    shapes = "\n".join(shape(*entry) for entry in entries)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 {height:g}" width="480">
<style>{STYLE}</style>
<rect class="page" width="400" height="{height:g}"/>
{shapes}
</svg>
"""


def shape(x, y, width, height, kind, *lines):
    """An entry as SVG: a photo, a note (text that begins at x), or a box with its text in the middle."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    if kind == "photo":
        return f'<image {place} href="{lines[0]}"/>'
    x += width / 2
    y += height / 2 - 8 * len(lines) - 3.5
    texts = ""
    for line in lines:
        y += 16
        texts += f'<text x="{x:.1f}" y="{y:.1f}">{escape(str(line))}</text>'
    return f'<g class="{kind}"><rect {place} rx="2"/>{texts}</g>'


def note(x, y, *lines):
    return x, y, 0, 16 * len(lines), "note", *lines


def photo(x, y, side, id):
    """The photo of a product of the demo world."""
    jpeg = io.BytesIO()
    world.photo_of(id).save(jpeg, "jpeg")
    return x, y, side, side, "photo", f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------- one batch


def tokens_of(model, example, visual_tokens):
    """[X, R] as a list of (kind, text, id), a token each."""
    ids = [*model.input_ids(example, visual_tokens, len(example.answer)), *example.answer]
    prompt = label_prompt(example.prompt, len(example.photos), model.tokenizer)     # a line of C a product
    end = "".join(part[0] for _, part in prompt) + "R" * len(example.answer)
    kinds = "B" + "I" * (len(ids) - 1 - len(end)) + end
    return [(kind, "I′" if kind == "I" else token_text(id, model.tokenizer), id)
            for kind, id in zip(kinds, ids)]


def token_rows(tokens):
    """Each token as a box with its position, text and id; a line over R."""
    headings, entries = HEADINGS.copy(), []
    x, y = 0, -56
    for position, (kind, text, id) in enumerate(tokens):
        width = 9 + 7.3 * max(len(text), len(str(id)))
        if kind in headings:                            # its first token begins a row
            x = 8
            y += 84
            entries.append(note(x, y - 24, headings.pop(kind)))
        elif x + width > 392:
            x = 8
            y += 63
        if kind == "R":
            entries.append((x, y - 5, width + 3, 3, "loss"))
        entries.append((x, y, width, 52, kind, position, text, id))
        x += width + 3
    return svg(entries)


def packing(tokens, base, both):
    """What base/packing.py makes of two sequences: a box for each token.  base, both: the kinds of theirs."""
    back, (_, row) = tokens.back.tolist(), tokens.table.view(2, -1).tolist()
    n, T, N = len(base), len(both), len(back)
    shared = n + T - N
    nodes = base + both[shared:]
    bars = [
        (f"Prefix tree: the first {shared} tokens are shared, so N = {N}", 0, base),
        ("From there the second sequence is a branch of its own", shared, both[shared:]),
        (f"Linear layers read the list of nodes, ({N}, D)", 0, nodes),
        (f"Attention reads a table. Row 0: {n} nodes, padding", 0, base + ["pad"] * (T - n)),
        (f"Row 1: nodes {row[0]} to {row[shared - 1]}, {row[shared]} to {row[-1]}", 0, both),
        (f"The list again (back): places {back[0]} to {back[shared - 1]}, {back[shared]} to {back[n - 1]}, "
         f"{back[n]} to {back[-1]}", 0, nodes),
    ]
    entries = []
    for y, (caption, start, kinds) in zip(range(8, 300, 48), bars):
        entries.append(note(8, y, caption))
        entries += [(8 + 384 * i / N, y + 20, 384 / N - 1, 20, kind) for i, kind in enumerate(kinds, start)]
    return svg(entries)


def one_example():
    """{file name: content} of the page and its pictures."""
    torch.manual_seed(5)                                # for the projector's first weights
    vit = load_vit(world.VIT)
    llama, tokenizer = load_llama(world.LLAMA, torch.float32)
    model = EIVEN(llama, tokenizer, vit.config.hidden_size)
    products = read_split(world.write_dataset(), "general", "train")
    first, second = [p for p in products if p.attribute == "Pattern"][:2]
    batch, _ = encode_examples([base_question(first), comparison(first, second, "judge_last")], tokenizer)
    # As in EIVEN.forward, but in one bucket
    pixels = torch.stack([preprocess(world.photo_of(p.id), vit.config.image_size) for p in (first, second)])
    I = vit(pixels, cls_layers(vit.config.num_hidden_layers))
    visual_tokens = model.project(I)
    base, both = sequences = [tokens_of(model, example, visual_tokens) for example in batch]
    tokens = pack([[id for *_, id in row[:-1]] for row in sequences], [len(e.answer) for e in batch])
    x = model.embed(tokens.ids, visual_tokens)
    [q] = tokens.pad(x.unflatten(-1, (-1, llama.config.head_dim)))
    h = llama(x, tokens)
    logits = model.logits(h)
    log_p = model.answer_log_probs(batch, I)
    X = len(base) - len(batch[0].answer)                # its length
    predictions = "\n".join(f"| `{text}` | {X - 1 + t} | {-log_p[t]:.1f} |"
                            for t, (_, text, _) in enumerate(base[X:]))
    page = f"""# One example, token by token

`python -m experiments.one_example` writes this page and its pictures of tokens and packing, from the demo
world's data and frozen models; a unit test checks them. Adapters and projector are not trained yet: the
adapters change nothing, the projector is random.

## A base question

The product is {first.id}, its {first.attribute} is {first.value}. Each box is a token: its position in the
sequence, its text (▁ is a space, ↵ a new line, `end` the EOS token), and its id.

![The tokens of a base question](one-example-base.svg)

LLaMA's tokens have the ids 0 to {llama.config.vocab_size - 1:,}. Visual tokens get the ids after these, so
that a sequence is one list.

**Teacher forcing**: in training the true answer is part of the input. Each token of R is predicted from all
tokens before it, in one pass. So the last token of R is not an input. Here:

| R | predicted at position | -log p |
|---|---|---|
{predictions}

## A comparison

*Learning-by-Comparison* (`data.comparison`) adds a second product: {second.id}, {second.value}.

![The tokens of a comparison](one-example-comparison.svg)

## From photo to loss

Both examples are one batch, so B = {len(batch)}. They share a photo, so P = {len(pixels)}.
N counts tokens, M those whose logits are used, H heads; pieces are the tokenizer's vocabulary.

| function | gives | shape |
|---|---|---|
| `vit.preprocess` | (P, 3, size, size) | {tuple(pixels.shape)} |
| `ViT.forward` | I (P, K, V) | {tuple(I.shape)} |
| `EIVEN.project` | I′ (P, K, D) | {tuple(visual_tokens.shape)} |
| `EIVEN.input_ids` | X, then R without its end | {len(base) - 1} and {len(both) - 1} tokens |
| `pack` | ids (N,) | {tuple(tokens.ids.shape)} |
| `EIVEN.embed` | x (N, D) | {tuple(x.shape)} |
| `Tokens.pad`, in attention | q (B, H, T, d) | {tuple(q.shape)} |
| `Tokens.unpad`, in attention | (N, D) | {tuple(tokens.unpad([q]).shape)} |
| `LLaMA.forward` | h (M, D) | {tuple(h.shape)} |
| `EIVEN.logits` | logits (M, pieces) | {tuple(logits.shape)} |
| `EIVEN.answer_log_probs` | log p (M,) | {tuple(log_p.shape)} |
| `EIVEN.forward` | L, the loss | {model(batch, I):.1f} |

The first three steps at the paper's size:

![A photo becomes 196 patches and [cls]; [cls] after four layers becomes I, then I′](patches.svg)

## Packing

`base/packing.py` stores a shared prefix once. Padding (empty boxes) exists in attention alone. `back` then
takes one copy of each token; of a shared token, the last. (Here both sequences are padded to one length. In
training there are two buckets, of shorter and of longer sequences.)

![Prefix tree, list, padded table, and back](packing.svg)

## The draw

When R is not known, `eiven.nucleus` draws it token by token. The logits are divided by the temperature first
(0.1 in the paper). The nucleus (orange) is the smallest set of most probable tokens that reaches 0.75. A
random number marks a point of it. The product DEMO04466 (`python -m tools.explain RUN DEMO04466`), at two
temperatures:

![Two nuclei on a number line](nucleus.svg)
"""
    return {"one-example.md": page, "one-example-base.svg": token_rows(base),
            "one-example-comparison.svg": token_rows(both),
            "packing.svg": packing(tokens, *([kind for kind, *_ in row[:-1]] for row in sequences))}


# ---------------------------------------------------------------------------------------- answers


def answers_of(run):
    """{file name: content} of the pictures that show answers of a run in the demo world."""
    table = read_tsv(run / "predictions.tsv", "the answers of a run in the demo world")
    rows = {row["id"]: row for _, row in table}
    card = rows[CARD]
    demo = []
    headings = "The photo alone tells", "The title alone tells", "Photo and title together tell"
    for y, way, heading in zip((8, 240, 472), world.WAYS, headings):
        demo.append(note(8, y, heading))
        of_way = [id for id in rows if world.describe(id)[2] == way]
        for x, id in zip((8, 105, 202, 299), of_way):
            row = rows[id]
            answer = f"{row['prediction']}{' (wrong)' * (row['prediction'] != row['attribute_values'])}"
            demo += [photo(x, y + 20, 93, id),
                     note(x, y + 116, *wrap(row["texts"], 12), f"{row['attribute_names']}:", answer)]
    return {"demo.svg": svg(demo), "product-card.svg": svg([
        photo(8, 8, 112, CARD),
        note(132, 8, *wrap(card["texts"], 36), card["category"], f"{card['attribute_names']}?"),
        (132, 92, 250, 28, "R", f"{card['prediction']}, probability {float(card['probability']):.2f}")])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=user_path, help="draw docs/demo.svg and docs/product-card.svg instead")
    args = parser.parse_args()
    made = answers_of(args.run) if args.run else one_example()
    for name, content in made.items():
        write_text(PROJECT / "docs" / name, content)
        print(f"written: docs/{name}")


if __name__ == "__main__":
    console.run(main)
