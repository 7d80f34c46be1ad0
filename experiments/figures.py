"""The paper's figures 4, 5 and 6 for any data set, on one page, from the runs of experiments.paper_tables:

    python -m experiments.paper_tables --rows full no-lbc no-lbc-twice --labels 10 50 --seeds 0 1 2
    python -m experiments.figures                                            RUNS/figures.html
    python -m experiments.figures --scores docs/scores.tsv                   the plots of docs/results.md

Where the paper compares EIVEN with DEFLATE, these figures compare it with itself, without
Learning-by-Comparison and trained for as many steps.
"""

import itertools
import math
import statistics
from collections import Counter, defaultdict

from base import console
from base.console import user_path, write_text
from base.tsv import read_tsv
from experiments.comparing import predictions
from experiments.paper_tables import new_parser, run_folder, scores
from support.config import find_sources
from support.report import STYLE, card, curve, escape
from support.run_folder import read_config

METHODS = {                                             # row of paper.tsv: its name and colour in plots
    "bag-of-words": ("bag of words", "#d66a12"),
    "discriminative": ("classifier on the same frozen models", "#17997a"),
    "full": ("EIVEN", "#3a86d4"),
    "no-lbc": ("EIVEN, no comparisons", "#b565b0"),
    "no-lbc-twice": ("EIVEN, no comparisons, as many steps", "#8a8f96"),
    "extractive": ("extractive: the ceiling", "#8a6d3b"),
}
SCORES = ("dataset", "n", "labels", "method", "micro_f1", "interval")   # columns of a file of scores
PLOT_STYLE = """text { font: 14px system-ui, sans-serif; fill: #1b1f24; text-anchor: start }
.middle { text-anchor: middle } .end { text-anchor: end } .page { fill: #fff }
.axis { fill: none; stroke: #8a8f96; stroke-width: 0.7 } circle { fill: currentColor }
polyline { fill: none; stroke: currentColor; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) { text { fill: #e8eaed } .page { fill: #16191d } }"""

# ---------------------------------------------------------------------------------------- plots


def svg(name, height, shapes):
    """A picture 400 units wide, to be read at 400 pixels or more, in a light or a dark browser."""
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 {height}" role="img">
<title>{name}</title><style>{PLOT_STYLE}</style>
<rect class="page" width="400" height="{height}" rx="8"/>
{shapes}</svg>
"""


def label_curves(panels):
    """SVG: micro-F1 against labels for each value.  A point is a seed, a line joins the means.

    panels  {title: {labels: {row of METHODS: [micro-F1 of each seed]}}}
    """
    def y(f1):
        return 210 - 1.7 * f1

    shapes = "<text class='middle' x='216' y='250'>labels for each value; micro-F1, per cent</text>\n"
    width = 360 / len(panels)
    for f1 in range(0, 101, 25):
        grid = f"M36 {y(f1)}" + f"h{width - 8}m8 0" * len(panels)
        shapes += f"<path class='axis' d='{grid}'/><text class='end' x='31' y='{y(f1) + 5}'>{f1}</text>\n"
    for left, (title, columns) in zip(itertools.count(36, width), panels.items()):
        xs = [left + (width - 8) * (i + 0.5) / len(columns) for i in range(len(columns))]
        shapes += f"<text class='middle' x='{left + width / 2:.0f}' y='24'>{escape(title)}</text>\n"
        for x, labels in zip(xs, columns):
            shapes += f"<text class='middle' x='{x:.0f}' y='229'>{labels or 'all'}</text>\n"
        for row, (_, colour) in METHODS.items():
            points = [(x, f1s[row]) for x, f1s in zip(xs, columns.values()) if row in f1s]
            means = curve((x, y(statistics.mean(f1s))) for x, f1s in points)
            seeds = [f"<circle cx='{x:.1f}' cy='{y(f1):.1f}' r='3'/>" for x, f1s in points for f1 in f1s]
            shapes += f"<g color='{colour}'>{means}{''.join(seeds)}</g>\n"
    names = [method for row, method in METHODS.items()
             if any(row in f1s for columns in panels.values() for f1s in columns.values())]
    for at, (name, colour) in zip(itertools.count(276, 20), names):
        shapes += f"""<circle color='{colour}' cx='44' cy='{at - 5}' r='5'/>
<text x='56' y='{at}'>{name}</text>
"""
    return svg("micro-F1 against labels for each value", 266 + 20 * len(names), shapes)


def difference_plot(unit, rows):
    """SVG: for each row a text, and below it a value on a line from low to high.

    rows  (text, value, low, high, points);  points are drawn small, such as the seeds' values
    """
    limit = max([1, *(math.ceil(abs(x)) for _, *numbers, points in rows for x in (*numbers, *points))])
    bottom = 12 + 44 * len(rows)

    def x(value):
        return f"{200 + 184 * value / limit:.1f}"

    shapes = f"""<path class='axis' d='M16 {bottom}H384'/>
