"""The other approaches of Table 1, on the same data and the same frozen models:

    python -m experiments.baselines --labels 10 20 --seeds 0 1 2                             the demo world
    python -m experiments.baselines --dataset footwear --data ROOT --llama DIR --no-image --labels 10
    python -m experiments.baselines --probe RUN [RUN ...]              a run, with inputs shuffled

Extractive: no training is needed to know its ceiling, the share of test products whose text contains the
value.  No method that marks words of the text can be right more often (M-JAVE: 0.00 in the paper).
Discriminative: the idea of CMA-CLIP, a classifier over the known values of each attribute, with a
modality-wise attention that weighs photo and text.  It reads the photo's [cls] tokens from the frozen ViT and
the text's hidden states from the frozen LLaMA, so it sees what EIVEN sees.  It is not CMA-CLIP itself: that
has CLIP's text encoder, a sequence-wise attention between the two, and trains its backbones.
Generative is EIVEN itself (experiments/paper_tables.py).  DEFLATE needs T5 and a pretraining of its own.

The scores go to RUNS like those of runs, where paper_tables (Table 1) and figures (figure 4) find them.
"""

import itertools
import random
import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from base import console
from base.console import write_json
from base.packing import pack
from data import read_split, sample_labels
from evaluate import load, score
from experiments.paper_tables import new_parser, run_folder
from support.answering import Run, answers, prepare_photos
from support.config import Config, add_flags, build_model, choose_device, describe, find_sources

EPOCHS, RATE, WIDTH, DROPOUT = 60, 3e-3, 64, 0.3        # of the classifier


def extractive_ceiling(products):
    """Per cent of the products whose title or category contains the words of the value, in any case."""
    def words(text):
        return " ".join(["", *re.findall(r"\w+", text.lower()), ""])

    return 100 * sum(words(p.value) in words(p.context) for p in products) / len(products)


class Classifier(nn.Module):
    """Scores of the values of a product's attribute from the embeddings of photo and text.

    Each modality is projected to WIDTH features.  Modality-wise attention: a learned query for each attribute
    gives the modalities their weights, which sum to 1.  Then a linear layer scores the values.
    widths  of the modalities;  owner (values,): the number of the attribute that each value belongs to
    """

    def __init__(self, widths, owner):
        super().__init__()
        self.owner = owner
        self.project = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.GELU(), nn.Dropout(DROPOUT))
            for width in widths)
        self.query = nn.Parameter(torch.zeros(len(owner.unique()), WIDTH))
        self.head = nn.Linear(WIDTH, len(owner))

    def forward(self, modalities, attribute):
        """(B, width) of each modality, attribute (B,) -> (B, values); -inf: another attribute's."""
        # (B, modalities, WIDTH)
        h = torch.stack([project(x) for project, x in zip(self.project, modalities)], 1)
        weight = (h * self.query[attribute, None]).sum(-1, keepdim=True) / WIDTH ** 0.5
        h = (weight.softmax(1) * h).sum(1)                                      # (B, WIDTH)
        return self.head(h).masked_fill(self.owner != attribute[:, None], float("-inf"))


@torch.no_grad()
def embed(products, run):
    """The modalities: photos (n, K V), texts (n, D), the mean of LLaMA's last hidden states."""
    modalities = []
    prepare_photos(run, products)
    if run.photo_features:
        modalities.append(run.photo_features.read([p.image for p in products], "cpu").flatten(1))
    if run.config.text:
        llama, tokenizer = run.model.llama, run.model.tokenizer
        rows = []
        for p in products:
            tokens = pack([[tokenizer.bos_id, *tokenizer.encode(p.context)]], device=run.model.device)
            rows.append(llama(llama.embed(tokens.ids), tokens).mean(0).float().cpu())
        modalities.append(torch.stack(rows))
    return modalities


def discriminative(splits, embedded, seed):
    """Test micro-F1 of the classifier after the epoch with the best micro-F1 on val."""
    torch.manual_seed(seed)
    values = sorted({(p.attribute, p.value) for p in splits[0]})
    names = sorted({attribute for attribute, _ in values})
    attributes = [torch.tensor([names.index(p.attribute) for p in split]) for split in splits]
    target = torch.tensor([values.index((p.attribute, p.value)) for p in splits[0]])
    classifier = Classifier([x.shape[1] for x in embedded[0]],
                            torch.tensor([names.index(attribute) for attribute, _ in values]))
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=0.05)

    def micro_f1(n):
        best = classifier(embedded[n], attributes[n]).argmax(-1)
        return score(splits[n], [values[i][1] for i in best])["micro_f1"]

    scores = []                                         # of each epoch: on val, on test
    for _ in range(EPOCHS):
        classifier.train()
        for batch in torch.randperm(len(target)).split(32):
            logits = classifier([x[batch] for x in embedded[0]], attributes[0][batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, target[batch]).backward()
            optimizer.step()
        classifier.eval()
        scores.append((micro_f1(1), micro_f1(2)))
    return max(scores, key=lambda pair: pair[0])[1]


def run_baselines(config, labels, seeds, runs):
    sources = find_sources(config)
    print(describe(config, sources))
    run = Run(runs, "", config, {}, sources, *build_model(config, sources, choose_device(config.device)))
    train, val, test = (read_split(sources.data, config.dataset, name) for name in ("train", "val", "test"))
    for count, seed in itertools.product(labels, seeds):
        number = None if count == "all" else int(count)
        splits = sample_labels(train, number, seed), sample_labels(val, number, seed), test
        f1 = discriminative(splits, [embed(split, run) for split in splits], seed)
        ceiling = extractive_ceiling(test)
        print(f"{count} labels, seed {seed}: micro-F1 {f1:.1f} on the test split, n = {len(test)}; "
              f"extractive at most {ceiling:.2f}", flush=True)
        for row, micro_f1 in (("extractive", ceiling), ("discriminative", f1)):
            write_json(run_folder(runs, config.dataset, row, count, seed) / "metrics.json",
                       {"micro_f1": micro_f1, "n": len(test), "sources": describe(config, sources)})


def shuffled(products, *fields):
    """The products, with these fields taken from another product of the same attribute."""
    others = random.Random(0).sample(products, len(products))
    pairs = zip(*(sorted(order, key=lambda p: p.attribute) for order in (products, others)))
    return [replace(p, **{field: getattr(other, field) for field in fields}) for p, other in pairs]


def probe(folder):
    """Print what a run scores on its test split, and what is left if photos, or texts, are shuffled."""
    run = load(folder, data_needed=True)
    test = read_split(run.sources.data, run.config.dataset, "test")
    prepare_photos(run, test)
    for name, products in {"the run itself": test, "photos shuffled": shuffled(test, "image"),
                           "titles and categories shuffled": shuffled(test, "title", "category")}.items():
        f1 = score(products, [answer.value for answer in answers(run, products)])["micro_f1"]
        print(f"{folder}, {name}: micro-F1 {f1:.2f}, test split, n = {len(test)}", flush=True)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--probe", nargs="+", default=[], metavar="RUN", help="shuffle runs' inputs instead")
    add_flags(parser, ("dataset", "data", "llama", "vit", "demo", "image", "text", "device", "dtype"))
    flags = vars(parser.parse_args())
    labels, seeds, runs, probed = (flags.pop(name) for name in ("labels", "seeds", "runs", "probe"))
    for folder in probed:
        probe(folder)
    if not probed:
        run_baselines(Config(**flags), labels, seeds, runs)


if __name__ == "__main__":
    console.run(main)
