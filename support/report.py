"""What a run shows: confusion matrices (figure 6) and a page with the scores and examples (figure 5)."""

import base64
import io
import math
import re
from collections import Counter, defaultdict
from html import escape
from shlex import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from base.console import UserError, whole_file, write_text
from base.photo import open_photo
from support.confidence import error_text, outside_text

MOST_VALUES = 60                                # in a confusion matrix that can be read on a screen
EXAMPLES = 12                                   # of each kind on the page
CELL = 44                                       # side of a matrix's cell, in pixels
LONGEST = 40                                    # characters of a name in a picture


# --------------------------------------------------------------------------------------------------- pictures


def confusion_png(title, counts):
    """The confusion matrix as an image: rows are gold values, columns answers, cells counts and shares of a
    row.

    counts  a Counter of (gold, answer)
    Of more than MOST_VALUES gold values, those with the most mistakes are drawn.  The last column, "(other)",
    counts the answers that are none of the values in the picture.
    """
    total = Counter()
    for (gold, _), n in counts.items():
        total[gold] += n
    golds = sorted(sorted(total, key=lambda gold: counts[gold, gold] - total[gold])[:MOST_VALUES])
    note = (f"rows: gold value, columns: answer, n = {total.total():,}; values with the most mistakes: "
            f"{len(golds)} of {len(total):,}")
    names = [value[:LONGEST] for value in [*golds, "(other)"]]
    font = ImageFont.load_default(14)
    margin = 24 + int(max(map(font.getlength, names)))
    top = margin + 50
    width = 24 + int(max(margin + CELL * len(names), *map(font.getlength, (title, note))))
    height = top + CELL * len(golds) + 24
    image = Image.new("RGB", (height, width), "white")          # on its side, for the names of the columns
    draw = ImageDraw.Draw(image)
    for x, name in zip(range(margin, width, CELL), names):
        draw.text((height - top + 10, x + CELL // 2), name, "black", font, "lm")
    image = image.rotate(90, expand=True)
    draw = ImageDraw.Draw(image)
    draw.text((12, 12), f"{title}\n{note}", "black", font)
    for y, gold, name in zip(range(top, height, CELL), golds, names):
        draw.text((margin - 10, y + CELL // 2), name, "black", font, "rm")
        row = [counts[gold, answer] for answer in golds]
        for x, n in zip(range(margin, width, CELL), [*row, total[gold] - sum(row)]):
            share = n / total[gold]
            white_to_blue = f"hsl(217, 76%, {100 - 67 * share}%)"
            draw.rectangle((x, y, x + CELL, y + CELL), white_to_blue, "lightgrey")
            colour = "white" if share > 0.5 else "black"
            draw.text((x + CELL // 2, y + CELL // 2), str(n or ""), colour, font, "mm")
    return image


def matrices_html(folder, title, products, answers):
    """Write a confusion matrix for each attribute; all of them as HTML."""
    counts = defaultdict(Counter)               # {attribute: how often each (gold value, answer)}
    for p, a in zip(products, answers):
        counts[p.attribute][p.value, a.value] += 1
    pictures = {}                               # by a part of the file's name, which is not too long
    for attribute, pairs in counts.items():
        name = re.sub(r"\W", "-", attribute.lower())[:LONGEST]
        while name in pictures:
            name += f"-{len(pictures)}"
        matrix = confusion_png(f"{attribute[:LONGEST]}: {title}", pairs)
        with whole_file(folder / f"confusion-{name}.png") as partial:
            matrix.save(partial, "png")
        pictures[name] = f"<div class='wide'>{inline(matrix, 'png', f'confusion matrix {name}')}</div>"
    return "".join(pictures.values())


def inline(picture, kind, words):
    """An <img> that holds its picture, so that the page needs no other file."""
    data = io.BytesIO()
    picture.save(data, kind)
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"<img alt='{words}' src='{source}'>"


def thumbnail(images, name):
    """An <img> with a small copy of the photo `name` in the folder `images`."""
    try:
        photo = open_photo(images / name)
    except UserError:                           # damaged or absent
        return "<div>no photo</div>"
    photo.thumbnail((160, 160))
    return inline(photo, "jpeg", "")


# --------------------------------------------------------------------------------------------------- diagrams


def diagram(name, top, right, shapes, texts=""):
    """An inline SVG with axes from 0 to the numbers `top` (y) and `right` (x); `name` says what x is.

    shapes  SVG elements whose x and y go from 0 to 100, upwards
    texts   <text> elements in the picture's own units: 400 x 260, downwards; the axes meet at (48, 200)
    """
    axes = "M0 100V0H100"
    for at in (0, 50, 100):                             # a tick on each axis
        axes += f"M0 {at}h-1M{at} 0v-2"
        texts += f"""<text x="40" y="{204 - 1.88 * at:g}">{top * at / 100:,g}</text>
<text class="middle" x="{48 + 3.4 * at:g}" y="219">{right * at / 100:,g}</text>"""
    return f"""<svg viewBox="0 0 400 260" role="img" aria-label="{name}">
<g transform="translate(48 200) scale(3.4 -1.88)">{shapes}<path d="{axes}"/></g>
<text x="388" y="236">{name}</text>{texts}</svg>"""


def curve(points):
    """A line through points (x, y), as SVG."""
    return f"<polyline points='{' '.join(f'{x:.2f},{y:.2f}' for x, y in points)}'/>"


def learning_curve(losses):
    """The training loss: the means of (at most) 100 parts of the training."""
    means = np.array([part.mean() for part in np.array_split(losses, min(100, len(losses)))])
    top = math.ceil(means.max())
    points = zip(np.linspace(0, 100, len(means)), 100 * means / top)
    return diagram("steps", top, len(losses), curve(points))


def reliability_diagram(bins):
    """Confidence against accuracy: for each bin a bar (accuracy), a mark (mean confidence) and its number of
    answers.

    bins  of support.confidence.calibration_error
    """
    shapes = ""
    texts = "<text x='40' y='254'>n</text>"
    for b in bins:
        x = 100 * b["from"]
        shapes += f"""<rect x="{x + 0.5:.1f}" width="9" height="{b['accuracy']:.2f}"/>
<rect class="mark" x="{x:.1f}" y="{b['confidence'] - 0.8:.2f}" width="10" height="1.6"/>"""
        texts += f"<text class='middle' x='{65 + 3.4 * x:.1f}' y='254'>{b['n']}</text>"
    shapes += "<path class='equal' d='M0 0L100 100'/>"
    return diagram("confidence", 100, 1, shapes, texts)


# --------------------------------------------------------------------------------------------------- the page


STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; overflow-wrap: anywhere }
.headline { font-size: 1.3rem }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; overflow-wrap: normal }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
tr:last-child { font-weight: 600 }
.row { display: flex; flex-wrap: wrap; gap: 1rem }
.card { width: 12rem; padding: .6rem; border: 1px solid #ddd; border-radius: 6px; font-size: .85rem;
break-inside: avoid } .card p { margin: .3rem 0 }
.wrong { border-left: 5px solid #D55E00 }
.right { border-left: 5px solid #0072B2 }
figure { margin: 0; flex: 0 1 30rem }
svg { width: 100%; max-width: 30rem; font-size: 13px }
text { text-anchor: end } .middle { text-anchor: middle }
path, polyline { fill: none; stroke: #999; vector-effect: non-scaling-stroke }
.equal { stroke: #222; stroke-dasharray: 4 }
polyline { stroke: #0072B2; stroke-width: 2.5 }
rect { fill: #0072B2 } .mark { fill: #D55E00 }
@media (max-width: 40rem) { td, th { padding: .25rem .3rem; font-size: .8rem }
.row { flex-wrap: nowrap; overflow-x: auto; align-items: start }
.row > * { flex: none; max-width: none } figure { width: 85vw } }
@media print { body { margin: 0; font-size: 11pt } h2 { break-after: avoid } }
"""


def floor_text(m):
    """The score of one value as the answer to all products, which value, and whether the run beats it."""
    if "floor" not in m:                                # a part of the products, such as those held out
        return ""
    beaten = "" if m["interval"][0] > m["floor"] else "(not beaten)"
    return f"{m['floor']:6.2f} {m.get('floor_value', '')} {beaten}"


def score_row(name, m):
    """A row of the table of scores."""
    return (f"<tr><td>{escape(name)}</td><td>{m['micro_f1']:.2f}</td>"
            f"<td>{m['interval'][0]:.1f} to {m['interval'][1]:.1f}</td><td>{escape(floor_text(m))}</td>"
            f"<td>{m['n']}</td><td>{m['precision']:.2f}</td><td>{m['recall']:.2f}</td>"
            f"<td>{m['implicitave']:.2f}</td></tr>\n")


def card(product, images, text, kind=""):
    """A product as HTML: its photo, title and category, and more `text` (HTML)."""
    photo = thumbnail(images, product.image) if images else ""
    return f"<div class='card {kind}'>{photo}<p>{escape(product.context)}</p>{text}</div>\n"


def cards(pairs, right, images, explain):
    """Up to EXAMPLES of the (product, answer) that are right, or of those that are not, with their photos;
    behind the id is the command that explains the answer.
    """
    kind = "right" if right else "wrong"
    page = ""
    for p, a in [(p, a) for p, a in pairs if (a.value == p.value) == right][:EXAMPLES]:
        command = f"{explain} {quote(p.id)} --attribute {quote(p.attribute)}"
        text = (f"<p>{escape(p.attribute)}: {escape(str(a))}</p><p>{kind}: it is {escape(p.value)}</p>"
                f"<details><summary>{escape(p.id)}</summary><code>{escape(command)}</code></details>")
        page += card(p, images, text, kind)
    return f"<div class='row'>{page or 'none'}</div>"


def confidence_html(metrics):
    """The part of the page on how far probabilities can be trusted, and on answers outside the list."""
    confidence = metrics["confidence"]
    coverage = curve((point["coverage"], point["accuracy"]) for point in confidence["coverage"])
    page = f"""<h2>How sure the answers are</h2>
<p>Expected calibration error: {error_text(confidence)}, n = {confidence["n"]}. It is the mean difference
between confidence (an answer's probability) and accuracy over 10 bins of equal width, weighted by their
answers.</p>
<div class="row"><figure><figcaption>Accuracy in % (bars) and mean confidence (marks) of the answers in each
bin; on the dashed line both are equal</figcaption>{reliability_diagram(confidence["bins"])}</figure>
<figure><figcaption>Accuracy in % of the answers given, if only the most confident are given</figcaption>
{diagram("% of products answered", 100, 100, coverage)}</figure></div>
"""
    if "outside" in metrics:
        page += f"<h2>Answers outside the known values</h2><p>{escape(outside_text(metrics, 50))}</p>"
    return page


def draw_results(folder, title, products, answers, metrics, images, losses, explain):
    """Write the confusion matrices, and report.html: the main result in words, scores, the most confident
    mistakes, how it was measured.

    images   folder of the photos, or None for a run without
    losses   of the training steps, for the learning curve
    explain  the command that explains a product of this run, without the product's id
    """
    surest_first = sorted(zip(products, answers), key=lambda pair: -pair[1].probability)
    rows = metrics["attributes"] | metrics.get("seen_and_held_out", {}) | {"all (micro)": metrics}
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>EIVEN: {escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>EIVEN: {escape(title)}</h1>
<p class="headline">
{metrics["right"]:,} of {metrics["n"]:,} answers are right ({metrics["recall"]:.0f} %).
{"Not better than one value for all, or not surely: the 95 % interval reaches down to it."
 if metrics["interval"][0] <= metrics["floor"] else ""}</p>
<p>{escape(metrics["sources"])}</p>
<h2>Scores</h2>
<div class="wide"><table>
<tr><th>attribute</th><th>micro-F1</th><th>95 % interval</th><th>one value for all</th><th>n</th>
<th>precision</th><th>recall</th><th>gold inside answer</th></tr>
{"".join(score_row(*row) for row in rows.items())}</table></div>
<p>An answer is right if it equals the gold value exactly; per cent; temperature: {metrics["temperature"]},
top p: {metrics["top_p"]}, constrained: {metrics["constrained"]}, min confidence: {metrics["min_confidence"]},
merged: {metrics["merged"]}; answered in {metrics["seconds"]} s. The interval is over products, and not over
seeds of the training. One value for all: the score of the attribute's commonest gold value as the answer to
every product.</p>
<h2>Which values are confused</h2><div class="row">
{matrices_html(folder, title, products, answers)}</div>
<h2>The most confident mistakes</h2>
<p>Behind the id is the command that follows the product from photo to (free) answer.</p>
{cards(surest_first, False, images, explain)}
<h2>Right answers</h2>{cards(surest_first, True, images, explain)}
{confidence_html(metrics)}
{"<h2>Training loss</h2>" + learning_curve(losses) if len(losses) > 1 else ""}
</body></html>
"""
    write_text(folder / "report.html", page)
