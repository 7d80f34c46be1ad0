"""The page of a run, and its confusion matrices."""

import re
from collections import Counter
from types import SimpleNamespace

from PIL import Image, ImageFont
from test_explain import Tags

from data import Product
from evaluate import score
from support import report
from support.answering import Answer
from support.confidence import measure


def draw(folder, rows, images=None):
    """The page on (answer, probability, fields of the product) in each row."""
    products = [Product(*fields) for _, _, *fields in rows]
    answers = [Answer(*row[:2]) for row in rows]
    metrics = score(products, [a.value for a in answers])
    metrics.update(measure(SimpleNamespace(values={}), products, answers, None, False))
    metrics.update(sources="demo", temperature=0.1, top_p=0.75, constrained=False, min_confidence=0.0,
                   merged=False, seconds=1.0)
    report.draw_results(folder, "a title", products, answers, metrics, images, [3.5, 2.0, 0.0],
                        "python -m tools.explain RUN")
    return (folder / "report.html").read_text()


def test_the_page(tmp_path):
    """The most confident mistake comes first; a photo that is absent costs nothing."""
    Image.new("RGB", (400, 300)).save(tmp_path / "0.jpg")
    answers = [("Wedge", 0.2), ("Flat", 0.9), ("High Heel", 0.7), ("", 0.1)]
    rows = [(*answer, f"B {i}", f"{i}.jpg", "", "", "Heel Height", "Flat")
            for i, answer in enumerate(answers)]
    page = draw(tmp_path, rows, tmp_path)
    assert "1 of 4 answers are right (25 %)" in page
    assert re.findall("<p>Heel Height: (.*?)  ", page) == ["High Heel", "Wedge", "(no answer)", "Flat"]
    assert (page.count("image/jpeg"), page.count("no photo"), page.count("image/png")) == (1, 3, 1)
    assert 'x="90.5" width="9" height="100.00"' in page                     # the bin of confidence 0.9
    assert "points='0.00,87.50 50.00,50.00 100.00,0.00'" in page            # the training loss: 3.5 of 4
    assert "python -m tools.explain RUN &#x27;B 2&#x27; --attribute &#x27;Heel Height&#x27;</code>" in page
    assert "100.00 Flat (not beaten)</td>" in page
    assert (tmp_path / "confusion-heel-height.png").exists()


def test_texts_stay_texts(tmp_path):
    payload = "</title><script>alert(1)</script>' onload='x\" &amp;"
    page = draw(tmp_path, [(answer, 1.0, *[payload] * 6) for answer in (payload, payload + "!")])
    assert payload in Tags(page).text


def test_a_large_matrix_shows_the_values_with_the_most_mistakes():
    """100 values, all right, but for v099: 9 of its answers are v001, and 1 is no value."""
    counts = Counter({(f"v{i:03}", f"v{i:03}"): 10 for i in range(99)})
    counts.update({("v099", "v001"): 9, ("v099", "no value"): 1})
    image = report.confusion_png("t", counts)
    left = 28 + int(ImageFont.load_default(14).getlength("(other)"))
    shades = [image.getpixel((left + 44 * column, image.height - 30)) for column in (0, 60, 1)]
    assert (255, 255, 255) == shades[0] > shades[1] > (200, 200, 200) > shades[2]
