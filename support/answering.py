"""A trained run, and its answers to one product or to many."""

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field, replace
from functools import cache
from itertools import islice
from operator import length_hint
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import NamedTuple

from PIL import Image

from base.checkpoint import check_frozen
from base.console import Progress, UserError, did_you_mean, reading, what_is
from base.photo import on_white, upright
from base.tsv import COLUMNS, write_tsv
from data import Product, base_question, comparison, encode_answer, encode_examples, read_split, sample_labels
from demo import world
from eiven import EIVEN, TEMPERATURE, TOP_P
from support import processes
from support.config import Config, Sources, build_model, choose_device, find_sources
from support.features import PhotoFeatures
from support.run_folder import check_weights, read_config, read_temperature

ANSWER_BATCH = 64                                       # products answered together
SCORE_BATCH = 8                                         # products whose values are scored together
SCORE_VALUES = 128                                      # pairs of product and value in one forward pass
SHORTEST_LIMIT = 32                                     # tokens that a free answer may have at least
# of predictions.tsv
PREDICTED = (*COLUMNS, "prediction", "probability", "runner_up", "runner_up_probability")

# ---------------------------------------------------------------------------------------- a run


class Answer(NamedTuple):
    """An answer and its probability; of scored values also the second most probable one.

    log_probs  of scored values: log p(R | X) of each, in the order of the list
    """

    value: str
    probability: float
    runner_up: str = ""
    runner_up_probability: float | None = None
    log_probs: tuple = ()

    def above(self, min_confidence):
        """The answer if it has this probability or more; else an empty one, which keeps the probability."""
        return self if self.probability >= min_confidence else self._replace(value="")

    def __str__(self):
        return f"{self.value or '(no answer)'}  (probability {self.probability:.2f})"


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

    def product(self, image=None, text=None, attribute=""):
        """The Product that `answer` is asked for: the same arguments, the same errors."""
        attribute = self.known_attribute(attribute)
        names = ", ".join(self.values)
        try:
            f"{text}{attribute}".encode()
        except UnicodeEncodeError:                      # typed in a terminal of another encoding
            raise UserError(f"--text or --attribute is not UTF-8 text: {text!r}, {attribute!r}") from None
        if not attribute.strip():
            raise UserError(f"--attribute is empty; name the one to answer, e.g. one of this run's: {names}")
        if attribute not in self.values:
            note_once(f"{attribute!r}{did_you_mean(attribute, self.values)} is not an attribute of this "
                      f"run's training data ({names})")
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
        values     choose from these values (a list of texts) instead
        min_confidence   below this probability the value is "" (the probability is still that of the value
                         left out)
        temperature, top_p   of free answers, as in EIVEN.generate
        The probability of a free answer is that of its text among all texts.  The probability of a chosen
        value is its share among the values of the list, at the temperature that was fitted on val (or 1).
        Errors     UserError: something is missing, not wanted, or unreadable; ValueError: values is no list
                   of texts; AttributeError: a product is no dict.  A note in the error says which product
        """
        if values is not None:
            texts = isinstance(values, list | tuple) and all(isinstance(v, str) and v.strip() for v in values)
            if not texts or not values:
                raise ValueError(f"values must be a list of texts, none of them empty, but is {values!r}")
            values = list(dict.fromkeys(" ".join(value.split()) for value in values))
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
                    lists = {p.attribute: values for p in block}
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


def load(folder: str | os.PathLike, data_needed: bool = False, **changed) -> Run:
    """The Run in a run folder, ready to answer.

    data_needed  whether products will be read from the data set's folder
    changed      flags that replace the saved ones: data, llama, vit, device, dtype, threads
    Errors       UserError: no run, not finished, other weights than in training
    """
    folder = Path(folder)
    config, record = read_config(folder)
    config = replace(config, **changed)
    trained = folder / "adapter.safetensors"
    if not trained.exists():
        raise UserError(f"{folder}: its training is not finished; continue it with "
                        f"python train.py --resume {quote(str(folder))}")
    sources = find_sources(config, data_needed)
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
            cells = [" ".join(cell.split()) for cell in line.split("\t")]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"line {number}, {line[:80]!r}, should be an attribute, one tab and a value")
            attribute, value = cells
            values.setdefault(attribute, []).append(value)
        if not values:
            raise ValueError("it holds no values; it needs an attribute, a tab and a value in each line")
    return values


# ---------------------------------------------------------------------------------------- answers


def split_products(config, sources, split):
    """The products of a split; train and val are sampled (--labels).

    With --skip-missing-photos those without a photo are left out, and a line says how many.  An empty file or
    a page of HTML is no photo.
    """
    products = read_split(sources.data, config.dataset, split)
    if config.skip_missing_photos and config.image and not config.drawn:        # drawn when they are needed
        images = sources.data / "images"
        kept = [p for p in products if not what_is(images / p.image)]
        note = (f"{split}: {len(products) - len(kept):,} of {len(products):,} products have no photo in "
                f"{images}")
        if not kept:
            raise UserError(f"{note}; download them (docs/data.md), or leave photos out with --no-image")
        print(f"{note}: left out")
        products = kept
    return products if split == "test" else sample_labels(products, config.labels, config.seed)


def prepare_photos(run, products, skip_bad=False):
    """Compute the features of these products' photos, if the run uses photos; the demo world's are drawn
    first.

    skip_bad  leave out photos that cannot be used: {file name: what is wrong with it}.  The processes then
              have different products, and none waits for another.
    """
    if run.photo_features is None:
        return {}
    names = [p.image for p in products]
    with nullcontext() if skip_bad else processes.one_first():
        if run.config.drawn:
            world.draw_photos(run.sources.data, names)
        return run.photo_features.prepare(names, skip_bad)


def answers(run, products, values=None, temperature=TEMPERATURE, top_p=TOP_P, what="answering"):
    """An Answer for each product, in order.

    Of several processes, each answers its part of the batches; process 0 returns all answers, and the others
    those of their part.
    values  {attribute: values} to choose from: each value is scored, and the most probable is the answer;
            None: free
    """
    with Progress(what, len(products), "products") as progress:
        answered = answer_batches(run, products, values, temperature, top_p, progress, processes.rank(),
                                  processes.size())
    for part in processes.gather(answered):
        answered |= part
    return [answered[i] for i in sorted(answered)]


def answer_batches(run, products, values, temperature, top_p, progress=None, rank=0, size=1):
    """{index of a product: its Answer}, sorted: of every batch, or of those that process `rank` of `size`
    takes.
    """
    answered = {}
    for number, batch in enumerate(batches(run, products, values)):
        if number % size == rank:
            answered |= answer_batch(run, products, batch, values, temperature, top_p)
        if progress:
            progress.step(len(batch))
    return dict(sorted(answered.items()))


def batches(run, products, values):
    """Products that are answered together: a list of lists of indices.

    They are sorted by length to save padding; but the attributes of a product stay together, because their
    sequences begin with the same tokens: BOS, I' and "Question: What is the".  base/packing.py computes those
    once.
    """
    size = ANSWER_BATCH if values is None else SCORE_BATCH
    longest = {}                                        # of the prompts of a product, in characters
    for p in products:
        longest[p.id] = max(longest.get(p.id, 0), len(base_question(p, run.config.text).prompt))
    order = sorted(range(len(products)), key=lambda i: longest[products[i].id])
    return [order[start:start + size] for start in range(0, len(order), size)]


def answer_batch(run, products, indices, values, temperature, top_p, observe=None):
    """{i: Answer} of the products with these indices, answered as one batch.

    An answer does not depend on its batch, except for the last bits of the probabilities: each product draws
    from a generator of its own.  (A draw that falls between two tokens to the last bit may go to either.)

    observe  as in EIVEN.generate
    """
    tokenizer = run.model.tokenizer
    batch_products = [products[i] for i in indices]
    questions = [base_question(p, run.config.text) for p in batch_products]
    batch, photos = encode_examples(questions, tokenizer, run.config.image)
    cls_tokens = run.photo_features.read(photos, run.model.device) if run.photo_features else None
    try:
        if values is None:
            seeds = [f"answer {run.config.seed} {p.id} {p.attribute}" for p in batch_products]
            written = run.model.generate(batch, cls_tokens, seeds, temperature, top_p, run.answer_limit,
                                         observe)
            batch_answers = [Answer(tokenizer.decode(ids).strip(), p) for ids, p in written]
        else:
            lists = [values[p.attribute] for p in batch_products]
            log_probs = score_values(run.model, batch, lists, cls_tokens)
            batch_answers = [likeliest(*scored, run.value_temperature) for scored in zip(lists, log_probs)]
    except FloatingPointError as error:
        check_frozen(run.model.llama, run.sources.llama)
        first = batch_products[0].id
        raise UserError(f"{error}, in the batch that begins with product {first!r}; start again with "
                        "--dtype fp32, whose numbers do not overflow so early") from None
    return dict(zip(indices, batch_answers))


def score_values(model, batch, lists, cls_tokens):
    """log p(R | X) of each value: for each example of the batch a list of floats, one for each value of its
    list.
    """
    pairs = [(example, encode_answer(value, model.tokenizer))
             for example, names in zip(batch, lists) for value in names]
    log_p = []
    for start in range(0, len(pairs), SCORE_VALUES):    # an attribute may have hundreds of values
        examples, answers = zip(*pairs[start:start + SCORE_VALUES])
        # one candidate for each example
        log_p += [lp for [lp] in model.score(examples, [[R] for R in answers], cls_tokens)]
    log_p = iter(log_p)
    return [[next(log_p) for _ in names] for names in lists]


def likeliest(values, log_probs, temperature=1.0):
    """The Answer from scored values: the most probable, with its probability, softmax(log_probs /
    temperature).
    """
    ranked = sorted(range(len(values)), key=lambda i: -log_probs[i])
    weight = [math.exp((lp - log_probs[ranked[0]]) / temperature) for lp in log_probs]
    best_and_second = [cell for i in ranked[:2] for cell in (values[i], weight[i] / sum(weight))]
    return Answer(*best_and_second, log_probs=tuple(log_probs))


def prediction(p, a):
    """The cells of a product and its Answer, in the order of PREDICTED."""
    second = a.runner_up_probability and round(a.runner_up_probability, 4)
    return [*astuple(p), a.value, round(a.probability, 4), a.runner_up, second]


def write_predictions(path, products, answers):
    """Write products and their answers as TSV: the data set's columns, then the answer's."""
    write_tsv(path, (["" if cell is None else cell for cell in prediction(p, a)]
                     for p, a in zip(products, answers)), PREDICTED)


# ---------------------------------------------------------------------------------------- questions that fail


def check_questions(run, products, values=None, compared=False):
    """UserError before any work if a product cannot be asked for; the arguments are those of
    `longest_values` and `problem_of`.
    """
    longest = longest_values(run, values)
    for product in products:
        if problem := problem_of(run, product, longest, compared):
            raise UserError(problem)


def longest_values(run, values):
    """{attribute: the value with the most tokens} of {attribute: values}, or {} of None."""
    return {attribute: max(names, key=lambda value: len(encode_answer(value, run.model.tokenizer)))
            for attribute, names in (values or {}).items()}


def problem_of(run, product, longest, compared=False):
    """What is wrong if a product's attribute has no values to choose from, or if its question and answer are
    longer than LLaMA can read; else None.

    longest   {attribute: the longest of the values to choose from}; {}: the answer is free, or the label
    compared  whether a question may hold two products; then both are assumed to be this long
    """
    if longest and product.attribute not in longest:
        return (f"there are no known values of {product.attribute}, only of {', '.join(longest)}; --values "
                "and --constrain together take those of the file and those of the training")
    config, limit = run.config, run.model.llama.config.max_position_embeddings
    p = replace(product, value=longest.get(product.attribute, product.value))
    example = comparison(p, p, config.lbc, config.text) if compared else base_question(p, config.text)
    tokens = 1 + len(example.photos) * (len(run.photo_features.cls_layers) if run.photo_features else 0)
    if tokens + len(f"{example.prompt}{example.answer}".encode()) < limit:
        return None  # a token is a byte or more, so nothing has to be tokenised
    [encoded], _ = encode_examples([example], run.model.tokenizer)
    tokens += len(encoded.prompt) + len(encoded.answer)
    if tokens <= limit:
        return None
    what = "a comparison with a product as long" if compared else "its question"
    return (f"product {p.id!r}: {what} has {tokens:,} tokens with the answer {p.value[:60]!r}, more than the "
            f"{limit:,} that this LLaMA was trained to read; shorten its title: {p.title[:100]!r}…")
