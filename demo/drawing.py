"""Photos of the demo world's products, drawn: a look on a thing, before a background, under some light.

A look is known by the first of its two words in demo/world.py's tables ("checks", "diamonds", "parcel").
It is either the surface of a thing that has its own outline (a scarf, a box), or the outline of an ornament
(a pendant, a charm).  Everything else comes from the generator `rng`: colours, size, angle, light, noise.
The order of the calls of `rng` is part of the world: whoever changes it gets other photos.

Read from the end: `draw` puts a photo together.
    scene        background, light, distractors
    outline_of   the form of the thing
    texture      its surface, as layers of colour; `layers_of` has a few lines for each look
    hang         what an ornament hangs on
    details      tape, a string, the body on a crucifix
"""

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

SIDE = 112                                              # of a photo, in pixels
TWICE = (2 * SIDE, 2 * SIDE)                            # size of what is drawn larger, for smooth edges
GRID_Y, GRID_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)        # of each pixel

# ---------------------------------------------------------------------------------------- colours


def one_of(colours, rng, p=None):
    """One of "#rrggbb #rrggbb ..." -> (3,), 0..255."""
    return np.array(ImageColor.getrgb(rng.choice(colours.split(), p=p)), float)


def colour(rng, low=30, high=235):
    """A colour that is no grey: RGB, 0..255."""
    while True:
        c = rng.uniform(low, high, 3)
        if np.ptp(c) > 60:
            return c


def two_colours(rng):
    """Two colours that differ clearly in brightness."""
    while True:
        a, b = colour(rng), colour(rng)
        if abs(a.mean() - b.mean()) > 55:
            return a, b


def paint(base, *layers):
    """A base colour under layers of (colour, how much of it, cut to 0..1: (SIDE, SIDE))."""
    image = 0
    for shade, amount in ((base, 1), *layers):
        if isinstance(shade, str):
            shade = ImageColor.getrgb(shade)
        amount = np.float32(np.clip(amount, 0, 1))[..., None]
        image = image * (1 - amount) + np.float32(shade) * amount
    return image


def as_image(pixels):
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------- amounts


def soft(x, width=0.06):
    """0 below zero, 1 above, soft over `width`: edges without stairs."""
    return np.clip(x / width + 0.5, 0, 1)


def line(x, half, width=0.06):
    """1 where x is within `half` of zero, soft over `width`."""
    return soft(half - abs(x), width)


def cells(u, v, rng, jitter):
    """Cells like bricks in a wall.  Of each pixel: x and y in its cell, -0.5..0.5, the cell's chance, -1..1,
    and distance and direction from the cell's middle; each cell is turned by half a circle times its chance.

    jitter  how far the middle of a cell is moved, at most
    """
    row = np.floor(v)
    u = u + 0.5 * (row % 2)
    column = np.floor(u)
    table = rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    dx, dy, chance = table.T[:, column.astype(int) % 16, row.astype(int) % 16]
    x = u - column - 0.5 + jitter * dx
    y = v - row - 0.5 + jitter * dy
    return x, y, chance, np.hypot(x, y), np.arctan2(y, x) + np.pi * chance


# ---------------------------------------------------------------------------------------- surfaces


def texture(look, rng):
    """The surface of a look, turned and sized at random: (SIDE, SIDE, 3), 0..255."""
    if look == "parcel":                                # brown paper
        return paint(one_of("#be9669 #aa825a #cdb491", rng) + rng.uniform(-12, 12))
    period = rng.uniform(17, 25)
    upright = look in ("checks", "diamonds", "knit")    # these are worn upright, give or take
    angle = rng.uniform(-0.25, 0.25) if upright else rng.uniform(0, np.pi)
    x = GRID_X / period + rng.uniform(0, 9)
    y = GRID_Y / period + rng.uniform(0, 9)
    turned = (x + 1j * y) * np.exp(-1j * angle)         # a point (x, y) is the complex number x + iy
    return paint(*layers_of(look, turned.real, turned.imag, *two_colours(rng), rng))


