"""Make the demo world's two backbones again from nothing:  python -m demo.pretrain [vit] [llama]

They play the parts of CLIP's ViT and of LLaMA-7B, and are trained once on what those have seen in the large, never on
a product of train, val or test: drawings of the same kind from other seeds, and prose about the world.

The ViT, 12 layers of width 64 for photos of 48 x 48: as in CLIP, shallow layers carry textures and edges and the last
one carries what captions say.  Here that is laid down in two rounds.  First, small heads on the [cls] tokens after
layers 3, 6, 9 and 12 name looks, things and colours.  Then layers 10 to 12 alone learn captions, as CLIP's last layer
does: the last [cls] token must itself be the caption's embedding.  A caption says the thing, its main colour and
roughly how it looks ("lines", "spots"); only one in four says the fine look.

The LLaMA, 4 layers of width 128, reads prose: which looks and circumstances belong to which value, questions about
products that are described in words, and comparisons of two products.  Where EIVEN will put four visual tokens, the
prose has up to four words that tell what is seen; the projector has to learn to say such words.

It takes some 45 minutes on one core: 35 for the ViT, 10 for the LLaMA; a GPU is not needed.
"""

import argparse
import io
import json
import math
import random
import time
from multiprocessing import Pool

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import llama as llama_file
import vit as vit_file
from base import console
from base.console import Progress, UserError, duration, whole_file, write_text
from base.packing import Groups, Tokens, pack
from demo import world

CLS_LAYERS = (3, 6, 9, 12)

# ------------------------------------------------------------------------------------------------ drawings, ViT

VIT = vit_file.ViTConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
                         patch_size=8, image_size=48)
SMALLEST_CUT = 0.85                                     # of a side: drawings are cut at random, and brought to 48
DRAWINGS, VIT_STEPS, VIT_BATCH, VIT_RATE = 18_000, 5000, 64, 1.2e-3
CAPTION_STEPS, CAPTION_LAYERS, FINE_CAPTIONS = 600, 3, 0.25
OTHER_SEEDS = 10_000_000                                # products' seeds are their numbers, far below

LOOKS = {}                                              # look: (attribute, number of its family)
for _attribute, _families in world.FAMILIES.items():
    for _words, _values in _families:
        _number = len({family for _, family in LOOKS.values()})
        for _look in (_words, *(world.VALUES[_attribute][value][0] for value in _values)):
            LOOKS[_look] = _attribute, _number
FAMILY_COUNT = len({family for _, family in LOOKS.values()}) + 1            # sealed parcels are one of their own
LOOK_NAMES = [*LOOKS, world.HIDDEN]
ITEM_NAMES = [item for items in world.ITEMS.values() for item in items]


def drawing(number):
    """(pixels (SIDE, SIDE, 3) uint8, look, family, item): a drawing for the ViT, from its number alone."""
    rng = np.random.default_rng([int(world.VERSION), OTHER_SEEDS + number])
    look = list(LOOKS)[rng.integers(len(LOOKS))]
    attribute, family = LOOKS[look]
    item = list(world.ITEMS[attribute])[rng.integers(len(world.ITEMS[attribute]))]
    if rng.random() < 0.05:
        look, family = world.HIDDEN, FAMILY_COUNT - 1
    return np.asarray(world.draw(look, item, rng)), LOOK_NAMES.index(look), family, ITEM_NAMES.index(item)


def make_drawings(numbers):
    """Drawings as arrays: (n, SIDE, SIDE, 3) uint8 and three of labels (n,)."""
    found = []
    with Pool() as pool, Progress("drawing", len(numbers), "drawings") as progress:
        for one in pool.imap(drawing, numbers, chunksize=50):
            found.append(one)
            progress.step()
    pixels, *labels = zip(*found)
    return np.stack(pixels), [torch.tensor(x) for x in labels]


