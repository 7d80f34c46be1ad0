"""The HTML page of an explanation (support/explain.py): one file, with every picture inside it, and no scripts."""

import base64
import html
import io

import numpy as np
from PIL import Image

from vit import CLIP_MEAN, CLIP_STD

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILLION, ORANGE = (0, 114, 178), (213, 94, 0), (230, 159, 0)
PART_CLASS = {"begin": "begin", "Q": "question", "C": "context", "Answer:": "mark"}       # the rest are visual tokens

STYLE = """
:root { --ink: #1b1b1b; --paper: #fff; --soft: #595959; --line: #d0d0d0; --box: #f5f5f5; --bar: #0072B2 }
@media screen and (prefers-color-scheme: dark) {
:root { --ink: #e8e8e8; --paper: #16181b; --soft: #a8a8a8; --line: #44484d; --box: #212429; --bar: #56B4E9 } }
* { box-sizing: border-box } html { -webkit-text-size-adjust: 100% }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; color: var(--ink);
background: var(--paper); overflow-wrap: anywhere; -webkit-print-color-adjust: exact; print-color-adjust: exact }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 } h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .4rem }
h3 { font-size: 1rem; margin: 0 0 .3rem } p { margin: .4rem 0; max-width: 46rem } small, .soft { color: var(--soft) }
section { border-top: 1px solid var(--line); padding: 1.2rem 0 .4rem; margin-top: 1.2rem }
code { font: .9em ui-monospace, monospace } .answer { font-size: 1.15rem; font-weight: 600 }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; font-size: .875rem; color: var(--soft); margin: .5rem 0 .8rem }
.facts b { font-weight: 600; color: var(--ink) }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 46%), 1fr)) }
.row figure { max-width: 22rem }
.row.wide { grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)) }
figure { margin: 0; break-inside: avoid } figure svg, figure img { display: block; width: 100%; height: auto }
figcaption { font-size: .875rem; margin-top: .3rem } .photo { max-width: 22rem }
.tokens { display: flex; flex-wrap: wrap; gap: 4px } .tokens span { border-radius: 4px; padding: 0 .35em; font: .875rem/1.7
ui-monospace, monospace; color: #000; white-space: pre-wrap }
.begin { background: #999 } .image { background: #E69F00 } .question { background: #56B4E9 } .context { background: #009E73 }
.mark { background: #CC79A7 }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .875rem; margin: .5rem 0 }
.key i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .4em; vertical-align: -.08em }
.rows { display: grid; grid-template-columns: auto auto 1fr; gap: 0 .8rem; font-size: .875rem; margin-bottom: 1rem }
.rows img { grid-column: 3; width: 100%; height: 0; min-height: 100% } .rows .n { grid-column: 2; text-align: right }
.layers { display: grid; grid-template-columns: auto 1fr auto; gap: .25rem .7rem; align-items: center; font-size: .875rem }
.stack { display: flex; height: 1.15rem; border-radius: 3px; overflow: hidden; background: var(--box) }
.stack i { display: block; border-right: 1px solid var(--paper) }
.n { font-variant-numeric: tabular-nums; white-space: nowrap }
.box { overflow-x: auto; margin: .8rem 0 } table { border-collapse: collapse; font-size: .875rem;
overflow-wrap: normal }
td, th { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 } .card table { width: 100% }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem .8rem; break-inside: avoid; min-width: 0 }
.card td:nth-child(2) { text-align: left; font-family: ui-monospace, monospace; white-space: pre }
.inside { font-weight: 600 } .inside td:first-child { border-left: 4px solid #E69F00; padding-left: .4rem }
.chosen td { background: var(--box) } .p { width: 30%; padding-right: 0 } .p i { display: block; height: .8rem;
background: var(--bar); border-radius: 2px } .draw { position: relative; height: 1.7rem; margin: .3rem 0 .9rem }
.draw .stack { position: relative; height: 1.2rem; background: #BBB } .draw .stack i { position: absolute; height: 100%;
background: #E69F00; color: #000; font: .75rem/1.6 ui-monospace, monospace; overflow: hidden;
text-align: center; white-space: nowrap }
.draw b { position: absolute; top: -.2rem;
height: 1.7rem; width: 3px; background: var(--ink); outline: 1px solid var(--paper) } .draw small { position: absolute;
top: 1.25rem; white-space: nowrap }
@media (max-width: 30rem) { .box td, .box th { padding: .15rem .3rem; font-size: .78rem } }
@media print { body { font-size: 10.5pt; max-width: none; padding: 0 } h2 { break-after: avoid } .facts { break-after: avoid }
.box { overflow: visible } }
"""


