"""Score a run, or answer with it.

    python evaluate.py RUN                                       score the test split again
    python evaluate.py RUN --image shoe.jpg --text "…" --attribute "Boot Style"
    python evaluate.py RUN --input products.tsv --output predictions.tsv
    python evaluate.py RUN --constrain --split val               calibrate the probabilities of known values (docs/answers.md)
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from base import console
from base.console import UserError, whole_file, write_text
from data import Product, Products, fingerprint, read_split, sample_labels
from eiven import TEMPERATURE, TOP_P
from support.answering import answers, check_lengths, load, prepare_photos, write_predictions
from support.confidence import calibrate, lines, measure, temperature_note
from support.config import add_flags, describe
from support.export import export_run
from support.report import confusion_file, confusion_png, report_html
from support.run_folder import read_config, read_losses
from support.values import read_values, without

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
    width = max(len(a) for a in [*metrics["attributes"], *metrics.get("seen_and_held_out", ()), "all (micro)"])
    lines = [f"{'attribute':{width}}  micro-F1  precision  recall      n"]
    for name, m in [*metrics["attributes"].items(), *metrics.get("seen_and_held_out", {}).items(), ("all (micro)", metrics)]:
        lines.append(f"{name:{width}}  {m['micro_f1']:8.2f}  {m['precision']:9.2f}  {m['recall']:6.2f}  {m['n']:5}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ a split


def evaluate(run, products, split, folder, values=None, merged=False, temperature=TEMPERATURE, top_p=TOP_P, min_confidence=0.0):
    """Answer the products of a split, score them, write the results into `folder`, print the table; the metrics.

    values          {attribute: values} to choose from instead of writing freely; on val, this fits their temperature
    merged          whether the adapters were merged (recorded in the results)
    min_confidence  answers below this probability are left empty
    """
    start, config = time.monotonic(), run.config
    found = list(answers(run, products, values, temperature, top_p, f"answering {split}"))
    seconds = round(time.monotonic() - start, 1)
    if values and split.startswith("val"):              # the split's name may say what was left out of it
        found = calibrate(run, products, found, values)
    confidence = measure(run, products, found, values, split)       # of all answers, also of those left out below
    found = [a.above(min_confidence) for a in found]
    metrics = score(products, [a.value for a in found])
    if run.held_out and split.startswith("test"):
        metrics["seen_and_held_out"] = {
            name: micro_f1([(a.value, p.value) for p, a in zip(products, found)
                            if (p.value in run.held_out.get(p.attribute, ())) == held])
            for name, held in (("values trained on", False), ("values held out", True))}
    metrics.update(split=split, dataset=config.dataset, labels=config.labels or "all", seed=config.seed,
                   constrained=values is not None, values={a: len(v) for a, v in (values or run.values).items()},
                   merged=merged, dtype=str(run.model.llama.embed_tokens.weight.dtype),
                   sources=describe(config, run.sources), seconds=seconds,
                   temperature=temperature, top_p=top_p, min_confidence=min_confidence, **confidence)
    title = f"{config.dataset}, {split} split, {config.labels or 'all'} labels a value, seed {config.seed}"
    images = run.sources.data / "images" if config.image else None
    write_results(folder, title, products, found, metrics, images, read_losses(run.folder))
    print(f"\n{title}, n = {metrics['n']}\n{table(metrics)}")
    print(f"gold value inside the answer (ImplicitAVE's scorer): {metrics['implicitave']:.2f}")
    print(*lines(run, metrics, split), sep="\n")
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


def check_values(products, values, where, source):
    """UserError if an attribute of the products has no values to choose from.  values None: free answers need none."""
    unknown = sorted({p.attribute for p in products} - values.keys()) if values else []
    if unknown:
        raise UserError(f"{where}: there are no known values of {', '.join(unknown[:5])}; {source} has those of "
                        f"{', '.join(values)}")


def main():
    parser = argparse.ArgumentParser(description="Score a run, or answer with it.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder that train.py wrote")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help="merge the adapters into LLaMA's weights first")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=TOP_P, help="of nucleus sampling (default: %(default)s)")
    parser.add_argument("--constrain", action="store_true", help="answer only with values known from training")
    parser.add_argument("--values", metavar="FILE", type=Path, help="answer only with these values: attribute, tab, value a line")
    parser.add_argument("--min-confidence", metavar="P", type=float, default=0.0,
                        help="leave an answer empty if its probability is below P (0 to 1)")
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
    if not 0 <= args.min_confidence <= 1:
        parser.error(f"--min-confidence {args.min_confidence}: must be a probability, 0 to 1")
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

    if args.input:                                      # every line is checked before the weights are loaded
        products = Products(args.input, labelled=False)
    values = read_values(args.values) if args.values else None
    given = {name: getattr(args, name) for name in ("data", "llama", "vit", "device", "dtype") if hasattr(args, name)}
    run = load(args.run, data_needed=not (one or args.input), **given)
    print(describe(run.config, run.sources), file=sys.stderr if one else sys.stdout)
    if (args.merge or args.export) and run.config.adapter == "mlp":
        raise UserError("this run has MLP-Adapters, whose non-linearity cannot be merged; --adapter rep and mlp-linear can be")
    if args.export:
        return export_run(run, args.export)
    if args.merge:
        run.model.merge_adapters()
    values, source = (run.values if args.constrain and not values else values), args.values or "the run's training data"
    if one:
        attribute = run.known_attribute(args.attribute)
        if args.values:
            check_values([Product("", "", "", "", attribute, "")], values, "--attribute", source)
        if values:
            print(temperature_note(run), file=sys.stderr)
        answer = run.answer(args.image, args.text, attribute, args.constrain, args.temperature, args.top_p,
                            values and values.get(attribute), args.min_confidence)
        print(f"{attribute}: {answer}")
    elif args.input:
        check_values(products, values, args.input, source)
        prepare_photos(run, products)
        check_lengths(run, products, values=values)
        found = answers(run, products, values, args.temperature, args.top_p)
        empty = write_predictions(args.output, products, (a.above(args.min_confidence) for a in found))
        print(f"{args.output}: {len(products):,} products answered" + (f", {empty:,} of them left empty" if empty else ""))
        if values:
            print(temperature_note(run))
    else:
        products = read_split(run.sources.data, run.config.dataset, args.split)
        if args.split != "test":                        # as train.py does: with few labels, val is small, too
            products = without(sample_labels(products, run.config.labels, run.config.seed), run.held_out)
        if fingerprint(products) != read_config(args.run)[1]["data_fingerprint"][args.split]:
            raise UserError(f"{run.sources.data}: the {args.split} split is not the one that this run was started with; --data "
                            "ROOT names another folder, and --input answers any file")
        check_values(products, values, f"--split {args.split}", source)
        check_lengths(run, products, values=values)
        prepare_photos(run, products)
        evaluate(run, products, args.split, args.run if args.split == "test" else args.run / args.split,
                 values, args.merge, args.temperature, args.top_p, args.min_confidence)


if __name__ == "__main__":
    console.run(main)
