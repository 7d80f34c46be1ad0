"""A trained run: its config, model and photo features, and its answers in Python."""

import csv
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from operator import length_hint
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

from PIL import Image

from base.console import Progress, UserError, did_you_mean, reading
from base.photo import on_white, upright
from data import Product, encode_answer
from eiven import EIVEN, TEMPERATURE, TOP_P
from support.answering import ANSWER_BATCH, Answer, answer_batches, check_questions, prepare_photos
from support.config import DTYPES, MACHINE, Config, Sources, build_model, choose_device, find_sources
from support.features import PhotoFeatures
from support.run_folder import check_weights, read_config, read_temperature

SHORTEST_LIMIT = 32                                     # tokens that a free answer may have at least


@dataclass
class Run:
    """A run folder with its model.  `load(folder)` makes one.

    id              the run's: a hash of its config.json
    values          {attribute: its values in the training data, those held out included}
    photo_features  None if the run does not use photos
    held_out        {attribute: values that the training did not see} (--holdout-values)
    calibration     the temperature of scored values, as support/confidence.py fits it; None: not fitted, and
                    1 is used
    """

    folder: Path
    id: str
    config: Config
    values: dict
    sources: Sources
    model: EIVEN
    photo_features: PhotoFeatures | None
    held_out: dict = field(default_factory=dict)
    calibration: dict | None = None

    @property
    def value_temperature(self):
        return self.calibration["temperature"] if self.calibration else 1.0

    @property
    def answer_limit(self):
        """Tokens that a free answer may have: no known value may be cut off."""
        lengths = (len(encode_answer(value, self.model.tokenizer))
                   for names in self.values.values() for value in names)
        return max(SHORTEST_LIMIT, *lengths)

    def known_attribute(self, name):
        """The attribute's name as in the training data, whatever its case and white space; or `name`."""
        name = " ".join(name.split())
        return next((a for a in self.values if a.lower() == name.lower()), name)

    def asked_attribute(self, name):
        """known_attribute, with a note if the training data does not have it."""
        name = self.known_attribute(name)
        if name not in self.values:
            note_once(f"{name!r}{did_you_mean(name, self.values)} is not an attribute of this run's training "
                      f"data ({', '.join(self.values)})")
        return name

    def product(self, image=None, text=None, attribute=""):
        """The Product that `answer` is asked for: the same arguments, the same errors."""
        try:
            f"{text}{attribute}".encode()
        except UnicodeEncodeError:                      # typed in a terminal of another encoding
            raise UserError(f"--text or --attribute is not UTF-8 text: {text!r}, {attribute!r}") from None
        if not attribute.strip():
            raise UserError("--attribute is empty; name the one to answer, e.g. one of this run's: "
                            f"{', '.join(self.values)}")
        attribute = self.asked_attribute(attribute)
        for name, argument, used in (("image", image, self.config.image), ("text", text, self.config.text)):
            if used != (argument is not None):
                raise UserError(f"this run was trained with{'' if used else 'out'} {name}s: "
                                f"{'give' if used else 'leave out'} --{name}")
        photo = str(Path(image).absolute()) if image else ""
        if photo:
            with reading(photo, "the photo of --image"):
                pass
        return Product("", photo, "", " ".join((text or "").split()), attribute, "")

    def answer(self, image: str | os.PathLike | Image.Image | None = None, text: str | None = None,
               attribute: str = "", **settings) -> Answer:
        """The Answer for one product: its value, and the probability of that value.

        image      the photo, a file or a PIL image, if the run was trained with photos
        text       title, best with the category: "title, category"; if the run was trained with texts
        attribute  its name in the training data; upper and lower case make no difference
        settings   those of `answers`
        """
        [answer] = self.answers([{"image": image, "text": text, "attribute": attribute}], **settings)
        return answer

    def answers(self, products: Iterable[dict], constrain: bool = False, values: list[str] | None = None,
                min_confidence: float = 0.0, temperature: float = TEMPERATURE,
                top_p: float = TOP_P) -> Iterator[Answer]:
        """Yield the Answers for many products, in their order, with progress; ANSWER_BATCH products are read
        and answered at a time.

        products   dicts with "image", "text" and "attribute", as in `answer`.  Other keys are ignored, and
                   what is no text and no photo counts as absent, such as NaN in the records of a DataFrame
        constrain  choose from the attribute's known values instead of writing freely
        values     choose from these values (a list of texts); with constrain, from both
        min_confidence   below this probability the value is "" (the probability is still that of the value
                         left out)
        temperature, top_p   of free answers, as in EIVEN.generate
        The probability of a free answer is that of its text among all texts.  The probability of a chosen
        value is its share among the values of the list, at the temperature that was fitted on val (or 1).
        Errors     UserError: something is missing, not wanted, or unreadable; ValueError: values is no list
                   of texts, or a setting is out of range; AttributeError: a product is no dict.  A note in
                   the error says which product
        """
        if values is not None:
            texts = isinstance(values, list | tuple) and all(isinstance(v, str) and v.strip() for v in values)
            if not texts or not values:
                raise ValueError(f"values must be a list of texts, none of them empty, but is {values!r}")
            values = [" ".join(value.split()) for value in values]
        if not (0 <= min_confidence <= 1 and temperature >= 0 and 0 < top_p <= 1):
            raise ValueError("min_confidence is from 0 to 1, temperature 0 or more, top_p in (0, 1]")
        records = enumerate(products)
        with Progress("answering", length_hint(products), "products") as progress:
            while block := list(islice(records, ANSWER_BATCH)):
                with TemporaryDirectory() as folder:
                    block = [self._product_of(*record, folder) for record in block]
                    prepare_photos(self, block)
                lists = self.values if constrain else None
                if values:
                    known = lists or {}
                    lists = {p.attribute: list(dict.fromkeys([*known.get(p.attribute, ()), *values]))
                             for p in block}
                check_questions(self, block, lists)
                answered = answer_batches(self, block, lists, temperature, top_p, progress)
                yield from (answer.above(min_confidence) for answer in answered.values())

    def _product_of(self, number, record, folder):
        """The Product of a record of `answers`; a PIL image becomes a file in `folder`."""
        try:
            given = {name: record.get(name) for name in ("image", "text", "attribute")}
            if isinstance(given["image"], Image.Image):
                photo = on_white(upright(given["image"]))
                given["image"] = Path(folder, f"{number}.bmp")
                photo.save(given["image"])
            given = {name: value for name, value in given.items() if isinstance(value, str | os.PathLike)}
            return self.product(**given)
        except Exception as error:
            error.add_note(f"in product {number} (the first is 0), which must be a dict with image, text and "
                           f"attribute: {record!r:.200}")
            raise


