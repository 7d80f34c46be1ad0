"""Probes that keep the demo world honest:  python -m experiments.probes RUN [RUN ...]

What a run of the full method scores on its test split is set beside what less should not reach: a nearest neighbour on
the ViT's features alone, a bag of words on the texts alone (both know the same labelled products), and the run itself
when photos, or texts, are shuffled among the test products of an attribute.
"""

import argparse
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F

from base import console
from base.console import UserError
from data import read_split, sample_labels
from evaluate import score
from support.answering import answers, load, prepare_photos

SHUFFLE_SEED = 0


def nearest_neighbour(photo_features, known, queries):
    """For each product of `queries`, the value of the `known` product with the same attribute and the nearest photo.

    Distance: cosine between all [cls] tokens side by side, each number standardised over the known products.
    """
    x = photo_features.read([p.image for p in known], "cpu").flatten(1)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = F.normalize((x - mean) / std, dim=1)
    y = F.normalize((photo_features.read([p.image for p in queries], "cpu").flatten(1) - mean) / std, dim=1)
    other = torch.tensor([[k.attribute != a.attribute for k in known] for a in queries])
    return [known[i].value for i in (y @ x.T).masked_fill(other, -2).argmax(1)]


def bag_of_words(known, queries):
    """Naive Bayes on the words of title and category, add-one smoothed, among the values of the attribute."""
    words, total, vocabulary = defaultdict(Counter), Counter(), set()
    for p in known:
        words[p.attribute, p.value].update(p.context.lower().split())
        vocabulary.update(p.context.lower().split())
        total[p.attribute, p.value] += 1

    def log_p(p, value):
        counts = words[p.attribute, value]
        size = sum(counts.values()) + len(vocabulary)
        return math.log(total[p.attribute, value]) + sum(math.log((counts[w] + 1) / size) for w in p.context.lower().split())

    return [max((v for a, v in words if a == p.attribute), key=lambda v: log_p(p, v)) for p in queries]


def shuffled(products, *fields):
    """The products, with these fields taken from another product of the same attribute."""
    rng, same = random.Random(SHUFFLE_SEED), defaultdict(list)
    for i, p in enumerate(products):
        same[p.attribute].append(i)
    out = list(products)
    for places in same.values():
        others = places[:]
        rng.shuffle(others)
        for i, j in zip(places, others):
            out[i] = replace(products[i], **{f: getattr(products[j], f) for f in fields})
    return out


def probe(folder):
    """({probe: micro-F1} on the test split, how many products that is, the run)."""
    run = load(folder, data_needed=True)
    config, data = run.config, run.sources.data
    if not (config.image and config.text):
        raise UserError(f"{folder}: was trained without photos or without texts; the probes are for runs of the full method")
    known = sample_labels(read_split(data, config.dataset, "train"), config.labels, config.seed)
    test = read_split(data, config.dataset, "test")
    prepare_photos(run, known)
    prepare_photos(run, test)

    def f1(predictions):
        return score(test, predictions)["micro_f1"]

    def answered(products):
        return f1([answer.value for answer in answers(run, products)])

    return {
        "the run itself": answered(test),
        "nearest neighbour on the ViT's features": f1(nearest_neighbour(run.photo_features, known, test)),
        "bag of words on title and category": f1(bag_of_words(known, test)),
        "the run, photos shuffled": answered(shuffled(test, "image")),
        "the run, titles and categories shuffled": answered(shuffled(test, "title", "category")),
    }, len(test), run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of the full method")
    for folder in parser.parse_args().runs:
        results, n, run = probe(folder)
        print(f"{folder}: micro-F1 on the test split, n = {n}, {run.config.labels or 'all'} labels, seed {run.config.seed}")
        for name, value in results.items():
            print(f"  {name:42} {value:6.2f}")


if __name__ == "__main__":
    console.run(main)
