"""What a run shows: confusion matrices (figure 6) and a page with the scores and examples (figure 5)."""

import base64
import hashlib
import html
import io
import itertools
import sys
from collections import Counter, defaultdict

from PIL import Image, ImageDraw, ImageFont

from base.console import UserError, whole_file, write_text
from base.photo import open_photo
from base.tsv import write_tsv

MOST_VALUES = 60                                        # in a confusion matrix that can be read on a screen
EXAMPLES = 12                                           # of each kind on the page
OUTSIDE = 50                                            # answers outside the known values, on the page


def draw_results(folder, title, products, answers, metrics, images=None, losses=()):
    """Write a confusion matrix for each attribute, and report.html.

    Drawing needs fonts and photos, and the scores are worth more: what cannot be drawn is a note on stderr.
    """
    counts = defaultdict(Counter)                       # attribute -> how often each (gold value, answer)
    for p, a in zip(products, answers):
        counts[p.attribute][p.value, a.value] += 1
    for attribute, name in confusion_files(counts).items():
        try:
            with whole_file(folder / name) as partial:
                confusion_png(f"{short(attribute)}: {title}", counts[attribute]).save(partial, format="png")
            if len({gold for gold, _ in counts[attribute]}) > MOST_VALUES:
                write_tsv((folder / name).with_suffix(".tsv"),
                          ((gold, answer, n) for (gold, answer), n in sorted(counts[attribute].items())),
                          ["gold", "answer", "count"])
        except OSError:                                 # a full disk is no matter of drawing
            raise
        except Exception as error:
            print(f"note: {folder / name} was not drawn: {error!r}", file=sys.stderr)
    write_text(folder / "report.html", report_html(title, products, answers, metrics, images, losses))


