"""A trained run and its answers: to one product, to a list of products, to a file of them."""

import math
import os
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from base.checkpoint import check_frozen
from base.console import Progress, UserError
from base.tsv import COLUMNS, write_tsv
from data import Product, base_question, comparison, encode_answer, encode_examples
from demo import world
from eiven import EIVEN, TEMPERATURE, TOP_P
from support.config import Config, Sources, build_model, choose_device, find_sources
from support.features import PhotoFeatures
from support.run_folder import check_weights, read_config

ANSWER_BATCH = 64                                       # products answered together
SCORE_BATCH = 8                                         # products whose values are scored together
LEAST_LIMIT = 32                                        # tokens that a free answer may have at least
SORTED_TOGETHER = 4096                                  # products in memory at a time, answered in order of length


class Answer(NamedTuple):
    """An answer and its probability; of scored values also the second likeliest."""

    value: str
    probability: float
    runner_up: str = ""
    runner_up_probability: float | None = None

    def __str__(self):
        return f"{self.value or '(no answer)'}  (probability {self.probability:.2f})"


@dataclass
class Run:
    """A run folder with its model.  `evaluate.load(folder)` makes one.

    values          {attribute: its values in the training data}
    photo_features  None if the run does not use photos
    """

    folder: Path
    config: Config
    values: dict
    sources: Sources
    model: EIVEN
    photo_features: PhotoFeatures | None

    @cached_property
    def longest(self):
        """{attribute: (its value with the most tokens, how many, the end token included)}"""
        def tokens(value):
            return len(encode_answer(value, self.model.tokenizer))
        longest = {attribute: max(values, key=tokens) for attribute, values in self.values.items()}
        return {attribute: (value, tokens(value)) for attribute, value in longest.items()}

    def known_attribute(self, name):
        """The attribute's name as in the training data, upper and lower case made equal; an unknown name as it is."""
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

    def answer(self, image=None, text=None, attribute="", constrain=False, temperature=TEMPERATURE, top_p=TOP_P):
        """The Answer for one product: its value, and the probability of that value.

        image      file name of the photo, if the run was trained with photos
        text       title, best with the category: "title, category"; if the run was trained with texts
        attribute  its name in the training data; upper and lower case make no difference
        constrain  choose from the attribute's known values instead of writing freely
        Errors     UserError: something is missing, not wanted, or unreadable
        """
        product = self.product(image, text, attribute)
        if constrain and product.attribute not in self.values:
            raise UserError(f"--constrain needs an attribute with known values: {', '.join(self.values)}")
        prepare_photos(self, [product])
        [answer] = answers(self, [product], self.values if constrain else None, temperature, top_p)
        return answer


def check_image(path):
    """UserError if there is no file at `path`."""
    if not os.path.isfile(path):
        found = "is a folder, a pipe or a device, not a photo" if os.path.exists(path) else "there is no such file"
        raise UserError(f"--image {path}: {found}")


def load(folder, data_needed=False, **given):
    """The Run in a run folder, ready to answer.

    data_needed  whether products will be read from the data set's folder
    given        flags that replace the saved ones: data, llama, vit, device, dtype
    Errors       UserError: no run, not finished, other weights than in training
    """
    config, record = read_config(folder)
    for name, value in given.items():
        setattr(config, name, value)
    trained = Path(folder) / "adapter.safetensors"
    if not trained.exists():
        raise UserError(f"{folder}: its training is not finished; continue it with: python train.py --resume {folder}")
    sources = find_sources(config, data_needed)
    check_weights(folder, record, sources)
    model, photo_features = build_model(config, sources, choose_device(config.device))
    model.load(trained)
    return Run(Path(folder), config, record["values"], sources, model, photo_features)


def prepare_photos(run, products):
    """Compute the features of these products' photos, if the run uses photos; photos of the demo world are drawn first."""
    if run.photo_features is None:
        return
    if run.config.demo and not run.config.data:
        world.draw_photos(run.sources.data, [p.image for p in products])
    run.photo_features.prepare(p.image for p in products)


