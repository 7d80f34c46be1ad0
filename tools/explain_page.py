"""The steps of tools/explain.py, in words and pictures; the lines and the page that show them.

The page is one HTML file, with every picture inside it, and no scripts.
"""

import math
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from base.console import printable
from support.report import inline

LIKELIEST = 5                                           # tokens shown for each token of the answer
# Colours of X's parts by their first letter: Okabe and Ito's, which colour-blind readers can tell apart
COLOURS = {"b": "#999", "I": "#E69F00", "Q": "#56B4E9", "C": "#009E73", "A": "#CC79A7"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; color: #1b1b1b;
background: #fff; overflow-wrap: anywhere; print-color-adjust: exact }
section { border-top: 1px solid #d0d0d0; margin-top: 1.2rem } p { max-width: 46rem }
small { color: #595959 } pre { overflow-x: auto; font-size: .8rem }
img, svg { display: block; width: 100%; height: auto }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)) }
.row > * { max-width: 22rem } .tokens span { border-radius: 4px; padding: 0 .35em; margin: 2px }
.bar { display: flex; position: relative; height: 1.3rem; margin: .2rem 0; background: #eee }
.bar i { overflow: hidden; white-space: nowrap; border-right: 1px solid #fff; font: .75rem/1.6 monospace }
.bar b { position: absolute; height: 1.6rem; width: 3px; background: #1b1b1b }
.scale { display: flex; justify-content: space-between; font-size: .75rem }
"""


class Step(NamedTuple):
    """A step from photo to answer.

    symbol, shape  in the paper, and here;  code: the functions that compute it, as "file: name"
    lines, picture what was computed, as lines of text and as HTML
    """

    number: int
    title: str
    symbol: str
    shape: str
    code: str
    text: str
    lines: list
    picture: str = ""


def token_text(token, tokenizer):
    """A token as text: "▁" is a space, "↵" a new line; the bytes of a character without a token stay
    <0x..>.
    """
    piece = "end" if token == tokenizer.eos_id else tokenizer.pieces.id_to_piece(token)
    return "↵" if piece == "<0x0A>" else piece


# ---------------------------------------------------------------------------------------- the steps


def image_steps(photo, attention, I, projected):
    """photo: (size, size, 3), uint8; attention: {layer of the ViT: (heads, 1 + patches)}, of [cls];
    I: (K, V); projected: (K, D)
    """
    size = len(photo)
    lines, pictures = [], ""
    for layer, weights in attention.items():
        heads, tokens = weights.shape
        side = math.isqrt(tokens)
        patch = size // side
        cls, *patches = weights.mean(0).tolist()
        lines.append(f"layer {layer:2}: {cls:4.0%} on [cls] itself; most on one patch: {max(patches):.1%} "
                     f"(equal: {1 / tokens:.1%})")
        light = np.kron(np.reshape(patches, (side, side, 1)) / max(patches), np.ones((patch, patch, 1)))
        seen = Image.fromarray((photo * light).astype(np.uint8))
        pictures += f"<div>{inline(seen, 'png', 'attention')}layer {layer}</div>"
    return [Step(
        1, "The photo, as the ViT sees it", "the product image", f"(3, {size}, {size})", "vit.py: preprocess",
        f"The photo is scaled so that its shorter side has {size} pixels, and its centre is cut out. The ViT "
        f"reads it as {side} × {side} patches of {patch} × {patch} pixels: one token each (section 4.1).", [],
        f"<div class='row'>{inline(Image.fromarray(photo), 'png', 'photo')}</div>",
    ), Step(
        2, "Where [cls] looks in the ViT", "attention inside the image encoder",
        f"{len(attention)} layers × ({heads} heads, {tokens} tokens)", "vit.py: Attention.forward",
        "The ViT has one more token, [cls]. In every layer it collects information from the patches. The "
        "brighter a patch, the more attention [cls] gives to it (mean over the heads). Early layers know "
        "edges and textures, late ones parts and objects; so the paper takes [cls] after several layers "
        "(section 2.1).", lines, f"<div class='row'>{pictures}</div>",
    ), Step(
        3, "The image embedding I, and I′ after the projector", "I, I′",
        f"{tuple(I.shape)} and {tuple(projected.shape)}", "vit.py: ViT.forward, eiven.py: Projector.forward",
        "Row k of I is [cls] after the k-th of these layers. The projector is trained: it turns each row "
        "into a token as wide as LLaMA's text tokens (section 2.1).", [],
    )]


def input_step(tokens):
    """tokens: X as [(text, part)]"""
    spans, parts = "", {}
    for text, part in tokens:
        spans += f"<span style='background: {COLOURS[part[0]]}'>{escape(text)}</span> "
        parts[part] = parts.get(part, "") + text
    return Step(
        4, "The input of LLaMA", "X = [I′, Q, C]", f"{len(tokens)} tokens",
        "eiven.py: EIVEN.input_ids, eiven.py: EIVEN.embed",
        "LLaMA reads one sequence of tokens: the begin token, the visual tokens I′ (orange), the question Q "
        "(blue), the context C (title and category, green), and the mark “Answer:” (pink). A token is often "
        "only a piece of a word; ▁ stands for a space, ↵ for a new line (section 2.2).",
        [f"{part:8} {text}" for part, text in parts.items()], f"<p class='tokens'>{spans}</p>")


def layers_step(tokens, attention, changes):
    """attention: for each layer (H, N), of the last position of X; changes: |h' - h| / |h| of its adapter"""
    parts = dict.fromkeys(part for _, part in tokens)
    lines = ["layer  " + "".join(f"{part:>8}" for part in parts) + "   adapter"]
    for i, (weights, change) in enumerate(zip(attention, changes), start=1):
        shares = dict.fromkeys(parts, 0.0)
        for (_, part), share in zip(tokens, weights.mean(0).tolist()):
            shares[part] += share
        lines.append(f"{i:5}  " + "".join(f"{share:8.1%}" for share in shares.values()) + f"{change:10.3f}")
    return Step(
        5, "What the answering position reads, layer by layer", "h, h′",
        f"{len(attention)} layers × ({len(weights)} heads, {len(tokens)} tokens)",
        "llama.py: Attention.forward, adapters.py: Adapter.forward",
        "The last position of X predicts the first token of the answer. Each line is a layer, and shows to "
        "which part of X this position gives its attention (mean over the heads). Attention shows where a "
        "layer reads, not what it makes of it. The adapter changes the input h of the attention to h′; the "
        "column “adapter” is |h′−h|/|h| (section 2.2).", lines)


def draws_step(draws, temperature, top_p, tokenizer):
    """draws: [(logits (pieces,), uniform number, drawn token), ...], as eiven.nucleus had them"""
    lines, bars = [], ""
    for t, (logits, uniform, drawn) in enumerate(draws, start=1):
        order = logits.argsort(descending=True, stable=True)
        probability = logits.softmax(-1).tolist()
        p = (logits[order] / max(temperature, 1e-6)).softmax(-1)                # at temperature 0 all on one
        nucleus = int((p.cumsum(-1) - p < top_p).sum())
        share = (p[:nucleus] / p[:nucleus].sum()).tolist()
        likeliest = order[:LIKELIEST].tolist()
        names = [token_text(token, tokenizer) for token in likeliest]
        name = token_text(drawn, tokenizer)
        likely = ", ".join(f"{text} {probability[token]:.3f}" for text, token in zip(names, likeliest))
        lines.append(f"{t:2}. {name} {probability[drawn]:.3f}  (draw {uniform:.3f} from a nucleus of "
                     f"{nucleus:,}; likeliest: {likely})")
        bar = "".join(f"<i style='background: {COLOURS['I']}; width: {100 * part:.2f}%'>{escape(text)}</i>"
                      for part, text in zip(share, names))
        bars += (f"<div>{t}. <b>{escape(name)}</b><div class='bar'>{bar}"
                 f"<b style='left: {100 * uniform:.2f}%'></b></div>"
                 "<div class='scale'><span>0</span><span>0.5</span><span>1</span></div></div>")
    return Step(
        6, "The answer, token after token", "p(R_t | X, R_<t)",
        f"{len(draws)} tokens × {len(logits):,} logits", "llama.py: LLaMA.logits, eiven.py: nucleus",
        "LLaMA gives every token a probability. For the draw, its logits are divided by the temperature, "
        f"{temperature:g} (0: the likeliest token is taken). The nucleus is the smallest set of likeliest "
        f"tokens that then reach {top_p:g} together; the bar shows it, from 0 to 1. A random number, the "
        "line in the bar, chooses one of them (section 4.1).",
        lines, f"<div class='row'>{bars}</div>")


def answer_step(answer, gold):
    """gold: the label, "" if there is none"""
    judged = "" if not gold else ", which is right" if answer.value == gold else f"; the gold value is {gold}"
    return Step(
        7, "The answer", "R", "text", "eiven.py: EIVEN.generate, evaluate.py: exact_match",
        "The tokens are joined to the answer. Its probability is the product of its tokens' probabilities, "
        "with the end token. It is right only if it equals the gold value exactly (section 4.1).",
        [f"{answer}{judged}"])


# ---------------------------------------------------------------------------------------- all steps


def title(product):
    return f"{product.id[:60] or 'product'}: {product.attribute}"


def summary(product, steps):
    """The steps as lines of text."""
    lines = [title(product)]
    for step in steps:
        lines += [f"{step.number}. {step.title}: {step.symbol}", f"   {step.shape}   {step.code}",
                  *(f"     {printable(line)}" for line in step.lines)]
    return lines


def page_html(product, steps, sources):
    """The page.  sources: which data and weights were used"""
    sections = ""
    for step in steps:
        lines = escape("\n".join(step.lines))
        sections += (f"<section><h2>{step.number}. {step.title}</h2><p>{step.text}</p>"
                     f"<p><small>in the paper: <b>{escape(step.symbol)}</b>; shape: {step.shape}; computed "
                     f"by: {step.code}</small></p>{step.picture}<pre>{lines}</pre></section>\n")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title(product))}</title>
<style>{STYLE}</style>
<h1>{escape(title(product))}, from photo to answer</h1><p>{escape(product.context)}</p>
<p><b>{escape(steps[-1].lines[0])}</b></p><p><small>{escape(sources)}</small></p>
{sections}
</html>
"""
