"""Photos of the demo world's products, drawn: a look on a thing, before a background, under some light.

A look is known by the first of its two words in demo/world.py's tables ("checks", "diamonds", "parcel").  It is either the
surface of a thing that has its own outline (a scarf, a box), or the outline of an ornament (a pendant, a charm).
Everything else - colours, size, place, angle, background, light, noise, distractors - comes from the generator `rng`.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 112                                                      # of a photo, in pixels

# ------------------------------------------------------------------------------------------------ textures

GRID_Y, GRID_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def smooth_noise(rng, cells, across=None):
    """(SIDE, SIDE) in about -1..1, with `cells` bumps down and `across` (as many, if not given) over a side."""
    small = rng.standard_normal((cells, across or cells)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


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
    """base colour under layers of (colour, how much of it: (SIDE, SIDE) in 0..1) -> (SIDE, SIDE, 3)."""
    image = np.broadcast_to(np.asarray(base, np.float32), (SIDE, SIDE, 3))
    for shade, amount in layers:
        amount = np.clip(amount, 0, 1).astype(np.float32)[..., None]
        image = image * (1 - amount) + np.asarray(shade, np.float32) * amount
    return image


def soft(x, width=0.06):
    """0 below zero, 1 above, soft over `width`: edges without stairs."""
    return np.clip(x / width + 0.5, 0, 1)


def cells(u, v, rng, jitter=0.0):
    """Places within staggered cells, each -0.5..0.5 and shifted by up to `jitter`, and a random number a cell."""
    row = np.floor(v)
    u = u + 0.5 * (row % 2)
    column = np.floor(u)
    table = rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    chance = table[row.astype(int) % 16, column.astype(int) % 16]
    return u - column - 0.5 + jitter * chance[..., 0], v - row - 0.5 + jitter * chance[..., 1], chance[..., 2]


def texture(look, rng):
    """The surface of a look (its first word), turned and sized at random: (SIDE, SIDE, 3), 0..255."""
    period = rng.uniform(17, 25)
    upright = look in ("checks", "diamonds", "knit")            # these are worn upright, give or take
    angle = rng.uniform(-0.25, 0.25) if upright else rng.uniform(0, np.pi)
    x, y = GRID_X / period + rng.uniform(0, 9), GRID_Y / period + rng.uniform(0, 9)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    a, b = two_colours(rng)
    fu, fv = u % 1, v % 1

    if look == "checks":                                        # Plaid: bands both ways, seen through each other
        thin = colour(rng)
        return paint(a, (b, 0.55 * soft(0.45 - fu)), (b, 0.55 * soft(0.45 - fv)),
                     (thin, 0.8 * soft(0.06 - abs(fu - 0.72), 0.04)), (thin, 0.8 * soft(0.06 - abs(fv - 0.72), 0.04)))
    if look == "diamonds":                                      # Argyle: tall lozenges under thin crossing lines
        fu, fv = (u * 0.8) % 1 - 0.5, (v * 0.5) % 1 - 0.5
        lines = soft(0.035 - abs(abs(fu) - abs(fv)), 0.03)
        return paint(a, (b, soft(0.5 - abs(fu) - abs(fv), 0.05)), (colour(rng, 150, 255), lines))
    if look == "bands":                                         # Stripe
        return paint(a, (b, soft(abs(fu - 0.5) - rng.uniform(0.2, 0.3))))
    if look in ("dots", "rosettes", "petals", "teardrops"):
        jitter = {"dots": 0.0, "rosettes": 0.16, "petals": 0.1, "teardrops": 0.05}[look]
        cu, cv, chance = cells(u, v, rng, jitter)
        r, theta = np.hypot(cu, cv), np.arctan2(cv, cu) + np.pi * chance
        if look == "dots":
            return paint(a, (b, soft(rng.uniform(0.24, 0.31) - r)))
        if look == "rosettes":                                  # Leopard: broken dark rings round a darker middle
            skin = np.array([(214, 168, 102), (225, 190, 140), (190, 180, 170), (228, 150, 160)][rng.integers(4)])
            wobble = 0.29 + 0.05 * np.sin(3 * theta + 9 * chance)
            ring = soft(0.085 - abs(r - wobble), 0.05) * soft(np.cos(1.5 * theta) + 0.55, 0.5)
            return paint(skin, (skin * 0.68, soft(wobble - r)), ((35, 25, 20), ring))
        if look == "petals":                                    # Floral: five petals and a heart, some leaves
            flower = soft(0.24 + 0.17 * np.cos(5 * theta) - r)
            leaf = soft(0.10 - abs(np.hypot(cu - 0.42, cv - 0.2) - 0.05), 0.05)
            return paint(a, ((60, 130, 60), leaf), (b, flower), ((240, 205, 60), soft(0.1 - r)))
        side = np.where(chance > 0, 1.0, -1.0)                  # Paisley: bent drops with a lighter one inside
        px, py = (cu * 0.8 + cv * 0.6) * side + 0.42, (cv * 0.8 - cu * 0.6) * side
        px, py = px / 0.9, py - 0.35 * px * px + 0.1
        width = 0.62 * np.sqrt(np.clip(px, 0, 1)) * np.clip(1 - px, 0, 1)
        return paint(a, (b, soft(width - abs(py))), (a, soft(width - 0.09 - abs(py))), (b, soft(width - 0.17 - abs(py))))
    if look == "patches":                                       # Camouflage: four shades in large flat patches
        shades = np.array([[(74, 88, 50), (120, 110, 70), (50, 48, 38), (160, 150, 110)],
                           [(195, 170, 125), (150, 115, 80), (110, 85, 60), (222, 205, 170)],
                           [(70, 90, 110), (120, 135, 145), (40, 50, 65), (175, 185, 190)]][rng.integers(3)])
        n = rng.integers(7, 10)
        return paint(shades[0], *((shade, soft(smooth_noise(rng, n) - 0.25, 0.12)) for shade in shades[1:]))
    if look == "nebula":                                        # Galaxy: clouds of light, stars of all sizes
        cloud = smooth_noise(rng, 4)
        stars = Image.new("L", (SIDE, SIDE))
        pen = ImageDraw.Draw(stars)
        for _ in range(55):
            (px, py), radius = rng.uniform(0, SIDE, 2), rng.choice([0.6, 0.9, 1.6])
            pen.ellipse((px - radius, py - radius, px + radius, py + radius), fill=255)
        return paint((18, 14, 44), ((120, 50, 150), cloud * 0.8), ((40, 110, 190), smooth_noise(rng, 4) * 0.7),
                     ((255, 250, 240), np.asarray(stars) / 255))
    if look == "grain":                                         # Leather: wrinkled hide with a seam
        hide = np.array([(120, 72, 40), (70, 42, 28), (165, 110, 65), (45, 40, 40), (125, 35, 35)][rng.integers(5)])
        wrinkles = abs(smooth_noise(rng, 30)) < 0.22
        seam = soft(0.05 - abs(v % 3 - 0.5), 0.04) * soft(0.3 - abs(u * 2.2 % 1 - 0.5))
        return paint(hide, (hide * 0.6, wrinkles * 0.7), (hide * 1.25, soft(smooth_noise(rng, 5), 2) * 0.3), ((230, 205, 160), seam))
    if look == "weave":                                         # Canvas: over and under, thread by thread
        cloth = np.array([(205, 190, 155), (150, 145, 110), (110, 115, 120), (175, 120, 80)][rng.integers(4)])
        over = np.sin(u * 16) * np.sin(v * 16)
        return paint(cloth, (cloth * 0.62, soft(over, 1.2) * 0.8), (cloth * 1.15, soft(-over - 0.5, 0.4) * 0.5))
    if look == "knots":                                         # Wooden: year rings, here and there a knot
        wood = np.array([(176, 125, 75), (140, 90, 50), (205, 165, 115), (110, 70, 45)][rng.integers(4)])
        (kx, ky), bend = rng.uniform(30, SIDE - 30, 2), smooth_noise(rng, 4)
        distance = np.hypot((GRID_X - kx) / 2.6, GRID_Y - ky)
        rings = np.sin((GRID_Y + 9 * bend + 16 * np.exp(-distance / 14)) * 0.75)
        return paint(wood, (wood * 0.66, soft(rings, 1.2) * 0.75), (wood * 0.4, soft(5 - distance, 2)))
    if look == "gleam":                                         # Metal: brushed, with hard highlights
        tone = np.array([(165, 168, 175), (190, 160, 90), (175, 110, 80)][rng.choice(3, p=(0.6, 0.2, 0.2))])
        flash = np.sin(u * 1.7 + rng.uniform(0, 6))
        brushed = smooth_noise(rng, 60, 3)
        return paint(tone * 0.75, ((255, 255, 255), np.clip(flash, 0, 1) ** 3 * 0.95), ((30, 32, 38), np.clip(-flash, 0, 1) ** 3 * 0.8),
                     ((250, 250, 250), brushed * 0.12))
    if look == "glossy":                                        # Synthetic: one loud colour, soft light, a moulding seam
        (gx, gy), loud = rng.uniform(30, SIDE - 30, 2), colour(rng, 20, 255)
        spot = np.exp(-((GRID_X - gx) ** 2 + (GRID_Y - gy) ** 2) / 220)
        return paint(loud, ((255, 255, 255), spot * 0.95), (loud * 0.75, soft(0.03 - abs(u % 3 - 1), 0.03)))
    if look == "knit":                                          # Wool: rows of stitches like small v's
        stitch = (v * 2.2 + abs(u * 2 % 1 - 0.5) * 1.6) % 1
        fuzz = smooth_noise(rng, 50) * 0.12
        return paint(a, (a * 0.5, soft(0.32 - stitch, 0.2) + fuzz), (a * 1.2, soft(abs(u * 2 % 1 - 0.5) - 0.4) * 0.4))
    # The families: what look-alikes have in common, and no more.
    if look == "hairlines":
        faded = soft(smooth_noise(rng, 5) + 0.4, 1.2)
        return paint(a, (b, soft(0.12 - abs(u * 2 % 1 - 0.5), 0.1) * faded * 0.7))
    if look == "specks":
        return paint(a, (b, soft(smooth_noise(rng, 26) - 1.0, 0.4)))
    if look == "smudges":
        return paint(a, (b, soft(smooth_noise(rng, 7), 1.3)), (colour(rng), soft(smooth_noise(rng, 7) - 0.4, 1.2) * 0.7))
    if look == "matte":
        return paint(a * 0.8, (a, soft(smooth_noise(rng, 3), 3) * 0.6))
    if look == "cloth":
        return paint(a, (a * 0.72, soft(np.sin(u * 9) + np.sin(v * 9), 2) * 0.8))
    if look == "painted":
        return paint(a, (a * 0.86, soft(np.sin(GRID_Y * 0.5 + 2 * smooth_noise(rng, 3)), 1.5) * 0.6))
    return paint(a, (a * 1.3, soft(smooth_noise(rng, 3), 3) * 0.5))             # of ornaments: plain, with some light


# ------------------------------------------------------------------------------------------------ outlines and photos

# Polygons in a square from -1 to 1; a second one is a hole.
OUTLINES = {
    "Scarf": ([(-0.5, -0.95), (0.1, -0.95), (0.25, 0), (0.75, 0.9), (0.2, 1), (-0.2, 0.35), (-0.35, 1), (-0.85, 0.9), (-0.45, 0)],),
    "Shirt": ([(-0.35, -0.9), (0.35, -0.9), (1, -0.5), (0.8, -0.05), (0.52, -0.25), (0.52, 0.95), (-0.52, 0.95), (-0.52, -0.25), (-0.8, -0.05), (-1, -0.5)],),
    "Skirt": ([(-0.4, -0.85), (0.4, -0.85), (0.95, 0.85), (-0.95, 0.85)],),
    "Dress": ([(-0.35, -1), (-0.15, -0.75), (0.15, -0.75), (0.35, -1), (0.5, -0.4), (0.3, -0.1), (0.8, 1), (-0.8, 1), (-0.3, -0.1), (-0.5, -0.4)],),
    "Blanket": ([(-0.95, -0.7), (0.95, -0.75), (0.9, 0.75), (0, 0.85), (-0.95, 0.7)],),
    "Tote": ([(-0.75, -0.3), (-0.45, -0.3), (-0.3, -0.95), (0.3, -0.95), (0.45, -0.3), (0.75, -0.3), (0.85, 0.95), (-0.85, 0.95)],
             [(-0.32, -0.3), (-0.2, -0.8), (0.2, -0.8), (0.32, -0.3)]),
    "Pillow": ([(-0.9, -0.85), (0, -0.72), (0.9, -0.85), (0.78, 0), (0.9, 0.85), (0, 0.72), (-0.9, 0.85), (-0.78, 0)],),
    "Box": ([(-0.85, -0.6), (-0.6, -0.85), (0.9, -0.85), (0.9, 0.55), (0.7, 0.8), (-0.85, 0.8)],),
    "Tray": ([(-0.8, -0.65), (0.8, -0.65), (1, 0), (0.8, 0.65), (-0.8, 0.65), (-1, 0)],),
    "Case": ([(-0.9, -0.45), (-0.35, -0.45), (-0.35, -0.75), (0.35, -0.75), (0.35, -0.45), (0.9, -0.45), (0.9, 0.8), (-0.9, 0.8)],),
    "Lamp": ([(-0.4, -0.95), (0.4, -0.95), (0.85, 0.3), (0.15, 0.3), (0.15, 0.75), (0.5, 0.95), (-0.5, 0.95), (-0.15, 0.75), (-0.15, 0.3), (-0.85, 0.3)],),
    "Frame": ([(-0.85, -0.95), (0.85, -0.95), (0.85, 0.95), (-0.85, 0.95)], [(-0.35, -0.45), (0.35, -0.45), (0.35, 0.45), (-0.35, 0.45)]),
    "Stool": ([(-0.9, -0.7), (0.9, -0.7), (0.9, 0.1), (0.65, 0.1), (0.8, 0.95), (0.5, 0.95), (0.35, 0.1), (-0.35, 0.1), (-0.5, 0.95), (-0.8, 0.95), (-0.65, 0.1), (-0.9, 0.1)],),
    "Basket": ([(-0.95, -0.25), (-0.6, -0.25), (-0.4, -0.9), (0.4, -0.9), (0.6, -0.25), (0.95, -0.25), (0.65, 0.85), (-0.65, 0.85)],
               [(-0.45, -0.25), (-0.3, -0.7), (0.3, -0.7), (0.45, -0.25)]),
}


def outline_of_shape(look, rng):
    """The polygon of an ornament, in a square from -1 to 1."""
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    if look == "lobes":
        points = np.stack([16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))]) / 17
    elif look in ("circle", "ellipse", "tilted"):
        ratio = {"circle": 1.0, "ellipse": rng.uniform(0.5, 0.62), "tilted": rng.uniform(0.78, 0.84)}[look]
        points = np.stack([ratio * np.cos(t), np.sin(t)])
    elif look in ("bars", "figure", "arms"):                    # upright longer than the beam
        w, beam, high = rng.uniform(0.2, 0.27), rng.uniform(0.6, 0.72), -0.3
        points = np.array([(-w, -1), (w, -1), (w, high - w), (beam, high - w), (beam, high + w), (w, high + w), (w, 1), (-w, 1),
                           (-w, high + w), (-beam, high + w), (-beam, high - w), (-w, high - w)]).T
    elif look == "points":
        r = np.where(np.arange(10) % 2, 0.42, 1.0)
        points = np.stack([r * np.sin(np.arange(10) * np.pi / 5), -r * np.cos(np.arange(10) * np.pi / 5)])
    elif look == "corners":
        points = np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]).T
    else:                                                       # a lumpy pouch
        r = 0.8 + 0.1 * np.sin(3 * t + rng.uniform(0, 6)) + 0.07 * np.sin(5 * t + rng.uniform(0, 6))
        points = np.stack([r * np.cos(t), r * np.sin(t)])
    return (points.T,)


def draw(look, item, rng):
    """A photo, RGB, SIDE x SIDE: `look` (two words of demo/world.py's tables) on an `item`, all else at random."""
    look = look[0]
    is_shape = item not in OUTLINES                             # an ornament, whose outline is the look
    a, b = colour(rng, 90, 250), colour(rng, 60, 250)
    slope = rng.uniform(-1, 1, 2)
    light = (GRID_X - SIDE / 2) / SIDE * slope[0] + (GRID_Y - SIDE / 2) / SIDE * slope[1]       # about -1..1
    floor = soft(GRID_Y - rng.uniform(0.5, 0.9) * SIDE, 4) * rng.integers(2)
    scene = paint(a * 0.5 + 110, (b * 0.6 + 60, floor)) + 40 * light[..., None]
    photo = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(photo)
    for _ in range(rng.integers(0, 4)):                         # distractors near the rim
        px, py = (rng.choice([rng.uniform(0, 14), rng.uniform(SIDE - 14, SIDE)]), rng.uniform(0, SIDE))[::rng.choice([1, -1])]
        radius, fill = rng.uniform(4, 11), tuple(int(x) for x in colour(rng))
        (pen.ellipse if rng.integers(2) else pen.rectangle)((px - radius, py - radius, px + radius, py + radius), fill=fill)

    far = look == "arms"                                        # seen from afar
    size = SIDE * (rng.uniform(0.24, 0.3) if far else rng.uniform(0.33, 0.45))
    if look == "parcel":
        outlines = ([(-0.9, -0.7), (0.9, -0.7), (0.9, 0.75), (-0.9, 0.75)],)
        surface = paint(np.array([(190, 150, 105), (170, 130, 90), (205, 180, 145)][rng.integers(3)]) + rng.uniform(-12, 12))
    else:
        outlines = outline_of_shape(look, rng) if is_shape else OUTLINES[item]
        surface = texture(look, rng)
    angle = rng.uniform(-0.35, 0.35)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))]) * size
    reach = SIDE / 2 - size * 0.92
    centre = SIDE / 2 + rng.uniform(-1, 1, 2) * max(reach, 3)

    def place(points):
        """Points of the square from -1 to 1 as places on the photo at twice its size."""
        return [tuple(point) for point in 2 * (np.asarray(points) @ turn.T + centre)]

    mask = Image.new("L", (2 * SIDE, 2 * SIDE))
    pen = ImageDraw.Draw(mask)
    for i, points in enumerate(outlines):
        pen.polygon(place(points), fill=0 if i else 255)
    mask = mask.reduce(2)
    shadow = mask.filter(ImageFilter.GaussianBlur(3)).point(lambda x: x * 0.45)
    photo.paste((25, 25, 30), (int(rng.integers(2, 6)), int(rng.integers(2, 6))), shadow)
    if is_shape and look != "parcel":
        hang(photo, item, place([(0, -0.95), (0, -1.3)]), rng)
    shading = 1 + 0.35 * light[..., None] * rng.uniform(0.3, 1)
    photo.paste(Image.fromarray(np.clip(surface * shading, 0, 255).astype(np.uint8)), (0, 0), mask)

    big = photo.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(big)
    if look == "parcel":                                        # tape both ways
        ribbon = tuple(int(x) for x in colour(rng))
        for line in ([(-0.9, 0), (0.9, 0)], [(0.1, -0.7), (0.1, 0.75)]):
            pen.line(place(line), fill=ribbon, width=9)
    elif look == "pouch":                                       # a string round its neck
        pen.line(place([(-0.5, -0.45), (0.5, -0.45)]), fill=(60, 45, 30), width=5)
    elif look == "figure":                                      # the body on the crucifix
        body = (250, 240, 215) if surface.mean() < 150 else (45, 30, 25)
        pen.line(place([(-0.55, -0.38), (0, -0.2), (0.55, -0.38)]), fill=body, width=8)
        pen.line(place([(0, -0.3), (0.05, 0.15), (-0.03, 0.6)]), fill=body, width=11)
        x, y = place([(0, -0.52)])[0]
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), fill=body)
    photo = big.reduce(2)
    if far:
        photo = photo.filter(ImageFilter.GaussianBlur(1.6))
    noise = rng.normal(0, rng.uniform(1, 6), (SIDE, SIDE, 1))
    pixels = np.asarray(photo, np.float32) * rng.uniform(0.8, 1.15) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def hang(photo, item, ends, rng):
    """A chain, ring or hook behind an ornament: it tells the item, not the shape."""
    (x, y), (tx, ty) = [(px / 2, py / 2) for px, py in ends]
    pen, metal = ImageDraw.Draw(photo), (120, 115, 100)
    if item == "Pendant":
        for side in (-1, 1):
            pen.line([(x, y), (tx + side * 40, ty - 60)], fill=metal, width=2)
    elif item in ("Keychain", "Charm"):
        r = 7 if item == "Keychain" else 4
        pen.ellipse((tx - r, ty - r, tx + r, ty + r), outline=metal, width=2)
        pen.line([(x, y), (tx, ty)], fill=metal, width=2)
    elif item == "Ornament":
        pen.line([(x, y), (x, -5)], fill=metal, width=1)
