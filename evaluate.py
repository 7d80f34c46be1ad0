"""Score a run, or answer with it.

    python evaluate.py RUN                                       score the test split again
    python evaluate.py RUN --without-duplicates                  leave out products that stand in train, too
    python evaluate.py RUN --image shoe.jpg --text "…" --attribute "Boot Style"
    python evaluate.py RUN --input products.tsv --output predictions.tsv
    python evaluate.py RUN --explain ID                          follow one product from photo to answer
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from base import console
from base.checkpoint import check_file
from base.console import UserError, replaceable, write_text
from base.duplicates import not_in
from data import Products, fingerprint, read_split, sample_labels
from eiven import TEMPERATURE, TOP_P
from support.answering import answers, check_image, check_lengths, load, prepare_photos, write_predictions
from support.config import add_flags, describe, number, utf8_text
from support.explain import find_product, show
from support.export import export_run
from support.report import draw_results
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
    """Write predictions.tsv, metrics.json, a confusion matrix for each attribute, and report.html, each as a whole file."""
    write_predictions(folder / "predictions.tsv", products, found)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    draw_results(folder, title, products, found, metrics, images, losses)       # last: scores do not depend on pictures


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
    parser.add_argument("--temperature", type=number(float, 0, 1000), default=TEMPERATURE,
                        help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=number(float, 1e-6, 1), default=TOP_P, help="of nucleus sampling (default: %(default)s)")
    parser.add_argument("--without-duplicates", action="store_true",
                        help="score only products whose title words and photo bytes are not in train")
    parser.add_argument("--constrain", action="store_true", help="answer only with values known from training")
    parser.add_argument("--image", metavar="FILE", help="photo of one product")
    parser.add_argument("--text", metavar="TEXT", type=utf8_text,
                        help="title of one product, best with its category: \"title, category\"")
    parser.add_argument("--attribute", metavar="NAME", type=utf8_text, help="the attribute to answer")
    parser.add_argument("--input", metavar="TSV", type=Path, help="answer the products of this file")
    parser.add_argument("--output", metavar="TSV", type=Path, help="where to write their answers")
    parser.add_argument("--explain", metavar="ID", nargs="?", const="", help="follow this product of the split, or the one of "
                        "--image, --text and --attribute, from photo to answer; writes a page to RUN/explain/")
    parser.add_argument("--export", metavar="DIR", type=Path, help="merge, and write an ordinary Hugging Face LLaMA")
    add_flags(parser, ("data", "llama", "vit", "device", "dtype"))
    args = parser.parse_args()
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together")
    if args.input:
        check_file(args.input, "the TSV file of --input")
    if args.output and (args.output.is_dir() or args.output.exists() and args.output.samefile(args.input)):
        raise UserError(f"--output {args.output}: is a folder, or the input itself; name another file")
    one = not args.explain and (args.image is not None or args.text is not None or args.attribute is not None)
    if args.explain is not None and (args.input or args.export or args.constrain
                                     or bool(args.explain) == (args.image is not None or args.text is not None)):
        parser.error("--explain follows one free answer: give the ID of a product of the split, or --attribute with --image or "
                     "--text; and leave --input, --export and --constrain out")
    if one and (args.attribute is None or args.input):
        parser.error("for one product, give --attribute and --image or --text, without --input")
    if args.export and (one or args.input):
        parser.error("--export does not answer: leave --input, --image, --text and --attribute out")
    if args.without_duplicates and (one or args.input or args.export or args.split == "train"):
        parser.error("--without-duplicates scores the test or val split")
    if args.image is not None:
        check_image(args.image)

    if args.input:                                      # every line is checked before the weights are loaded
        products = Products(args.input, labelled=False)
    given = {name: getattr(args, name) for name in ("data", "llama", "vit", "device", "dtype") if hasattr(args, name)}
    run = load(args.run, data_needed=not (one or args.input), **given)
    # Where answers may go to stdout (one product's, or --output /dev/stdout), nothing else does.
    answers_only = one or args.explain or args.output and not replaceable(args.output)
    status = sys.stderr if answers_only else sys.stdout
    print(describe(run.config, run.sources), file=status)
    if args.merge or args.export:
        if run.config.adapter == "mlp":
            raise UserError("this run has MLP-Adapters, whose non-linearity cannot be merged; "
                            "--adapter rep and mlp-linear can be")
    if args.export:
        return export_run(run, args.export)
    if args.merge:
        run.model.merge_adapters()
    if one and args.explain is not None:
        show(run, run.product(args.image, args.text, args.attribute), args.temperature, args.top_p)
    elif one:
        answer = run.answer(args.image, args.text, args.attribute, args.constrain, args.temperature, args.top_p)
        print(f"{run.known_attribute(args.attribute)}: {answer}")
    elif args.input:
        values = known_values(run, products, args.constrain, args.input)
        prepare_photos(run, products)
        check_lengths(run, products, constrain=args.constrain)
        write_predictions(args.output, products, answers(run, products, values, args.temperature, args.top_p))
        print(f"{args.output}: {len(products):,} products answered", file=status)
    else:
        whole = products = read_split(run.sources.data, run.config.dataset, args.split)
        if args.split != "test":                        # as train.py does: with few labels, val is small, too
            products = sample_labels(products, run.config.labels, run.config.seed)
        if fingerprint(products) != read_config(args.run)[1]["data_fingerprint"][args.split]:
            raise UserError(f"{run.sources.data}: the {args.split} split is not the one that this run was started with; --data "
                            "ROOT names another folder, and --input answers any file")
        if args.explain:
            product = find_product(whole, " ".join(args.explain.split()), args.attribute, whole.path)
            return show(run, product, args.temperature, args.top_p)
        known_values(run, products, args.constrain, f"--split {args.split}")
        split, folder = args.split, args.run if args.split == "test" else args.run / args.split
        if args.without_duplicates:
            split, folder, n = f"{split} (without duplicates of train)", folder / "without-duplicates", len(products)
            products = not_in(read_split(run.sources.data, run.config.dataset, "train"), products, run.sources.data / "images")
            print(f"{n - len(products):,} of {n:,} products left out: their title words or photo bytes are in train")
            if not products:
                raise UserError(f"--without-duplicates leaves no product of {args.split}: all of them are in train, too")
        prepare_photos(run, products)
        check_lengths(run, products, constrain=args.constrain)
        evaluate(run, products, split, folder, args.constrain, args.merge, args.temperature, args.top_p)


if __name__ == "__main__":
    console.run(main)
