"""The other approaches of Table 1, on the same data and the same frozen models:

    python -m experiments.baselines --labels 10 20 --seeds 0 1 2                             the demo world
    python -m experiments.baselines --dataset footwear --data ROOT --llama DIR --no-image --labels 10 --seeds 0 1 2

Extractive      No training is needed to know its ceiling: the share of test products whose text contains the value.  No
                method that marks words of the text can be right more often (M-JAVE: 0.00 in the paper).
Discriminative  The idea of CMA-CLIP: a classifier over the known values of each attribute, with a modality-wise attention
                that weighs photo and text.  It reads the photo's [cls] tokens from the frozen ViT and the text's hidden
                states from the frozen LLaMA, so it sees what EIVEN sees.  It is not CMA-CLIP itself: that has CLIP's text
                encoder, a sequence-wise attention between the two, and trains its backbones.
Generative      is EIVEN itself: experiments/paper_tables.py.  DEFLATE needs T5 and its own pretraining, and is not here.

The scores are written to RUNS/DATASET-baselines.json, where paper_tables (Table 1) and figures (figure 4) find them.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from base import console
from base.checkpoint import read_json
from base.console import Progress, write_text
from base.packing import pack
from data import read_split, sample_labels, values_of
from demo import world
from evaluate import score
from support.config import PROJECT, Config, add_flags, build_model, choose_device, describe, find_sources

EPOCHS, RATE, WIDTH, DROPOUT = 60, 3e-3, 64, 0.3


def extractive_ceiling(products):
    """Per cent of the products whose title or category contains the words of the value, in any case."""
    def words(text):
        return " ".join(["", *re.findall(r"\w+", text.lower()), ""])

    return 100 * sum(words(p.value) in words(p.context) for p in products) / len(products)


class Classifier(nn.Module):
    """softmax over the values of an attribute from the embeddings of photo and text.

    Each modality is projected to WIDTH features.  Modality-wise attention: a learned query for each attribute gives the
    modalities their weights, which sum to 1.  Then one linear layer for each attribute.
    """

    def __init__(self, widths, values):
        super().__init__()
        self.attributes = list(values)
        self.project = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.GELU(), nn.Dropout(DROPOUT))
                                     for width in widths)
        self.query = nn.Parameter(torch.zeros(len(values), WIDTH))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(known)) for known in values.values())

    def forward(self, modalities, attribute):
        """modalities: a list of (B, width), all of products with this attribute -> logits (B, values)"""
        a = self.attributes.index(attribute)
        h = torch.stack([project(x) for project, x in zip(self.project, modalities)], 1)       # (B, modalities, WIDTH)
        weight = (h @ self.query[a] / WIDTH ** 0.5).softmax(1)                  # (B, modalities)
        return self.heads[a]((weight[..., None] * h).sum(1))


@torch.no_grad()
def embed(products, model, photo_features, config):
    """One tensor for each modality: photos (n, K V), texts (n, D), the mean of LLaMA's last hidden states."""
    found = []
    if photo_features:
        photo_features.prepare(p.image for p in products)
        found.append(photo_features.read([p.image for p in products], "cpu").flatten(1))
    if config.text:
        rows = []
        with Progress("reading texts", len(products), "products") as progress:
            for start in range(0, len(products), 64):
                some = products[start:start + 64]
                ids = [[model.tokenizer.bos_id, *model.tokenizer.encode(p.context)] for p in some]
                lengths = [len(each) for each in ids]
                tokens = pack(ids, lengths, model.device)
                h = model.llama(model.llama.embed(tokens.ids), tokens).float().cpu()
                rows += [part.mean(0) for part in h.split(lengths)]
                progress.step(len(some))
        found.append(torch.stack(rows))
    return found


def by_attribute(products):
    indices = defaultdict(list)
    for i, p in enumerate(products):
        indices[p.attribute].append(i)
    return {attribute: torch.tensor(found) for attribute, found in indices.items()}


def predict(classifier, x, products, values):
    classifier.eval()
    found = [""] * len(products)
    with torch.no_grad():
        for attribute, indices in by_attribute(products).items():
            best = classifier([m[indices] for m in x], attribute).argmax(-1).tolist()
            for i, b in zip(indices.tolist(), best):
                found[i] = values[attribute][b]
    return found


def discriminative(splits, embedded, seed):
    """Test predictions of the classifier after the epoch with the best micro-F1 on val."""
    train, val, test = splits
    values = values_of(train)
    torch.manual_seed(seed)
    classifier = Classifier([x.shape[1] for x in embedded[0]], values)
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=0.05)
    target = torch.tensor([values[p.attribute].index(p.value) for p in train])
    best = -1.0, None
    for _ in range(EPOCHS):
        classifier.train()
        for attribute, indices in by_attribute(train).items():
            for batch in indices[torch.randperm(len(indices))].split(32):
                loss = F.cross_entropy(classifier([m[batch] for m in embedded[0]], attribute), target[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        f1 = score(val, predict(classifier, embedded[1], val, values))["micro_f1"]
        if f1 > best[0]:
            best = f1, predict(classifier, embedded[2], test, values)
    return best[1]


def baselines_file(runs, dataset):
    return runs / f"{dataset}-baselines.json"


def read_baselines(runs, dataset):
    """{"extractive": ceiling in per cent or None, "discriminative": {labels: micro-F1 of each seed}} as this command left them."""
    path = baselines_file(runs, dataset)
    return read_json(path, "scores of baselines") if path.exists() else {"extractive": None, "discriminative": {}}


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.baselines", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--labels", nargs="+", default=["10"], metavar="N|all", help="labelled products for each value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "tables", help="folder of paper_tables' runs")
    add_flags(parser, ("dataset", "data", "llama", "vit", "demo", "image", "text", "device", "dtype"))
    given = vars(parser.parse_args())
    labels, seeds, runs = given.pop("labels"), given.pop("seeds"), given.pop("runs")
    config = Config(**given)
    sources = find_sources(config)
    print(describe(config, sources))
    model, photo_features = build_model(config, sources, choose_device(config.device))
    test = list(read_split(sources.data, config.dataset, "test"))
    found = read_baselines(runs, config.dataset)
    found["extractive"] = extractive_ceiling(test)
    print(f"extractive, ceiling: {found['extractive']:.2f} % of {len(test)} test products contain their value")
    cells = []
    for count in labels:
        scores = []
        for seed in seeds:
            number = None if count == "all" else int(count)
            splits = [list(sample_labels(read_split(sources.data, config.dataset, split), number, seed))
                      for split in ("train", "val")] + [test]
            if config.demo and not config.data and config.image:
                world.draw_photos(sources.data, [p.image for split in splits for p in split])
            embedded = [embed(split, model, photo_features, config) for split in splits]
            scores.append(score(test, discriminative(splits, embedded, seed))["micro_f1"])
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        cells.append(f"{statistics.mean(scores):.1f}{spread} ({len(scores)})")
        found["discriminative"][count] = scores
        write_text(baselines_file(runs, config.dataset), json.dumps(found, indent=2) + "\n")
    print(f"discriminative, micro-F1 in per cent, test split, n = {len(test)}, mean ± standard deviation (seeds)\n"
          f"| labels | {' | '.join(labels)} |\n|---|{'---|' * len(labels)}\n| classifier | {' | '.join(cells)} |")


if __name__ == "__main__":
    console.run(main)
