"""Answer and score: a run on a split, one product, or a file of products.

    python evaluate.py RUN                                       score on the test split again
    python evaluate.py RUN --image shoe.jpg --text "…" --attribute "Boot Style"
    python evaluate.py RUN --input products.tsv --output predictions.tsv
"""

import argparse
import csv
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

import console
import demo
from config import add_flags, build_model, check_weights, choose_device, describe, find_sources, read_run
from console import Progress, UserError, whole_file, write_text
from data import (COLUMNS, Product, Products, answer_ids, base_question, comparison, fingerprint, read_split, rows_of,
                  sample_labels)
from eiven import TEMPERATURE, TOP_P, export, export_readme, taps
from report import confusion_file, confusion_png, report_html

ANSWER_BATCH = 64                                       # products answered together
SORTED_TOGETHER = 4096                                  # products in memory as rows, and answered in order of length


# ------------------------------------------------------------------------------------------------ answering


def answers_to(model, features, products, config, temperature=TEMPERATURE, top_p=TOP_P, values=None, what="answering"):
    """Yield (answer, probability) for each of the products, in their order; some thousand are in work at a time.

    values  {attribute: allowed answers} to choose from, or None for free text.  The answers do not depend on how
    products are batched: they are sorted by length only to save work, and each draws from a generator of its own.
    """
    with Progress(what, len(products), "products") as progress:
        for first in range(0, len(products), SORTED_TOGETHER):
            some = products[first:first + SORTED_TOGETHER]
            answers = [None] * len(some)
            rows, photos = rows_of([base_question(p, config.text) for p in some], model.tokenizer, config.image)
            order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
            for start in range(0, len(order), ANSWER_BATCH):
                batch = order[start:start + ANSWER_BATCH]
                names = list(dict.fromkeys(photos[p] for i in batch for p in rows[i].photos))
                place = {name: k for k, name in enumerate(names)}
                found = model.generate(
                    [rows[i]._replace(photos=tuple(place[photos[p]] for p in rows[i].photos)) for i in batch],
                    features.read(names, model.device) if features else None,
                    [f"answer {config.seed} {some[i].id} {some[i].attribute}" for i in batch],
                    temperature, top_p,
                    allowed=values and [[answer_ids(v, model.tokenizer) for v in values[some[i].attribute]] for i in batch])
                for i, (ids, probability) in zip(batch, found):
                    answers[i] = model.tokenizer.decode(ids).strip(), probability
                progress.step(len(batch))
            yield from answers


def answer(*args, **how):
    """The list of what `answers_to` yields."""
    return list(answers_to(*args, **how))


# ------------------------------------------------------------------------------------------------ scoring


def exact_match(prediction, gold):
    """Section 4.1: the full sequence of words is required; white space around it does not count, case does."""
    return prediction.strip() == gold.strip()


def micro_f1(pairs):
    """Scores of (prediction, gold) pairs as a dict; shares in per cent.

    precision = right / non-empty predictions, recall = right / all, micro_f1 = their harmonic mean, all from totals:
    an empty prediction is no prediction.  implicitave is the scorer of the authors' later data set: the gold value
    is a part of the prediction, both in lower case.
    """
    right = sum(exact_match(p, g) for p, g in pairs)
    answered = sum(bool(p.strip()) for p, g in pairs)
    loose = sum(g.strip().lower() in p.lower() for p, g in pairs)
    n = len(pairs)
    precision, recall = 100 * right / max(answered, 1), 100 * right / max(n, 1)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"micro_f1": f1, "precision": precision, "recall": recall, "n": n, "right": right, "answered": answered,
            "implicitave": 100 * loose / max(n, 1)}


def score(products, answers):
    """micro_f1 over all products, and under `attributes` the same for each attribute."""
    pairs = defaultdict(list)
    for product, (prediction, _) in zip(products, answers):
        pairs[product.attribute].append((prediction, product.value))
    metrics = micro_f1([pair for same in pairs.values() for pair in same])
    metrics["attributes"] = {attribute: micro_f1(same) for attribute, same in sorted(pairs.items())}
    return metrics


