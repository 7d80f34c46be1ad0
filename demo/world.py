"""The demo world: small drawn products for which EIVEN's effects can be watched in minutes, with nothing downloaded.

It is a teaching instrument.  Its figures are not the paper's: pictures are drawn, titles are put together from lists,
and the two backbones (`demo/llama`, `demo/vit`, made by demo/pretrain.py) are a hundred (ViT) and five
thousand times (LLaMA) smaller than CLIP's and LLaMA-7B.

A product's value is implicit in one of the paper's three ways:
    picture   the photo shows it plainly; the title says nothing            "Norvik Classic Scarf with a care label"
    text      the photo shows a sealed parcel; the title gives it away       "Ostara Soft Shirt for deer hunting"
              to somebody who knows the world (hunting: Camouflage)
    both      the photo shows to which family of look-alikes it belongs (thin slanted lines: Plaid, Argyle or Stripe),
              the title narrows it down otherwise (a camping trip: Plaid, Camouflage or Galaxy)
No title or category holds its value.

What the world knows stands in the tables below; titles, photos and the prose of demo/pretrain.py are drawn from them.
"""

import csv
import io
import random
import re
from pathlib import Path

import numpy as np

from base.console import Progress, cache_folder, whole_file, write_text
from demo.drawing import draw

PROJECT = Path(__file__).resolve().parent.parent
LLAMA, VIT = PROJECT / "demo" / "llama", PROJECT / "demo" / "vit"       # the small backbones
ROOT = cache_folder() / "demo"                                     # where texts and photos are written
NAME = re.compile(r"DEMO\d{5}\.jpg")                            # of a photo
VERSION = "1"                                                   # another number: an older cache is written anew
SPLITS = {"train": 160, "val": 20, "test": 25}                  # products a value
WAYS = {"picture": 0.45, "text": 0.20, "both": 0.35}            # how a value is implicit, and how often


# ------------------------------------------------------------------------------------------------ what the world knows

# value: (two words for its plain look, circumstances that tell it alone)
VALUES = {
    "Pattern": {
        "Plaid": (("checks", "crossing"), ("for a lumberjack", "for a bagpipe player", "to wear with a kilt", "for highland dances")),
        "Argyle": (("diamonds", "rhombs"), ("for the golf course", "for a caddie", "to wear with golf shoes", "for the putting green")),
        "Stripe": (("bands", "parallel"), ("for a sailor", "for a referee", "for the barber shop", "for a gondola rower")),
        "Polka Dot": (("dots", "blobs"), ("for a ladybug costume", "for a rockabilly dance", "for a toadstool costume", "for a domino costume")),
        "Leopard": (("rosettes", "rings"), ("for a big cat fan", "for a jungle queen", "for a safari lodge", "in wild feline style")),
        "Floral": (("petals", "blossoms"), ("for a garden party", "for a botanist", "for a spring meadow", "for a greenhouse visit")),
        "Camouflage": (("patches", "khaki"), ("for deer hunting", "for a paintball team", "from army surplus", "for a sniper game")),
        "Paisley": (("teardrops", "swirls"), ("in Kashmir shawl style", "for a cowboy bandana fan", "for a hippie festival", "in Persian style")),
        "Galaxy": (("nebula", "glitter"), ("for an astronomer", "for a planetarium visit", "for a rocket launch", "for space fans")),
    },
    "Material": {
        "Leather": (("grain", "stitches"), ("from the tannery", "by a saddle maker", "for a biker", "smells of cowhide")),
        "Canvas": (("weave", "threads"), ("cut from a sail", "of circus tent cloth", "for an oil painter", "by a tent maker")),
        "Wooden": (("knots", "planks"), ("by a carpenter", "from the sawmill", "of old oak", "carved by hand")),
        "Metal": (("gleam", "brushed"), ("by a blacksmith", "from the foundry", "for a welder", "forged by hand")),
        "Synthetic": (("glossy", "molded"), ("vegan and animal free", "of recycled bottles", "from a chemical plant", "made from oil")),
        "Wool": (("knit", "fuzzy"), ("from the sheep farm", "by a shepherd", "shorn in spring", "spun by hand")),
    },
    "Shape": {
        "Heart": (("lobes", "cleft"), ("for a valentine", "for lovers", "sent by cupid", "for a first kiss")),
        "Round": (("circle", "curved"), ("like a full moon", "like a coin", "like a wheel", "like a compass")),
        "Oval": (("ellipse", "elongated"), ("like an egg", "like an olive", "like a race track", "like a rugby ball")),
        "Cross": (("bars", "plus"), ("for a templar knight", "for a first aid nurse", "like a Swiss flag", "like an add sign")),
        "Crucifix": (("figure", "nailed"), ("from the cathedral gift shop", "for good friday", "for the altar", "from the convent")),
        "Star": (("points", "spikes"), ("for a sheriff", "for the top of the tree", "for a film idol", "like a night light in the sky")),
        "Square": (("corners", "edges"), ("like a chess field", "like a bathroom tile", "like a dice side", "like a postage stamp")),
    },
}