def answers(run, products, values=None, temperature=TEMPERATURE, top_p=TOP_P, what="answering"):
    """Yield an Answer for each product, in order; at most some thousand products are in memory at a time.

    values  {attribute: values} to choose from: each value is scored, and the likeliest is the answer; None: free text
    An answer does not depend on its batch: products are sorted by length only to save padding, and each product draws
    from a generator of its own.
    """
    tokenizer, image = run.model.tokenizer, run.config.image
    size = ANSWER_BATCH if values is None else SCORE_BATCH
    with Progress(what, len(products), "products") as progress:
        # No known value may be cut off.
        limit = max([LEAST_LIMIT, *(tokens for _, tokens in run.longest.values())])
        for first in range(0, len(products), SORTED_TOGETHER):
            some = products[first:first + SORTED_TOGETHER]
            examples = [base_question(p, run.config.text) for p in some]
            order = sorted(range(len(some)), key=lambda i: len(examples[i].prompt))
            found = [None] * len(some)
            for start in range(0, len(some), size):
                chosen = order[start:start + size]
                batch, photos = encode_examples([examples[i] for i in chosen], tokenizer, image)
                cls_tokens = run.photo_features.read(photos, run.model.device) if run.photo_features else None
                try:
                    if values is None:
                        seeds = [f"answer {run.config.seed} {some[i].id} {some[i].attribute}" for i in chosen]
                        written = run.model.generate(batch, cls_tokens, seeds, temperature, top_p, limit)
                        batch_answers = [Answer(tokenizer.decode(ids).strip(), p) for ids, p in written]
                    else:
                        known = [values[some[i].attribute] for i in chosen]
                        candidates = [[encode_answer(v, tokenizer) for v in each] for each in known]
                        log_p = run.model.score(batch, candidates, cls_tokens)
                        batch_answers = [likeliest(v, lp) for v, lp in zip(known, log_p)]
                except FloatingPointError as error:
                    check_frozen(run.model.llama, run.sources.llama)
                    raise UserError(f"{error}, in the batch that begins with product {some[chosen[0]].id!r}; start again with "
                                    "--dtype fp32, whose numbers do not overflow so early") from None
                for i, answer in zip(chosen, batch_answers):
                    found[i] = answer
                progress.step(len(chosen))
            yield from found


def likeliest(values, log_p):
    """The Answer from scored values: the likeliest, with its probability among these values."""
    highest = max(log_p)
    weight = [math.exp(lp - highest) for lp in log_p]
    ranked = sorted(range(len(values)), key=lambda i: -weight[i])
    p = [weight[i] / sum(weight) for i in ranked[:2]]
    return Answer(values[ranked[0]], p[0], *((values[ranked[1]], p[1]) if len(values) > 1 else ()))


def write_predictions(path, products, answers):
    """Products and their answers as TSV: the data set's columns, then the answer's."""
    write_tsv(path, (
        [p.id, p.image, p.category, p.title, p.attribute, p.value, a.value, f"{a.probability:.4f}", a.runner_up,
         "" if a.runner_up_probability is None else f"{a.runner_up_probability:.4f}"] for p, a in zip(products, answers)),
        [*COLUMNS, "prediction", "probability", "runner_up", "runner_up_probability"])


def check_lengths(run, products, compared=False, constrain=False):
    """UserError before any work if a product's question and answer are longer than LLaMA can read.

    compared   whether a question may hold two products; then each product must fit together with one as long as itself
    constrain  whether every known value of the attribute will be scored; then the longest of them must fit
    """
    model, config = run.model, run.config
    most = model.llama.config.max_position_embeddings
    image_tokens = len(run.photo_features.cls_layers) if run.photo_features else 0
    with Progress("lengths", len(products), "products") as progress:
        for p in products:
            progress.step()
            if constrain:
                p = replace(p, value=run.longest[p.attribute][0])
            if 3 * (len(p.context.encode()) + len(p.attribute.encode()) + len(p.value.encode())) + 200 < most:
                continue                                # a token has at least one byte: this cannot be too long
            example = comparison(p, p, config.lbc, config.text) if compared else base_question(p, config.text)
            [encoded], _ = encode_examples([example], model.tokenizer, image=False)
            tokens = 1 + image_tokens * (1 + compared) + len(encoded.prompt) + len(encoded.answer)
            if tokens > most:
                raise UserError(f"product {p.id!r}: its question{' with another product as long' if compared else ''} has "
                                f"{tokens:,} tokens, more than the {most:,} that this LLaMA was trained to read; shorten its "
                                f"title: {p.title[:100]!r}…")
