"""Answers of a run to many products: their photos, batches, free answers and scored values.

`run` is a Run (support/run.py).
"""

import math
from contextlib import nullcontext
from dataclasses import astuple, replace
from typing import NamedTuple

from base.checkpoint import check_frozen
from base.console import Progress, UserError, what_is
from base.tsv import COLUMNS, write_tsv
from data import base_question, comparison, encode_answer, encode_examples, read_split, sample_labels
from demo import world
from eiven import TEMPERATURE, TOP_P
from support import processes

ANSWER_BATCH = 64                                       # products answered together
SCORE_BATCH = 8                                         # products whose values are scored together
SCORE_VALUES = 128                                      # pairs of product and value in one forward pass
# of predictions.tsv
PREDICTED = (*COLUMNS, "prediction", "probability", "runner_up", "runner_up_probability")

# ---------------------------------------------------------------------------------------- answers


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


def split_products(config, sources, split):
    """The products of a split; train and val are sampled (--labels).

    With --skip-missing-photos those without a photo are left out, and a line says how many.  An empty file or
    a page of HTML is no photo.
    """
    products = read_split(sources.data, config.dataset, split)
    if config.skip_missing_photos and config.image and not config.drawn:        # drawn when they are needed
        images = sources.data / "images"
        kept = [p for p in products if (images / p.image).is_file() and not what_is(images / p.image)]
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

    Of several processes, each answers its part of the batches, and all return all answers.
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
    for number, batch in enumerate(batches(products, values)):
        if number % size == rank:
            answered |= answer_batch(run, products, batch, values, temperature, top_p)
        if progress:
            progress.step(len(batch))
    return dict(sorted(answered.items()))


def batches(products, values):
    """Products that are answered together: a list of lists of indices.

    They are sorted by the length of their texts to save padding.  The attributes of a product stay together
    as in the file; their sequences begin with the same tokens: BOS, I' and "Question: What is the".
    base/packing.py computes those once.
    """
    size = ANSWER_BATCH if values is None else SCORE_BATCH
    order = sorted(range(len(products)), key=lambda i: len(products[i].context))
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
    cls_tokens = run.photo_features.read(photos) if run.photo_features else None
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
    examples = [example._replace(answer=encode_answer(value, model.tokenizer))
                for example, names in zip(batch, lists) for value in names]
    log_p = []
    for start in range(0, len(examples), SCORE_VALUES):  # an attribute may have hundreds of values
        log_p += model.score(examples[start:start + SCORE_VALUES], cls_tokens)
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
    write_tsv(path, map(prediction, products, answers), PREDICTED)


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
    [encoded], _ = encode_examples([example], run.model.tokenizer)
    K = len(run.photo_features.cls_layers) if run.photo_features else 0
    tokens = 1 + K * len(example.photos) + len(encoded.prompt) + len(encoded.answer)
    if tokens <= limit:
        return None
    what = "a comparison with a product as long" if compared else "its question"
    return (f"product {p.id!r}: {what} has {tokens:,} tokens with the answer {p.value[:60]!r}, more than the "
            f"{limit:,} that this LLaMA was trained to read; shorten its title: {p.title[:100]!r}…")