def confusion_png(title, counts):
    """The confusion matrix as an image: rows are gold values, columns predictions, cells counts and shares of a row.

    counts  {(gold, prediction): number}
    Of more than MOST_VALUES values only the most confused ones are drawn: those in the most mistakes, as the right or as
    the given answer.  The last column, "(other)", counts the answers that are none of the values in the picture.
    """
    total, mistakes = Counter(), Counter()
    for (gold, answer), n in counts.items():
        total[gold] += n
        if gold != answer:
            mistakes.update({gold: n, answer: n})
    golds = sorted(sorted(sorted(total), key=lambda value: -mistakes[value])[:MOST_VALUES])
    shown, cells = set(golds), Counter()
    for (gold, answer), n in counts.items():
        if gold in shown:
            cells[gold, answer if answer in shown else None] += n
    columns = golds + ([None] if any(answer is None for _, answer in cells) else [])
    names = {value: "(other)" if value is None else short(value) for value in columns}
    note = f"rows: gold value, columns: answer, n = {sum(total.values()):,}"
    if len(golds) < len(total):
        note += (f"; the {len(golds)} most confused of {len(total):,} values, n = {sum(cells.values()):,}; the TSV file of the "
                 "same name has all of them")

    cell, font, small = 44, ImageFont.load_default(14), ImageFont.load_default(12)
    margin = 24 + int(max(font.getlength(name) for name in names.values()))
    top = margin + 40
    width = max(margin + cell * len(columns) + 24, 24 + int(font.getlength(title)))
    image = Image.new("RGB", (width, top + cell * len(golds) + 44), "white")
    draw = ImageDraw.Draw(image)
    draw.text((12, 12), title, fill="black", font=font)
    for j, value in enumerate(columns):                 # column names stand upright
        name = Image.new("L", (margin - 16, 20), 0)
        ImageDraw.Draw(name).text((0, 1), names[value], fill=255, font=font)
        name = name.rotate(90, expand=True)
        image.paste("black", (margin + cell * j + 12, top - 8 - name.height), name)
    for i, gold in enumerate(golds):
        y = top + cell * i
        draw.text((margin - 10, y + cell // 2), names[gold], fill="black", font=font, anchor="rm")
        for j, value in enumerate(columns):
            n = cells[gold, value]
            share = n / total[gold]
            x = margin + cell * j
            # white to blue along the row's share
            shade = tuple(round(255 + (full - 255) * share) for full in (20, 70, 150))
            draw.rectangle((x, y, x + cell, y + cell), fill=shade, outline=(210, 210, 210))
            if n:
                draw.text((x + cell // 2, y + cell // 2), str(n), font=small, anchor="mm",
                          fill="white" if share > 0.5 else "black")
    draw.text((12, image.height - 26), note, fill=(90, 90, 90), font=small)
    return image


def short(text, most=40):
    """A text that fits into a picture."""
    return text if len(text) <= most else text[:most - 1] + "…"


def confusion_files(attributes):
    """{attribute: the file name of its confusion matrix}: readable, each different, and never too long for a file system."""
    readable = {a: "".join(c if c.isalnum() else "-" for c in a.lower()) for a in attributes}
    uses = Counter(readable.values())
    names = {}
    for attribute, name in readable.items():
        if uses[name] > 1 or len(name.encode()) > 100:
            name = f"{name[:25]}-{hashlib.sha256(attribute.encode()).hexdigest()[:8]}"
        names[attribute] = f"confusion-{name}.png"
    return names


def thumbnail(path):
    """An <img> with a small copy of the photo inside it, so that the page needs no other file."""
    try:
        photo = open_photo(path)
    except (UserError, OSError):
        return "<div class='none'>no photo</div>"
    photo.thumbnail((160, 160))
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}'>"


def learning_curve(losses):
    """The training loss as an inline SVG: the loss of each step as a thin line, the mean of about 20 steps as a thick one."""
    if len(losses) < 2:
        return ""
    width, height, left, bottom = 640, 220, 48, 190
    highest = max(losses)
    window = max(1, min(20, len(losses) // 4))
    means = [sum(losses[max(0, i - window + 1):i + 1]) / len(losses[max(0, i - window + 1):i + 1]) for i in range(len(losses))]

    def points(values):
        return " ".join(f"{left + i * (width - left - 10) / (len(values) - 1):.1f},{bottom - v * (bottom - 12) / highest:.1f}"
                        for i, v in enumerate(values))

    return (f"<svg class='curve' viewBox='0 0 {width} {height}' role='img' aria-label='training loss'>"
            f"<line x1='{left}' y1='{bottom}' x2='{width - 10}' y2='{bottom}' stroke='#999'/>"
            f"<polyline points='{points(losses)}' fill='none' stroke='#9ecae1' stroke-width='1'/>"
            f"<polyline points='{points(means)}' fill='none' stroke='#0072B2' stroke-width='2.5'/>"
            f"<text x='{left - 6}' y='18' text-anchor='end'>{highest:.1f}</text>"
            f"<text x='{left - 6}' y='{bottom}' text-anchor='end'>0</text>"
            f"<text x='{width - 10}' y='{height - 8}' text-anchor='end'>{len(losses):,} steps</text></svg>")


def reliability_diagram(bins):
    """Confidence against accuracy as an inline SVG: a bar for each bin (accuracy), a mark at its mean confidence, and the
    diagonal on which both are equal; below each bar the number of its answers.

    bins  of support.confidence.calibration_error
    """
    width, height, left, bottom, cell = 400, 250, 48, 200, 34

    def y(percent):
        return f"{bottom - percent * (bottom - 12) / 100:.1f}"

    bars = ""
    for i, b in enumerate(bins):
        x = left + i * cell
        bars += f"<text x='{x + cell / 2}' y='{bottom + 34}' text-anchor='middle' fill='#666'>{b['n'] or ''}</text>"
        bars += f"<text x='{x}' y='{bottom + 16}' text-anchor='middle'>{b['from']:.1f}</text>"
        if b["n"]:
            top, mark = y(b["accuracy"]), y(b["confidence"])
            bars += (f"<rect x='{x + 2}' y='{top}' width='{cell - 4}' height='{bottom - float(top):.1f}' fill='#0072B2'/>"
                     f"<line x1='{x + 2}' x2='{x + cell - 2}' y1='{mark}' y2='{mark}' stroke='#D55E00' stroke-width='3'/>")
    right = left + cell * len(bins)
    return (f"<svg class='curve' viewBox='0 0 {width} {height}' role='img' aria-label='confidence against accuracy'>{bars}"
            f"<line x1='{left}' y1='{y(0)}' x2='{right}' y2='{y(100)}' stroke='#999' stroke-dasharray='4'/>"
            f"<line x1='{left}' y1='{bottom}' x2='{right}' y2='{bottom}' stroke='#999'/>"
            f"<text x='{right}' y='{bottom + 16}' text-anchor='middle'>1</text>"
            f"<text x='{left - 6}' y='18' text-anchor='end'>100 %</text>"
            f"<text x='{left - 6}' y='{bottom}' text-anchor='end'>0</text>"
            f"<text x='{left - 6}' y='{bottom + 34}' text-anchor='end' fill='#666'>n</text></svg>")


def coverage_diagram(points):
    """Coverage (x) against accuracy (y) as an inline SVG; points as support.confidence.coverage_curve gives them."""
    width, height, left, bottom, right = 400, 250, 48, 200, 388
    line = " ".join(f"{left + p['coverage'] * (right - left) / 100:.1f},{bottom - p['accuracy'] * (bottom - 12) / 100:.1f}"
                    for p in points)
    marks = "".join("<circle cx='{}' cy='{}' r='3' fill='#0072B2'/>".format(*xy.split(",")) for xy in line.split())
    return (f"<svg class='curve' viewBox='0 0 {width} {height}' role='img' aria-label='coverage against accuracy'>"
            f"<line x1='{left}' y1='{bottom}' x2='{right}' y2='{bottom}' stroke='#999'/>"
            f"<polyline points='{line}' fill='none' stroke='#0072B2' stroke-width='2.5'/>{marks}"
            f"<text x='{left - 6}' y='18' text-anchor='end'>100 %</text>"
            f"<text x='{left - 6}' y='{bottom}' text-anchor='end'>0</text>"
            f"<text x='{left}' y='{bottom + 16}' text-anchor='middle'>0</text>"
            f"<text x='{right}' y='{bottom + 16}' text-anchor='end'>100 % of products answered</text></svg>")


def confidence_html(metrics):
    """The part of the page on how far the answers' probabilities can be trusted, and on answers outside the known values."""
    confidence = metrics["confidence"]
    before = (f" (at temperature 1: {confidence['calibration_error_at_1']:.1f} %; the temperature of the values is "
              f"{confidence['temperature']:.2f})" if confidence.get("temperature", 1) != 1 else "")
    page = (f"<h2>How sure the answers are</h2><p>Expected calibration error: {confidence['calibration_error']:.1f} %{before}, "
            f"n = {confidence['n']}. It is the mean difference between confidence (an answer's probability) and accuracy over 10 "
            "bins of equal width, weighted by their answers.</p><div class='pair'><figure><figcaption>Accuracy (bars) and mean "
            "confidence (marks) of each bin; on the dashed line both are equal</figcaption>"
            f"{reliability_diagram(confidence['bins'])}</figure>"
            "<figure><figcaption>Accuracy of the answers given, if only the most confident are given</figcaption>"
            f"{coverage_diagram(confidence['coverage'])}</figure></div>")
    if "outside" in metrics:
        n, named = metrics["outside"]["n"], [f"{html.escape(attribute)}: {html.escape(answer)} ({count})" for attribute, counts
                                             in metrics["outside"]["answers"].items() for answer, count in counts.items()]
        page += (f"<h2>Answers outside the known values</h2><p>{n} of {metrics['n']}. {'; '.join(named[:OUTSIDE])}"
                 f"{'; …' if named[OUTSIDE:] else ''}</p>")
    return page


def report_html(title, products, answers, metrics, images=None, losses=()):
    """The page of a run's results: the main result in words, scores, the most confident mistakes, and how it was measured.

    images  folder of the photos, or None for a run without
    losses  of the training steps, for the learning curve
    """
    def cells(name, m):
        return (f"<tr><td>{html.escape(name)}</td><td>{m['micro_f1']:.2f}</td><td>{m['precision']:.2f}</td>"
                f"<td>{m['recall']:.2f}</td><td>{m['implicitave']:.2f}</td><td>{m['n']}</td></tr>")

    def card(product, answer):
        photo = thumbnail(images / product.image) if images else ""
        right = answer.value == product.value
        return (f"<div class='card {'right' if right else 'wrong'}'>{photo}<p>{html.escape(product.context)}</p>"
                f"<p>{html.escape(product.attribute)}: <b>{html.escape(answer.value or '(no answer)')}</b> "
                f"<small>probability {answer.probability:.2f}</small></p>"
                f"<p>{'right' if right else 'wrong: it is ' + html.escape(product.value)}</p></div>")

    def cards(right):
        judged = [(p, a) for p, a in zip(products, answers) if (p.value == a.value) == right]
        if not right:                                   # the most confident mistakes first
            judged.sort(key=lambda pair: -pair[1].probability)
        return "".join(card(*pair) for pair in itertools.islice(judged, EXAMPLES)) or "none"

    rows = "".join(cells(name, m) for name, m in [*metrics["attributes"].items(), *metrics.get("seen_and_held_out", {}).items()])
    weakest = min(metrics["attributes"], key=lambda name: metrics["attributes"][name]["micro_f1"])
    weakest = (f" Weakest attribute: {html.escape(weakest)} ({metrics['attributes'][weakest]['micro_f1']:.0f} %)."
               if len(metrics["attributes"]) > 1 else "")
    matrices = "".join(f"<img class='matrix' alt='confusion matrix: {html.escape(attribute)}' "
                       f"src='{name}'>" for attribute, name in confusion_files(metrics["attributes"]).items())
    curve = learning_curve(list(losses))
    how = (f"temperature {metrics['temperature']}, top-p {metrics['top_p']}"
           + (", only known values allowed" if metrics["constrained"] else "")
           + (f", empty below probability {metrics['min_confidence']}" if metrics.get("min_confidence") else "")
           + (", adapters merged" if metrics["merged"] else ""))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>EIVEN: {html.escape(title)}</title>
<style>
body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
color: #222; background: #fff }}
.headline {{ font-size: 1.3rem }} .table {{ overflow-x: auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr:last-child {{ font-weight: 600 }}
.cards {{ display: flex; flex-wrap: wrap; gap: .8rem }} .card {{ width: 12rem; padding: .6rem; border: 1px solid #ddd;
border-radius: 6px; font-size: .85rem; overflow-wrap: anywhere; break-inside: avoid }} .card p {{ margin: .3rem 0 }}
.wrong {{ border-left: 5px solid #D55E00 }} .right {{ border-left: 5px solid #0072B2 }}
.pair {{ display: flex; flex-wrap: wrap; gap: 1rem }} figure {{ margin: 0; flex: 1 1 20rem }}
.matrix {{ max-width: 100%; vertical-align: top }} .curve {{ width: 100%; max-width: 40rem; font-size: 13px }}
@media (max-width: 40rem) {{ td, th {{ padding: .25rem .4rem; font-size: .85rem }} .card {{ width: 100% }} }}
@media print {{ body {{ margin: 0; font-size: 11pt }} h2 {{ break-after: avoid }} }}
</style></head><body>
<h1>EIVEN: {html.escape(title)}</h1>
<p class="headline">{metrics["right"]:,} of {metrics["n"]:,} answers are right ({metrics["recall"]:.0f} %).{weakest}</p>
<p>{html.escape(metrics["sources"])}</p>
<h2>Scores</h2>
<div class="table"><table><tr><th>attribute</th><th>micro-F1</th><th>precision</th><th>recall</th><th>gold inside answer</th>
<th>n</th></tr>
{rows}{cells("all (micro)", metrics)}</table></div>
<p>An answer is right if it equals the gold value exactly; per cent; {how}; n = {metrics["n"]}, answered in
{metrics["seconds"]} s.</p>
{confidence_html(metrics) if "confidence" in metrics else ""}
<h2>The most confident mistakes</h2><div class="cards">{cards(right=False)}</div>
<h2>Right answers</h2><div class="cards">{cards(right=True)}</div>
<h2>Which values are confused</h2>{matrices}
{"<h2>Training loss</h2>" + curve if curve else ""}
</body></html>
"""
