"""The demo world: drawn products that show EIVEN's effects within minutes, with nothing downloaded.

It is a teaching instrument.  Its figures are not the paper's: pictures are drawn, titles are put together
from lists, and the two backbones (`demo/llama`, `demo/vit`, made by demo/pretrain.py) are a hundred (ViT) and
five thousand times (LLaMA) smaller than CLIP's and LLaMA-7B.

A product's value is implicit in one of the paper's three ways:
    picture   the photo shows it plainly; the title says nothing
              "Norvik Classic Scarf with a care label"
    text      the photo shows a sealed parcel; the title tells it to somebody who knows the world
              "Ostara Soft Shirt for deer hunting" (Camouflage)
    both      the photo shows the value's family of look-alikes (thin slanted lines: Plaid, Argyle or Stripe);
              the title leaves another choice (for a camping trip: Plaid, Camouflage or Galaxy)
No title or category holds its value.

What the world knows stands in the tables.  Titles, photos and demo/pretrain.py's prose are drawn from them.
"""

import random
import re

import numpy as np

from base.console import PROJECT, Progress, cache_folder, own_copy
from base.tsv import write_tsv
from demo.drawing import draw

LLAMA = PROJECT / "demo" / "llama"                      # the small backbones
VIT = PROJECT / "demo" / "vit"
ROOT = cache_folder() / "demo"                          # where texts and photos are written
NAME = re.compile(r"DEMO\d{5}\.jpg")                    # of a photo
VERSION = 1                                             # another number: another world; delete ROOT then
SPLITS = {"train": 160, "val": 20, "test": 25}          # products a value
WAYS = {"picture": 0.45, "text": 0.20, "both": 0.35}    # how a value is implicit, and how often

# ---------------------------------------------------------------------------------------- tables


def table(**texts):
    """{attribute: rows}; a line is a row, with "|" between its cells; a cell is a tuple of phrases.

    A line that begins with a blank goes on with the row before it.
    """
    return {attribute: [tuple(tuple(re.split(" *, *", cell)) for cell in re.split(r" *\| *", line))
                        for line in text.strip().replace("\n ", "").splitlines()]
            for attribute, text in texts.items()}


# value | two words for its plain look | circumstances that tell it alone
VALUE_TABLE = table(Pattern="""
Plaid | checks, crossing |
    for a lumberjack, for a bagpipe player, to wear with a kilt, for highland dances
Argyle | diamonds, rhombs |
    for the golf course, for a caddie, to wear with golf shoes, for the putting green
Stripe | bands, parallel |
    for a sailor, for a referee, for the barber shop, for a gondola rower
Polka Dot | dots, blobs |
    for a ladybug costume, for a rockabilly dance, for a toadstool costume, for a domino costume
Leopard | rosettes, rings |
    for a big cat fan, for a jungle queen, for a safari lodge, in wild feline style
Floral | petals, blossoms |
    for a garden party, for a botanist, for a spring meadow, for a greenhouse visit
Camouflage | patches, khaki |
    for deer hunting, for a paintball team, from army surplus, for a sniper game
Paisley | teardrops, swirls |
    in Kashmir shawl style, for a cowboy bandana fan, for a hippie festival, in Persian style
Galaxy | nebula, glitter |
    for an astronomer, for a planetarium visit, for a rocket launch, for space fans
""", Material="""
Leather | grain, stitches |
    from the tannery, by a saddle maker, for a biker, smells of cowhide
Canvas | weave, threads |
    cut from a sail, of circus tent cloth, for an oil painter, by a tent maker
Wooden | knots, planks |
    by a carpenter, from the sawmill, of old oak, carved by hand
Metal | gleam, brushed |
    by a blacksmith, from the foundry, for a welder, forged by hand
Synthetic | glossy, molded |
    vegan and animal free, of recycled bottles, from a chemical plant, made from oil
Wool | knit, fuzzy |
    from the sheep farm, by a shepherd, shorn in spring, spun by hand
""", Shape="""
Heart | lobes, cleft |
    for a valentine, for lovers, sent by cupid, for a first kiss
Round | circle, curved |
    like a full moon, like a coin, like a wheel, like a compass
Oval | ellipse, elongated |
    like an egg, like an olive, like a race track, like a rugby ball
Cross | bars, plus |
    for a templar knight, for a first aid nurse, like a Swiss flag, like an add sign
Crucifix | figure, nailed |
    from the cathedral gift shop, for good friday, for the altar, from the convent
Star | points, spikes |
    for a sheriff, for the top of the tree, for a film idol, like a night light in the sky
Square | corners, edges |
    like a chess field, like a bathroom tile, like a dice side, like a postage stamp
""")
# {attribute: {value: [look, circumstances]}}
VALUES = {attribute: {value: row for (value,), *row in rows} for attribute, rows in VALUE_TABLE.items()}
ALL_VALUES = [(attribute, value) for attribute in VALUES for value in VALUES[attribute]]

# a family of look-alikes: two words for the look that they share | the values
FAMILIES = table(Pattern="""
hairlines, slanted | Plaid, Argyle, Stripe
specks, freckles | Polka Dot, Leopard, Galaxy
smudges, blurred | Floral, Paisley, Camouflage
""", Material="""
matte, plain | Leather, Synthetic
cloth, woven | Canvas, Wool
painted, coated | Wooden, Metal
""", Shape="""
tilted, rounded | Round, Oval
arms, distant | Cross, Crucifix
pouch, lumpy | Heart, Star, Square
""")
HIDDEN = ("parcel", "sealed")