def as_pixels(drawings, rng=None):
    """(n, 3, 48, 48), read as vit.preprocess reads photos; with rng: cut, mirrored and lit at random.

    The whole drawing is among the cuts: products' photos are never cut, and a look must not be known by its size.
    """
    if rng is None:
        return torch.stack([vit_file.preprocess(Image.fromarray(image), VIT.image_size) for image in drawings])
    size, side = VIT.image_size, drawings.shape[1]
    pixels = np.empty((len(drawings), size, size, 3), np.float32)
    for i, image in enumerate(drawings):
        cut = rng.uniform(SMALLEST_CUT, 1) * side
        left, top = rng.uniform(0, side - cut, 2)
        photo = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut))
        if rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels[i] = np.asarray(photo, np.float32) * rng.uniform(0.85, 1.15)
    pixels = (np.clip(pixels / 255, 0, 1) - np.float32(vit_file.CLIP_MEAN)) / np.float32(vit_file.CLIP_STD)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def start_vit():
    """A ViT at its usual start, all of it trainable."""
    vit = vit_file.ViT(VIT)
    for name, p in vit.named_parameters():
        p.requires_grad_(True)
        if p.dim() == 1 and "norm" in name and name.endswith("weight"):
            nn.init.ones_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=0.06 if p.dim() > 2 or "embedding" in name else p.shape[-1] ** -0.5 * 0.7)
    return vit


