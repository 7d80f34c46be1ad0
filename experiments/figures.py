"""The paper's figures 1, 4, 5 and 6 for any data set, from the runs of experiments.paper_tables:

    python -m experiments.paper_tables --rows full no-lbc no-lbc-twice --labels 10 20 --seeds 0 1 2
    python -m experiments.figures                                            RUNS/figure-1.png and so on

Where the paper compares EIVEN with DEFLATE, these figures compare it with itself, without Learning-by-Comparison and trained
for as many steps.
"""

import argparse
import csv
import statistics
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from base import console
from base.console import UserError, whole_file
from base.photo import open_photo
from data import read_split
from demo import world
from experiments.baselines import read_baselines
from experiments.paper_tables import CURVE, DATASETS, run_folder, scores
from support.config import PROJECT, find_sources
from support.report import confusion_png
from support.run_folder import read_config

# Okabe and Ito's colours: colour-blind readers can tell them apart.
BLUE, ORANGE, GREEN, PINK, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#888888", "#000000"
WITH, WITHOUT, FEWER_STEPS = "full", "no-lbc-twice", "no-lbc"
WAYS = {"picture": "the picture", "text": "the text", "both": "picture and text together"}


def font(size):
    return ImageFont.load_default(size)


def wrapped(text, size, width):
    """Lines of text of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        if font(size).getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def card(product, photo, lines, width=300):
    """A product as a picture: photo, title, and further lines as (text, colour)."""
    text = [(line, "black") for line in wrapped(product.title, 17, width - 20)]
    text += [(part, colour) for line, colour in lines for part in wrapped(line, 17, width - 20)]
    image = Image.new("RGB", (width, width + 24 * len(text) + 20), "white")
    photo = photo.copy()
    photo.thumbnail((width - 20, width - 20))
    photo = photo.resize([round(s * (width - 20) / max(photo.size)) for s in photo.size], Image.Resampling.BICUBIC)
    image.paste(photo, ((width - photo.width) // 2, 10))
    pen = ImageDraw.Draw(image)
    for i, (line, colour) in enumerate(text):
        pen.text((10, width + 24 * i), line, fill=colour, font=font(17))
    return image


def side_by_side(images, caption, columns=3):
    """Images in rows of `columns`, and a caption under them."""
    rows = [images[i:i + columns] for i in range(0, len(images), columns)]
    width = max(sum(image.width for image in row) for row in rows)
    lines = wrapped(caption, 16, width - 20)
    heights = [max(image.height for image in row) for row in rows]
    page = Image.new("RGB", (width, sum(heights) + 22 * len(lines) + 16), "white")
    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for image in row:
            page.paste(image, (x, y))
            x += image.width
        y += height
    for i, line in enumerate(lines):
        ImageDraw.Draw(page).text((10, y + 6 + 22 * i), line, fill=GREY, font=font(16))
    return page


def predictions(folder):
    """{(id, attribute): answer} of a run's test split."""
    with open(folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        return {(row["id"], row["attribute_names"]): row["prediction"] for row in csv.DictReader(file, dialect="excel-tab")}


def figure_1(products, images):
    """Three products, one for each way in which a value is implicit.  Only the demo world knows these ways."""
    cards = []
    for way, said in WAYS.items():
        product = next(p for p in products if world.NAME.fullmatch(p.image) and world.describe(p.id)[2] == way)
        lines = [(f"{product.attribute}: {product.value}", BLUE), (f"known from {said}", GREY)]
        cards.append(card(product, images(product), lines))
    return side_by_side(cards, "Figure 1: implicit attribute values. The value is not a part of the text.")


def figure_4(runs, dataset, labels, seeds):
    """micro-F1 against labels, with and without comparisons, and of the baselines: a point for each seed, a line for the means."""
    width, height, left, top = 760, 530, 70, 40
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    right, bottom = width - 20, height - 180
    places = {count: left + 40 + i * (right - left - 80) // max(1, len(labels) - 1) for i, count in enumerate(labels)}

    def y(f1):
        return bottom - (bottom - top) * f1 / 100

    for f1 in range(0, 101, 20):
        pen.line((left, y(f1), right, y(f1)), fill="#dddddd")
        pen.text((left - 8, y(f1)), str(f1), fill="black", font=font(16), anchor="rm")
    for count, x in places.items():
        pen.text((x, bottom + 8), str(count), fill="black", font=font(16), anchor="ma")
    pen.text((left, 8), f"{dataset}: micro-F1 in per cent, test split", fill="black", font=font(16))
    pen.text((right, bottom + 30), "labels for each value", fill="black", font=font(16), anchor="ra")
    curves = [(name, colour, {c: scores(runs, dataset, row, c, seeds)[0] for c in labels}) for name, colour, row in (
        ("EIVEN", BLUE, WITH), ("without comparisons, as many steps", GREEN, WITHOUT),
        ("without comparisons", ORANGE, FEWER_STEPS))]
    baselines = read_baselines(runs, dataset)           # empty if experiments.baselines did not run
    known = [c for c in labels if c in baselines["discriminative"]]
    curves += [("discriminative: a classifier on the same frozen models", PINK, {c: baselines["discriminative"][c] for c in known}),
               ("extractive: the ceiling of every method", BLACK, {c: [baselines["extractive"]] for c in known})]
    if dataset in DATASETS:
        curves.append((f"the paper's EIVEN on its {dataset.capitalize()}, with photos and LLaMA-7B", GREY,
                       {c: [float(CURVE[c][DATASETS.index(dataset)])] for c in labels if c in CURVE}))
    for n, (name, colour, found) in enumerate(curve for curve in curves if curve[2]):
        points = [(places[c], y(statistics.mean(f1))) for c, f1 in found.items() if f1]
        for (x1, y1), (x2, y2) in zip(points, points[1:]):
            pen.line((x1, y1, x2, y2), fill=colour, width=3)
        for count, f1 in found.items():
            for one in f1:
                pen.ellipse((places[count] - 4, y(one) - 4, places[count] + 4, y(one) + 4), fill=colour)
        pen.rectangle((left, bottom + 52 + 22 * n, left + 24, bottom + 56 + 22 * n), fill=colour)
        pen.text((left + 32, bottom + 54 + 22 * n), name, fill="black", font=font(16), anchor="lm")
    return image


def figure_5(products, images, with_lbc, without, count=6):
    """Products that the two runs answer differently: photo, text, gold value, both answers."""
    cards = []
    differ = [p for p in products if with_lbc[p.id, p.attribute] != without[p.id, p.attribute]]
    for product in differ[:count]:
        lines = [(f"{product.attribute}: {product.value}", "black")]
        for name, found in (("with comparisons", with_lbc), ("without", without)):
            said = found[product.id, product.attribute]
            lines.append((f"{name}: {said or '(no answer)'}{'' if said == product.value else ' (wrong)'}",
                          BLUE if said == product.value else ORANGE))
        cards.append(card(product, images(product), lines))
    if not cards:
        raise UserError("both runs give the same answers: there is nothing to show in figure 5")
    return side_by_side(cards, f"Figure 5: the first {len(cards)} of {len(differ)} test products (n = {len(products)}) that EIVEN "
                               "answers differently with and without Learning-by-Comparison (equal numbers of steps).")


def figure_6(products, attribute, with_lbc, without):
    """The confusion matrices of one attribute, with and without comparisons, on the same scale."""
    some = [p for p in products if p.attribute == attribute]
    pictures = [confusion_png(f"{attribute}: {name}", Counter((p.value, found[p.id, p.attribute]) for p in some))
                for name, found in (("without comparisons", without), ("with comparisons", with_lbc))]
    return side_by_side(pictures, f"Figure 6: {attribute}, test split, n = {len(some)}. On the left, the paper has DEFLATE; "
                                  "here it is EIVEN without Learning-by-Comparison, trained for as many steps.", columns=2)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "tables", help="folder of the runs")
    parser.add_argument("--dataset", default="general", help="default: %(default)s")
    parser.add_argument("--labels", nargs="+", default=["10", "20"], metavar="N|all", help="of figure 4; of the others the first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of figure 4; of the others the first")
    parser.add_argument("--attribute", default="Pattern", help="of figure 6 (default: %(default)s)")
    args = parser.parse_args()
    folders = [run_folder(args.runs, args.dataset, row, args.labels[0], args.seeds[0]) for row in (WITH, WITHOUT)]
    for folder in folders:
        if not (folder / "metrics.json").exists():
            raise UserError(f"{folder}: no finished run; make it with: python -m experiments.paper_tables --runs {args.runs} "
                            f"--rows {WITH} {WITHOUT} --labels {args.labels[0]} --seeds {args.seeds[0]} --dataset {args.dataset}")
    config = read_config(folders[0])[0]
    sources = find_sources(config)
    products = read_split(sources.data, args.dataset, "test")
    with_lbc, without = map(predictions, folders)

    def images(product):
        if not config.image:
            return Image.new("RGB", (100, 10), "white")
        world.draw_photos(sources.data, [product.image])        # photos of the demo world, if not drawn yet
        return open_photo(sources.data / "images" / product.image)

    figures = {"figure-4": figure_4(args.runs, args.dataset, args.labels, args.seeds),
               "figure-5": figure_5(products, images, with_lbc, without),
               "figure-6": figure_6(products, args.attribute, with_lbc, without)}
    if config.demo:
        figures["figure-1"] = figure_1(products, images)
    for name, figure in sorted(figures.items()):
        path = args.runs / f"{name}.png"
        with whole_file(path) as partial:
            figure.save(partial, format="PNG", optimize=True)
        print(f"written: {path}, {figure.width} x {figure.height}")


if __name__ == "__main__":
    console.run(main)
