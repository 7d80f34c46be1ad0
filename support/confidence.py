"""How far the probability of an answer can be trusted: calibration, and coverage against accuracy.

The confidence of an answer is its probability.  Calibrated means: of the answers with confidence 0.8, 80 %
are right.

`given` is a list of pairs: of each answer that is not empty, its probability, and whether it is right.

Source of the calibration error and of the temperature: Guo et al. 2017, On Calibration of Modern Neural
Networks (arXiv 1706.04599), sections 2 and 4.2.
"""

import math
from collections import Counter
from itertools import groupby
from shlex import quote
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from base.console import write_json
from support.answering import likeliest

BINS = 10
PRECISION = 95                                  # per cent: that val's threshold is chosen for
LEAST = 30                                      # on fewer products, a threshold or a temperature is chance
TEMPERATURES = [0.05 * 400 ** (i / 500) for i in range(501)]    # that are tried: 0.05 to 20, 1.2 % apart


# ------------------------------------------------------------------------------------------------ calibration


def calibration_error(given):
    """(expected calibration error in per cent, a dict for each bin that holds answers).

    10 bins of equal width: [0, 0.1), [0.1, 0.2), ... [0.9, 1].  In each, the mean confidence is compared with
    the share of right answers.  The error is the mean of their absolute differences, weighted by the number
    of answers.
    """
    bins = []
    error = 0.0
    for i, members in groupby(sorted(given), lambda pair: min(int(pair[0] * BINS), BINS - 1)):
        probabilities, right = zip(*members)
        n = len(right)
        confidence = 100 * fmean(probabilities)
        accuracy = 100 * fmean(right)
        bins.append({"from": i / BINS, "n": n, "confidence": confidence, "accuracy": accuracy})
        error += n * abs(confidence - accuracy) / len(given)
    return error, bins


def fit_temperature(log_probs, gold):
    """The T of TEMPERATURES with the lowest negative log-likelihood of the gold values under
    softmax(log_probs / T).

    log_probs  for each product the log-probabilities of the values that it can choose from
    gold       for each product the index of its gold value among them
    """
    rows = [torch.tensor(row) for row in log_probs]
    logits = pad_sequence(rows, batch_first=True, padding_value=-math.inf)
    return min(TEMPERATURES, key=lambda T: F.cross_entropy(logits / T, torch.tensor(gold)))


def calibrate(run, products, answers, values):
    """Fit the temperature of scored values on val's products and save it with the run; the answers at that
    temperature.

    Without a product whose gold value is among the values there is nothing to fit, and the temperature is 1.
    """
    scored = [(a.log_probs, values[p.attribute].index(p.value))
              for p, a in zip(products, answers) if p.value in values[p.attribute]]
    temperature = fit_temperature(*zip(*scored)) if scored else 1.0
    run.calibration = {"run": run.id, "temperature": temperature, "n": len(scored),
                       "values": sum(map(len, values.values()))}
    write_json(run.folder / "calibration.json", run.calibration)
    return [likeliest(values[p.attribute], a.log_probs, temperature) for p, a in zip(products, answers)]


# --------------------------------------------------------------------------------------------------- coverage


def coverage_curve(given, n):
    """[{min_confidence, n, coverage, accuracy}, ...]: what is left if only answers of that confidence or more
    are given.

    n         number of products; in the list, of answers.  Products without an answer are never covered
    coverage  answers / products, in per cent; it rises along the list
    accuracy  right answers / answers (their precision), in per cent
    The confidences are rounded down to 4 digits, so min_confidence can be printed, and typed again as it is.
    """
    curve = {}
    correct = 0
    for count, (probability, right) in enumerate(sorted(given, reverse=True), start=1):
        correct += right
        p = math.floor(probability * 1e4) / 1e4
        # Of answers with the same confidence, the last one replaces the others: they are given together.
        curve[p] = {"min_confidence": p, "n": count, "coverage": 100 * count / n,
                    "accuracy": 100 * correct / count}
    return list(curve.values())


