"""Score a run, or answer with it.

    python evaluate.py RUN                                       score the test split again
    python evaluate.py RUN --without-duplicates                  leave out products that stand in train, too
    python evaluate.py RUN --image shoe.jpg --text "…" --attribute "Boot Style"
    python evaluate.py RUN --input products.tsv --output predictions.tsv         any number (support/catalogue.py)
    python evaluate.py RUN --explain ID                          follow one product from photo to answer
    python evaluate.py RUN --constrain --split val               calibrate the probabilities of known values (docs/answers.md)
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from base.console import UserError, replaceable, write_text  # before PyTorch: Ctrl-C while that loads ends in one line, too

# isort: split

from base.duplicates import not_in
from data import Product, fingerprint, read_split, sample_labels
from eiven import TEMPERATURE, TOP_P
from support import processes
from support.answering import answers, check_image, check_lengths, load, prepare_photos, write_predictions
from support.catalogue import Catalogue
from support.confidence import calibrate, lines, measure, temperature_note
from support.config import add_flags, describe, number, utf8_text
from support.explain import find_product, show
from support.export import export_run
from support.report import draw_results
from support.run_folder import read_config, read_losses
from support.threads import choose_threads
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
    """Answer the products of a split, score them, write the results into `folder`, print the table; the metrics (in process 0).

    values          {attribute: values} to choose from instead of writing freely; on val, this fits their temperature
    merged          whether the adapters were merged (recorded in the results)
    min_confidence  answers below this probability are left empty
    """
    start, config = time.monotonic(), run.config
    found = list(answers(run, products, values, temperature, top_p, f"answering {split}"))
    if processes.rank() > 0:                            # process 0 has all answers, and goes on with them
        return None
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
                   merged=merged, dtype=str(run.model.llama.layers[0].mlp.up_proj.weight.dtype),
                   sources=describe(config, run.sources), seconds=seconds,
                   temperature=temperature, top_p=top_p, min_confidence=min_confidence, **confidence)
    title = f"{config.dataset}, {split} split, {config.labels or 'all'} labels per value, seed {config.seed}"
    images = run.sources.data / "images" if config.image else None
    write_results(folder, title, products, found, metrics, images, read_losses(run.folder))
    print(f"\n{title}, n = {metrics['n']}\n{table(metrics)}")
    print(f"gold value inside the answer (ImplicitAVE's scorer): {metrics['implicitave']:.2f}")
    print(*lines(run, metrics, split), sep="\n")
    return metrics


def write_results(folder, title, products, found, metrics, images=None, losses=()):
    """Write predictions.tsv, metrics.json, a confusion matrix for each attribute, and report.html, each as a whole file."""
    write_predictions(folder / "predictions.tsv", products, found)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    draw_results(folder, title, products, found, metrics, images, losses)       # last: scores do not depend on pictures


# ------------------------------------------------------------------------------------------------ the command


def parse():
    """The command line as a namespace; .one tells whether --image, --text and --attribute describe a product."""
    parser = argparse.ArgumentParser(description="Score a run, or answer with it.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder that train.py wrote")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: %(default)s")
    parser.add_argument("--without-duplicates", action="store_true",
                        help="score only products whose title words and photo bytes are not in train")
    parser.add_argument("--merge", action="store_true", help="merge the adapters into LLaMA's weights first")
    parser.add_argument("--temperature", type=number(float, 0, 1000), default=TEMPERATURE,
                        help="0: the most probable token (default: %(default)s)")
    parser.add_argument("--top-p", type=number(float, 1e-6, 1), default=TOP_P, help="of nucleus sampling (default: %(default)s)")
    parser.add_argument("--constrain", action="store_true", help="answer only with values known from training")
    parser.add_argument("--values", metavar="FILE", type=Path, help="answer only with these values; per line: attribute, tab, value")
    parser.add_argument("--min-confidence", metavar="P", type=number(float, 0, 1), default=0.0,
                        help="leave an answer empty if its probability is below P (0 to 1)")
    parser.add_argument("--image", metavar="FILE", help="photo of one product")
    parser.add_argument("--text", metavar="TEXT", type=utf8_text,
                        help="title of one product, best with its category: \"title, category\"")
    parser.add_argument("--attribute", metavar="NAME", type=utf8_text, help="the attribute to answer")
    parser.add_argument("--input", metavar="FILE", type=Path, help="answer the products of this TSV or JSONL, also gzip; -: stdin")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where to write their answers: a TSV, or *.jsonl, also *.gz. "
                        "After an interruption the same command goes on; rows that cannot be answered go to failed.tsv beside it")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of the photos of --input (default: ROOT/images)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row of --input that cannot be answered")
    parser.add_argument("--no-feature-cache", action="store_true",
                        help="do not keep the features of the photos of --input (12 kB a photo with ViT-B/16)")
    parser.add_argument("--explain", metavar="ID", nargs="?", const="", help="follow this product of the split, or the one of "
                        "--image, --text and --attribute, from photo to answer; writes a page to RUN/explain/")
    parser.add_argument("--export", metavar="DIR", type=Path, help="merge, and write an ordinary Hugging Face LLaMA")
    add_flags(parser, ("data", "llama", "vit", "device", "dtype", "threads", "shard"))
    args = parser.parse_args()
    described = args.image is not None or args.text is not None
    args.one = not args.explain and (described or args.attribute is not None)
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together")
    if args.input is None and (args.images or args.strict or args.no_feature_cache):
        parser.error("--images, --strict and --no-feature-cache go with --input")
    if args.explain is not None and (args.input or args.export or args.constrain or args.values or args.min_confidence
                                     or bool(args.explain) == described):
        parser.error("--explain follows one free answer: give the ID of a product of the split, or --attribute with --image or "
                     "--text; and leave --input, --export, --constrain, --values and --min-confidence out")
    if args.one and (args.attribute is None or args.input):
        parser.error("for one product, give --attribute and --image or --text, without --input")
    if args.export and (args.one or args.input):
        parser.error("--export does not answer: leave --input, --image, --text and --attribute out")
    if args.without_duplicates and (args.one or args.input or args.export or args.split == "train"):
        parser.error("--without-duplicates scores the test or val split")
    if hasattr(args, "shard") and (args.merge or args.export or args.explain is not None):
        parser.error("--shard spreads the weights that --merge, --export and --explain need: leave it out")
    if processes.size() > 1 and (args.one or args.export or args.explain is not None):
        parser.error("--image, --text, --explain and --export take one process: leave torchrun out")
    if args.input and (args.output.is_dir() or args.output.exists() and args.input.exists() and args.output.samefile(args.input)):
        raise UserError(f"--output {args.output}: is a folder, or the input itself; name another file")
    if args.image is not None:
        check_image(args.image)
    return args


def main():
    args = parse()
    # All input is checked before the weights are loaded.
    catalogue = Catalogue(args.input) if args.input else None
    values = read_values(args.values) if args.values else None
    given = {name: getattr(args, name) for name in ("data", "llama", "vit", "device", "dtype", "shard") if hasattr(args, name)}
    given["threads"] = getattr(args, "threads", None)   # not the training's: this may be another machine
    run = load(args.run, data_needed=not (args.one or args.input), feature_cache=not args.no_feature_cache, **given)
    # Where answers may go to stdout (one product's, or --output /dev/stdout), nothing else does.
    answers_only = args.one or args.explain or args.output and not replaceable(args.output)
    status = sys.stderr if answers_only else sys.stdout
    print(describe(run.config, run.sources), file=status)
    choose_threads(run.config, run.model, status)
    if (args.merge or args.export) and run.config.adapter == "mlp":
        raise UserError("this run has MLP-Adapters, which are not linear and cannot be merged; rep and mlp-linear can be")
    if (args.merge or args.export) and run.config.dtype == "int8":
        raise UserError("int8 weights cannot hold a merged adapter: --merge and --export need 16 or 32 bits; add --dtype bf16 "
                        "(or fp32), which reads the weights anew")
    if args.export:
        return export_run(run, args.export)
    if args.merge:
        run.model.merge_adapters()
    source = args.values or "the run's training data"
    if args.constrain and not values:
        values = run.values
    if args.one:
        answer_one(run, args, values, source)
    elif args.input:
        catalogue.answer(run, args, values, source, status)
    else:
        score_split(run, args, values, source)


def check_values(products, values, where, source):
    """UserError if an attribute of the products has no values to choose from.  values None: free answers need none."""
    unknown = sorted({p.attribute for p in products} - values.keys()) if values else []
    if unknown:
        raise UserError(f"{where}: there are no known values of {', '.join(unknown[:5])}; {source} has those of "
                        f"{', '.join(values)}")


def answer_one(run, args, values, source):
    """Answer or explain the product of --image, --text and --attribute."""
    if args.explain is not None:
        return show(run, run.product(args.image, args.text, args.attribute), args.temperature, args.top_p)
    attribute = run.known_attribute(args.attribute)
    if args.values:
        check_values([Product("", "", "", "", attribute, "")], values, "--attribute", source)
    if values:
        print(temperature_note(run), file=sys.stderr)
    answer = run.answer(args.image, args.text, attribute, args.constrain, args.temperature, args.top_p,
                        values and values.get(attribute), args.min_confidence)
    print(f"{attribute}: {answer}")


def score_split(run, args, values, source):
    """Score a split of the run's own data set, or explain one of its products."""
    whole = products = read_split(run.sources.data, run.config.dataset, args.split)
    if args.split != "test":                            # as in training: val is sampled like train
        products = without(sample_labels(products, run.config.labels, run.config.seed), run.held_out)
    if fingerprint(products) != read_config(args.run)[1]["data_fingerprint"][args.split]:
        raise UserError(f"{run.sources.data}: the {args.split} split is not the one that this run was started with; --data "
                        "ROOT names another folder, and --input answers any file")
    if args.explain:
        product = find_product(whole, " ".join(args.explain.split()), args.attribute, whole.path)
        return show(run, product, args.temperature, args.top_p)
    check_values(products, values, f"--split {args.split}", source)
    split, folder = args.split, args.run if args.split == "test" else args.run / args.split
    if args.without_duplicates:
        split, folder, n = f"{split} (without duplicates of train)", folder / "without-duplicates", len(products)
        products = not_in(read_split(run.sources.data, run.config.dataset, "train"), products, run.sources.data / "images")
        print(f"{n - len(products):,} of {n:,} products left out: their title words or photo bytes are in train")
        if not products:
            raise UserError(f"--without-duplicates leaves no product of {args.split}: all of them are in train, too")
    prepare_photos(run, products)
    check_lengths(run, products, values=values)
    evaluate(run, products, split, folder, values, args.merge, args.temperature, args.top_p, args.min_confidence)


if __name__ == "__main__":
    processes.run(main)
