"""How far the probability of an answer can be trusted: calibration, and coverage against accuracy.

The confidence of an answer is its probability.  Calibrated means: of the answers with confidence 0.8, 80 % are right.
Source of the calibration error and of the temperature: Guo et al. 2017, On Calibration of Modern Neural Networks
(arXiv 1706.04599), sections 2 and 4.2.
"""

import math
from itertools import groupby

import numpy as np

from support.answering import likeliest
from support.run_folder import save_temperature
from support.values import outside

BINS = 10
PRECISIONS, ADVISED = (90, 95, 99), 95                  # per cent: val's thresholds for these are saved; for one, printed
LEAST = 30                                              # answers that a threshold must rest on; with fewer it is chance
LOWEST, HIGHEST = 0.05, 20.0                            # the range of temperatures that are tried


# ------------------------------------------------------------------------------------------------ calibration


def calibration_error(confidence, right):
    """(expected calibration error in per cent, a dict for each bin), from each answer's confidence and whether it is right.

    10 bins of equal width: [0, 0.1), [0.1, 0.2), ... [0.9, 1].  In each, the mean confidence is compared with the share of
    right answers.  The error is the mean of their absolute difference, weighted by the number of answers in the bin.
    """
    members = [[] for _ in range(BINS)]
    for p, is_right in zip(confidence, right):
        members[min(int(p * BINS), BINS - 1)].append((p, is_right))
    bins, error = [], 0.0
    for i, several in enumerate(members):
        n = len(several)
        mean, accuracy = (100 * sum(column) / n for column in zip(*several)) if n else (None, None)
        bins.append({"from": i / BINS, "to": (i + 1) / BINS, "n": n, "confidence": mean, "accuracy": accuracy})
        error += n * abs(mean - accuracy) if n else 0.0
    return error / max(len(confidence), 1), bins


def fit_temperature(log_probs, gold):
    """The temperature T that minimises the negative log-likelihood of the gold values under softmax(log_probs / T).

    log_probs  for each product the log-probabilities of the values it can choose from
    gold       for each product the index of its gold value among them
    T is searched between 0.05 and 20.  The likelihood is convex in 1/T, so its derivative changes sign only once.
    """
    z = np.full((len(log_probs), max(map(len, log_probs))), -np.inf)
    for row, several in zip(z, log_probs):
        row[:len(several)] = np.asarray(several) - max(several)
    finite = np.where(np.isfinite(z), z, 0.0)
    of_gold = finite[np.arange(len(z)), gold]

    def derivative(beta):                               # of the negative log-likelihood by beta = 1/T
        weight = np.exp(beta * z)
        return ((weight * finite).sum(1) / weight.sum(1) - of_gold).sum()

    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return 1 / middle


# ------------------------------------------------------------------------------------------------ coverage


def coverage_curve(confidence, right, n):
    """[{min_confidence, coverage, accuracy}, ...]: what is left if only answers of that confidence or more are given.

    n         number of products; those without an answer are never covered
    coverage  answers given / n, accuracy right / given (their precision), both in per cent; coverage rises along the list
    The confidences are rounded down to 4 digits, so min_confidence can be printed and typed again as it is.
    """
    falling = sorted(((math.floor(p * 1e4) / 1e4, is_right) for p, is_right in zip(confidence, right)), reverse=True)
    given = correct = 0
    curve = []
    for p, same in groupby(falling, key=lambda answer: answer[0]):
        several = [is_right for _, is_right in same]
        given, correct = given + len(several), correct + sum(several)
        curve.append({"min_confidence": p, "coverage": 100 * given / n, "accuracy": 100 * correct / given})
    return curve


def threshold(curve, precision, coverage=0.0):
    """The point of a coverage curve that covers most at this precision or more, and at least this coverage (per cent).

    None if there is none.
    """
    fine = [point for point in curve if point["accuracy"] >= precision and point["coverage"] >= coverage]
    return max(fine, key=lambda point: point["coverage"], default=None)


def summary(confidence, right, n, choose):
    """Calibration and coverage as a dict for metrics.json.

    confidence, right  of the answers that are not empty
    n                  number of all products
    choose             whether thresholds may be chosen on these products: on val, and never on test
    """
    error, bins = calibration_error(confidence, right)
    curve = coverage_curve(confidence, right, n)
    steps = [next((i for i, point in enumerate(curve) if point["coverage"] >= least), None) for least in range(5, 101, 5)]
    found = {"n": len(confidence), "calibration_error": error, "bins": bins,
             "coverage": [curve[i] for i in sorted({i for i in steps if i is not None})]}
    if choose:
        found["thresholds"] = {str(precision): threshold(curve, precision, 100 * LEAST / n) for precision in PRECISIONS}
    return found


