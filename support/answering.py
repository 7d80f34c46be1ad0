"""A trained run, and its answers to one product or to many."""

import math
import os
import sys
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from base.checkpoint import check_frozen
from base.console import Progress, UserError
from base.tsv import COLUMNS, write_tsv
from data import Product, base_question, comparison, encode_answer, encode_examples
from demo import world
from eiven import EIVEN, TEMPERATURE, TOP_P
from support import processes
from support.config import Config, Sources, build_model, choose_device, find_sources
from support.features import PhotoFeatures
from support.run_folder import check_weights, read_config, read_temperature

ANSWER_BATCH = 64                                       # products answered together
SCORE_BATCH = 8                                         # products whose values are scored together
SCORE_VALUES = 128                                      # at most so many values of theirs in all, but those of one product
SCORE_TOKENS = 8192                                     # text tokens of questions with a value that are scored at once
LEAST_LIMIT = 32                                        # tokens that a free answer may have at least
SORTED_TOGETHER = 4096                                  # products sorted by length together
PREDICTED = (*COLUMNS, "prediction", "probability", "runner_up", "runner_up_probability")       # columns of predictions.tsv


class Answer(NamedTuple):
    """An answer and its probability; of scored values also the second most probable, and log p(R | X) of each in the list's order.

    A value that was left out by `above` is "", and its probability is kept.
    """

    value: str
    probability: float
    runner_up: str = ""
    runner_up_probability: float | None = None
    log_probs: array = ()

    def above(self, min_confidence):
        """The answer if it has this probability or more, else an empty one."""
        return self if self.probability >= min_confidence else self._replace(value="")

    def __str__(self):
        return f"{self.value or '(no answer)'}  (probability {self.probability:.2f})"


@dataclass
class Run:
    """A run folder with its model.  `load(folder)` makes one.

    values          {attribute: its values in the training data, those held out included}
    photo_features  None if the run does not use photos
    held_out        {attribute: values that the training did not see} (--holdout-values)
    calibration     the temperature of scored values, as support/confidence.py fits it; None: not fitted, and 1 is used
    """

    folder: Path
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
        known = (value for several in self.values.values() for value in several)
        return max([LEAST_LIMIT, *(len(encode_answer(value, self.model.tokenizer)) for value in known)])

    def known_attribute(self, name):
        """The attribute's name as in the training data, ignoring case; an unknown name unchanged."""
        return next((a for a in self.values if a.lower() == name.lower()), name)

    def product(self, image=None, text=None, attribute=""):
        """The Product that `answer` is asked for: the same arguments, the same errors."""
        attribute = self.known_attribute(attribute)
        if not attribute.strip():
            raise UserError("--attribute is empty; name the attribute to answer, e.g. one of this run's training data: "
                            f"{', '.join(self.values)}")
        if attribute not in self.values:
            print(f"note: {attribute!r} is not an attribute of this run's training data ({', '.join(self.values)})",
                  file=sys.stderr)
        for name, given, used in (("image", image, self.config.image), ("text", text, self.config.text)):
            if used and given is None:
                raise UserError(f"this run was trained with {name}s: give --{name}")
            if given is not None and not used:
                raise UserError(f"this run was trained without {name}s (--no-{name}): leave --{name} out")
        if image is not None:
            check_image(image)
        return Product("", str(Path(image).resolve()) if image else "", "", " ".join((text or "").split()), attribute, "")

    def answer(self, image=None, text=None, attribute="", constrain=False, temperature=TEMPERATURE, top_p=TOP_P,
               values=None, min_confidence=0.0):
        """The Answer for one product: its value, and the probability of that value.

        image      file name of the photo, if the run was trained with photos
        text       title, best with the category: "title, category"; if the run was trained with texts
        attribute  its name in the training data; upper and lower case make no difference
        constrain  choose from the attribute's known values instead of writing freely
        values     choose from these values (a list of texts) instead
        min_confidence   below this probability the value is "" (and the probability is still that of the value left out)
        temperature, top_p   of free answers, as in EIVEN.generate
        The probability of a free answer is that of its text among all texts.  The probability of a chosen value is its
        share among the values of the list, at the temperature that was fitted on val (or 1).
        Errors     UserError: something is missing, not wanted, or unreadable; ValueError: values is no list of texts
        """
        if values is not None and not (isinstance(values, (list, tuple)) and values and
                                       all(isinstance(v, str) and v.strip() for v in values)):
            raise ValueError(f"values must be a list of at least one text, none of them empty, but is {values!r}")
        product = self.product(image, text, attribute)
        attribute = product.attribute
        if constrain and values is None and attribute not in self.values:
            raise UserError(f"--constrain needs an attribute with known values: {', '.join(self.values)}")
        prepare_photos(self, [product])
        if values is not None:
            values = {attribute: list(dict.fromkeys(" ".join(v.split()) for v in values))}
        elif constrain:
            values = self.values
        [answer] = answers(self, [product], values, temperature, top_p)
        return answer.above(min_confidence)