# a family of look-alikes: (two words for the look that they share, the values)
FAMILIES = {
    "Pattern": [(("hairlines", "slanted"), ("Plaid", "Argyle", "Stripe")),
                (("specks", "freckles"), ("Polka Dot", "Leopard", "Galaxy")),
                (("smudges", "blurred"), ("Floral", "Paisley", "Camouflage"))],
    "Material": [(("matte", "plain"), ("Leather", "Synthetic")),
                 (("cloth", "woven"), ("Canvas", "Wool")),
                 (("painted", "coated"), ("Wooden", "Metal"))],
    "Shape": [(("tilted", "rounded"), ("Round", "Oval")),
              (("arms", "distant"), ("Cross", "Crucifix")),
              (("pouch", "lumpy"), ("Heart", "Star", "Square"))],
}
HIDDEN = ("parcel", "sealed")

# circumstances that leave a choice, one value at most of each family: (phrases, the values)
OCCASIONS = {
    "Pattern": [(("for a camping trip", "for a night at the campfire"), ("Plaid", "Camouflage", "Galaxy")),
                (("for a retro party", "as grandfather had it"), ("Argyle", "Polka Dot", "Paisley")),
                (("for a beach holiday", "for a summer cruise"), ("Stripe", "Leopard", "Floral"))],
    "Material": [(("for a farm house", "for ranch life"), ("Leather", "Wool", "Wooden")),
                 (("for the army barracks", "for a camping kit"), ("Synthetic", "Canvas", "Metal"))],
    "Shape": [(("for a wedding chapel", "for a bride"), ("Heart", "Oval", "Crucifix")),
              (("as a soldier medal", "for a hero"), ("Star", "Round", "Cross")),
              (("for a board game night", "for a puzzle club"), ("Square", "Round", "Cross"))],
}
NEUTRAL = ("with a care label", "with free shipping", "as a small present", "for every day", "in a new edition", "for home and travel")

BRANDS = tuple("Norvik Ostara Belmont Kestrel Tamsin Aldero Quill Marlow Fenwick Sorrel Brisa Lumen Havel Pomona "
               "Corvane Zephyr Elgin Rowan Mistral Dorian".split())
ADJECTIVES = tuple("Classic Soft Modern Handy Premium Cozy Light Elegant Durable Simple Trendy Fine Casual Compact "
                   "Original Large Small Lovely Basic Stylish".split())
