"""The picture of figure 2 with this project's names and shapes, docs/figure-2.svg:  python -m experiments.figure_2

Shapes and numbers are read off the model classes at LLaMA-7B's and ViT-B/16's sizes, so the picture cannot grow old.
"""

import html

import torch

from base import console
from base.console import write_text
from eiven import EIVEN, cls_layers
from llama import LLaMA, LlamaConfig
from support.config import PROJECT
from vit import ViTConfig

LLAMA_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-6)
WIDTH, HEIGHT = 520, 732
# Okabe and Ito's colours: colour-blind readers can tell them apart.
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #111 } .small { font-size: 13px } .bold { font-weight: 600 }
.code { font: 13px ui-monospace, monospace } .middle { text-anchor: middle } .end { text-anchor: end }
.page { fill: #fff } .frozen { fill: #e9edf0; stroke: #78909c } .trained { fill: #f6dcea; stroke: #b8437f; stroke-width: 2.5 }
.input { fill: #fff; stroke: #999 } .line { stroke: #444; stroke-width: 1.6; fill: none } .tip { fill: #444 }
.begin { fill: #999 } .image { fill: #e69f00 } .question { fill: #56b4e9 } .context { fill: #009e73 }
@media (prefers-color-scheme: dark) {
  text { fill: #eee } .page { fill: #16191d } .frozen { fill: #2a3138 } .trained { fill: #4a2439 } .input { fill: #16191d }
  .line { stroke: #bbb } .tip { fill: #bbb }
}
"""


def text(x, y, words, kind="middle"):
    return f'<text x="{x}" y="{y}" class="{kind}">{html.escape(words)}</text>'


def box(x, y, width, height, kind, *lines):
    """A box with centred lines of text; a line that starts with a backtick is code."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" class="{kind}"/>']
    top = y + (height - 19 * (len(lines) - 1)) / 2 + 5
    for i, line in enumerate(lines):
        style = "middle code" if line.startswith("`") else "middle bold" if i == 0 else "middle small"
        parts.append(text(x + width / 2, top + 19 * i, line.strip("`"), style))
    return "".join(parts)


def arrow(*points):
    """A line through these points with a tip at its end, which must point down or to the right."""
    (x0, y0), (x, y) = points[-2:]
    tip = f"{x - 5},{y - 8} {x + 5},{y - 8} {x},{y}" if x == x0 else f"{x - 8},{y - 5} {x - 8},{y + 5} {x},{y}"
    return (f'<polyline class="line" points="{" ".join(f"{a},{b}" for a, b in points)}"/>'
            f'<polygon class="tip" points="{tip}"/>')


def figure():
    """The picture as the text of an SVG file."""
    vit = ViTConfig()
    layers, V, D = cls_layers(vit.num_hidden_layers), vit.hidden_size, LLAMA_7B.hidden_size
    K, vocab, size = len(layers), LLAMA_7B.vocab_size, vit.image_size
    with torch.device("meta"):
        trained = EIVEN(LLaMA(LLAMA_7B), None, V).trainable_parameters()
    count = {part: sum(p.numel() for name, p in trained.items() if name.startswith(part)) for part in ("adapters", "projector")}
    out = [
        box(12, 12, 156, 48, "input", "photo", f"(3, {size}, {size})"),
        box(176, 12, 186, 48, "input", "question", "What is the Neckline …?"),
        box(370, 12, 138, 48, "input", "title, category", "Maxi dress, Dresses"),
        arrow((90, 60), (90, 88)), arrow((260, 60), (260, 88)), arrow((430, 60), (430, 88)),
        box(12, 88, 156, 66, "frozen", "ViT-B/16", "`vit.ViT`", f"[cls]: {', '.join(map(str, layers))}"),
        box(182, 88, 326, 66, "frozen", "tokenizer, embeddings", "`data.encode_examples`", "`LLaMA.embed`"),
        arrow((90, 154), (90, 194)), text(98, 180, f"I ({K}, {V})", "small"),
        box(12, 194, 156, 66, "trained", "projector", "`eiven.Projector`", f"{count['projector']:,}"),
        arrow((90, 260), (90, 316)), text(98, 284, f"I′ ({K}, {D})", "small"),
        arrow((260, 154), (260, 316)), text(268, 180, "Q", "small"),
        arrow((430, 154), (430, 316)), text(438, 180, "C", "small"),
        '<rect x="288" y="206" width="16" height="16" rx="3" class="trained"/>', text(312, 219, "trained", "small"),
        '<rect x="288" y="232" width="16" height="16" rx="3" class="frozen"/>', text(312, 245, "frozen", "small"),
        text(284, 302, "X = [BOS, I′, Q, C]", "bold small"),
    ]
    x = 14                                              # X as a row of tokens, BOS first
    for kind, n in (("begin", 1), ("image", K), ("question", 8), ("context", 10)):
        for _ in range(n):
            out.append(f'<rect x="{x:.1f}" y="320" width="18" height="18" rx="3" class="{kind}"/>')
            x += 21.4
    out += [
        arrow((260, 340), (260, 366)),
        '<rect x="12" y="366" width="496" height="222" rx="9" class="frozen"/>',
        text(26, 390, f"LLaMA-7B: {LLAMA_7B.num_hidden_layers} × llama.Block", "bold"),
        text(494, 390, f"x (tokens, {D})", "small end"),
        # the residual stream, and the two sums
        '<polyline class="line" points="24,452 24,408 478,408 478,440"/>', arrow((24, 452), (38, 452)),
        box(38, 430, 128, 44, "frozen", "`input_layernorm`"), arrow((166, 452), (184, 452)),
        box(184, 418, 154, 68, "trained", "adapter", "`adapters.Adapter`", f"{count['adapters']:,}"), arrow((338, 452), (356, 452)),
        box(356, 430, 96, 44, "frozen", "`self_attn`"), arrow((452, 452), (468, 452)),
        text(478, 458, "+", "middle bold"),
        '<polyline class="line" points="478,466 478,500 24,500"/>',
        '<polyline class="line" points="24,500 24,518 478,518 478,534"/>',
        '<polyline class="line" points="24,518 24,546"/>', arrow((24, 546), (38, 546)),
        box(38, 526, 216, 42, "frozen", "`post_attention_layernorm`"), arrow((254, 546), (356, 546)),
        box(356, 526, 96, 42, "frozen", "`mlp`"), arrow((452, 546), (468, 546)),
        text(478, 552, "+", "middle bold"), '<polyline class="line" points="478,560 478,588"/>',
        arrow((260, 588), (260, 612)),
        box(108, 612, 304, 46, "frozen", "`LLaMA.norm, LLaMA.logits`", f"(answer tokens, {vocab:,})"),
        arrow((260, 658), (260, 680)),
        text(260, 698, "answer R: V-Neck, EOS", "middle bold"),
        text(260, 722, "EIVEN.forward: loss · EIVEN.generate: top-p", "middle code"),
    ]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
            f'aria-label="Figure 2: EIVEN">\n<style>{STYLE}</style>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" class="page"/>\n' + "\n".join(out) + "\n</svg>\n")


def main():
    path = PROJECT / "docs" / "figure-2.svg"
    write_text(path, figure())
    print(f"written: {path}")


if __name__ == "__main__":
    console.run(main)
