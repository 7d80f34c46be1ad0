"""One product, followed: every step from its photo to its answer, recorded while the model answers.

The answer is that of `answering.answers`; nothing here computes another one.  Forward hooks keep what the ViT, the projector
and the layers of LLaMA compute.  Fused attention does not return its weights, so they are computed again from the recorded
queries and keys; tests/test_explain.py holds these weights, times the values, to the output of each layer.
"""

import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

import eiven
from adapters import Adapter
from base.console import Progress, UserError, write_text
from base.photo import open_photo
from data import Product, base_question
from eiven import TEMPERATURE, TOP_P
from llama import apply_rotary
from support.answering import Answer, answers, prepare_photos
from support.config import describe
from support.explain_page import page_html
from vit import preprocess

LIKELIEST = 10                                          # tokens shown for each place of the answer
ROWS_PRINTED = 10                                       # layers and answer tokens in the printed summary; the page has all


class Choice(NamedTuple):
    """A token that could come next.  share: (start, end) of its part of the draw, in 0..1; None outside the nucleus."""

    text: str
    rank: int
    probability: float
    share: tuple | None
    chosen: bool


class AnswerToken(NamedTuple):
    """One place of the answer: its likeliest tokens, how many tokens the nucleus has, and the number that was drawn."""

    choices: list
    nucleus: int
    uniform: float


class Step(NamedTuple):
    """A step from photo to answer, in words: both the page and the printed summary show these.

    symbol, shape  in the paper, and here;  code: the functions that compute it, as "file: name"
    """

    number: int
    title: str
    symbol: str
    shape: str
    code: tuple
    text: str


@dataclass
class Explanation:
    """What was recorded while a run answered one product.

    vit_layers     the ViT layers whose [cls] tokens are used; without photos all from here to I_projected is empty or None
    pixels         (3, size, size), normalised
    patch_size     pixels
    cls_attention  for each of vit_layers (heads, 1 + patches): attention weights of the [cls] query
    I, I_projected (K, V) and (K, D)
    tokens         X as [(text of the token, its part)]; the parts are "begin", "I′1" ..., "Q", "C" and "Answer:"
    attention      for each layer of LLaMA (H, N): attention weights of the answering position, the last of X
    changes        for each layer |h' - h| / |h| of its adapter, over all of X; None where the adapter was merged
    answer_tokens  an AnswerToken for each token of the answer, with the end token
    """

    product: Product
    sources: str
    temperature: float
    top_p: float
    answer: Answer = None
    vit_layers: tuple = ()
    pixels: torch.Tensor = None
    patch_size: int = 0
    cls_attention: list = None
    I: torch.Tensor = None
    I_projected: torch.Tensor = None
    tokens: list = None
    attention: list = None
    changes: list = None
    answer_tokens: list = None
    width: int = 0                                      # D
    vocab: int = 0

    def shares(self):
        """For each layer {part: its share of the answering position's attention, mean over heads}; the shares sum to 1."""
        parts = list(dict.fromkeys(part for _, part in self.tokens))
        index = torch.tensor([parts.index(part) for _, part in self.tokens])
        mean = torch.stack([weights.mean(0) for weights in self.attention])             # (layers, N)
        sums = torch.zeros(len(mean), len(parts)).index_add_(1, index, mean)            # (layers, parts)
        return [dict(zip(parts, row)) for row in sums.tolist()]


# ------------------------------------------------------------------------------------------------ recording


def explain(run, product, temperature=TEMPERATURE, top_p=TOP_P):
    """The Explanation of a run's free answer to one product.

    Hooks are put on the run's model and removed again: no other thread may use the model meanwhile.
    Errors  UserError: the photo is missing or unreadable, the question is too long
    """
    model = run.model
    e = Explanation(product, describe(run.config, run.sources), temperature, top_p, width=model.llama.config.hidden_size,
                    vocab=model.llama.config.vocab_size)
    if run.photo_features is not None:
        record_vit(e, run, product)
    ids, draws = [], []
    with recorded_llama(e, model, ids), recorded_draws(draws):
        [e.answer] = answers(run, [product], temperature=temperature, top_p=top_p)
    e.tokens = label_tokens(ids, e, model.tokenizer, base_question(product, run.config.text))
    e.answer_tokens = [answer_token(*drawn, temperature, top_p, model.tokenizer) for drawn in draws]
    return e