def table(metrics):
    """The scores as lines of text, an attribute a line."""
    width = max(len(a) for a in [*metrics["attributes"], "all (micro)"])
    lines = [f"{'attribute':{width}}  micro-F1  precision  recall      n"]
    for name, m in [*metrics["attributes"].items(), ("all (micro)", metrics)]:
        lines.append(f"{name:{width}}  {m['micro_f1']:8.2f}  {m['precision']:9.2f}  {m['recall']:6.2f}  {m['n']:5}")
    return "\n".join(lines)


def write_results(folder, title, products, answers, metrics, images=None):
    """metrics.json, predictions.tsv, a confusion matrix an attribute and report.html, each whole, into `folder`."""
    write_predictions(folder / "predictions.tsv", zip(products, answers))
    counts = defaultdict(Counter)                       # attribute -> how often (gold, answer)
    for p, (prediction, _) in zip(products, answers):
        counts[p.attribute][p.value, prediction] += 1
    for attribute in metrics["attributes"]:
        with whole_file(folder / confusion_file(attribute)) as partial:
            confusion_png(f"{attribute}: {title}", counts[attribute]).save(partial, format="png")
    write_text(folder / "report.html", report_html(title, products, answers, metrics, images))
    # Last: where it stands, the rest is whole.
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def write_predictions(path, answered):
    """Products and their answers as TSV: the data set's columns, then prediction and probability."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        lines.writerow([*COLUMNS, "prediction", "probability"])
        for p, (prediction, probability) in answered:
            lines.writerow([p.id, p.image, p.category, p.title, p.attribute, p.value, prediction, f"{probability:.4f}"])


def evaluate(model, features, products, config, sources, split, folder, merged=False, **how):
    """Answer the products of a split, score them, write the results into `folder`, print the table; the metrics.

    merged  whether the adapters were folded in (said in the results);  how  temperature, top_p, values: as for `answer`
    """
    start = time.monotonic()
    answers = answer(model, features, products, config, what=f"answering {split}", **how)
    metrics = score(products, answers)
    settings = {"temperature": TEMPERATURE, "top_p": TOP_P, **{k: v for k, v in how.items() if k != "values"}}
    metrics.update(split=split, dataset=config.dataset, labels=config.labels or "all", seed=config.seed,
                   constrained=how.get("values") is not None, merged=merged, dtype=str(model.llama.embed_tokens.weight.dtype),
                   sources=describe(config, sources),
                   seconds=round(time.monotonic() - start, 1), **settings)
    title = f"{config.dataset}, {split} split, {config.labels or 'all'} labels a value, seed {config.seed}"
    write_results(folder, title, products, answers, metrics, sources.data / "images" if config.image else None)
    print(f"\n{title}, n = {metrics['n']}\n{table(metrics)}")
    print(f"gold value inside the answer (ImplicitAVE's scorer): {metrics['implicitave']:.2f}")
    return metrics


# ------------------------------------------------------------------------------------------------ the command


def load_run(run, given, data_needed=True):
    """(model, features, config, sources, raw config) of a finished run.

    given        flags that replace the saved ones
    data_needed  whether anything will be read from the data's folder
    """
    config, raw = read_run(run)
    for name, value in given.items():
        setattr(config, name, value)
    trained = Path(run) / "adapter.safetensors"
    if not trained.exists():
        raise UserError(f"{run}: the training of this run has not ended; go on with: python train.py --resume {run}")
    sources = find_sources(config, data_needed)
    check_weights(run, raw, sources)
    model, features = build_model(config, sources, choose_device(config.device))
    model.load(trained)
    return model, features, config, sources, raw


def prepare_photos(features, products, config, sources):
    """Features of the photos of these lists of products; the demo world draws the photos first."""
    if config.demo and not config.data:
        demo.draw_photos(sources.data, [p.image for some in products for p in some])
    features.prepare(p.image for some in products for p in some)


def check_lengths(model, features, products, config, compared=False):
    """UserError before any work if a product's question is longer than LLaMA can read, with its answer.

    compared  whether a question may hold two products; then each must fit with another as long as itself
    """
    most = model.llama.config.max_position_embeddings
    photos = 0 if features is None else 1 if features.single else len(taps(features.vit.config.num_hidden_layers))
    with Progress("lengths", len(products), "products") as progress:
        for p in products:
            progress.step()
            if 3 * (len(p.context.encode()) + len(p.attribute.encode()) + len(p.value.encode())) + 200 < most:
                continue                                # no piece is shorter than a byte: this cannot be too long
            example = comparison(p, p, config.lbc, config.text) if compared else base_question(p, config.text)
            [row], _ = rows_of([example], model.tokenizer, image=False)
            tokens = 1 + photos * (1 + compared) + len(row.prompt) + len(row.answer)
            if tokens > most:
                raise UserError(f"product {p.id!r}: its question{' with another product as long' if compared else ''} has "
                                f"{tokens:,} tokens, more than the {most:,} that this LLaMA was trained to read; shorten its "
                                f"title: {p.title[:100]!r}…")


def answer_one(model, features, config, raw, args):
    """Print the answer for one product, given by photo, text and attribute."""
    known = raw["values"]
    same = [a for a in known if a.lower() == args.attribute.lower()]
    attribute = same[0] if same else args.attribute
    if not same:
        print(f"evaluate.py: note: {attribute!r} is none of the attributes of this run's training "
              f"({', '.join(known)})", file=sys.stderr)
        if args.constrain:
            raise UserError(f"--constrain needs an attribute whose values are known: {', '.join(known)}")
    for name, given, used in (("image", args.image, config.image), ("text", args.text, config.text)):
        if used and given is None:
            raise UserError(f"this run was trained with {name}s: give --{name}")
        if given is not None and not used:
            raise UserError(f"this run was trained without {name}s (--no-{name}): leave --{name} out")
    product = Product("", str(Path(args.image).resolve()) if args.image else "", "",
                      " ".join((args.text or "").split()), attribute, "")
    if features:
        features.prepare([product.image])
    values = known if args.constrain else None
    [(text, probability)] = answer(model, features, [product], config, args.temperature, args.top_p, values)
    print(f"{attribute}: {text or '(no answer)'}  (probability {probability:.2f})")


def export_run(model, features, config, sources, out):
    """Merge, write the folder `out`, and print how far merging moves the logits of answers to test products."""
    if out.exists():
        raise UserError(f"--export {out}: exists already; name a folder that does not")
    products = read_split(sources.data, config.dataset, "test")[:32]
    if features:
        prepare_photos(features, [products], config, sources)
    rows, photos = rows_of([base_question(p, config.text) for p in products], model.tokenizer, config.image)
    read = features.read(photos, model.device) if features else None
    with torch.no_grad():
        before = model.answer_logits(rows, read)
        after = model.merge_adapters().answer_logits(rows, read)
    tapped = taps(features.vit.config.num_hidden_layers) if features else ()
    tapped = tapped[-1:] if config.features == "single" else tapped
    export(model, sources.llama, out, export_readme(model, tapped, config.text))
    print(f"{out}: merged LLaMA{' and projector' if features else ''} written; the greatest difference of logits, merged "
          f"against unmerged, is {(after - before).abs().max():.2e} (logits to {before.abs().max():.0f}; answers to "
          f"{len(rows)} test products)")


def answer_file(products, model, features, config, sources, raw, args):
    """Answer the products of a TSV of any length into another one.  Attributes are asked as they are written there."""
    unknown = sorted({p.attribute for p in products} - raw["values"].keys()) if args.constrain else []
    if unknown:
        raise UserError(f"{args.input}: --constrain knows no values of {', '.join(unknown[:5])}; "
                        f"the run was trained on {', '.join(raw['values'])}")
    if features:
        prepare_photos(features, [products], config, sources)
    check_lengths(model, features, products, config)
    values = raw["values"] if args.constrain else None
    answers = answers_to(model, features, products, config, args.temperature, args.top_p, values)
    write_predictions(args.output, zip(products, answers))
    print(f"{args.output}: {len(products):,} products answered")


def main():
    parser = argparse.ArgumentParser(description="Score a run, or answer with it.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder that train.py wrote")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help="fold the adapters into LLaMA's weights first")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0 takes the best token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=TOP_P, help="nucleus (default: %(default)s)")
    parser.add_argument("--constrain", action="store_true", help="answer only with values known from training")
    parser.add_argument("--image", metavar="FILE", help="photo of one product")
    parser.add_argument("--text", metavar="TEXT", help="title of one product, best with its category: \"title, category\"")
    parser.add_argument("--attribute", metavar="NAME", help="attribute that is asked of it")
    parser.add_argument("--input", metavar="TSV", type=Path, help="answer the products of this file")
    parser.add_argument("--output", metavar="TSV", type=Path, help="where to write their answers")
    parser.add_argument("--export", metavar="DIR", type=Path, help="merge, and write an ordinary Hugging Face LLaMA")
    add_flags(parser, ("data", "llama", "vit", "device", "dtype"))
    args = parser.parse_args()
    if not args.temperature >= 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together")
    if args.input and not args.input.is_file():
        raise UserError(f"{args.input}: not found; --input is a TSV file of products")
    if args.output and (args.output.is_dir() or args.output.resolve() == args.input.resolve()):
        raise UserError(f"--output {args.output}: is a folder, or the input itself; name another file")
    one = args.image is not None or args.text is not None or args.attribute is not None
    if one and (args.attribute is None or args.input):
        parser.error("for one product, give --attribute and --image or --text, without --input")
    if args.export and (one or args.input):
        parser.error("--export does not answer: leave --input, --image, --text and --attribute out")
    if args.image and not Path(args.image).is_file():
        raise UserError(f"--image {args.image}: there is no such file")

    if args.input:                                      # every line of it is checked before anything else is done
        products = Products(args.input, labelled=False)
    given = {name: getattr(args, name) for name in ("data", "llama", "vit", "device", "dtype") if hasattr(args, name)}
    model, features, config, sources, raw = load_run(args.run, given, data_needed=not (one or args.input))
    if args.merge or args.export:
        if config.adapter == "mlp":
            raise UserError("this run has MLP-Adapters, whose non-linearity cannot be merged; "
                            "--adapter rep and mlp-linear can be")
    if args.export:
        print(describe(config, sources))
        return export_run(model, features, config, sources, args.export)
    if args.merge:
        model.merge_adapters()
    if one:
        print(describe(config, sources), file=sys.stderr)       # stdout has the answer alone
        return answer_one(model, features, config, raw, args)
    print(describe(config, sources))
    if args.input:
        return answer_file(products, model, features, config, sources, raw, args)
    products = read_split(sources.data, config.dataset, args.split)
    if args.split != "test":                            # as train.py does: few labels are few for validation, too
        products = sample_labels(products, config.labels, config.seed)
    if fingerprint(products) != raw["data_fingerprint"][args.split]:
        raise UserError(f"{sources.data}: the {args.split} split is not the one that this run was started with; --data ROOT "
                        "names another folder, and --input answers any file")
    values = raw["values"] if args.constrain else None
    unknown = sorted({p.attribute for p in products} - raw["values"].keys())
    if args.constrain and unknown:
        raise UserError(f"--constrain knows no values of {', '.join(unknown[:5])}: training had no label of it")
    if features:
        prepare_photos(features, [products], config, sources)
    evaluate(model, features, products, config, sources, args.split,
             args.run if args.split == "test" else args.run / args.split,
             merged=args.merge, temperature=args.temperature, top_p=args.top_p, values=values)


if __name__ == "__main__":
    console.run(main)
