"""Probes that keep the demo world honest:  python demo_probes.py RUN [RUN ...]

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

import console
from console import UserError
from data import read_split, sample_labels
from evaluate import answer, load_run, prepare_photos, score

SHUFFLE_SEED = 0


def nearest_neighbour(features, known, asked):
    """For each of the products `asked`, the value of the `known` one with the same attribute and the nearest photo.

    Distance: cosine between all [cls] tokens side by side, each number standardised over the known products.
    """
    x = features.read([p.image for p in known], "cpu").flatten(1)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = F.normalize((x - mean) / std, dim=1)
    y = F.normalize((features.read([p.image for p in asked], "cpu").flatten(1) - mean) / std, dim=1)
    other = torch.tensor([[k.attribute != a.attribute for k in known] for a in asked])
    return [known[i].value for i in (y @ x.T).masked_fill(other, -2).argmax(1)]


def bag_of_words(known, asked):
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

    return [max((v for a, v in words if a == p.attribute), key=lambda v: log_p(p, v)) for p in asked]


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


def probe(run):
    """{probe: micro-F1} on the test split, and how many products that is."""
    model, features, config, sources, _ = load_run(run, {})
    if not (config.image and config.text):
        raise UserError(f"{run}: was trained without photos or without texts; the probes are for runs of the full method")
    known = sample_labels(read_split(sources.data, config.dataset, "train"), config.labels, config.seed)
    test = read_split(sources.data, config.dataset, "test")
    prepare_photos(features, [known, test], config, sources)

    def f1(values):
        return score(test, [(value, 1.0) for value in values])["micro_f1"]

    def asked(products):
        return score(test, answer(model, features, products, config))["micro_f1"]

    return {
        "the run itself": asked(test),
        "nearest neighbour on the ViT's features": f1(nearest_neighbour(features, known, test)),
        "bag of words on title and category": f1(bag_of_words(known, test)),
        "the run, photos shuffled": asked(shuffled(test, "image")),
        "the run, titles and categories shuffled": asked(shuffled(test, "title", "category")),
    }, len(test), config


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of the full method")
    for run in parser.parse_args().runs:
        results, n, config = probe(run)
        print(f"{run}: micro-F1 on the test split, n = {n}, {config.labels or 'all'} labels, seed {config.seed}")
        for name, value in results.items():
            print(f"  {name:42} {value:6.2f}")


if __name__ == "__main__":
    console.run(main)