class Heads(nn.Module):
    """What the [cls] tokens are asked for while the ViT learns; thrown away afterwards."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in CLS_LAYERS)
        self.look = nn.ModuleList(nn.Linear(width, len(LOOK_NAMES)) for _ in CLS_LAYERS[:3])
        self.item = nn.ModuleList(nn.Linear(width, len(ITEM_NAMES)) for _ in CLS_LAYERS[2:])
        self.family, self.colour = nn.Linear(width, FAMILY_COUNT), nn.Linear(width, 3)

    def forward(self, tokens, pixels, look, family, item):
        """The loss for [cls] tokens (n, 4, width)."""
        a, b, c, d = (norm(tokens[:, k]) for k, norm in enumerate(self.norm))
        middle = pixels[:, :, 16:32, 16:32].mean((2, 3))                    # its main colour
        surface = sum(F.cross_entropy(head(x), look) for head, x in zip(self.look, (a, b, c)))
        caption = F.cross_entropy(self.family(d), family) + F.mse_loss(self.colour(d), middle)
        return surface + caption + sum(F.cross_entropy(head(x), item) for head, x in zip(self.item, (c, d)))


def rate_at(step, steps, peak):
    """Warm-up over a twentieth of the steps, then half a cosine."""
    return peak * min((step + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


class Captions:
    """Embeddings of captions: (n, width), the sum of a fixed random vector for each thing that a caption says."""

    def __init__(self, width):
        draw = torch.Generator().manual_seed(0)
        self.item, self.family, self.look, self.colour = (
            torch.randn(n, width, generator=draw) for n in (len(ITEM_NAMES), FAMILY_COUNT, len(LOOK_NAMES), 3))

    def loss(self, tokens, pixels, look, family, item):
        """How far the last of the [cls] tokens (n, 4, width) are from the captions of their photos."""
        middle = pixels[:, :, 16:32, 16:32].mean((2, 3)).cpu()
        fine = (torch.rand(len(look), 1) < FINE_CAPTIONS).float()
        caption = self.item[item.cpu()] + self.family[family.cpu()] + middle @ self.colour + fine * self.look[look.cpu()]
        return F.mse_loss(tokens[:, -1], caption.to(tokens.device))


def vit_round(vit, parameters, loss_of, images, labels, steps, device, seed, what):
    """One round of training: `parameters` on loss_of([cls] tokens, pixels, look, family, item)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    order = np.concatenate([rng.permutation(len(images)) for _ in range(steps * VIT_BATCH // len(images) + 1)])
    with Progress(what, steps, "steps") as progress:
        for step in range(steps):
            chosen = order[step * VIT_BATCH:(step + 1) * VIT_BATCH]
            pixels = as_pixels(images[chosen], rng).to(device)
            loss = loss_of(vit(pixels, CLS_LAYERS), pixels, *(x[chosen].to(device) for x in labels))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, VIT_RATE)
            optimizer.step()
            progress.step(note=f"loss {loss.item():.3f}")


def pretrain_vit(device, drawings=DRAWINGS, steps=VIT_STEPS, caption_steps=CAPTION_STEPS, seed=0):
    torch.manual_seed(seed)
    images, labels = make_drawings(range(drawings))
    vit = start_vit().to(device)
    heads = Heads(VIT.hidden_size).to(device)
    vit_round(vit, [*vit.parameters(), *heads.parameters()], heads, images, labels, steps, device, seed, "ViT, looks")
    learn_captions(vit, images, labels, caption_steps, device, seed)
    save(vit.cpu(), world.VIT, vit_file.official_name, {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", **vars(VIT)})


def learn_captions(vit, images, labels, steps, device, seed):
    """The second round: the first layers stay as they are."""
    vit.requires_grad_(False)
    last = [p for block in vit.layers[-CAPTION_LAYERS:] for p in block.requires_grad_(True).parameters()]
    vit_round(vit, last, Captions(VIT.hidden_size).loss, images, labels, steps, device, seed + 1, "ViT, captions")


def probe_vit(labels=20, held_out=1500):
    """What single layers know, on drawings that the ViT has not seen: nearest neighbours among `labels` a look."""
    vit = vit_file.load_vit(world.VIT)
    images, (look, family, item) = make_drawings(range(DRAWINGS, DRAWINGS + labels * len(LOOK_NAMES) + held_out))
    with torch.no_grad():
        tokens = torch.cat([vit(as_pixels(part), CLS_LAYERS) for part in np.array_split(images, 20)])
    known = labels * len(LOOK_NAMES)
    for name, label in (("look", look), ("family", family), ("item", item)):
        scores = []
        for k in range(len(CLS_LAYERS)):
            x = tokens[:, k] - tokens[:, k].mean(0)
            x = F.normalize(x / x.std(0), dim=-1)
            nearest = (x[known:] @ x[:known].T).argmax(1)
            scores.append((label[:known][nearest] == label[known:]).float().mean().item())
        print(f"nearest neighbour, {name}: " + ", ".join(f"layer {t} {100 * s:.1f} %" for t, s in zip(CLS_LAYERS, scores))
              + f" ({held_out} unseen drawings, {known} known)")


# ------------------------------------------------------------------------------------------------ files


def save(model, folder, names, config):
    """Write model.safetensors (16 bits) and config.json in the Hugging Face layout."""
    tensors = {names(name): p.detach().half().contiguous() for name, p in model.named_parameters()}
    with whole_file(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"wrote {folder / 'model.safetensors'}: {sum(t.numel() for t in tensors.values()):,} parameters")


# ------------------------------------------------------------------------------------------------ prose

COLOURS = "red blue green yellow brown grey white black purple orange pink".split()
PRODUCT_TITLES = {row["texts"].removeprefix("[Title] ") for rows in world.make_splits().values() for row in rows}


def some_product(rng, attribute=None):
    """(attribute, value, way, item, title) of a product of the prose, whose title is no product's of the data set."""
    attribute = attribute or rng.choice(list(world.VALUES))
    value, item = rng.choice(list(world.VALUES[attribute])), rng.choice(list(world.ITEMS[attribute]))
    way = rng.choice(list(world.WAYS))
    title = world.draw_title(way, attribute, value, item, rng)
    while title in PRODUCT_TITLES:
        title = world.draw_title(way, attribute, value, item, rng)
    return attribute, value, way, item, title


def sight(product, rng):
    """Up to four words that tell what is seen of a product, in any order."""
    attribute, value, way, item, _ = product
    look = world.look_of(way, attribute, value)
    words = list(look) if rng.random() < 0.5 else [rng.choice(look)] * rng.choice((1, 1, 2))
    words += rng.sample([rng.choice(COLOURS), item.lower(), rng.choice(COLOURS)], 4 - len(words))
    rng.shuffle(words)
    return " ".join(words)


def context(product):
    return f"{product[4]}, {world.ITEMS[product[0]][product[3]]}"


def either(values):
    return f"{', '.join(values[:-1])} or {values[-1]}"


def facts(rng):
    """Three sentences of what the world knows."""
    said = []
    for _ in range(3):
        attribute = rng.choice(list(world.VALUES))
        value = rng.choice(list(world.VALUES[attribute]))
        look, telling = world.VALUES[attribute][value]
        words, alike = rng.choice(world.FAMILIES[attribute])
        phrases, chosen = rng.choice(world.OCCASIONS[attribute])
        word, phrase, item = rng.choice(words), rng.choice(phrases), rng.choice(list(world.ITEMS[attribute]))
        common = [v for v in alike if v in chosen]
        said.append(rng.choice((
            f"{look[0]} and {look[1]} are the {attribute} {value}.",
            f"A {item} {rng.choice(telling)} has the {attribute} {value}.",
            f"What shows {rng.choice(look)} and comes {rng.choice(telling)} is {value}.",
            f"{word} may be {either(alike)}.",
            f"A {item} {phrase} is {either(chosen)}.",
            f"{word} on a {item} {phrase} means {common[0]}." if common else f"{word} and {words[0]} may be {either(alike)}.",
        )))
    return "", "", " ".join(said)


def question(rng):
    """A product, described, and one question about it."""
    product = some_product(rng)
    attribute, value, way, _, _ = product
    ask = f"What is the {attribute} of this product?"
    if way == "picture" and rng.random() < 0.1:
        return sight(product, rng), f"Question: {ask}\nAnswer:", value
    if way == "text" and rng.random() < 0.3:
        return "", f"Question: {ask}\nContext: {context(product)}\nAnswer:", value
    prompt = rng.choice((f"Question: {ask}\nContext: {context(product)}\nAnswer:",
                         f"Question: {ask}\nContext: {context(product)}\nAnswer:",
                         f"Context: {context(product)}\nQuestion: Which {attribute} has it?\nAnswer:",
                         f"A customer asks for the {attribute} of {context(product)}. It is"))
    return sight(product, rng), prompt, value


def comparison(rng):
    """Two products, described, and whether they are the same."""
    first = some_product(rng)
    second = some_product(rng, first[0])
    A, v1, v2 = first[0], first[1], second[1]
    verdict = "Yes" if v1 == v2 else "No"
    ask, answer = rng.choice((
        (f"What is the {A} of these two products? Are they the same?", f"First: {v1}; Second: {v2}; {verdict}."),
        (f"Do these two products have the same {A}? Why?", f"{verdict}; First: {v1}; Second: {v2}."),
        (f"Which product's {A} is {v2}?", f"{'Both products have' if v1 == v2 else 'Second product has'} {v2}."),
        (f"Which product's {A} is {v1}?", f"{'Both products have' if v1 == v2 else 'First product has'} {v1}."),
    ))
    prompt = f"Question: {ask}\nFirst: {context(first)}\nSecond: {context(second)}\nAnswer:"
    return f"{sight(first, rng)} {sight(second, rng)}", prompt, answer


def prose(rng):
    """One document: what is seen, what is asked, what is said."""
    return rng.choices((facts, question, comparison), (0.2, 0.55, 0.25))[0](rng)


# ------------------------------------------------------------------------------------------------ LLaMA

LLAMA = llama_file.LlamaConfig(vocab_size=1400, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                               num_attention_heads=4, num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-6,
                               max_position_embeddings=512)
LLAMA_STEPS, LLAMA_BATCH, LLAMA_RATE = 1200, 64, 2.5e-3
PROSE_WEIGHT = 0.2                                      # of a token that is only read, against one that is answered


def train_tokenizer(path, vocab_size, documents=8000):
    """A SentencePiece model with LLaMA's settings: bytes for what is unknown, nothing normalised away."""
    rng, model = random.Random("tokenizer"), io.BytesIO()
    text = (" ".join(part for part in prose(rng) if part).replace("\n", " ") for _ in range(documents))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        minloglevel=2)
    with whole_file(path) as partial:
        partial.write_bytes(model.getvalue())


def trainable(llama):
    """The same model with weights that learn: LLaMA's own Linear and RMSNorm are for frozen ones and give them no gradient."""
    for module in list(llama.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, llama_file.Linear):
                setattr(module, name, nn.Linear(child.weight.shape[1], child.weight.shape[0], bias=False))
            elif isinstance(child, llama_file.RMSNorm):
                setattr(module, name, nn.RMSNorm(len(child.weight), child.eps))
    for name, p in llama.named_parameters():
        p.requires_grad_(True)
        if p.dim() == 1:
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=0.02 if "o_proj" in name or "down_proj" in name else 0.05)
    return llama


def batches(rng, tokenizer):
    """Batches without end: (ids (B, T), weight of each as a target (B, T)), rows of like length together."""
    while True:
        rows = []
        for _ in range(16 * LLAMA_BATCH):
            seen, asked, said = prose(rng)
            read = [tokenizer.bos_id, *tokenizer.encode(seen), *tokenizer.encode(asked)]
            answer = tokenizer.encode(said) + [tokenizer.eos_id]
            rows.append((read + answer, [PROSE_WEIGHT] * len(read) + [1.0] * len(answer)))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i:i + LLAMA_BATCH] for i in range(0, len(rows), LLAMA_BATCH)]
        rng.shuffle(groups)
        for group in groups:
            T = len(group[-1][0])
            yield (torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in group]),
                   torch.tensor([weight + [0.0] * (T - len(weight)) for _, weight in group]))