def check_image(path):
    """UserError if there is no file at `path`."""
    if not os.path.isfile(path):
        found = "is a folder, a pipe or a device, not a photo" if os.path.exists(path) else "there is no such file"
        raise UserError(f"--image {path}: {found}")


def load(folder, data_needed=False, feature_cache=True, **given):
    """The Run in a run folder, ready to answer.

    data_needed    whether products will be read from the data set's folder
    feature_cache  False: the features of photos are not kept; only support/catalogue.py can do without
    given          flags that replace the saved ones: data, llama, vit, device, dtype, threads, shard
    Errors         UserError: no run, not finished, other weights than in training
    """
    config, record = read_config(folder)
    for name, value in given.items():
        setattr(config, name, value)
    trained = Path(folder) / "adapter.safetensors"
    if not trained.exists():
        raise UserError(f"{folder}: its training is not finished; continue it with: python train.py --resume {folder}")
    sources = find_sources(config, data_needed)
    check_weights(folder, record, sources)
    model, photo_features = build_model(config, sources, choose_device(config.device), feature_cache)
    model.load(trained)
    return Run(Path(folder), config, record["values"], sources, model, photo_features, record["held_out"],
               read_temperature(Path(folder)))


def prepare_photos(run, products):
    """Compute the features of these products' photos, if the run uses photos; photos of the demo world are drawn first."""
    if run.photo_features is None:
        return
    with processes.one_first():
        if run.config.demo and not run.config.data:
            world.draw_photos(run.sources.data, [p.image for p in products])
        run.photo_features.prepare(p.image for p in products)


def answers(run, products, values=None, temperature=TEMPERATURE, top_p=TOP_P, what="answering"):
    """Yield an Answer for each product, in order; SORTED_TOGETHER products are in memory at a time.

    Of several processes, each answers its part of the batches; process 0 yields all answers, and the others none.
    values  {attribute: values} to choose from: each value is scored, and the most probable is the answer; None: free text
    """
    with Progress(what, len(products), "products") as progress:
        for first in range(0, len(products), SORTED_TOGETHER):
            some = products[first:first + SORTED_TOGETHER]
            found = [None] * len(some)
            for number, chosen in enumerate(batches(run, some, values)):
                if number % processes.size() == processes.rank():        # else another process answers it, about now
                    answer_batch(run, some, chosen, found, values, temperature, top_p)
                progress.step(len(chosen))
            processes.keep_up(run.model.llama)
            for each in zip(*processes.gather(found)):
                yield next(answer for answer in each if answer is not None)


