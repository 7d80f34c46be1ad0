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
from functools import partial
from itertools import product

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


def answer(method, train, test):
    """A method's answers for the products of test, whose attributes all stand in train.

    method(labelled, target, asked)  gives the scores (asked, values) of one attribute.  labelled and asked
    are its products in train and test, target (labelled,) the indices of the right values.
    """
    answers = {}
    for attribute, values in values_of(train).items():
        labelled, asked = ([p for p in split if p.attribute == attribute] for split in (train, test))
        target = torch.tensor([values.index(p.value) for p in labelled])
        for p, scores in zip(asked, method(labelled, target, asked)):
            answers[p] = values[scores.argmax()]
    return [answers[p] for p in test]


# ---------------------------------------------------------------------------------------- bag of words


def tf_idf(labelled, asked):
    """Two lists of texts as rows (texts, words): a word's count times its weight, scaled to length 1.

    The words, and their weights ln((1 + texts) / (1 + texts that have the word)) + 1, come from `labelled`.
    """
    vocabulary = sorted({word for text in labelled for word in words(text)})

    def count(texts):
        counts = [[row.count(word) for word in vocabulary] for row in map(words, texts)]
        return torch.tensor(counts, dtype=torch.float64)

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


def bag_of_words(labelled, target, asked):
    x, x_asked = tf_idf([p.context for p in labelled], [p.context for p in asked])
    weight = logistic_regression(x, target)
    return x_asked @ weight[:-1] + weight[-1]


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
    """{product: its modalities}: photo (K V,), and text (D,), the mean of LLaMA's last hidden states."""
    prepare_photos(run, products)
    llama, tokenizer = run.model.llama, run.model.tokenizer
    embedded = {}
    with Progress("embedding", len(products), "products") as progress:
        for p in products:
            embedded[p] = []
            if run.photo_features:
                embedded[p].append(run.photo_features.read([p.image]).flatten())
            if run.config.text:
                tokens = pack([[tokenizer.bos_id, *tokenizer.encode(p.context)]], device=run.model.device)
                embedded[p].append(llama(llama.embed(tokens.ids), tokens).mean(0).float().cpu())
            progress.step()
    return embedded


def discriminative(labelled, target, asked, embedded, seed):
    """A method for `answer`.  embedded: what `embed` gives for all these products."""
    x, x_asked = ([torch.stack(modality) for modality in zip(*(embedded[p] for p in products))]
                  for products in (labelled, asked))
    torch.manual_seed(seed)
    classifier = Classifier([modality.shape[1] for modality in x], target.max() + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=0.05)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(target)).split(32):
            logits = classifier([modality[batch] for modality in x])
            optimizer.zero_grad()
            F.cross_entropy(logits, target[batch]).backward()
            optimizer.step()
    return classifier.eval()(x_asked)


# ---------------------------------------------------------------------------------------- the command


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--words-only", action="store_true", help="the bag of words alone, without a LLaMA")
    add_flags(parser, ("dataset", "data", "llama", "vit", "demo", "image", "text", "device", "dtype"))
    flags = vars(parser.parse_args())
    labels, seeds, runs, words_only = (flags.pop(name) for name in ("labels", "seeds", "runs", "words_only"))
    config = Config(**flags)
    if words_only:
        config.image = False
        if config.data or DATA.exists():
            config.llama = "demo"                       # this one is always there; it is not loaded
    sources = find_sources(config)
    used = describe(config, sources)
    if words_only:
        used = used.split(";")[0]                       # the data
    print(used, flush=True)
    train, test = (read_split(sources.data, config.dataset, split) for split in ("train", "test"))
    if not words_only:
        run = Run(runs, "", config, {}, sources, *build_model(config, sources, choose_device(config.device)))
        embedded_test = embed(test, run)
    for count, seed in product(labels, seeds):
        labelled = sample_labels(train, count, seed)
        methods = {"bag-of-words": bag_of_words}
        if not words_only:
            embedded = embedded_test | embed(labelled, run)
            methods["discriminative"] = partial(discriminative, embedded=embedded, seed=seed)
        f1s = {row: score(test, answer(method, labelled, test))["micro_f1"]
               for row, method in methods.items()}
        for row, f1 in [("extractive", extractive_ceiling(test)), *f1s.items()]:
            print(f"{config.dataset}, {count or 'all'} labels, seed {seed}, {row}: micro-F1 {f1:.2f}, "
                  f"test split, n = {len(test)}", flush=True)
            write_json(run_folder(runs, config.dataset, row, count, seed) / "metrics.json",
                       {"micro_f1": f1, "n": len(test), "sources": used})


if __name__ == "__main__":
    console.run(main)