def logits_of(llama, ids):
    """(B, T) ids -> (B, T, vocab), all rows padded to one length: nothing is shared, nothing frozen."""
    B, T = ids.shape
    each = torch.arange(B * T, device=ids.device)
    tokens = Tokens(ids.flatten(), each % T, Groups([each.view(B, T)], each))
    return F.linear(llama(llama.embed_tokens(tokens.ids), tokens), llama.lm_head.weight).view(B, T, -1)


def pretrain_llama(device, steps=LLAMA_STEPS, seed=0):
    torch.manual_seed(seed)
    train_tokenizer(world.LLAMA / "tokenizer.model", LLAMA.vocab_size)
    tokenizer = llama_file.Tokenizer(world.LLAMA / "tokenizer.model")
    llama = trainable(llama_file.LLaMA(LLAMA)).to(device)
    optimizer = torch.optim.AdamW(llama.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    source = batches(random.Random(f"prose {seed}"), tokenizer)
    with Progress("LLaMA", steps, "steps") as progress:
        for step in range(steps):
            ids, weight = (x.to(device) for x in next(source))
            logits = logits_of(llama, ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            weight = weight[:, 1:].flatten()
            total = (loss * weight).sum() / weight.sum()
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, LLAMA_RATE)
            optimizer.step()
            answers = loss[weight == 1].mean().item()
            progress.step(note=f"loss {total.item():.3f}, of answers {answers:.3f}")
    config = vars(LLAMA)
    save(llama.cpu(), world.LLAMA, llama_file.official_name, {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, **config})
    again, _ = llama_file.load_llama(world.LLAMA, torch.float32)
    tokens = pack([ids[0].tolist()])
    with torch.no_grad():
        ours = again.logits(again(again.embed(tokens.ids), tokens))
        off = (ours - logits_of(llama, ids[:1].cpu())[0]).abs().max().item()
    print(f"read back, its logits differ by {off:.1e} at most (16-bit weights)")


def probe_llama(documents=400):
    """How often the LLaMA alone, reading descriptions in words, gives the right answer: greedy, new prose."""
    llama, tokenizer = llama_file.load_llama(world.LLAMA, torch.float32)
    rng = random.Random("probe")
    for kind in (question, comparison):
        right = 0
        for _ in range(documents):
            seen, asked, said = kind(rng)
            answer = tokenizer.encode(said) + [tokenizer.eos_id]
            ids = [tokenizer.bos_id, *tokenizer.encode(seen), *tokenizer.encode(asked)]
            right += llama_file.greedy_continuation(llama, ids, len(answer)) == answer
        print(f"LLaMA alone, {kind.__name__}s in words: {100 * right / documents:.1f} % right ({documents} new documents)")


# ------------------------------------------------------------------------------------------------ the command


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("which", nargs="*", default=["vit", "llama"], metavar="vit|llama", help="what to make (default: both)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    wrong = [name for name in args.which if name not in ("vit", "llama")]
    if wrong:
        raise UserError(f"{wrong[0]}: is nothing to make here; there are vit and llama")
    start = time.monotonic()
    if "vit" in args.which:
        pretrain_vit(args.device)
        probe_vit()
    if "llama" in args.which:
        pretrain_llama(args.device)
        probe_llama()
    print(f"made in {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    console.run(main)