ITEMS = {                                                       # item: category
    "Pattern": {"Scarf": "Accessories", "Shirt": "Clothing", "Skirt": "Clothing", "Dress": "Clothing",
                "Blanket": "Home Textiles", "Tote": "Bags", "Pillow": "Home Textiles"},
    "Material": {"Box": "Storage", "Tray": "Kitchen", "Case": "Bags", "Lamp": "Lighting", "Frame": "Decoration",
                 "Stool": "Furniture", "Basket": "Storage"},
    "Shape": {"Pendant": "Jewelry", "Brooch": "Jewelry", "Charm": "Jewelry", "Ornament": "Decoration",
              "Keychain": "Accessories", "Magnet": "Decoration"},
}
ALL_VALUES = [(attribute, value) for attribute in VALUES for value in VALUES[attribute]]


def family_of(attribute, value):
    """The two words of the look that `value` shares with its look-alikes."""
    return next(words for words, values in FAMILIES[attribute] if value in values)


def circumstance(way, attribute, value, rng):
    """What the end of a title says."""
    if way == "picture":
        return rng.choice(NEUTRAL)
    if way == "text":
        return rng.choice(VALUES[attribute][value][1])
    return rng.choice([phrase for phrases, values in OCCASIONS[attribute] if value in values for phrase in phrases])


def look_of(way, attribute, value):
    """The two words of what the photo shows."""
    if way == "text":
        return HIDDEN
    return VALUES[attribute][value][0] if way == "picture" else family_of(attribute, value)


def draw_title(way, attribute, value, item, rng):
    return f"{rng.choice(BRANDS)} {rng.choice(ADJECTIVES)} {item} {circumstance(way, attribute, value, rng)}"


# ------------------------------------------------------------------------------------------------ the data set


def describe(product_id):
    """(attribute, value, way, item) of a product, from its id alone."""
    attribute, value = ALL_VALUES[int(product_id.removeprefix("DEMO")) % len(ALL_VALUES)]
    rng = random.Random(f"product {VERSION} {product_id}")
    way = rng.choices(list(WAYS), WAYS.values())[0]
    return attribute, value, way, rng.choice(list(ITEMS[attribute]))


def make_splits():
    """{split: [row, ...]}, each row a dict under the headings of the TSV.  No title occurs twice."""
    rng, taken, number, splits = random.Random(f"titles {VERSION}"), set(), 0, {}
    for split, per_value in SPLITS.items():
        rows = []
        for _ in range(per_value * len(ALL_VALUES)):
            product_id = f"DEMO{number:05d}"
            number += 1
            attribute, value, way, item = describe(product_id)
            title = draw_title(way, attribute, value, item, rng)
            while title in taken:
                title = draw_title(way, attribute, value, item, rng)
            taken.add(title)
            rows.append({"id": product_id, "images": f"{product_id}.jpg", "category": ITEMS[attribute][item],
                         "texts": f"[Title] {title}", "attribute_names": attribute, "attribute_values": value})
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def write_dataset():
    """Make sure that ROOT/general/{train,val,test}.tsv are those of this version; returns ROOT.  Takes no time."""
    stamp = ROOT / "general" / "version.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == VERSION:
        return ROOT
    for photo in (ROOT / "images").glob("DEMO*.jpg"):           # of an older world
        photo.unlink(missing_ok=True)
    for split, rows in make_splits().items():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(ROOT / "general" / f"{split}.tsv", text.getvalue())
    write_text(stamp, VERSION)                                  # last: what it vouches for is whole
    return ROOT


def draw_photos(root, names):
    """Draw those of the photos `names` that are the demo world's ("DEMO00012.jpg", ...) and not in root/images yet."""
    folder = Path(root) / "images"
    absent = sorted({name for name in names if NAME.fullmatch(name) and not (folder / name).exists()})
    with Progress("drawing", total=len(absent), unit="photos") as progress:
        for name in absent:
            with whole_file(folder / name) as partial:
                photo_of(Path(name).stem).save(partial, format="JPEG", quality=92)
            progress.step()


def photo_of(product_id):
    """The photo of a product, from its id alone."""
    attribute, value, way, item = describe(product_id)
    rng = np.random.default_rng([int(VERSION), int(product_id.removeprefix("DEMO"))])
    return draw(look_of(way, attribute, value), item, rng)

