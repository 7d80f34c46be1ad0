"""Score a run, or answer with it.

    python evaluate.py RUN                                       score the test split again
    python evaluate.py RUN --without-duplicates                  leave out products that stand in train, too
    python evaluate.py RUN --image shoe.jpg --text "…" --attribute "Boot Style"
    python evaluate.py RUN --input products.tsv --output predictions.tsv
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from base import console
from base.console import UserError, whole_file, write_text
from base.duplicates import not_in
from data import Products, fingerprint, read_split, sample_labels
from eiven import TEMPERATURE, TOP_P
from support.answering import answers, check_lengths, load, prepare_photos, write_predictions
from support.config import add_flags, describe
from support.export import export_run
from support.report import confusion_file, confusion_png, report_html
from support.run_folder import read_config, read_losses

# ------------------------------------------------------------------------------------------------ scores


def exact_match(prediction, gold):
    """Section 4.1: the full sequence of words is required.  Surrounding white space is ignored, upper case is not."""
    return prediction.strip() == gold.strip()


def micro_f1(pairs):
    """Scores of (prediction, gold) pairs as a dict, in per cent.

    precision = right / non-empty predictions, recall = right / all, micro_f1 = their harmonic mean, all from totals:
    an empty prediction is no prediction.  implicitave is the scorer of the authors' later data set: the prediction
    contains the gold value, both in lower case.
    """
    right = sum(exact_match(p, g) for p, g in pairs)
    answered = sum(bool(p.strip()) for p, g in pairs)
    loose = sum(g.strip().lower() in p.lower() for p, g in pairs)
    n = len(pairs)
    precision, recall = 100 * right / max(answered, 1), 100 * right / max(n, 1)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"micro_f1": f1, "precision": precision, "recall": recall, "n": n, "right": right, "answered": answered,
            "implicitave": 100 * loose / max(n, 1)}


def score(products, predictions):
    """micro_f1 over all products, and under `attributes` the same for each attribute.  predictions: a list of texts."""
    pairs = defaultdict(list)
    for product, prediction in zip(products, predictions):
        pairs[product.attribute].append((prediction, product.value))
    metrics = micro_f1([pair for same in pairs.values() for pair in same])
    metrics["attributes"] = {attribute: micro_f1(same) for attribute, same in sorted(pairs.items())}
    return metrics


def table(metrics):
    """The scores as lines of text, one for each attribute."""
    width = max(len(a) for a in [*metrics["attributes"], "all (micro)"])
    lines = [f"{'attribute':{width}}  micro-F1  precision  recall      n"]
    for name, m in [*metrics["attributes"].items(), ("all (micro)", metrics)]:
        lines.append(f"{name:{width}}  {m['micro_f1']:8.2f}  {m['precision']:9.2f}  {m['recall']:6.2f}  {m['n']:5}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ a split


def evaluate(run, products, split, folder, constrain=False, merged=False, temperature=TEMPERATURE, top_p=TOP_P):
    """Answer the products of a split, score them, write the results into `folder`, print the table; the metrics.

    constrain  choose from each attribute's known values instead of writing freely
    merged     whether the adapters were merged (recorded in the results)
    """
    start, config = time.monotonic(), run.config
    found = list(answers(run, products, run.values if constrain else None, temperature, top_p, f"answering {split}"))
    metrics = score(products, [a.value for a in found])
    metrics.update(split=split, dataset=config.dataset, labels=config.labels or "all", seed=config.seed,
                   constrained=constrain, merged=merged, dtype=str(run.model.llama.embed_tokens.weight.dtype),
                   sources=describe(config, run.sources), seconds=round(time.monotonic() - start, 1),
                   temperature=temperature, top_p=top_p)
    title = f"{config.dataset}, {split} split, {config.labels or 'all'} labels a value, seed {config.seed}"
    images = run.sources.data / "images" if config.image else None
    write_results(folder, title, products, found, metrics, images, read_losses(run.folder))
    print(f"\n{title}, n = {metrics['n']}\n{table(metrics)}")
    print(f"gold value inside the answer (ImplicitAVE's scorer): {metrics['implicitave']:.2f}")
    return metrics


def write_results(folder, title, products, found, metrics, images=None, losses=()):
    """Write metrics.json, predictions.tsv, a confusion matrix for each attribute, and report.html, each as a whole file."""
    write_predictions(folder / "predictions.tsv", products, found)
    counts = defaultdict(Counter)                       # attribute -> how often each (gold value, answer)
    for p, a in zip(products, found):
        counts[p.attribute][p.value, a.value] += 1
    for attribute in metrics["attributes"]:
        with whole_file(folder / confusion_file(attribute)) as partial:
            confusion_png(f"{attribute}: {title}", counts[attribute]).save(partial, format="png")
    write_text(folder / "report.html", report_html(title, products, found, metrics, images, losses))
    # Last: if it is there, everything else is complete.
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ the command


def known_values(run, products, constrain, where):
    """{attribute: known values} for --constrain, or None without it; UserError if an attribute of the products has none."""
    unknown = sorted({p.attribute for p in products} - run.values.keys()) if constrain else []
    if unknown:
        raise UserError(f"{where}: --constrain knows no values of {', '.join(unknown[:5])}; "
                        f"the run was trained on {', '.join(run.values)}")
    return run.values if constrain else None


def main():
    parser = argparse.ArgumentParser(description="Score a run, or answer with it.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder that train.py wrote")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help="merge the adapters into LLaMA's weights first")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=TOP_P, help="of nucleus sampling (default: %(default)s)")
    parser.add_argument("--without-duplicates", action="store_true",
                        help="score only products whose title words and photo bytes are not in train")
    parser.add_argument("--constrain", action="store_true", help="answer only with values known from training")
    parser.add_argument("--image", metavar="FILE", help="photo of one product")
    parser.add_argument("--text", metavar="TEXT", help="title of one product, best with its category: \"title, category\"")
    parser.add_argument("--attribute", metavar="NAME", help="the attribute to answer")
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
    if args.without_duplicates and (one or args.input or args.export or args.split == "train"):
        parser.error("--without-duplicates scores the test or val split")
    if args.image and not Path(args.image).is_file():
        raise UserError(f"--image {args.image}: there is no such file")

    if args.input:                                      # every line is checked before the weights are loaded
        products = Products(args.input, labelled=False)
    given = {name: getattr(args, name) for name in ("data", "llama", "vit", "device", "dtype") if hasattr(args, name)}
    run = load(args.run, data_needed=not (one or args.input), **given)
    print(describe(run.config, run.sources), file=sys.stderr if one else sys.stdout)
    if args.merge or args.export:
        if run.config.adapter == "mlp":
            raise UserError("this run has MLP-Adapters, whose non-linearity cannot be merged; "
                            "--adapter rep and mlp-linear can be")
    if args.export:
        return export_run(run, args.export)
    if args.merge:
        run.model.merge_adapters()
    if one:
        answer = run.answer(args.image, args.text, args.attribute, args.constrain, args.temperature, args.top_p)
        print(f"{run.known_attribute(args.attribute)}: {answer}")
    elif args.input:
        values = known_values(run, products, args.constrain, args.input)
        prepare_photos(run, products)
        check_lengths(run, products)
        write_predictions(args.output, products, answers(run, products, values, args.temperature, args.top_p))
        print(f"{args.output}: {len(products):,} products answered")
    else:
        products = read_split(run.sources.data, run.config.dataset, args.split)
        if args.split != "test":                        # as train.py does: with few labels, val is small, too
            products = sample_labels(products, run.config.labels, run.config.seed)
        if fingerprint(products) != read_config(args.run)[1]["data_fingerprint"][args.split]:
            raise UserError(f"{run.sources.data}: the {args.split} split is not the one that this run was started with; --data "
                            "ROOT names another folder, and --input answers any file")
        known_values(run, products, args.constrain, f"--split {args.split}")
        split, folder = args.split, args.run if args.split == "test" else args.run / args.split
        if args.without_duplicates:
            split, folder, n = f"{split} (without duplicates of train)", folder / "without-duplicates", len(products)
            products = not_in(read_split(run.sources.data, run.config.dataset, "train"), products, run.sources.data / "images")
            print(f"{n - len(products):,} of {n:,} products left out: their title words or photo bytes are in train")
            if not products:
                raise UserError(f"--without-duplicates leaves no product of {args.split}: all of them are in train, too")
        prepare_photos(run, products)
        evaluate(run, products, split, folder, args.constrain, args.merge, args.temperature, args.top_p)


if __name__ == "__main__":
    console.run(main)
