"""The paper's figures 1, 4, 5 and 6 for any data set, on one page, from the runs of experiments.paper_tables:

    python -m experiments.paper_tables --rows full no-lbc no-lbc-twice --labels 10 20 --seeds 0 1 2
    python -m experiments.figures                                            RUNS/figures.html

Where the paper compares EIVEN with DEFLATE, these figures compare it with itself, without
Learning-by-Comparison and trained for as many steps.
"""

import statistics

from base import console
from base.console import write_text
from base.tsv import read_tsv
from data import read_products
from demo import world
from experiments.paper_tables import new_parser, run_folder, scores
from support.config import find_sources
from support.report import STYLE, card, curve, diagram, escape
from support.run_folder import read_config

# Okabe and Ito's colours: colour-blind readers can tell them apart.
BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
CURVES = {                                              # of figure 4: row: (name, colour)
    "full": ("EIVEN", BLUE),
    "no-lbc-twice": ("without comparisons, as many steps", GREEN),
    "no-lbc": ("without comparisons", ORANGE),
    "discriminative": ("discriminative: a classifier on the same frozen models", PINK),
    "extractive": ("extractive: the ceiling of every method", BLACK),
}
COLOURS = """polyline, .dot { stroke: var(--colour) }
.dot { stroke-width: 7; stroke-linecap: round }"""


def card_with(product, images, **answers):
    """A card with the gold value, and answers by name."""
    text = f"<p>{escape(product.attribute)}: {escape(product.value)}</p>"
    for name, answer in answers.items():
        wrong = "" if answer == product.value else "(wrong)"
        text += f"<p>{name}: {escape(answer or '(no answer)')} {wrong}</p>"
    return card(product, images, text)


def figure(number, caption, content):
    return f"<h2>Figure {number}</h2><p>{escape(caption)}</p><div class='row'>{content}</div>\n"


def figure_1(products, images, answers, each=6):
    """Products of each way in which a value is implicit.  Only the demo world knows these ways."""
    content = ""
    for way in world.WAYS:
        shown = [pair for pair in zip(products, answers) if world.describe(pair[0].id)[2] == way][:each]
        content += "".join(card_with(p, images, **{way: answer}) for p, answer in shown)
    return figure(1, f"implicit attribute values: answers to {each} test products each that the picture, the "
                     "text, or both together tell.", content)


def figure_4(runs, dataset, labels, seeds):
    """micro-F1 against labels: a point for each seed, a line for the means."""
    xs = [100 * (i + 0.5) / len(labels) for i in range(len(labels))]
    shapes = names = ""
    for row, (name, colour) in CURVES.items():
        points = [(x, scores(runs, dataset, row, count, seeds)) for x, count in zip(xs, labels)]
        means = curve((x, statistics.mean(f1s)) for x, f1s in points if f1s)
        # A line of no length with round ends is a point.
        dots = "".join(f"<path class='dot' d='M{x:.2f} {f1:.2f}h0'/>" for x, f1s in points for f1 in f1s)
        shapes += f"<g style='--colour: {colour}'>{means}{dots}</g>"
        names += f"<p style='color: {colour}'>{name}</p>"
    texts = "".join(f"<text class='middle' x='{48 + 3.4 * x:.0f}' y='218'>{count}</text>"
                    for x, count in zip(xs, labels))
    return figure(4, f"{dataset}: micro-F1 in per cent against labels for each value, test split.",
                  diagram("figure 4", "100 %", "", shapes, texts) + f"<div>{names}</div>")


def figure_5(products, images, with_lbc, without, count=6):
    """Products that the two runs answer differently."""
    differ = [row for row in zip(products, with_lbc, without) if row[1] != row[2]]
    content = "".join(card_with(p, images, comparing=a, without=b) for p, a, b in differ[:count])
    return figure(5, f"the first of {len(differ)} test products (n = {len(products)}) that EIVEN answers "
                     "differently with and without Learning-by-Comparison (equal numbers of steps).", content)


def figure_6(with_lbc, without):
    """The confusion matrices of two run folders, without and with comparisons, attribute by attribute."""
    pictures = [sorted(folder.glob("confusion-*.png")) for folder in (without, with_lbc)]
    content = "".join(f"<img src='{path.parent.name}/{path.name}'>"
                      for pair in zip(*pictures) for path in pair)
    return figure(6, "confusion matrices, test split. On the left, the paper has DEFLATE; here it is EIVEN "
                     "without Learning-by-Comparison, trained for as many steps.", content)


def main():
    parser = new_parser(__doc__, labels="10 20")
    parser.epilog = "Figure 4 has all labels and seeds, the other figures the first ones."
    parser.add_argument("--dataset", default="general", help="default: %(default)s")
    args = parser.parse_args()
    folders = [run_folder(args.runs, args.dataset, row, args.labels[0], args.seeds[0])
               for row in ("full", "no-lbc-twice")]
    paths = [folder / "predictions.tsv" for folder in folders]
    products = read_products(paths[0])
    answers = [[row["prediction"] for _, row in read_tsv(path, "a run's predictions", ("prediction",))]
               for path in paths]
    config, _ = read_config(folders[0])
    images = find_sources(config).data / "images"
    page = f"<!doctype html><meta charset='utf-8'><style>{STYLE}{COLOURS}</style>"
    if config.demo:
        page += figure_1(products, images, answers[0])
    page += figure_4(args.runs, args.dataset, args.labels, args.seeds)
    page += figure_5(products, images, *answers)
    page += figure_6(*folders)
    write_text(args.runs / "figures.html", page)
    print(f"written: {args.runs / 'figures.html'}")


if __name__ == "__main__":
    console.run(main)