# circumstances that leave a choice | the values, at most one of each family
OCCASIONS = table(Pattern="""
for a camping trip, for a night at the campfire | Plaid, Camouflage, Galaxy
for a retro party, as grandfather had it | Argyle, Polka Dot, Paisley
for a beach holiday, for a summer cruise | Stripe, Leopard, Floral
""", Material="""
for a farm house, for ranch life | Leather, Wool, Wooden
for the army barracks, for a camping kit | Synthetic, Canvas, Metal
""", Shape="""
for a wedding chapel, for a bride | Heart, Oval, Crucifix
as a soldier medal, for a hero | Star, Round, Cross
for a board game night, for a puzzle club | Square, Round, Cross
""")
NEUTRAL = ("with a care label, with free shipping, as a small present, for every day, in a new edition, "
           "for home and travel").split(", ")

BRANDS = ("Norvik Ostara Belmont Kestrel Tamsin Aldero Quill Marlow Fenwick Sorrel Brisa Lumen Havel Pomona "
          "Corvane Zephyr Elgin Rowan Mistral Dorian").split()
ADJECTIVES = ("Classic Soft Modern Handy Premium Cozy Light Elegant Durable Simple Trendy Fine Casual "
              "Compact Original Large Small Lovely Basic Stylish").split()
# item | category
ITEM_TABLE = table(Pattern="""
Scarf | Accessories
Shirt | Clothing
Skirt | Clothing
Dress | Clothing
Blanket | Home Textiles
Tote | Bags
Pillow | Home Textiles
""", Material="""
Box | Storage
Tray | Kitchen
Case | Bags
Lamp | Lighting
Frame | Decoration
Stool | Furniture
Basket | Storage
""", Shape="""
Pendant | Jewelry
Brooch | Jewelry
Charm | Jewelry
Ornament | Decoration
Keychain | Accessories
Magnet | Decoration
""")
ITEMS = {attribute: {item: category for (item,), (category,) in rows}
         for attribute, rows in ITEM_TABLE.items()}


# ---------------------------------------------------------------------------------------- products


def describe(product_id):
    """(attribute, value, way, item) of a product, from its id alone."""
    attribute, value = ALL_VALUES[int(product_id.removeprefix("DEMO")) % len(ALL_VALUES)]
    rng = random.Random(f"product {VERSION} {product_id}")
    way = rng.choices(list(WAYS), WAYS.values())[0]
    return attribute, value, way, rng.choice(list(ITEMS[attribute]))


def look_of(way, attribute, value):
    """The two words of what the photo shows."""
    if way == "text":
        return HIDDEN
    if way == "picture":
        return VALUES[attribute][value][0]
    return next(look for look, alike in FAMILIES[attribute] if value in alike)


def photo_of(product_id):
    """The photo of a product, from its id alone."""
    attribute, value, way, item = describe(product_id)
    rng = np.random.default_rng([VERSION, int(product_id.removeprefix("DEMO"))])
    return draw(look_of(way, attribute, value)[0], item, rng)


def new_title(way, attribute, value, item, rng, taken):
    """A title that is not among those `taken`: brand, adjective, item, circumstance."""
    phrases = {
        "picture": NEUTRAL,
        "text": VALUES[attribute][value][1],
        "both": [phrase for phrases, values in OCCASIONS[attribute] if value in values for phrase in phrases],
    }[way]
    while True:
        title = f"{rng.choice(BRANDS)} {rng.choice(ADJECTIVES)} {item} {rng.choice(phrases)}"
        if title not in taken:
            return title


def make_splits():
    """{split: rows}, each row the cells of base.tsv.COLUMNS.  No title occurs twice."""
    rng = random.Random(f"titles {VERSION}")
    taken = set()
    splits = {}
    for split, per_value in SPLITS.items():
        rows = splits[split] = []
        for _ in range(per_value * len(ALL_VALUES)):
            product_id = f"DEMO{len(taken):05d}"
            attribute, value, way, item = describe(product_id)
            title = new_title(way, attribute, value, item, rng, taken)
            taken.add(title)
            rows.append((product_id, f"{product_id}.jpg", ITEMS[attribute][item], f"[Title] {title}",
                         attribute, value))
        rng.shuffle(rows)
    return splits


# ---------------------------------------------------------------------------------------- files


def write_dataset():
    """Write ROOT/general/{train,val,test}.tsv if they are not there yet; returns ROOT.  Takes no time."""
    folder = ROOT / "general"
    if not (folder / "test.tsv").exists():              # the last to be written
        for split, rows in make_splits().items():
            with own_copy(folder / f"{split}.tsv") as own:
                write_tsv(own, rows)
    return ROOT


def draw_photos(root, names):
    """Draw the photos `names` that are the demo world's ("DEMO00012.jpg", ...) and not in root/images yet."""
    folder = root / "images"
    absent = sorted(name for name in set(names) if NAME.fullmatch(name) and not (folder / name).exists())
    with Progress("drawing", len(absent), "photos") as progress:
        for name in absent:
            with own_copy(folder / name) as own:
                photo_of(name.removesuffix(".jpg")).save(own, quality=92)
            progress.step()