def layers_of(look, u, v, a, b, rng):
    """What `paint` needs: a base colour, and layers of (colour, how much of it).

    u, v  (SIDE, SIDE): each pixel's place on the surface; a pattern repeats itself about once in 1
    a, b  two colours
    """
    def noise(down, across=None):
        """(SIDE, SIDE) in about -1..1: soft bumps, `down` by `across` (or as many)."""
        small = rng.standard_normal((down, across or down)).astype(np.float32)
        return np.asarray(Image.fromarray(small).resize((SIDE, SIDE)))

    match look:
        # The values, each as it looks where it is plain to see.
        case "checks":                                  # Plaid: bands both ways, seen through each other
            thin = colour(rng)
            bands = [(b, 0.55 * soft(0.45 - w % 1)) for w in (u, v)]
            lines = [(thin, 0.8 * line(w % 1 - 0.72, 0.06, 0.04)) for w in (u, v)]
            return a, *bands, *lines
        case "diamonds":                                # Argyle: tall lozenges under thin crossing lines
            across = abs(u * 0.8 % 1 - 0.5)
            down = abs(v * 0.5 % 1 - 0.5)
            lines = line(across - down, 0.035, 0.03)
            return a, (b, soft(0.5 - across - down, 0.05)), (colour(rng, 150, 255), lines)
        case "bands":                                   # Stripe
            return a, (b, soft(abs(u % 1 - 0.5) - rng.uniform(0.2, 0.3)))
        case "dots":                                    # Polka Dot
            *_, r, _ = cells(u, v, rng, 0)
            return a, (b, soft(rng.uniform(0.24, 0.31) - r))
        case "rosettes":                                # Leopard: broken dark rings round a darker middle
            _, _, chance, r, theta = cells(u, v, rng, 0.16)
            skin = one_of("#d6a866 #e1be8c #beb4aa #e496a0", rng)
            radius = 0.29 + 0.05 * np.sin(3 * theta + 9 * chance)
            ring = line(r - radius, 0.085, 0.05) * soft(np.cos(1.5 * theta) + 0.55, 0.5)
            return skin, (skin * 0.68, soft(radius - r)), ("#231914", ring)
        case "petals":                                  # Floral: five petals and a heart, some leaves
            x, y, _, r, theta = cells(u, v, rng, 0.1)
            leaf = line(np.hypot(x - 0.42, y - 0.2) - 0.05, 0.1, 0.05)
            petals = soft(0.24 + 0.17 * np.cos(5 * theta) - r)
            return a, ("#3c823c", leaf), (b, petals), ("#f0cd3c", soft(0.1 - r))
        case "teardrops":                               # Paisley: bent drops with a lighter one inside
            x, y, chance, *_ = cells(u, v, rng, 0.05)
            side = np.sign(chance)
            along = (x * 0.8 + y * 0.6) * side + 0.42
            beside = (y * 0.8 - x * 0.6) * side - 0.35 * along * along + 0.1
            along = np.clip(along / 0.9, 0, 1)
            half = 0.62 * np.sqrt(along) * (1 - along)
            return a, (b, line(beside, half)), (a, line(beside, half - 0.09)), (b, line(beside, half - 0.17))
        case "patches":                                 # Camouflage: four shades in large flat patches
            ground, *shades = rng.choice(["#4a5832 #786e46 #323026 #a0966e",
                                          "#c3aa7d #967350 #6e553c #decdaa",
                                          "#465a6e #788791 #283241 #afb9be"]).split()
            n = rng.integers(7, 10)
            return ground, *((shade, soft(noise(n) - 0.25, 0.12)) for shade in shades)
        case "nebula":                                  # Galaxy: clouds of light, stars of all sizes
            cloud = noise(4)
            stars = Image.new("L", (SIDE, SIDE))
            for _ in range(55):
                ImageDraw.Draw(stars).circle(rng.uniform(0, SIDE, 2), rng.choice([0.6, 0.9, 1.6]), fill=255)
            other_cloud = noise(4)
            return ("#120e2c", ("#783296", cloud * 0.8), ("#286ebe", other_cloud * 0.7),
                    ("#fffaf0", np.asarray(stars) / 255))
        case "grain":                                   # Leather: wrinkled hide with a seam
            hide = one_of("#784828 #462a1c #a56e41 #2d2828 #7d2323", rng)
            wrinkles = abs(noise(30)) < 0.22
            seam = line(v % 3 - 0.5, 0.05, 0.04) * line(u * 2.2 % 1 - 0.5, 0.3)
            return (hide, (hide * 0.6, wrinkles * 0.7), (hide * 1.25, soft(noise(5), 2) * 0.3),
                    ("#e6cda0", seam))
        case "weave":                                   # Canvas: over and under, thread by thread
            cloth = one_of("#cdbe9b #96916e #6e7378 #af7850", rng)
            over = np.sin(u * 16) * np.sin(v * 16)
            return cloth, (cloth * 0.62, soft(over, 1.2) * 0.8), (cloth * 1.15, soft(-over - 0.5, 0.4) * 0.5)
        case "knots":                                   # Wooden: year rings, here and there a knot
            wood = one_of("#b07d4b #8c5a32 #cda573 #6e462d", rng)
            x, y = rng.uniform(30, SIDE - 30, 2)
            distance = np.hypot((GRID_X - x) / 2.6, GRID_Y - y)
            rings = np.sin((GRID_Y + 9 * noise(4) + 16 * np.exp(-distance / 14)) * 0.75)
            return wood, (wood * 0.66, soft(rings, 1.2) * 0.75), (wood * 0.4, soft(5 - distance, 2))
        case "gleam":                                   # Metal: brushed, with hard highlights
            tone = one_of("#a5a8af #bea05a #af6e50", rng, p=(0.6, 0.2, 0.2))
            flash = np.sin(u * 1.7 + rng.uniform(0, 6))
            brushed = noise(60, 3)
            return (tone * 0.75, (255, flash ** 3 * 0.95), ("#1e2026", -flash ** 3 * 0.8),
                    (250, brushed * 0.12))
        case "glossy":                                  # Synthetic: one loud colour, soft light, a seam
            x, y = rng.uniform(30, SIDE - 30, 2)
            loud = colour(rng, 20, 255)
            spot = np.exp(-((GRID_X - x) ** 2 + (GRID_Y - y) ** 2) / 220)
            return loud, (255, spot * 0.95), (loud * 0.75, line(u % 3 - 1, 0.03, 0.03))
        case "knit":                                    # Wool: rows of stitches like small v's
            slant = abs(u * 2 % 1 - 0.5)
            stitch = (v * 2.2 + slant * 1.6) % 1
            fuzz = noise(50) * 0.12
            return a, (a * 0.5, soft(0.32 - stitch, 0.2) + fuzz), (a * 1.2, soft(slant - 0.4) * 0.4)
        # The families: what look-alikes have in common, and no more.
        case "hairlines":
            faded = soft(noise(5) + 0.4, 1.2)
            return a, (b, line(u * 2 % 1 - 0.5, 0.12, 0.1) * faded * 0.7)
        case "specks":
            return a, (b, soft(noise(26) - 1, 0.4))
        case "smudges":
            first = soft(noise(7), 1.3)
            c = colour(rng)
            return a, (b, first), (c, soft(noise(7) - 0.4, 1.2) * 0.7)
        case "matte":
            return a * 0.8, (a, soft(noise(3), 3) * 0.6)
        case "cloth":
            return a, (a * 0.72, soft(np.sin(u * 9) + np.sin(v * 9), 2) * 0.8)
        case "painted":
            return a, (a * 0.86, soft(np.sin(GRID_Y * 0.5 + 2 * noise(3)), 1.5) * 0.6)
        case _:                                         # of ornaments: plain, with some light
            return a, (a * 1.3, soft(noise(3), 3) * 0.5)