# --------------------------------------------------------------------------------------- the answers of a run


def measure(run, products, answers, values, fit):
    """What metrics.json says of a split's answers: their confidence, and free answers outside the known
    values.

    values  {attribute: values} that were chosen from, or None for free answers
    fit     whether these are val's products, on which a threshold may be chosen: the point of the coverage
            curve that covers most with PRECISION or more, and LEAST answers or more
    """
    pairs = list(zip(products, answers))
    given = [(a.probability, a.value == p.value) for p, a in pairs if a.value]
    error, bins = calibration_error(given)
    curve = coverage_curve(given, len(products))
    points = curve[::-max(1, len(curve) // 20)]         # some 20, to be drawn
    confidence = {"n": len(given), "calibration_error": error, "bins": bins, "coverage": points}
    if fit:
        enough = [point for point in curve if point["accuracy"] >= PRECISION and point["n"] >= LEAST]
        confidence["threshold"] = enough[-1] if enough else None
    if values is None:
        outside = Counter(f"{p.attribute}: {a.value!r}" for p, a in pairs
                          if a.value and a.value not in run.values.get(p.attribute, ()))
        return {"confidence": confidence, "outside": dict(outside.most_common())}
    confidence["temperature"] = run.value_temperature
    if run.calibration:
        at_1 = [(likeliest(values[p.attribute], a.log_probs).probability, a.value == p.value)
                for p, a in pairs]
        confidence["calibration_error_at_1"], _ = calibration_error(at_1)
    return {"confidence": confidence}


def lines(run, metrics):
    """What `measure` says, as lines of text.  metrics: all of metrics.json."""
    confidence = metrics["confidence"]
    split = f"{metrics['split']}, n = {confidence['n']}"
    if metrics["min_confidence"]:
        empty = confidence["n"] - metrics["answered"]
        yield (f"answers below probability {metrics['min_confidence']} were left empty: {empty} of "
               f"{confidence['n']}")
    if "outside" in metrics:
        yield f"answers outside the attribute's known values: {outside_text(metrics, 5)}"
    else:
        yield temperature_note(run)
    yield f"expected calibration error: {error_text(confidence)} ({split}, {BINS} bins)"
    if point := confidence.get("threshold"):
        yield (f"for {PRECISION} % precision answer only with confidence {point['min_confidence']:.4f} or "
               f"more (--min-confidence), which covers {point['coverage']:.1f} % ({metrics['split']}: "
               f"{point['n']} of {metrics['n']} products)")
    elif "threshold" in confidence:
        yield f"no confidence gives {LEAST} answers or more of {PRECISION} % precision ({split})"


def error_text(confidence):
    """The calibration error as text, with that at temperature 1 beside it if another one was fitted."""
    text = f"{confidence['calibration_error']:.1f} %"
    if "calibration_error_at_1" in confidence:
        text += f"; at temperature 1: {confidence['calibration_error_at_1']:.1f} %"
    return text


def outside_text(metrics, most):
    """How many answers are outside the known values, and the `most` frequent of them, as text."""
    n = sum(metrics["outside"].values())
    named = [f"{answer} ({count})" for answer, count in metrics["outside"].items()]
    return "; ".join([f"{n} of {metrics['n']} ({100 * n / metrics['n']:.1f} %)", *named[:most]])


def temperature_note(run):
    """One line: the temperature of scored values, where it comes from, and whether it can be trusted."""
    if not run.calibration:
        return ("probabilities of values: not calibrated (temperature 1); to calibrate them: "
                f"python evaluate.py {quote(str(run.folder))} --constrain --split val")
    T = run.value_temperature
    n = run.calibration["n"]
    note = (f"probabilities of values: temperature {T:.2f}, fitted on val (n = {n}, "
            f"{run.calibration['values']} values)")
    if n < LEAST or T in (TEMPERATURES[0], TEMPERATURES[-1]):
        note += "; do not trust it: it rests on too few products, or is the end of the range"
    return note
