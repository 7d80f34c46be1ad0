"""Score a run on a split of its data set.

    python evaluate.py RUN                                       score the test split again
    python evaluate.py RUN --without-duplicates                  leave out products that are also in train
    python evaluate.py RUN --constrain --split val               calibrate the probabilities of known values

The scores of the training itself are in RUN (test) and RUN/val.  Another scoring goes to a folder of its own,
such as RUN/scores/test-constrain.  tools/ answers single products and catalogues.
"""

import argparse
import math
import time
import zlib
from collections import defaultdict
from shlex import quote
from statistics import mode

from base.console import UserError, locked, parse_flags, user_path, write_json
from base.duplicates import not_in
from data import fingerprint, read_split, without
from eiven import TEMPERATURE, TOP_P
from support import processes
from support.answering import answers, check_questions, prepare_photos, split_products, write_predictions
from support.confidence import calibrate, lines, measure
from support.config import MACHINE, add_flags, choose_threads, describe, number
from support.report import draw_results, floor_text
from support.run import load, read_values
from support.run_folder import check_still_there, read_config, read_log

# ---------------------------------------------------------------------------------------- scores


def exact_match(prediction, gold):
    """Section 4.1: the full sequence of words is required.  Case counts, surrounding white space does not."""
    return prediction.strip() == gold.strip()


def micro_f1(pairs):
    """Scores of (prediction, gold) pairs as a dict, in per cent.

    precision = right / non-empty predictions, recall = right / all, micro_f1 = their harmonic mean, all from
    totals: an empty prediction is no prediction.  Without empty ones, all three are accuracy.
    implicitave is the scorer of the authors' later data set: the prediction contains the gold value, both in
    lower case.
    """
    right = sum(exact_match(p, g) for p, g in pairs)
    answered = sum(bool(p.strip()) for p, g in pairs)
    loose = sum(g.strip().lower() in p.lower() for p, g in pairs)
    n = len(pairs)
    precision, recall = 100 * right / max(answered, 1), 100 * right / max(n, 1)
    f1 = 200 * right / max(answered + n, 1)             # 2 P R / (P + R)
    return {"micro_f1": f1, "precision": precision, "recall": recall, "n": n, "right": right,
            "answered": answered, "implicitave": 100 * loose / max(n, 1)}


def score(products, predictions):
    """What `measures` says over all products, and under `attributes` of each attribute; and the floor: the
    score of one value as the answer to all products.  predictions: a list of texts.

    floor_value  of an attribute: the commonest of these gold values.  No constant answer has a higher score.
                 (Few-label training data cannot tell it: there all values are equally frequent.)
    """
    rows = list(zip(products, predictions))
    attributes = {}
    for attribute in sorted({product.attribute for product in products}):
        same = [row for row in rows if row[0].attribute == attribute]
        golds = [product.value for product, _ in same]
        value = mode(golds)
        attributes[attribute] = measures(same) | {"floor": 100 * golds.count(value) / len(golds),
                                                  "floor_value": value}
    floor = sum(m["floor"] * m["n"] for m in attributes.values()) / max(len(products), 1)
    return measures(rows) | {"floor": floor, "attributes": attributes}


def measures(rows):
    """micro_f1 of (product, prediction) pairs, and its 95 % interval over products."""
    metrics = micro_f1([(prediction, product.value) for product, prediction in rows])
    products = {product.id for product, _ in rows}
    return metrics | {"interval": interval(metrics["micro_f1"], len(products))}


def interval(score, n):
    """[low, high]: Wilson's 95 % interval of a score of n products, all in per cent.  It is valid near 0
    and 100, too.

    n counts products, not questions: the answers to several questions on one product are not independent.  So
    the interval over several attributes is rather too wide than too narrow.
    """
    p = score / 100
    z2_n = 1.96 ** 2 / max(n, 1)
    half = math.sqrt(z2_n * (p * (1 - p) + z2_n / 4))
    return [100 * (p + z2_n / 2 + side) / (1 + z2_n) for side in (-half, half)]