# ---------------------------------------------------------------------------------------- outlines

# The corners of a polygon, "x y, x y, ...", in a square from -100 to 100; what follows a semicolon is a hole.
OUTLINES = {
    "Scarf": "-50 -95, 10 -95, 25 0, 75 90, 20 100, -20 35, -35 100, -85 90, -45 0",
    "Shirt": "-35 -90, 35 -90, 100 -50, 80 -5, 52 -25, 52 95, -52 95, -52 -25, -80 -5, -100 -50",
    "Skirt": "-40 -85, 40 -85, 95 85, -95 85",
    "Dress": "-35 -100, -15 -75, 15 -75, 35 -100, 50 -40, 30 -10, 80 100, -80 100, -30 -10, -50 -40",
    "Blanket": "-95 -70, 95 -75, 90 75, 0 85, -95 70",
    "Tote": "-75 -30, -45 -30, -30 -95, 30 -95, 45 -30, 75 -30, 85 95, -85 95;"
            "-32 -30, -20 -80, 20 -80, 32 -30",
    "Pillow": "-90 -85, 0 -72, 90 -85, 78 0, 90 85, 0 72, -90 85, -78 0",
    "Box": "-85 -60, -60 -85, 90 -85, 90 55, 70 80, -85 80",
    "Tray": "-80 -65, 80 -65, 100 0, 80 65, -80 65, -100 0",
    "Case": "-90 -45, -35 -45, -35 -75, 35 -75, 35 -45, 90 -45, 90 80, -90 80",
    "Lamp": "-40 -95, 40 -95, 85 30, 15 30, 15 75, 50 95, -50 95, -15 75, -15 30, -85 30",
    "Frame": "-85 -95, 85 -95, 85 95, -85 95; -35 -45, 35 -45, 35 45, -35 45",
    "Stool": "-90 -70, 90 -70, 90 10, 65 10, 80 95, 50 95, 35 10, -35 10, -50 95, -80 95, -65 10, -90 10",
    "Basket": "-95 -25, -60 -25, -40 -90, 40 -90, 60 -25, 95 -25, 65 85, -65 85;"
              "-45 -25, -30 -70, 30 -70, 45 -25",
    "parcel": "-90 -70, 90 -70, 90 75, -90 75",         # of any item
    "corners": "-80 -80, 80 -80, 80 80, -80 80",        # of ornaments: Square
    "points": "0 -100, 24.687 -33.979, 95.106 -30.902, 39.944 12.979, 58.779 80.902, 0 42, "
              "-58.779 80.902, -39.944 12.979, -95.106 -30.902, -24.687 -33.979",   # Star
}