def attention_weights(q, k):
    """softmax(q k^T / sqrt(d)) of one query: (H, d), (S, G, d) -> (H, S), fp32.  Each of G key heads serves H / G heads of q."""
    k = k.float().repeat_interleave(len(q) // k.shape[1], dim=1)                        # (S, H, d)
    return (torch.einsum("hd,shd->hs", q.float(), k) / math.sqrt(q.shape[-1])).softmax(-1)


@contextmanager
def hooks():
    """Yield a list for the handles of hooks; all of them are removed at the end."""
    handles = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def keep_output(kept, name):
    """A forward hook that keeps the module's latest output as kept[name]."""
    def hook(module, inputs, output):
        kept[name] = output
    return hook


def record_vit(e, run, product):
    """Compute the photo's features, and fill pixels and cls_attention.  If the features are in the cache already, the ViT has
    to read the photo once more."""
    photo_features, kept = run.photo_features, {}
    vit, e.vit_layers, e.patch_size = photo_features.vit, photo_features.cls_layers, photo_features.vit.config.patch_size
    with hooks() as handles, torch.no_grad():
        for depth in e.vit_layers:
            attention = vit.layers[depth - 1].self_attn
            for projection in ("q_proj", "k_proj"):
                handles.append(getattr(attention, projection).register_forward_hook(keep_output(kept, (depth, projection))))
        prepare_photos(run, [product])
        e.pixels = preprocess(open_photo(photo_features.images / product.image), vit.config.image_size)
        if not kept:
            vit(e.pixels[None].to(photo_features.device), e.vit_layers)
    heads = vit.config.num_attention_heads
    e.cls_attention = [attention_weights(kept[depth, "q_proj"][0, 0].unflatten(-1, (heads, -1)),        # token 0 is [cls]
                                         kept[depth, "k_proj"][0].unflatten(-1, (heads, -1))).cpu() for depth in e.vit_layers]


@contextmanager
def recorded_llama(e, model, ids):
    """Meanwhile, the first forward pass, which reads the prompt of one example, fills I, I_projected, attention and changes
    of `e`, and puts X into `ids`.  After this pass the hooks are removed, since the next ones read tokens of the answer."""
    e.attention, e.changes = [], []

    def projected(module, inputs, output):
        e.I, e.I_projected = inputs[0][0].cpu(), output[0].cpu()

    def read(module, inputs):
        ids.extend(inputs[1].ids.tolist())

    def adapted(module, inputs, output):
        h, changed = inputs[0].float(), output.float()
        e.changes.append(((changed - h).norm() / h.norm()).item() if isinstance(module, Adapter) else None)

    def attended(kept):
        def hook(attention, inputs, output):
            tokens = inputs[1]
            q, k = (kept[name].unflatten(-1, (-1, attention.head_dim)) for name in ("q", "k"))
            q = apply_rotary(q[-1:], tokens.cos[-1:], tokens.sin[-1:])                  # (1, H, d)   the last position of X
            e.attention.append(attention_weights(q[0], apply_rotary(k, tokens.cos, tokens.sin)).cpu())
            if len(e.attention) == len(model.llama.layers):
                for handle in handles:
                    handle.remove()
        return hook

    with hooks() as handles:
        handles.append(model.llama.register_forward_pre_hook(read))
        if model.projector is not None:
            handles.append(model.projector.register_forward_hook(projected))
        for block in model.llama.layers:
            kept, attention = {}, block.self_attn
            handles.append(block.adapter.register_forward_hook(adapted))
            handles.append(attention.q_proj.register_forward_hook(keep_output(kept, "q")))
            handles.append(attention.k_proj.register_forward_hook(keep_output(kept, "k")))
            handles.append(attention.register_forward_hook(attended(kept)))
        yield


@contextmanager
def recorded_draws(draws):
    """Meanwhile, every call of eiven.nucleus adds (logits (vocab,), uniform number, chosen id) of its first row to `draws`.

    EIVEN.generate keeps neither.  Its nucleus function gets both, so what is shown is the very draw that was made.
    """
    original = eiven.nucleus

    def recording(logits, temperature, top_p, uniform):
        token = original(logits, temperature, top_p, uniform)
        draws.append((logits[0].cpu(), uniform[0], int(token[0])))
        return token

    eiven.nucleus = recording
    try:
        yield
    finally:
        eiven.nucleus = original


def label_tokens(ids, e, tokenizer, example):
    """X as [(text, part)], from its ids."""
    images = 0 if e.I is None else len(e.I)
    prompt = ids[1 + images:]
    text = tokenizer.decode(prompt)
    end = text.rindex("Answer:")
    context = text.find("Context:") if "\nContext:" in example.prompt else end
    tokens = [("<s>", "begin"), *((f"I′{k}", f"I′{k}") for k in range(1, images + 1))]
    for n, token in enumerate(prompt):
        start = len(tokenizer.decode(prompt[:n]))       # where this token starts in the text
        tokens.append((token_text(token, tokenizer), "Q" if start < context else "C" if start < end else "Answer:"))
    return tokens


def token_text(token, tokenizer):
    """A token as text: "▁" is a space, "↵" a new line; the bytes of a character that has no token of its own stay <0x..>."""
    if token == tokenizer.eos_id:
        return "end"
    piece = tokenizer.pieces.id_to_piece(token)
    if not tokenizer.pieces.is_byte(token):
        return piece
    byte = int(piece[3:5], 16)
    return "↵" if byte == 10 else chr(byte) if 32 < byte < 127 else piece


def answer_token(logits, uniform, chosen, temperature, top_p, tokenizer):
    """The AnswerToken of a draw: logits (vocab,), the uniform number, and the id that eiven.nucleus chose from it."""
    probability = logits.softmax(-1)
    order = logits.sort(descending=True, stable=True).indices
    shares = {int(order[0]): (0.0, 1.0)}                # temperature 0: no draw
    if temperature > 0:
        falling, tokens = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
        inside = int((falling.cumsum(-1) - falling < top_p).sum())                      # as in eiven.nucleus
        ends = (falling[:inside].cumsum(-1) / falling[:inside].sum()).tolist()
        shares = dict(zip(tokens[:inside].tolist(), zip([0.0, *ends], ends)))
    ranked = list(enumerate(order[:LIKELIEST].tolist(), start=1))
    if chosen not in dict(ranked).values():
        ranked.append((int((order == chosen).nonzero()) + 1, chosen))
    choices = [Choice(token_text(token, tokenizer), rank, probability[token].item(), shares.get(token), token == chosen)
               for rank, token in ranked]
    return AnswerToken(choices, len(shares), uniform)


# ------------------------------------------------------------------------------------------------ in words


def steps(e):
    """The seven steps of an Explanation; without photos the first three are left out."""
    found = []
    if e.pixels is not None:
        size, (heads, tokens) = e.pixels.shape[-1], e.cls_attention[0].shape
        side, layers = size // e.patch_size, ", ".join(map(str, e.vit_layers))
        (K, V), D = e.I.shape, e.width
        found += [
            Step(1, "The photo, as the ViT sees it", "the product image", f"(3, {size}, {size})", ("vit.py: preprocess",),
                 f"The photo is scaled so that its shorter side has {size} pixels, and its centre is cut out. "
                 f"The ViT reads it as {side} × {side} patches of {e.patch_size} × {e.patch_size} pixels: one token each "
                 "(section 4.1)."),
            Step(2, f"Where [cls] looks in layer{'s' * (K > 1)} {layers} of the ViT", "attention inside the image encoder",
                 f"{K} layer{'s' * (K > 1)} × ({heads} heads, 1 + {tokens - 1} patches)", ("vit.py: Attention.forward",),
                 "The ViT has one more token, [cls]. In every layer it collects information from the patches. "
                 "The more orange a patch, the more attention [cls] gives to it (mean over the heads). "
                 + ("Early layers know edges and textures, late ones parts and objects; so [cls] is taken after several "
                    "layers (section 2.1)." if K > 1 else
                    "This run takes [cls] after the last layer only (\"- MGVF\" in Table 2).")),
            Step(3, "The image embedding I, and I′ after the projector", "I, I′", f"({K}, {V}) and ({K}, {D})",
                 ("vit.py: ViT.forward", "eiven.py: Projector.forward"),
                 f"Row k of I is [cls] after the k-th of these layers. The projector is trained: it turns each row into a "
                 f"token as wide as LLaMA's text tokens ({V} → {D}; section 2.1)."),
        ]
    image, context = ("I′, " if e.pixels is not None else ""), (", C" if any(part == "C" for _, part in e.tokens) else "")
    found += [
        Step(4, "The input of LLaMA", f"X = [{image}Q{context}]", f"({len(e.tokens)}, {e.width})",
             ("eiven.py: EIVEN.input_ids", "eiven.py: EIVEN.embed"),
             "LLaMA reads one sequence of tokens: the begin token, the visual tokens, the question, and the context "
             "(title and category). A token is often only a piece of a word; ▁ stands for a space, ↵ for a new line "
             "(section 2.2)."),
        Step(5, "What the answering position reads, layer by layer", "h, h′",
             f"{len(e.attention)} layers × ({len(e.attention[0])} heads, {len(e.tokens)} tokens)",
             ("llama.py: Attention.forward", "adapters.py: Adapter.forward"),
             "The last position of X predicts the first token of the answer. The bar shows to which part of X it gives its "
             "attention (mean over the heads). Attention shows where a layer reads, not what it makes of it. "
             "The adapter changes the input h of the attention to h′; the column “adapter” is |h′−h|/|h| (section 2.2)."),
        Step(6, "The answer, token after token", "p(R_t | X, R_<t)", f"{len(e.answer_tokens)} tokens × {e.vocab:,} logits",
             ("llama.py: LLaMA.logits", "eiven.py: nucleus"),
             "LLaMA gives every token a probability. For the draw, its logits are divided by the temperature, "
             f"{e.temperature:g}. The nucleus is the smallest set of likeliest tokens that then reach {e.top_p:g} together. "
             "A random number between 0 and 1 chooses one of them (section 4.1)."
             if e.temperature > 0 else
             "LLaMA gives every token a probability. At temperature 0 the likeliest token is taken, without a draw."),
        Step(7, "The answer", "R", "text", ("eiven.py: EIVEN.generate", "evaluate.py: exact_match"),
             "The tokens are joined to the answer. Its probability is the product of its tokens' probabilities, with the end "
             "token. It is right only if it equals the gold value exactly (section 4.1)."),
    ]
    return found


def summary(e):
    """The Explanation as lines of text, at most some 60 of at most 100 columns."""
    lines = {number: [] for number in range(1, 8)}
    if e.pixels is not None:
        side = e.pixels.shape[-1] // e.patch_size
        for layer, weights in zip(e.vit_layers, e.cls_attention):
            mean = weights.mean(0)
            best = int(mean[1:].argmax())
            lines[2].append(f"layer {layer:2}: {mean[0]:4.0%} on [cls] itself; most on the patch in row {best // side + 1}, "
                            f"column {best % side + 1}: {mean[1 + best]:.1%} (equal shares: {1 / len(mean):.1%})")
        for k, (layer, before, after) in enumerate(zip(e.vit_layers, e.I, e.I_projected), start=1):
            lines[3].append(f"layer {layer:2}: norm of I_{k} {before.norm():8.2f}, of I′{k} {after.norm():8.2f}")
    for part, text in parts_as_text(e):
        lines[4] += wrapped(f"{part:8} {text}", 94, 4)
    shares = e.shares()
    lines[5].append("layer  " + "".join(f"{part:>8}" for part in shares[0]) + "   adapter")
    for i in evenly(len(shares), ROWS_PRINTED):
        change = "merged" if e.changes[i] is None else f"{e.changes[i]:.3f}"
        lines[5].append(f"{i + 1:5}  " + "".join(f"{share:8.1%}" for share in shares[i].values()) + f"{change:>10}")
    for t, token in enumerate(e.answer_tokens[:ROWS_PRINTED], start=1):
        chosen = next(c for c in token.choices if c.chosen)
        draw = f"draw {token.uniform:.3f} from a nucleus of {token.nucleus:,}" if e.temperature > 0 else "the likeliest"
        others = ", ".join(f"{c.text} {c.probability:.3f}" for c in token.choices if not c.chosen)
        lines[6].append(shortened(f"{t:2}. {chosen.text} {chosen.probability:.3f}  ({draw}; others: {others})", 94))
    if len(e.answer_tokens) > ROWS_PRINTED:
        lines[6].append(f"… {len(e.answer_tokens) - ROWS_PRINTED} more tokens on the page")
    lines[7] = wrapped(verdict(e), 94, 3)
    out = [shortened(f"{e.product.id or 'product'}: {e.product.attribute}", 100)]
    if e.pixels is None:
        out.append("(steps 1 to 3 are left out: this run does not use photos)")
    for step in steps(e):
        out.append(shortened(f"{step.number}. {step.title}: {step.symbol}", 100))
        out.append(shortened(f"   {step.shape}   {', '.join(step.code)}", 100))
        out += [f"     {line}" for line in lines[step.number]]
    return out


def verdict(e):
    """The answer, its probability, and the gold value, where there is one."""
    gold = e.product.value
    judged = "" if not gold else ", which is right" if e.answer.value == gold else f"; the gold value is {gold}"
    return f"{e.answer}{judged}"


def parts_as_text(e):
    """[(part, its tokens as one text)], with the visual tokens as one part."""
    joined = {}
    for text, part in e.tokens:
        name = "I′" if part.startswith("I′") else part
        joined[name] = joined.get(name, "") + (" " if name == "I′" and name in joined else "") + text
    return joined.items()


def evenly(n, most):
    """At most `most` of the numbers 0 to n - 1, evenly spaced, with the first and the last."""
    return range(n) if n <= most else sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def shortened(text, columns):
    return text if len(text) <= columns else text[:columns - 1] + "…"


def wrapped(text, columns, most):
    """Lines of at most `columns`; what does not fit into `most` lines is cut off with an ellipsis."""
    text = shortened(text, columns * most)
    return [text[i:i + columns] for i in range(0, len(text), columns)]


# ------------------------------------------------------------------------------------------------ for the command


def find_product(products, given, attribute, where):
    """The product with the ID `given`, and with this attribute if one is given; UserError if there is none, or several.

    products  those of a split; where: its file, for the message
    """
    rows = []
    with Progress("looking for the product", len(products), "products") as progress:
        for product in products:
            progress.step()
            if product.id == given:
                rows.append(product)
    if not rows:
        raise UserError(f"--explain {shortened(given, 60)!r}: {where} has no product of this ID; it has, for example, "
                        f"{' and '.join(dict.fromkeys([products[0].id, products[-1].id]))}. Other splits: --split")
    known = list(dict.fromkeys(p.attribute for p in rows))
    if attribute is None and len(known) > 1:
        raise UserError(f"--explain {shortened(given, 60)!r}: {where} has {len(rows)} rows of this ID; choose one with "
                        f"--attribute: {', '.join(map(repr, known))}")
    rows = [p for p in rows if attribute is None or p.attribute.lower() == attribute.lower()]
    if not rows:
        raise UserError(f"--explain {shortened(given, 60)!r} --attribute {attribute!r}: {where} has no such row; this product "
                        f"has {', '.join(map(repr, known))}")
    return rows[0]


def page_name(product):
    """A file name for any product: the start of its ID, then a hash of all its fields, so that two never share a page."""
    start = "".join(c if c.isalnum() else "-" for c in product.id)[:40] or "product"
    return f"{start}-{hashlib.sha256(repr(product).encode('utf-8', 'replace')).hexdigest()[:8]}.html"


def show(run, product, temperature=TEMPERATURE, top_p=TOP_P):
    """Explain a product: print the summary, and write the page to RUN/explain/."""
    e = explain(run, product, temperature, top_p)
    path = run.folder / "explain" / page_name(product)
    write_text(path, page_html(e, steps(e), verdict(e)))
    print("\n".join(summary(e)))
    print(f"as a page: {path}")
