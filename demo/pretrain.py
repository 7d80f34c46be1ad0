"""Make the demo world's two backbones again from random weights:  python -m demo.pretrain vit|llama

They play the parts of CLIP's ViT and of LLaMA-7B, and are trained once on what those have seen in the large,
never on a product of train, val or test: drawings of the same kind from other seeds, prose about the world.

The ViT, 12 layers of width 64 for photos of 48 x 48: as in CLIP, shallow layers carry textures and edges, and
the last one carries what captions say.  It is trained in two rounds.  In the first, classifiers on the [cls]
tokens after layers 3, 6, 9 and 12 name looks, things and colours.  In the second, layers 10 to 12 alone learn
captions, as CLIP's last layer does: the last [cls] token must itself be the caption's embedding.  A caption
says the thing, its main colour and its family of look-alikes; only one in four says the look.

The LLaMA, 4 layers of width 128, reads prose: which looks and circumstances belong to which value, questions
about products that are described in words, and comparisons of two products.  Where EIVEN will put four visual
tokens, the prose has up to four words that tell what is seen; the projector has to learn to say such words.

It takes some 45 minutes on one core: 35 for the ViT, 10 for the LLaMA.  Each config.json stays as it is.
"""

import argparse
import random

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import llama as llama_file
import vit as vit_file
from base import console
from base.checkpoint import save_tensors
from base.console import Progress, whole_file
from base.packing import pack
from demo import world
from demo.drawing import SIDE, draw

# ---------------------------------------------------------------------------------------- training

BATCH = 64                                              # drawings, or documents, a step


def initialise(model, std):
    """The model with weights at their usual start, all trainable; std(name, weight) is that of a matrix."""
    for name, p in model.requires_grad_(True).named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif "norm" in name:
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=std(name, p))
    return model