<text x='8' y='{bottom + 18}'>-{limit}</text><text class='middle' x='200' y='{bottom + 18}'>0</text>
<text class='end' x='392' y='{bottom + 18}'>+{limit} {unit}</text>
"""
    for y, (text, value, low, high, points) in zip(itertools.count(24, 44), rows):
        shapes += f"""<text x='8' y='{y}'>{escape(text)}</text><path class='axis' d='M200 {y + 5}v18'/>
<g color='#3a86d4'><polyline points='{x(low)},{y + 14} {x(high)},{y + 14}'/>
<circle cx='{x(value)}' cy='{y + 14}' r='6'/></g>
"""
        for point in points:
            shapes += f"<circle color='#d66a12' cx='{x(point)}' cy='{y + 14}' r='3'/>\n"
    return svg(f"differences in {unit}", bottom + 28, shapes)


# ---------------------------------------------------------------------------------------- the figures


def figure(number, caption, content):
    return f"<h2>Figure {number}</h2><p>{escape(caption)}</p><div class='row'>{content}</div>\n"


def figure_4(runs, dataset, labels, seeds):
    """micro-F1 against labels, as far as the runs are done."""
    columns = {count: {row: f1s for row in METHODS if (f1s := scores(runs, dataset, row, count, seeds))}
               for count in labels}
    return figure(4, "micro-F1 against labels, test split.", label_curves({dataset: columns}))


def figure_5(products, images, with_lbc, without, count=6):
    """Products that the two runs answer differently."""
    differ = [row for row in zip(products, with_lbc, without) if row[1] != row[2]]
    content = ""
    for p, *answers in differ[:count]:
        text = f"<p>{escape(p.attribute)}: {escape(p.value)}</p>"
        for name, answer in zip(("comparing", "without"), answers):
            wrong = "" if answer == p.value else "(wrong)"
            text += f"<p>{name}: {escape(answer or '(no answer)')} {wrong}</p>"
        content += card(p, images, text)
    return figure(5, f"the first of {len(differ)} test products (n = {len(products)}) that EIVEN answers "
                     "differently with and without Learning-by-Comparison (equal numbers of steps).", content)


def figure_6(products, with_lbc, without, count=12):
    """What differs most between the confusion matrices of the two runs."""
    golds = [p.value for p in products]
    change = Counter(zip(golds, with_lbc))
    change.subtract(zip(golds, without))
    rows = [(f"{gold} → {answer or '(no answer)'}: {n:+}", n, 0, n, ())
            for (gold, answer), n in sorted(change.items(), key=lambda item: -abs(item[1]))[:count]]
    return figure(6, "the confusion matrix with Learning-by-Comparison minus that without (equal numbers of "
                     "steps): gold value → answer, and by how many answers they differ.",
                  difference_plot("answers", rows))


# ---------------------------------------------------------------------------------------- a file of scores


def draw_scores(path):
    """{file name: SVG}: the label curves and the gains of Learning-by-Comparison in a file of scores.

    micro_f1 holds a number for each seed; in a row with an interval they are differences.
    """
    panels, gains = defaultdict(lambda: defaultdict(dict)), []
    for _, row in read_tsv(path, "a file of scores", SCORES):
        f1s = [float(f1) for f1 in row["micro_f1"].split()]
        if row["interval"]:
            mean, low, high = statistics.mean(f1s), *map(float, row["interval"].split())
            text = f"{row['dataset']}, {row['labels']} labels: {mean:+.1f} ({low:+.1f} to {high:+.1f})"
            gains.append((text, mean, low, high, f1s))
        else:
            panels[f"{row['dataset']} (n = {row['n']})"][row["labels"]][row["method"]] = f1s
    curves = {dataset: columns for dataset, columns in panels.items() if len(columns) > 1}
    return {"label-curve.svg": label_curves(curves), "lbc-intervals.svg": difference_plot("points", gains)}


def main():
    parser = new_parser(__doc__)
    parser.epilog = "Figure 4 has all labels and seeds, the other figures the first ones."
    parser.add_argument("--dataset", default="general", help="default: %(default)s")
    parser.add_argument("--scores", type=user_path, metavar="FILE",
                        help="instead: draw the plots of a file of scores, beside it")
    args = parser.parse_args()
    if args.scores:
        for name, plot in draw_scores(args.scores).items():
            write_text(args.scores.with_name(name), plot)
            print(f"written: {args.scores.with_name(name)}")
        return
    full, control = (run_folder(args.runs, args.dataset, row, args.labels[0], args.seeds[0])
                     for row in ("full", "no-lbc-twice"))
    products, *answers = *predictions(full), predictions(control)[1]
    config, _ = read_config(full)
    images = find_sources(config).data / "images"
    page = f"<!doctype html><meta charset='utf-8'><style>{STYLE}</style>"
    page += figure_4(args.runs, args.dataset, args.labels, args.seeds)
    page += figure_5(products, images, *answers)
    page += figure_6(products, *answers)
    write_text(args.runs / "figures.html", page)
    print(f"written: {args.runs / 'figures.html'}")


if __name__ == "__main__":
    console.run(main)