def escape(text):
    """HTML of a text; what is no valid Unicode (half a pair of surrogates, from a file name) becomes a question mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def data_uri(image, kind="png", **how):
    data = io.BytesIO()
    image.save(data, kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def shown_photo(pixels):
    """The pixels that the ViT reads as an image again: the normalisation undone."""
    values = pixels.permute(1, 2, 0).numpy() * np.float32(CLIP_STD) + np.float32(CLIP_MEAN)
    return Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))


def heat_map(matrix, largest):
    """A pixel for each number of (rows, columns): blue below 0, white at 0, vermillion above; full colour at `largest`."""
    share = (matrix.float().numpy() / max(largest, 1e-12)).clip(-1, 1)[..., None]       # (rows, columns, 1)
    ends = np.where(share < 0, np.float32(BLUE), np.float32(VERMILLION))
    return Image.fromarray((255 + (ends - 255) * abs(share)).round().astype(np.uint8))


# ------------------------------------------------------------------------------------------------ a picture of each step


def photo_picture(e):
    size, patch = e.pixels.shape[-1], e.patch_size
    lines = "".join(f"M{at} 0V{size}M0 {at}H{size}" for at in range(patch, size, patch))
    width = size / 500
    return (f"<figure class='photo'><svg viewBox='0 0 {size} {size}' role='img' aria-label='the photo with its patches'>"
            f"<image id='photo' width='{size}' height='{size}' href='{data_uri(shown_photo(e.pixels))}'/>"
            f"<path d='{lines}' stroke='#000' stroke-width='{2 * width:.3f}' opacity='.45'/>"
            f"<path d='{lines}' stroke='#fff' stroke-width='{width:.3f}' opacity='.9'/></svg></figure>")


def cls_picture(e):
    size, side = e.pixels.shape[-1], e.pixels.shape[-1] // e.patch_size
    figures = []
    for layer, weights in zip(e.vit_layers, e.cls_attention):
        mean = weights.mean(0).numpy()                                                  # (1 + patches,)
        low, high = mean[1:].min(), mean[1:].max()
        alpha = ((mean[1:] - low) / max(high - low, 1e-12)).reshape(side, side)
        heat = np.empty((side, side, 4), np.uint8)
        heat[..., :3], heat[..., 3] = ORANGE, (235 * alpha).round()
        figures.append(
            f"<figure><svg viewBox='0 0 {size} {size}' role='img' aria-label='attention of [cls] in layer {layer}'>"
            f"<use href='#photo' style='filter: grayscale(1) brightness(.75)'/>"
            f"<image width='{size}' height='{size}' preserveAspectRatio='none' style='image-rendering: pixelated' "
            f"href='{data_uri(Image.fromarray(heat))}'/></svg><figcaption><b>layer {layer}</b>: a patch gets "
            f"{low:.1%} to {high:.1%} (equal shares: {1 / len(mean):.1%}); [cls] itself {mean[0]:.1%}</figcaption></figure>")
    return f"<div class='row'>{''.join(figures)}</div>"


def embedding_picture(e):
    def embedding(name, rows):
        K, width = rows.shape
        picture = heat_map(rows, 2 * rows.square().mean().sqrt().item())
        # Each row many pixels high: a browser that makes the picture narrower must not mix the rows.
        picture = picture.resize((max(1, 300 // width) * width, 20 * K), Image.Resampling.NEAREST)
        labels = "".join(f"<span style='grid-row: {k}'>{name}{k}, layer {layer}</span>"
                         f"<span class='n' style='grid-row: {k}'>{row.norm():.2f}</span>"
                         for k, (layer, row) in enumerate(zip(e.vit_layers, rows), start=1))
        return (f"<h3>{name} ({K}, {width})</h3><div class='rows'>{labels}<img alt='heat map of {name}' "
                f"style='grid-row: 1 / {K + 1}' src='{data_uri(picture)}'></div>")

    return (embedding("I", e.I) + embedding("I′", e.I_projected)
            + "<p><small>A row is a token, with its norm; a stripe is one number: blue below 0, white at 0, red-orange above. "
            "The colour is full at twice the root mean square.</small></p>")


def part_class(part):
    return PART_CLASS.get(part, "image")


def key(e):
    """The legend of the colours of X's parts."""
    names = {"begin": "begin token", "image": "visual tokens I′", "question": "question Q", "context": "context C",
             "mark": "the mark “Answer:”"}
    found = dict.fromkeys(part_class(part) for _, part in e.tokens)
    return "<div class='key'>" + "".join(f"<span><i class='{c}'></i>{names[c]}</span>" for c in found) + "</div>"


def input_picture(e):
    return key(e) + "<div class='tokens'>" + "".join(
        f"<span class='{part_class(part)}'>{escape(text)}</span>" for text, part in e.tokens) + "</div>"