def advice(thresholds, precision, split, n):
    """One line: from which confidence on answers have this precision, chosen on a split of n products."""
    point = thresholds[str(precision)]
    if point is None:
        return f"no confidence gives {LEAST} answers or more of {precision} % precision ({split}, n = {n})"
    return (f"for {precision} % precision answer only with confidence {point['min_confidence']:.4f} or more (--min-confidence), "
            f"which covers {point['coverage']:.1f} % ({split}: {round(point['coverage'] * n / 100)} of {n} products)")


# ------------------------------------------------------------------------------------------------ the answers of a run


def calibrate(run, products, found, values):
    """Fit the temperature of scored values on val's products and save it with the run; the answers at that temperature.

    Without a product whose gold value is among the values there is nothing to fit, and the temperature is 1.
    """
    known = [(a.log_probs, values[p.attribute].index(p.value)) for p, a in zip(products, found) if p.value in values[p.attribute]]
    temperature = fit_temperature(*zip(*known)) if known else 1.0
    run.calibration = save_temperature(run.folder, temperature, len(known), sum(map(len, values.values())))
    return at_temperature(products, found, values, temperature)


def at_temperature(products, found, values, temperature):
    """Scored answers with their probabilities at another temperature; the values stay the same."""
    return [likeliest(values[p.attribute], a.log_probs, temperature) for p, a in zip(products, found)]


def measure(run, products, found, values, split):
    """What metrics.json says of the answers of a split: their confidence, and free ones outside the known values.

    values  {attribute: values} that were chosen from, or None for free answers
    """
    def sure(answers):
        answered = [(a.probability, a.value == p.value) for p, a in zip(products, answers) if a.value]
        return [p for p, _ in answered], [right for _, right in answered]

    confidence = summary(*sure(found), len(products), choose=split.startswith("val"))
    if values is None:
        answers = outside(products, found, run.values)
        return {"confidence": confidence, "outside": {"n": sum(sum(c.values()) for c in answers.values()), "answers": answers}}
    confidence["temperature"] = run.value_temperature
    confidence["calibration_error_at_1"] = calibration_error(*sure(at_temperature(products, found, values, 1.0)))[0]
    return {"confidence": confidence}


def lines(run, metrics, split):
    """The same as lines of text."""
    confidence, where = metrics["confidence"], f"{split}, n = {metrics['confidence']['n']}"
    if metrics["min_confidence"]:
        yield (f"answers below probability {metrics['min_confidence']} were left empty: {confidence['n'] - metrics['answered']} "
               f"of {confidence['n']}")
    if "outside" in metrics:
        n = metrics["outside"]["n"]
        found = [(count, f"{attribute}: {answer!r} ({count})") for attribute, counts in metrics["outside"]["answers"].items()
                 for answer, count in counts.items()]
        named = [text for _, text in sorted(found, key=lambda pair: -pair[0])]
        yield "; ".join([f"answers outside the attribute's known values: {n} of {metrics['n']} ({100 * n / metrics['n']:.1f} %)",
                         *named[:5], *["…"][:len(named[5:])]])
    else:
        yield temperature_note(run)
    before = f"; at temperature 1: {confidence['calibration_error_at_1']:.1f} %" if confidence.get("temperature", 1) != 1 else ""
    yield f"expected calibration error: {confidence['calibration_error']:.1f} %{before} ({where}, {BINS} bins)"
    if "thresholds" in confidence:
        yield advice(confidence["thresholds"], ADVISED, split, metrics["n"])


def temperature_note(run):
    """One line: the temperature of scored values, and where it comes from."""
    if run.calibration is None:
        return ("probabilities of values: not calibrated (temperature 1); to calibrate them: "
                f"python evaluate.py {run.folder} --constrain --split val")
    if not run.calibration["n"]:
        return "probabilities of values: not calibrated (temperature 1); val has no products whose gold value is in the list"
    return (f"probabilities of values: temperature {run.value_temperature:.2f}, fitted on val "
            f"(n = {run.calibration['n']}, {run.calibration['values']} values)")