def optimise(what, parameters, next_loss, steps, peak):
    """AdamW on a next_loss() each step; its rate rises to `peak` in a twentieth of them, then falls to 0."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.05)
    [group] = optimizer.param_groups
    with Progress(what, steps, "steps") as progress:
        for step in range(steps):
            loss = next_loss()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(group["params"], 1.0)
            cosine = 0.5 * (1 + np.cos(np.pi * step / steps))
            group["lr"] = peak * min((step + 1) / (0.05 * steps), cosine)
            optimizer.step()
            progress.step(note=f"loss {loss.item():.3f}")


def save(model, folder, official_name):
    """Write model.safetensors, in 16 bits and in the Hugging Face layout."""
    tensors = {official_name(name): p.half() for name, p in model.named_parameters()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


# ---------------------------------------------------------------------------------------- drawings

OTHER_SEEDS = 10_000_000                                # products' seeds are their numbers, far below

FAMILIES = [(attribute, *row) for attribute, rows in world.FAMILIES.items() for row in rows]
LOOKS = [(look, attribute, family) for family, (attribute, shared, values) in enumerate(FAMILIES)
         for look in (shared, *(world.VALUES[attribute][value][0] for value in values))]
LOOKS.append((world.HIDDEN, None, len(FAMILIES)))       # sealed parcels are a family of their own
ITEMS = [item for items in world.ITEMS.values() for item in items]
SIZES = {"item": len(ITEMS), "family": len(FAMILIES) + 1, "look": len(LOOKS), "colour": 3}


def make_drawings(numbers):
    """Drawings (n, SIDE, SIDE, 3), uint8, and their labels: {"item": (n,), "family": (n,), "look": (n,)}."""
    print(f"drawing {len(numbers):,} drawings")
    drawings, labels = [], []
    for number in numbers:
        rng = np.random.default_rng([world.VERSION, OTHER_SEEDS + number])
        label = rng.integers(len(LOOKS) - 1)
        item = rng.choice(list(world.ITEMS[LOOKS[label][1]]))
        if rng.random() < 0.05:
            label = len(LOOKS) - 1
        look, _, family = LOOKS[label]
        drawings.append(np.asarray(draw(look[0], item, rng)))
        labels.append((ITEMS.index(item), family, label))
    return np.stack(drawings), dict(zip(SIZES, torch.tensor(labels).T))


def random_cuts(drawings, rng):
    """Drawings, cut (to 85 % of a side or more), mirrored and lit at random -> (n, 3, 48, 48), normalised.

    The whole drawing is among the cuts: photos are never cut, and a look must not be known by its size.
    """
    photos = []
    for pixels in drawings:
        side = rng.uniform(0.85, 1) * SIDE
        left, top = rng.uniform(0, SIDE - side, 2)
        photo = Image.fromarray(pixels).resize([VIT.image_size] * 2,
                                               box=(left, top, left + side, top + side))
        photos.append(np.float32(photo)[:, ::rng.choice([-1, 1])] * rng.uniform(0.85, 1.15))
    return vit_file.normalize(np.clip(photos, 0, 255))


# ---------------------------------------------------------------------------------------- ViT

VIT = vit_file.ViTConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
                         patch_size=8, image_size=48)   # as in demo/vit/config.json
CLS_LAYERS = (3, 6, 9, 12)
# What the [cls] tokens are asked for in the first round: (index in CLS_LAYERS, what).
ASKED = ((0, "look"), (1, "look"), (2, "look"), (2, "item"), (3, "item"), (3, "family"), (3, "colour"))
DRAWINGS = 18_000


def heads_loss(heads, cls_tokens, labels):
    """How badly `heads`, a linear layer for each of ASKED, read the labels in [cls] tokens (n, 4, width)."""
    x = F.layer_norm(cls_tokens, cls_tokens.shape[2:])
    return sum((F.mse_loss if what == "colour" else F.cross_entropy)(head(x[:, k]), labels[what])
               for head, (k, what) in zip(heads, ASKED))


def caption_loss(cls_tokens, labels):
    """How far the last of the [cls] tokens (n, 4, width) are from the captions of their photos.

    A caption's embedding is the sum of a fixed random vector for each thing that it says.  One in four says
    the look.
    """
    fixed = torch.Generator().manual_seed(0)
    vectors = {what: torch.randn(n, VIT.hidden_size, generator=fixed) for what, n in SIZES.items()}
    item, family, look = (vectors[what][labels[what]] for what in ("item", "family", "look"))
    fine = torch.rand(BATCH, 1) < 0.25
    return F.mse_loss(cls_tokens[:, -1], item + family + fine * look + labels["colour"] @ vectors["colour"])


def pretrain_vit(folder=world.VIT, drawings=DRAWINGS, steps=5000, caption_steps=600):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, labels = make_drawings(range(drawings))
    vit = initialise(vit_file.ViT(VIT),
                     lambda name, p: 0.06 if "embedding" in name else 0.7 * p.shape[-1] ** -0.5)
    heads = nn.ModuleList(nn.Linear(VIT.hidden_size, SIZES[what]) for _, what in ASKED)

    def batch():
        """[cls] tokens of random drawings, and their labels."""
        chosen = rng.integers(drawings, size=BATCH)
        pixels = random_cuts(images[chosen], rng)
        colour = pixels[:, :, 16:32, 16:32].mean((2, 3))        # the main one: that of the middle
        return vit(pixels, CLS_LAYERS), {"colour": colour} | {what: x[chosen] for what, x in labels.items()}

    optimise("ViT, looks", [*vit.parameters(), *heads.parameters()], lambda: heads_loss(heads, *batch()),
             steps, 1.2e-3)
    vit.requires_grad_(False)
    last = vit.layers[9:].requires_grad_(True)
    optimise("ViT, captions", last.parameters(), lambda: caption_loss(*batch()), caption_steps, 1.2e-3)
    save(vit, folder, vit_file.official_name)


@torch.no_grad()
def probe_vit(held_out=1500):
    """What each layer knows of new drawings: the label of the nearest among 20 known drawings a look."""
    vit = vit_file.load_vit(world.VIT)
    known = 20 * len(LOOKS)
    images, labels = make_drawings(range(DRAWINGS, DRAWINGS + known + held_out))
    pixels = torch.stack([vit_file.preprocess(Image.fromarray(image), VIT.image_size) for image in images])
    x = vit(pixels, CLS_LAYERS)                         # (n, K, V)
    x = F.normalize((x - x.mean(0)) / x.std(0), dim=-1)
    nearest = torch.einsum("nkv,mkv->knm", x[known:], x[:known]).argmax(-1)             # (K, held_out)
    print(f"nearest neighbour, {held_out} unseen drawings, {known} known; layers {CLS_LAYERS}:")
    for what, label in labels.items():
        right = 100 * (label[nearest] == label[known:]).float().mean(1)
        print(f"{what:6}", *(f"{share:.1f} %" for share in right))


# ---------------------------------------------------------------------------------------- prose

COLOURS = "red blue green yellow brown grey white black purple orange pink".split()
TITLES = {row[3].removeprefix("[Title] ") for rows in world.make_splits().values() for row in rows}


def prose_product(rng, attribute=None):
    """(attribute, value, way, item, context) of a product of the prose, which is not in the data set."""
    attribute = attribute or rng.choice(list(world.VALUES))
    value = rng.choice(list(world.VALUES[attribute]))
    item = rng.choice(list(world.ITEMS[attribute]))
    way = rng.choice(list(world.WAYS))
    title = world.new_title(way, attribute, value, item, rng, TITLES)
    return attribute, value, way, item, f"{title}, {world.ITEMS[attribute][item]}"


def sight(product, rng):
    """Up to four words that tell what is seen of a product, in any order."""
    attribute, value, way, item, _ = product
    look = world.look_of(way, attribute, value)
    words = list(look) if rng.random() < 0.5 else [rng.choice(look)] * rng.choice((1, 1, 2))
    words += rng.sample([rng.choice(COLOURS), item.lower(), rng.choice(COLOURS)], 4 - len(words))
    rng.shuffle(words)
    return " ".join(words)


def either(values):
    return f"{', '.join(values[:-1])} or {values[-1]}"


def facts(rng):
    """Three sentences of what the world knows."""
    sentences = []
    for _ in range(3):
        attribute = rng.choice(list(world.VALUES))
        value = rng.choice(list(world.VALUES[attribute]))
        look, telling = world.VALUES[attribute][value]
        words, alike = rng.choice(world.FAMILIES[attribute])
        phrases, fitting = rng.choice(world.OCCASIONS[attribute])
        word = rng.choice(words)
        phrase = rng.choice(phrases)
        item = rng.choice(list(world.ITEMS[attribute]))
        common = [value for value in alike if value in fitting]
        sentences.append(rng.choice((
            f"{look[0]} and {look[1]} are the {attribute} {value}.",
            f"A {item} {rng.choice(telling)} has the {attribute} {value}.",
            f"What shows {rng.choice(look)} and comes {rng.choice(telling)} is {value}.",
            f"{word} may be {either(alike)}.",
            f"A {item} {phrase} is {either(fitting)}.",
            f"{word} on a {item} {phrase} means {common[0]}." if common
            else f"{word} and {words[0]} may be {either(alike)}.",
        )))
    return "", "", " ".join(sentences)


def question(rng):
    """A product, described, and one question about it."""
    product = prose_product(rng)
    attribute, value, way, _, context = product
    ask = f"Question: What is the {attribute} of this product?\n"
    plain = f"{ask}Context: {context}\nAnswer:"
    if way == "picture" and rng.random() < 0.1:
        return sight(product, rng), f"{ask}Answer:", value
    if way == "text" and rng.random() < 0.3:
        return "", plain, value
    prompt = rng.choice((plain, plain, f"Context: {context}\nQuestion: Which {attribute} has it?\nAnswer:",
                         f"A customer asks for the {attribute} of {context}. It is"))
    return sight(product, rng), prompt, value


def comparison(rng):
    """Two products, described, and whether they are the same."""
    first = prose_product(rng)
    second = prose_product(rng, first[0])
    A, v1, _, _, context1 = first
    _, v2, _, _, context2 = second
    verdict = "Yes" if v1 == v2 else "No"
    both = "Both products have" if v1 == v2 else None
    ask, answer = rng.choice((
        (f"What is the {A} of these two products? Are they the same?",
         f"First: {v1}; Second: {v2}; {verdict}."),
        (f"Do these two products have the same {A}? Why?", f"{verdict}; First: {v1}; Second: {v2}."),
        (f"Which product's {A} is {v2}?", f"{both or 'Second product has'} {v2}."),
        (f"Which product's {A} is {v1}?", f"{both or 'First product has'} {v1}."),
    ))
    prompt = f"Question: {ask}\nFirst: {context1}\nSecond: {context2}\nAnswer:"
    return f"{sight(first, rng)} {sight(second, rng)}", prompt, answer


def prose(rng):
    """One document: what is seen, what is asked, what is said."""
    return rng.choices((facts, question, comparison), (0.2, 0.55, 0.25))[0](rng)


# ---------------------------------------------------------------------------------------- LLaMA

PROSE_WEIGHT = 0.2                                      # in the loss, of a token that is no answer's


def train_tokenizer(path, vocab_size):
    """A SentencePiece model with LLaMA's settings: bytes for what is unknown, nothing normalised away."""
    rng = random.Random("tokenizer")
    text = (" ".join(filter(None, prose(rng))).replace("\n", " ") for _ in range(8000))
    with whole_file(path) as partial, open(partial, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text, model_writer=file, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, minloglevel=2)


