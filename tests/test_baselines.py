"""The baselines: the ceiling by hand, and a classifier that learns what only one modality tells."""

import pytest
import torch

from data import Product
from experiments.baselines import Classifier, discriminative, extractive_ceiling


def product(i, value, title="", attribute="Shape"):
    return Product(f"P{i}", "", "Jewelry", title, attribute, value)


def test_the_extractive_ceiling_counts_whole_words():
    titles = ["a ROUND box", "surround box", "a box, round", "polka-dot dress", "polka dress dot"]
    values = ["Round", "Round", "Round", "Polka Dot", "Polka Dot"]
    assert extractive_ceiling([product(i, v, t) for i, (v, t) in enumerate(zip(values, titles))]) == pytest.approx(60)
    assert extractive_ceiling([product(0, "Jewelry")]) == 100


def test_modality_weights_sum_to_one_and_each_attribute_has_its_own_head():
    values = {"Shape": ["Heart", "Round"], "Material": ["Leather", "Metal", "Wool"]}
    classifier = Classifier([5, 7], values)
    modalities = [torch.randn(4, 5), torch.randn(4, 7)]
    assert classifier(modalities, "Shape").shape == (4, 2) and classifier(modalities, "Material").shape == (4, 3)
    assert sum(p.numel() for head in classifier.heads for p in head.parameters()) == 65 * 5


def test_the_classifier_learns_from_the_modality_that_tells():
    """The photo tells the value of Shape, the text that of Material; the other modality is noise."""
    draw = torch.Generator().manual_seed(0)

    def split(n):
        products, photo, text = [], torch.randn(2 * n, 6, generator=draw), torch.randn(2 * n, 6, generator=draw)
        for i in range(2 * n):
            attribute, modality, values = ("Shape", photo, ("Heart", "Round")) if i % 2 else ("Material", text, ("Metal", "Wool"))
            value = values[i // 2 % 2]
            modality[i, 0] += 6 if value == values[0] else -6
            products.append(product(i, value, attribute=attribute))
        return products, [photo, text]

    splits, embedded = zip(*(split(n) for n in (20, 10, 40)))
    right = [p.value == said for p, said in zip(splits[2], discriminative(splits, embedded, seed=0))]
    assert sum(right) / len(right) > 0.95
