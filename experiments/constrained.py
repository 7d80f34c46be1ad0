"""Free answers beside constrained ones, run by run (docs/answers.md):

    python -m experiments.constrained RUN [RUN ...]

Temperature and thresholds are fitted on val and used on test.  Nothing is written into the run folders.
"""

import argparse
import statistics
import time
from pathlib import Path

from base import console
from data import read_split, sample_labels
from evaluate import load, micro_f1
from support.answering import answers, prepare_photos
from support.confidence import LEAST, at_temperature, calibration_error, coverage_curve, fit_temperature, threshold
from support.values import outside, without

PRECISION = 90                                          # per cent


def right_and_sure(products, found):
    """(confidence, right) of the answers that are not empty."""
    answered = [(a.probability, a.value == p.value) for p, a in zip(products, found) if a.value]
    return [p for p, _ in answered], [right for _, right in answered]


def timed(run, products, values=None):
    """(answers, products per second)"""
    start = time.monotonic()
    found = list(answers(run, products, values))
    return found, len(products) / (time.monotonic() - start)


def at_threshold(val, val_found, test, test_found):
    """"coverage / precision" on test above the confidence that has PRECISION per cent on val."""
    point = threshold(coverage_curve(*right_and_sure(val, val_found), len(val)), PRECISION, 100 * LEAST / len(val))
    if point is None:
        return "none"
    given = [a.value == p.value for p, a in zip(test, test_found) if a.value and a.probability >= point["min_confidence"]]
    return f"{100 * len(given) / len(test):.1f} / {100 * statistics.mean(given):.1f} %" if given else "0 / -"


def best_coverage(products, found):
    """The greatest coverage with PRECISION per cent right, chosen on these very products: what is there at best."""
    point = threshold(coverage_curve(*right_and_sure(products, found), len(products)), PRECISION)
    return f"{point['coverage']:.1f} %" if point else "0 %"


def measure(folder):
    """{what: text} for one run."""
    run = load(folder, data_needed=True)
    run.calibration = None
    config = run.config
    test = list(read_split(run.sources.data, config.dataset, "test"))
    val = without(sample_labels(read_split(run.sources.data, config.dataset, "val"), config.labels, config.seed), run.held_out)
    prepare_photos(run, [*val, *test])
    free, free_rate = timed(run, test)
    free_val, _ = timed(run, val)
    chosen, rate = timed(run, test, run.values)
    chosen_val, _ = timed(run, val, run.values)
    known = [(a.log_probs, run.values[p.attribute].index(p.value)) for p, a in zip(val, chosen_val)
             if p.value in run.values[p.attribute]]
    T = fit_temperature(*zip(*known))
    fitted, fitted_val = (at_temperature(p, found, run.values, T) for p, found in ((test, chosen), (val, chosen_val)))

    def f1(found):
        return f"{micro_f1([(a.value, p.value) for p, a in zip(test, found)])['micro_f1']:.1f}"

    def error(found):
        return f"{calibration_error(*right_and_sure(test, found))[0]:.1f} %"

    other = sum(sum(counts.values()) for counts in outside(test, free, run.values).values())
    return {
        "micro-F1, free": f1(free), "micro-F1, constrained": f1(chosen),
        "free answers outside the list": f"{other} ({100 * other / len(test):.1f} %)",
        "calibration error, free": error(free), "calibration error, constrained, temperature 1": error(chosen),
        "calibration error, constrained, fitted temperature": error(fitted), "fitted temperature": f"{T:.2f}",
        f"coverage / precision at val's threshold for {PRECISION} %, free": at_threshold(val, free_val, test, free),
        f"coverage / precision at val's threshold for {PRECISION} %, constrained": at_threshold(val, fitted_val, test, fitted),
        f"coverage at {PRECISION} % accuracy, threshold chosen on test itself, free": best_coverage(test, free),
        f"coverage at {PRECISION} % accuracy, threshold chosen on test itself, constrained": best_coverage(test, fitted),
        "products per second, free": f"{free_rate:.1f}", "products per second, constrained": f"{rate:.1f}",
    }, f"{config.dataset}, {config.labels or 'all'} labels, test split, n = {len(test)}; val, n = {len(val)}"


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.constrained", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder that train.py wrote")
    folders = parser.parse_args().runs
    found = [measure(folder) for folder in folders]
    for where in dict.fromkeys(where for _, where in found):
        columns = [column for column, w in found if w == where]
        names = [folder.name for folder, (_, w) in zip(folders, found) if w == where]
        print(f"\n{where}\n\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for name in columns[0]:
            print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    console.run(main)