def encode(document, tokenizer):
    """(prompt, answer) of a document, as ids."""
    seen, asked, said = map(tokenizer.encode, document)
    return [tokenizer.bos_id, *seen, *asked], [*said, tokenizer.eos_id]


def prose_loss(llama, documents):
    """The weighted mean cross-entropy of documents, each (prompt, answer) as ids."""
    inputs, targets, weights = [], [], []
    for prompt, answer in documents:
        ids = prompt + answer
        inputs.append(ids[:-1])
        targets += ids[1:]
        weights += [PROSE_WEIGHT] * (len(prompt) - 1) + [1.0] * len(answer)
    tokens = pack(inputs, list(map(len, inputs)))
    logits = llama.logits(llama(llama.embed(tokens.ids), tokens))
    losses = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
    return losses @ torch.tensor(weights) / sum(weights)


def pretrain_llama(folder=world.LLAMA, steps=1200):
    torch.manual_seed(0)
    config = llama_file.read_config(folder / "config.json")
    train_tokenizer(folder / "tokenizer.model", config.vocab_size)
    tokenizer = llama_file.Tokenizer(folder / "tokenizer.model")
    llama = initialise(llama_file.LLaMA(config),
                       lambda name, _: 0.02 if "o_proj" in name or "down_proj" in name else 0.05)
    rng = random.Random("prose 0")
    optimise("LLaMA", llama.parameters(), lambda: prose_loss(llama, [encode(prose(rng), tokenizer)
                                                                     for _ in range(BATCH)]), steps, 2.5e-3)
    save(llama, folder, llama_file.official_name)


def probe_llama(documents=400):
    """How often the LLaMA alone, reading descriptions in words, gives the right answer: greedy, new prose."""
    llama, tokenizer = llama_file.load_llama(world.LLAMA, torch.float32)
    rng = random.Random("probe")
    for kind in (question, comparison):
        right = 0
        for _ in range(documents):
            prompt, answer = encode(kind(rng), tokenizer)
            right += llama_file.greedy_continuation(llama, prompt, len(answer)) == answer
        print(f"LLaMA alone, {kind.__name__}s in words: {100 * right / documents:.1f} % right "
              f"({documents} new documents)")


# ---------------------------------------------------------------------------------------- the command


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("vit", "llama"))
    if parser.parse_args().which == "vit":
        pretrain_vit()
        probe_vit()
    else:
        pretrain_llama()
        probe_llama()


if __name__ == "__main__":
    console.run(main)