def batches(run, products, values):
    """Products that are answered together: a list of lists of indices.

    They are sorted by length to save padding; but the attributes of a product stay together, because their sequences begin
    with the same tokens: BOS, I' and "Question: What is the".  base/packing.py computes those once.
    """
    size = ANSWER_BATCH
    if values is not None:                              # long lists: fewer products together, so that progress is seen
        size = max(1, min(SCORE_BATCH, SCORE_VALUES // max(map(len, values.values()))))
    longest = {}                                        # of the prompts of a product, in characters
    for p in products:
        longest[p.id] = max(longest.get(p.id, 0), len(base_question(p, run.config.text).prompt))
    order = sorted(range(len(products)), key=lambda i: longest[products[i].id])
    return [order[start:start + size] for start in range(0, len(order), size)]


def answer_batch(run, products, chosen, found, values, temperature, top_p):
    """Answer the products with the indices `chosen` as one batch: found[i] becomes the Answer of products[i].

    An answer does not depend on its batch, except for the last bits of the probabilities: each product draws from a generator
    of its own.  (So a draw that falls between two tokens to the last bit may go to either.)
    """
    tokenizer, some = run.model.tokenizer, [products[i] for i in chosen]
    batch, photos = encode_examples([base_question(p, run.config.text) for p in some], tokenizer, run.config.image)
    cls_tokens = run.photo_features.read(photos, run.model.device) if run.photo_features else None
    try:
        if values is None:
            seeds = [f"answer {run.config.seed} {p.id} {p.attribute}" for p in some]
            written = run.model.generate(batch, cls_tokens, seeds, temperature, top_p, run.answer_limit)
            batch_answers = [Answer(tokenizer.decode(ids).strip(), p) for ids, p in written]
        else:
            known = [values[p.attribute] for p in some]
            log_probs = score_values(run.model, batch, known, cls_tokens)
            batch_answers = [likeliest(v, lp, run.value_temperature) for v, lp in zip(known, log_probs)]
    except FloatingPointError as error:
        check_frozen(run.model.llama, run.sources.llama)
        raise UserError(f"{error}, in the batch that begins with product {some[0].id!r}; start again with "
                        "--dtype fp32, whose numbers do not overflow so early") from None
    for i, answer in zip(chosen, batch_answers):
        found[i] = answer


def score_values(model, batch, values, cls_tokens):
    """log p(R | X) of each value: for each example of the batch a list of floats, one for each of its values.

    The values are scored in parts of at most SCORE_TOKENS tokens: an attribute may have hundreds of values.
    """
    parts, room = [], 0
    for example, several in zip(batch, values):
        for value in several:
            R = encode_answer(value, model.tokenizer)
            length = len(example.prompt) + len(R)
            if length > room:
                parts.append([])
                room = SCORE_TOKENS
            parts[-1].append((example, R))
            room -= length
    log_p = (lp for part in parts for [lp] in model.score([e for e, _ in part], [[R] for _, R in part], cls_tokens))
    return [[next(log_p) for _ in several] for several in values]


def likeliest(values, log_probs, temperature=1.0):
    """The Answer from scored values: the most probable, with its probability, softmax(log_probs / temperature)."""
    ranked = sorted(range(len(values)), key=lambda i: -log_probs[i])
    weight = [math.exp((lp - log_probs[ranked[0]]) / temperature) for lp in log_probs]
    p = [weight[i] / sum(weight) for i in ranked[:2]]
    runner_up = (values[ranked[1]], p[1]) if len(values) > 1 else ("", None)
    return Answer(values[ranked[0]], p[0], *runner_up, array("d", log_probs))


def prediction(p, a):
    """The cells of a product and its Answer, in the order of PREDICTED."""
    return [p.id, p.image, p.category, p.title, p.attribute, p.value, a.value, f"{a.probability:.4f}", a.runner_up,
            "" if a.runner_up_probability is None else f"{a.runner_up_probability:.4f}"]


def write_predictions(path, products, answers):
    """Write products and their answers as TSV: the data set's columns, then the answer's."""
    write_tsv(path, (prediction(p, a) for p, a in zip(products, answers)), PREDICTED)


def check_lengths(run, products, compared=False, values=None):
    """UserError before any work if a product's question and answer are longer than LLaMA can read.

    compared, values   as in `too_long`
    """
    longest = longest_values(run, values)
    with Progress("lengths", len(products), "products") as progress:
        for p in products:
            progress.step()
            if reason := too_long(run, p, longest, compared):
                raise UserError(reason)


def longest_values(run, values):
    """{attribute: the value with the most tokens} of {attribute: values}, or {} of None."""
    return {attribute: max(several, key=lambda v: len(encode_answer(v, run.model.tokenizer)))
            for attribute, several in (values or {}).items()}


def too_long(run, p, longest, compared=False):
    """What is wrong if a product's question and answer are longer than LLaMA can read; else None.

    longest   {attribute: value} that the product must fit together with, if it has this attribute
    compared  whether a question may hold two products; then both are assumed to be this long
    """
    model, config = run.model, run.config
    most = model.llama.config.max_position_embeddings
    image_tokens = len(run.photo_features.cls_layers) if run.photo_features else 0
    if p.attribute in longest:
        p = replace(p, value=longest[p.attribute])
    if 3 * (len(p.context.encode()) + len(p.attribute.encode()) + len(p.value.encode())) + 200 < most:
        return None                                     # tokens <= bytes, in two contexts and values, and 200 for the rest
    example = comparison(p, p, config.lbc, config.text) if compared else base_question(p, config.text)
    [encoded], _ = encode_examples([example], model.tokenizer, image=False)
    tokens = 1 + image_tokens * (1 + compared) + len(encoded.prompt) + len(encoded.answer)
    if tokens <= most:
        return None
    chosen = f", with the value {p.value[:60]!r}" if longest else ""
    return (f"product {p.id!r}: its question{' with another product as long' if compared else ''} has {tokens:,} tokens, more "
            f"than the {most:,} that this LLaMA was trained to read{chosen}; shorten its title: {p.title[:100]!r}…")
