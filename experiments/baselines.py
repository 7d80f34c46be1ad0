"""A bag of words, and the other approaches of Table 1 on the same data and the same frozen models:

    python -m experiments.baselines --labels 10 20 --seeds 0 1 2                             the demo world
    python -m experiments.baselines --dataset footwear --data ROOT --llama DIR --no-image --labels 10
    python -m experiments.baselines --dataset footwear --data ROOT --words-only              without a LLaMA

Bag of words: TF-IDF of the words of title and category, and one logistic regression for each attribute.  It
sees the same labelled products as the others.  Its settings are fixed, so it needs no val split.
Extractive: no training is needed to know its ceiling, the share of test products whose text contains the
value.  No method that marks words of the text can be right more often (M-JAVE: 0.00 in the paper).
Discriminative: the idea of CMA-CLIP, a classifier over the known values of each attribute, with a
modality-wise attention that weighs photo and text.  It reads the photo's [cls] tokens from the frozen ViT and
the text's hidden states from the frozen LLaMA, so it sees what EIVEN sees.  It is not CMA-CLIP itself: that
has CLIP's text encoder, a sequence-wise attention between the two, and trains its backbones.
Generative is EIVEN itself (experiments/paper_tables.py).  DEFLATE needs T5 and a pretraining of its own.

The scores go to RUNS like those of runs, where paper_tables (Table 1) and figures (figure 4) find them.
"""

import re
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from base import console
from base.console import Progress, write_json
from base.packing import pack
from data import read_split, sample_labels, values_of
from evaluate import score
from experiments.paper_tables import new_parser, run_folder
from support.answering import prepare_photos
from support.config import DATA, Config, add_flags, build_model, choose_device, describe, find_sources
from support.run import Run

EPOCHS, RATE, WIDTH, DROPOUT = 60, 3e-3, 64, 0.3        # of the classifier
C = 1                                                   # weight of the cross-entropy in a bag of words


def words(text):
    return re.findall(r"\w+", text.lower())


def extractive_ceiling(products):
    """Per cent of the products whose title or category contains the words of the value, in any case."""
    def joined(text):
        return f" {' '.join(words(text))} "

    return 100 * sum(joined(p.value) in joined(p.context) for p in products) / len(products)


def answer(train, test, scores_of):
    """The answers for the products of test, whose attributes all stand in train, attribute by attribute.

    scores_of(labelled, target, asked)  gives the scores (asked, values) of one attribute.  labelled and asked
    are indices in train and test, target (labelled,) those of the right values.
    """
    best = [""] * len(test)
    for attribute, values in values_of(train).items():
        labelled, asked = ([i for i, p in enumerate(split) if p.attribute == attribute]
                           for split in (train, test))
        target = torch.tensor([values.index(train[i].value) for i in labelled])
        for i, scores in zip(asked, scores_of(labelled, target, asked)):
            best[i] = values[scores.argmax()]
    return best


# ---------------------------------------------------------------------------------------- bag of words


def tf_idf(labelled, asked):
    """Two lists of texts as rows (texts, words): a word's count times its weight, scaled to length 1.

    The words, and their weights ln((1 + texts) / (1 + texts that have the word)) + 1, come from `labelled`.
    """
    vocabulary = sorted({word for text in labelled for word in words(text)})

    def count(texts):
        counts = [Counter(words(text)) for text in texts]
        return torch.tensor([[n[word] for word in vocabulary] for n in counts], dtype=torch.float64)

    x = count(labelled)
    idf = ((1 + len(x)) / (1 + (x > 0).sum(0))).log() + 1
    return F.normalize(x * idf), F.normalize(count(asked) * idf)