def points(text):
    """Points "x y, x y, ..." of a square from -100 to 100 -> (n,), complex numbers, from -1 to 1."""
    return np.array([point.split() for point in text.split(",")], float) @ (1, 1j) / 100


def outline_of(look, item, rng):
    """The polygons (n,) of a thing, in a square from -1 to 1: its outline, and then perhaps a hole."""
    if corners := OUTLINES.get(look) or OUTLINES.get(item):
        return [points(polygon) for polygon in corners.split(";")]
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    match look:
        case "lobes":                                   # Heart
            up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            outline = (16 * np.sin(t) ** 3 - 1j * up) / 17
        case "circle" | "ellipse" | "tilted":           # Round, Oval, and what they have in common
            ratio = {"circle": 1, "ellipse": rng.uniform(0.5, 0.62), "tilted": rng.uniform(0.78, 0.84)}[look]
            outline = ratio * np.cos(t) + 1j * np.sin(t)
        case "bars" | "figure" | "arms":                # Cross, Crucifix, both: upright longer than the beam
            w = rng.uniform(0.2, 0.27)
            beam = rng.uniform(0.6, 0.72)
            down = np.array([-1, -0.3 - w, -0.3 - w, -0.3 + w, -0.3 + w, 1])
            right = np.array([w, w, beam, beam, w, w]) + 1j * down
            outline = np.append(right, -right.conj()[::-1])
        case _:                                         # a lumpy pouch: Heart, Star and Square
            r = 0.8 + 0.1 * np.sin(3 * t + rng.uniform(0, 6)) + 0.07 * np.sin(5 * t + rng.uniform(0, 6))
            outline = r * np.exp(1j * t)
    return [outline]


# ---------------------------------------------------------------------------------------- photos