def table(metrics):
    """The scores as lines of text, one for each attribute."""
    rows = {**metrics["attributes"], **metrics.get("seen_and_held_out", {}), "all (micro)": metrics}
    width = max(map(len, rows))
    lines = [f"{'attribute':{width}}  micro-F1  precision  recall      n  one value for all"]
    for name, m in rows.items():
        scores = f"{m['micro_f1']:8.2f}  {m['precision']:9.2f}  {m['recall']:6.2f}"
        lines.append(f"{name:{width}}  {scores}  {m['n']:5}  {floor_text(m)}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- a split


def evaluate(run, products, split, folder, values=None, merged=False, temperature=TEMPERATURE, top_p=TOP_P,
             min_confidence=0.0, fit=False):
    """Answer the products of a split, score them, write the results into `folder`, print the table; the
    metrics.

    split           its name in words, for the results
    values          {attribute: values} to choose from instead of writing freely
    merged          whether the adapters were merged (recorded in the results)
    min_confidence  answers below this probability are left empty
    fit             whether the products are val's: then the temperature of an attribute's values and the
                    threshold of confidence are fitted on them
    Of several processes, process 0 writes and returns the metrics, and the others return None.
    """
    config = run.config
    start = time.monotonic()
    answered = answers(run, products, values, temperature, top_p, f"answering {split}")
    if processes.rank() > 0:
        return None
    seconds = round(time.monotonic() - start, 1)
    check_still_there(run.folder, run.id)
    if values and fit:
        answered = calibrate(run, products, answered, values)
    confidence = measure(run, products, answered, values, fit)  # of all answers, also of those left out below
    answered = [a.above(min_confidence) for a in answered]
    metrics = score(products, [a.value for a in answered])
    parts = defaultdict(list)
    for p, a in zip(products, answered):
        held_out = p.value in run.held_out.get(p.attribute, ())
        parts["values held out" if held_out else "values trained on"].append((p, a.value))
    if len(parts) > 1:
        metrics["seen_and_held_out"] = {name: measures(parts[name]) for name in sorted(parts, reverse=True)}
    metrics.update(split=split, constrained=values is not None, merged=merged,
                   sources=describe(config, run.sources), seconds=seconds, temperature=temperature,
                   top_p=top_p, min_confidence=min_confidence, **confidence)
    title = f"{config.dataset}, {split} split, {config.labels or 'all'} labels per value, seed {config.seed}"
    images = run.sources.data / "images" if config.image else None
    write_predictions(folder / "predictions.tsv", products, answered)
    write_json(folder / "metrics.json", metrics)
    draw_results(folder, title, products, answered, metrics, images,
                 [line["loss"] for line in read_log(run.folder)],
                 f"python -m tools.explain {quote(str(run.folder))}")
    print(f"\n{title}, n = {metrics['n']}\n{table(metrics)}")
    low, high = metrics["interval"]
    print(f"95 % interval of micro-F1 over products: {low:.1f} to {high:.1f}")
    if low <= metrics["floor"]:
        print("one value for all is not beaten: the interval reaches down to its score")
    print(f"gold value inside the answer (ImplicitAVE's scorer): {metrics['implicitave']:.2f}")
    print(*lines(run, metrics), sep="\n")
    return metrics


# ---------------------------------------------------------------------------------------- the command


def run_parser(description):
    """A parser for RUN and the flags of MACHINE, for `load_run`."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=user_path, help="run folder that train.py wrote")
    parser.set_defaults(values=None, constrain=False, merge=False)
    add_flags(parser, MACHINE)
    return parser


def answer_parser(description):
    """A run_parser with the flags that decide how a run answers."""
    parser = run_parser(description)
    parser.add_argument("--merge", action="store_true", help="merge the adapters into LLaMA's weights first")
    parser.add_argument("--temperature", type=number(float, 0, 1000), default=TEMPERATURE,
                        help="of free answers; 0: the most probable token (default: %(default)s)")
    parser.add_argument("--top-p", type=number(float, 1e-6, 1), default=TOP_P,
                        help="of free answers: nucleus sampling (default: %(default)s)")
    parser.add_argument("--constrain", action="store_true",
                        help="answer only with values known from training")
    parser.add_argument("--values", metavar="FILE", type=user_path,
                        help="answer only with these values, one a line: attribute, tab, value; with "
                             "--constrain they are added to those of the training")
    parser.add_argument("--min-confidence", metavar="C", type=number(float, 0, 1), default=0.0,
                        help="leave an answer empty if its probability is below C (0 to 1)")
    return parser


def load_run(args, status=None):
    """(Run, {attribute: values} to choose from or None) of the parsed flags.

    status  where the line is printed that says which data and weights are in use; None: stdout
    """
    listed = read_values(args.values) if args.values else {}
    run_id = read_config(args.run)[1]["id"]
    processes.check_same("flags", vars(args) | {"run": run_id, "values": listed})
    changed = {name: value for name, value in vars(args).items() if name in MACHINE}
    run = load(args.run, **{"threads": None, **changed})   # not the training's number of threads
    print(describe(run.config, run.sources), file=status)
    choose_threads(run.config, run.model, status)
    if args.merge:
        run.model.merge_adapters()
    if not (listed or args.constrain):
        return run, None
    values = dict(run.values) if args.constrain else {}
    for attribute, names in listed.items():
        known = run.asked_attribute(attribute)
        values[known] = list(dict.fromkeys([*values.get(known, ()), *names]))   # each once
    return run, values


def scores_folder(args, parser):
    """RUN or RUN/SPLIT for the training's own settings; for others a folder that is named after them."""
    words = [args.split]
    for name in ("without_duplicates", "merge", "constrain", "min_confidence", "temperature", "top_p",
                 "dtype"):
        value = getattr(args, name, None)
        if value not in (None, parser.get_default(name)):
            words.append(name if value is True else f"{name}-{value}")
    if args.values:                                     # another list may have the same name
        words.append(f"values-{args.values.stem}-{zlib.crc32(args.values.read_bytes()):08x}")
    if len(words) > 1:
        return args.run / "scores" / "-".join(words)
    return args.run if args.split == "test" else args.run / args.split


def main():
    parser = answer_parser("Score a run on a split of its data.")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"),
                        help="default: %(default)s")
    parser.add_argument("--without-duplicates", action="store_true",
                        help="score only products whose title words and photo bytes are not in train")
    args = parse_flags(parser)
    run, values = load_run(args)
    config, root = run.config, run.sources.data
    products = split_products(config, run.sources, args.split)
    if args.split != "test":
        products = without(products, run.held_out)
    prepare_photos(run, products)
    data = fingerprint(products, run.photo_features.keys if run.photo_features else {})
    if data != read_config(args.run)[1]["data_fingerprint"][args.split]:
        raise UserError(f"{root}: the products or photos of {args.split} are not those of this run's start "
                        "(with --skip-missing-photos, a photo that came later adds its product); --data ROOT "
                        "names another folder, and python -m tools.catalogue answers any file")
    split = args.split
    if args.without_duplicates:
        split += " (without duplicates of train)"
        kept = not_in(read_split(root, config.dataset, "train"), products, root / "images")
        print(f"{len(products) - len(kept):,} of {len(products):,} products left out: their title words or "
              "photo bytes are in train")
        products = kept
        if not products:
            raise UserError(f"--without-duplicates leaves no product of {args.split}: train has all of them")
    check_questions(run, products, values)
    # Two scorings at once would write the same files.
    with processes.in_process_0(locked(scores_folder(args, parser), "scoring")) as folder:
        evaluate(run, products, split, folder, values, args.merge, args.temperature, args.top_p,
                 args.min_confidence, fit=args.split == "val")


if __name__ == "__main__":
    processes.run(main)