def logistic_regression(x, target):
    """weight (words + 1, values) that minimises C * cross-entropy (a sum) + |weight|² / 2.

    x (texts, words);  target (texts,): indices of the right values
    The last row of weight is the bias, and is left out of |weight|².
    """
    weight = torch.zeros(x.shape[1] + 1, target.max() + 1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        cross_entropy = F.cross_entropy(x @ weight[:-1] + weight[-1], target, reduction="sum")
        value = C * cross_entropy + weight[:-1].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def bag_of_words(train, test):
    def scores_of(labelled, target, asked):
        x, x_asked = tf_idf([train[i].context for i in labelled], [test[i].context for i in asked])
        weight = logistic_regression(x, target)
        return x_asked @ weight[:-1] + weight[-1]

    return answer(train, test, scores_of)


# ---------------------------------------------------------------------------------------- the classifier


class Classifier(nn.Module):
    """Scores of an attribute's values from the embeddings of photo and text.

    Each modality is projected to WIDTH features.  Modality-wise attention: a learned query gives the
    modalities their weights, which sum to 1.  Then a linear layer scores the values.
    """

    def __init__(self, widths, values):
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.GELU(), nn.Dropout(DROPOUT))
            for width in widths)
        self.query = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, values)

    def forward(self, modalities):
        """(B, width) of each modality -> (B, values)"""
        # (B, modalities, WIDTH)
        h = torch.stack([project(x) for project, x in zip(self.project, modalities)], 1)
        weight = (h @ self.query / WIDTH ** 0.5).softmax(1)                     # (B, modalities)
        return self.head((weight[:, None] @ h)[:, 0])


@torch.no_grad()
def embed(products, run):
    """The modalities: photos (n, K V), texts (n, D), the mean of LLaMA's last hidden states."""
    modalities = []
    prepare_photos(run, products)
    if run.photo_features:
        modalities.append(run.photo_features.read([p.image for p in products]).flatten(1))
    if run.config.text:
        llama, tokenizer = run.model.llama, run.model.tokenizer
        rows = []
        with Progress("texts read", len(products), "texts") as progress:
            for p in products:
                tokens = pack([[tokenizer.bos_id, *tokenizer.encode(p.context)]], device=run.model.device)
                rows.append(llama(llama.embed(tokens.ids), tokens).mean(0).float().cpu())
                progress.step()
        modalities.append(torch.stack(rows))
    return modalities


def discriminative(train, embedded, test, embedded_test, seed):
    """The classifier's answers for test.  embedded, embedded_test: what `embed` gives for train and test."""
    def scores_of(labelled, target, asked):
        torch.manual_seed(seed)
        classifier = Classifier([x.shape[1] for x in embedded], target.max() + 1)
        optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=0.05)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(target)).split(32):
                logits = classifier([x[labelled][batch] for x in embedded])
                optimizer.zero_grad()
                F.cross_entropy(logits, target[batch]).backward()
                optimizer.step()
        return classifier.eval()([x[asked] for x in embedded_test])

    return answer(train, test, scores_of)


# ---------------------------------------------------------------------------------------- the command


def run_baselines(config, labels, seeds, runs, words_only):
    sources = find_sources(config)
    used = describe(config, sources)
    if words_only:
        used = used.split(";")[0]                       # the data
    train, test = (read_split(sources.data, config.dataset, split) for split in ("train", "test"))
    samples = {(count, seed): sample_labels(train, count, seed) for count in labels for seed in seeds}

    def report(row, count, seed, micro_f1):
        print(f"{config.dataset}, {count or 'all'} labels, seed {seed}, {row}: micro-F1 {micro_f1:.2f}, "
              f"test split, n = {len(test)}", flush=True)
        write_json(run_folder(runs, config.dataset, row, count, seed) / "metrics.json",
                   {"micro_f1": micro_f1, "n": len(test), "sources": used})

    print(used)
    for task, labelled in samples.items():              # what needs no model comes first
        report("extractive", *task, extractive_ceiling(test))
        report("bag-of-words", *task, score(test, bag_of_words(labelled, test))["micro_f1"])
    if words_only:
        return
    run = Run(runs, "", config, {}, sources, *build_model(config, sources, choose_device(config.device)))
    embedded_test = embed(test, run)
    for task, labelled in samples.items():
        answers = discriminative(labelled, embed(labelled, run), test, embedded_test, seed=task[1])
        report("discriminative", *task, score(test, answers)["micro_f1"])


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--words-only", action="store_true", help="the bag of words alone, without a LLaMA")
    add_flags(parser, ("dataset", "data", "llama", "vit", "demo", "image", "text", "device", "dtype"))
    flags = vars(parser.parse_args())
    labels, seeds, runs, words_only = (flags.pop(name) for name in ("labels", "seeds", "runs", "words_only"))
    config = Config(**flags)
    if words_only:                                      # the demo's LLaMA is always there; it is not loaded
        demo = config.demo or not (config.data or DATA.exists())
        config = replace(config, image=False, llama="demo", demo=demo)
    run_baselines(config, labels, seeds, runs, words_only)


if __name__ == "__main__":
    console.run(main)