def layers_picture(e):
    shares = e.shares()
    changes = ["merged" if change is None else f"{change:.3f}" for change in e.changes]
    bars = "".join(
        f"<span>layer {i}</span><div class='stack'>"
        + "".join(f"<i class='{part_class(part)}' style='width: {100 * share:.2f}%'></i>" for part, share in row.items())
        + f"</div><span class='n'>{change}</span>" for i, (row, change) in enumerate(zip(shares, changes), start=1))
    head = "".join(f"<th>{escape(part)}</th>" for part in shares[0])
    rows = "".join(f"<tr><td>{i}</td>" + "".join(f"<td>{share:.1%}</td>" for share in row.values()) + f"<td>{change}</td></tr>"
                   for i, (row, change) in enumerate(zip(shares, changes), start=1))
    merged = ("<p>The adapters of this model are merged into the weights of q, k and v: there is no h′ to measure.</p>"
              if None in e.changes else "")
    return (f"{key(e)}{merged}<div class='layers'><b></b><b>attention of the answering position</b><b>adapter</b>{bars}</div>"
            f"<div class='box'><table><tr><th>layer</th>{head}<th>adapter</th></tr>{rows}</table></div>")


def draws_picture(e):
    def card(t, token):
        chosen = next(c for c in token.choices if c.chosen)
        rows = "".join(
            f"<tr class='{'inside ' * bool(c.share)}{'chosen' * c.chosen}'><td>{c.rank}</td><td>{escape(c.text)}</td>"
            f"<td>{c.probability:.4f}</td><td class='p'><i style='width: {100 * c.probability:.1f}%'></i></td></tr>"
            for c in token.choices)
        draw = ""
        if e.temperature > 0:
            parts = "".join(
                f"<i style='left: {100 * c.share[0]:.2f}%; width: {100 * (c.share[1] - c.share[0]):.2f}%'>{escape(c.text)}</i>"
                for c in token.choices if c.share)
            side = f"left: {100 * token.uniform:.1f}%" if token.uniform < 0.5 else f"right: {100 - 100 * token.uniform:.1f}%"
            draw = (f"<p>{token.nucleus:,} token{'s' * (token.nucleus > 1)} in the nucleus; the draw {token.uniform:.3f} "
                    f"chooses <b>{escape(chosen.text)}</b>.</p><div class='draw'><div class='stack'>{parts}</div>"
                    f"<b style='left: calc({100 * token.uniform:.2f}% - 1px)'></b><small style='{side}'>{token.uniform:.3f}"
                    "</small></div>")
        return f"<div class='card'><h3>{t}. {escape(chosen.text)}</h3>{draw}<table>{rows}</table></div>"

    bar = (" The bar is the nucleus, from 0 to 1; the line on it is the draw. Tokens of the nucleus that are not listed are grey."
           if e.temperature > 0 else "")
    return ("<p><small>Rank, token, probability (at temperature 1). An orange edge and bold type mark the nucleus. "
            f"The shaded row is the chosen token.{bar}</small></p><div class='row wide'>"
            + "".join(card(t, token) for t, token in enumerate(e.answer_tokens, start=1)) + "</div>")


PICTURES = {1: photo_picture, 2: cls_picture, 3: embedding_picture, 4: input_picture, 5: layers_picture, 6: draws_picture}


def page_html(e, steps, verdict):
    """The page of an Explanation: its steps in words, and a picture of each."""
    product = e.product
    sections = "".join(
        f"<section><h2>{step.number}. {escape(step.title)}</h2><p>{escape(step.text)}</p><div class='facts'>"
        f"<span>in the paper: <b>{escape(step.symbol)}</b></span><span>shape: <b>{escape(step.shape)}</b></span>"
        f"<span>computed by: {', '.join(f'<code>{escape(code)}</code>' for code in step.code)}</span></div>"
        + (PICTURES[step.number](e) if step.number in PICTURES else f"<p class='answer'>{escape(verdict)}</p>")
        + "</section>" for step in steps)
    name = product.id[:60] + "…" * (len(product.id) > 60) if product.id else "One product"
    no_photo = "" if e.pixels is not None else "<p>This run does not use photos, so steps 1 to 3 are left out.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{escape(name)}: {escape(product.attribute)}, from photo to answer</title>
<style>{STYLE}</style></head><body>
<h1>{escape(name)}: {escape(product.attribute)}, from photo to answer</h1>
<p>{escape(product.context) or "(no text)"}</p>
<p class="answer">{escape(verdict)}</p>
<p><small>{escape(e.sources)} Temperature {e.temperature:g}, top-p {e.top_p:g}.</small></p>{no_photo}
{sections}
</body></html>
"""