@cache
def note_once(text):
    """Print a note, but not again for the next of many products."""
    print(f"note: {text}", file=sys.stderr)


def load(folder: str | os.PathLike, **changed) -> Run:
    """The Run in a run folder, ready to answer.

    changed  flags that replace the saved ones: those of MACHINE
    Errors   UserError: no run, not finished, other weights than in training; TypeError: another flag;
             ValueError: a dtype that there is not
    """
    folder = Path(folder)
    config, record = read_config(folder)
    if unknown := changed.keys() - MACHINE:
        raise TypeError(f"load takes {', '.join(MACHINE)}, but not {', '.join(unknown)}")
    dtypes = ("auto", "int8", *DTYPES)
    if changed.get("dtype", "auto") not in dtypes:
        raise ValueError(f"dtype is {changed['dtype']!r}, but must be one of {', '.join(dtypes)}")
    config = replace(config, **changed)
    trained = folder / "adapter.safetensors"
    if not trained.exists():
        raise UserError(f"{folder}: its training is not finished; continue it with "
                        f"python train.py --resume {quote(str(folder))}")
    sources = find_sources(config)
    check_weights(folder, record, sources)
    model, photo_features = build_model(config, sources, choose_device(config.device))
    model.load(trained, record["id"])
    return Run(folder, record["id"], config, record["values"], sources, model, photo_features,
               record["held_out"], read_temperature(folder, record["id"]))


def read_values(path):
    """{attribute: its values} from a file with one `attribute<TAB>value` a line and no header."""
    values = {}
    with reading(path, "a list of values (attribute, tab, value)"):
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
            cells = [" ".join(cell.split()) for cell in next(csv.reader([line], "excel-tab"), [])]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"line {number}, {line[:80]!r}, should be an attribute, one tab and a value")
            attribute, value = cells
            values.setdefault(attribute, []).append(value)
        if not values:
            raise ValueError("it holds no values; it needs an attribute, a tab and a value in each line")
    return values