def scene(rng):
    """A background with distractors near its rim, and the light on it: (SIDE, SIDE, 1), about -1..1."""
    a = colour(rng, 90, 250)
    b = colour(rng, 60, 250)
    right, down = rng.uniform(-1, 1, 2)
    light = ((GRID_X - SIDE / 2) / SIDE * right + (GRID_Y - SIDE / 2) / SIDE * down)[..., None]
    floor = soft(GRID_Y - rng.uniform(0.5, 0.9) * SIDE, 4) * rng.integers(2)
    photo = as_image(paint(a * 0.5 + 110, (b * 0.6 + 60, floor)) + 40 * light)
    pen = ImageDraw.Draw(photo)
    for _ in range(rng.integers(0, 4)):
        near_rim = rng.choice([rng.uniform(0, 14), rng.uniform(SIDE - 14, SIDE)])
        middle = np.array([near_rim, rng.uniform(0, SIDE)])[::rng.choice([1, -1])]
        radius = rng.uniform(4, 11)
        fill = tuple(colour(rng).astype(int))
        shape = pen.ellipse if rng.integers(2) else pen.rectangle
        shape([*(middle - radius), *(middle + radius)], fill=fill)
    return photo, light


def draw(look, item, rng):
    """A photo, RGB, SIDE x SIDE: `look` on an `item`, all else at random."""
    photo, light = scene(rng)
    far = look == "arms"                                # seen from afar
    size = SIDE * (rng.uniform(0.24, 0.3) if far else rng.uniform(0.33, 0.45))
    outline = outline_of(look, item, rng)
    surface = texture(look, rng)
    angle = rng.uniform(-0.35, 0.35)
    turn = size * np.exp(1j * angle)
    centre = (SIDE / 2 + rng.uniform(-1, 1, 2) * max(SIDE / 2 - size * 0.92, 3)) @ (1, 1j)

    def on_photo(corners):
        """Points (n,) of the square from -1 to 1 as pixels (x, y) of the photo at twice its size."""
        return [(point.real, point.imag) for point in 2 * (corners * turn + centre)]

    mask = Image.new("L", TWICE)
    for polygon, fill in zip(outline, (255, 0)):        # 0: a hole
        ImageDraw.Draw(mask).polygon(on_photo(polygon), fill=fill)
    mask = mask.reduce(2)
    shadow = mask.filter(ImageFilter.GaussianBlur(3)).point(lambda x: x * 0.45)
    photo.paste((25, 25, 30), tuple(rng.integers(2, 6, 2)), shadow)
    if look != "parcel":
        hang(photo, item, *np.array(on_photo(points("0 -95, 0 -130"))) / 2)
    shading = 1 + 0.35 * light * rng.uniform(0.3, 1)
    photo.paste(as_image(surface * shading), mask=mask)

    big = photo.resize(TWICE)
    details(ImageDraw.Draw(big), look, on_photo, surface.mean() < 150, rng)
    photo = big.reduce(2)
    if far:
        photo = photo.filter(ImageFilter.GaussianBlur(1.6))
    noise = rng.normal(0, rng.uniform(1, 6), (SIDE, SIDE, 1))
    return as_image(np.asarray(photo, np.float32) * rng.uniform(0.8, 1.15) + noise)


def hang(photo, item, low, high):
    """A chain, ring or thread behind an ornament: it tells the item, not the look.

    low, high  (2,): near the ornament's top, and above it
    """
    pen = ImageDraw.Draw(photo)
    metal = "#787364"
    if item == "Pendant":
        for side in (-40, 40):
            pen.line([*low, *high + (side, -60)], metal, 2)
    if item == "Ornament":
        pen.line([*low, low[0], -5], metal)
    if item in ("Keychain", "Charm"):
        pen.circle(high, 7 if item == "Keychain" else 4, outline=metal, width=2)
        pen.line([*low, *high], metal, 2)


def details(pen, look, on_photo, is_dark, rng):
    """What three of the looks have on their surface, drawn on the photo at twice its size."""
    def stroke(corners, colour, width):
        pen.line(on_photo(points(corners)), colour, width)

    if look == "parcel":                                # tape both ways
        tape = tuple(colour(rng).astype(int))
        stroke("-90 0, 90 0", tape, 9)
        stroke("10 -70, 10 75", tape, 9)
    if look == "pouch":                                 # a string round its neck
        stroke("-50 -45, 50 -45", "#3c2d1e", 5)
    if look == "figure":                                # the body on the crucifix
        body = "#faf0d7" if is_dark else "#2d1e19"
        stroke("-55 -38, 0 -20, 55 -38", body, 8)
        stroke("0 -30, 5 15, -3 60", body, 11)
        pen.circle(on_photo(points("0 -52"))[0], 7, body)
