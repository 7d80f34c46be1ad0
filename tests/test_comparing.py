"""The comparison of arms: counts by hand, and an interval that a formula gives."""

import csv
import json

import numpy as np
import pytest

from base.console import UserError
from base.tsv import COLUMNS, write_tsv
from experiments import comparing, paper_tables


def write_run(folder, predictions, steps):
    """A run folder: predictions is a list of (attribute, gold, prediction)."""
    folder.mkdir(parents=True)
    write_tsv(folder / "predictions.tsv",
              [[f"P{i}", "", "", "", attribute, gold, said] for i, (attribute, gold, said) in enumerate(predictions)],
              [*COLUMNS, "prediction"])
    (folder / "log.jsonl").write_text("{}\n" * steps)
    (folder / "metrics.json").write_text(json.dumps({"answered": len(predictions)}))


def test_errors_inside_a_family_and_outside(tmp_path):
    write_run(tmp_path / "a", [("Pattern", "Plaid", "Plaid"), ("Pattern", "Plaid", "Argyle"), ("Pattern", "Plaid", "Floral"),
                               ("Pattern", "Plaid", "checks"), ("Toe Style", "Round Toe", "Pointed Toe")], 7)
    outcome, steps = comparing.read_run(tmp_path / "a")
    assert [tuple(map(int, outcome[f"P{i}", a])) for i, a in enumerate(["Pattern"] * 4 + ["Toe Style"])] == [
        (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1)]
    assert steps == 7


def test_families_hold_every_value_of_footwear_once():
    for families in comparing.FAMILIES.values():
        values = [value for family in families for value in family]
        assert len(values) == len(set(values))


def test_the_interval_is_the_normal_one_for_many_products():
    """One value in [0, 1] for each product, equal in all seeds: mean ± 1.96 standard errors."""
    draw = np.random.default_rng(1)
    one = draw.random(2000)
    mean, low, high = comparing.interval(np.stack([one, one, one]), draw)
    error = 100 * one.std() / np.sqrt(2000)
    assert mean == pytest.approx(100 * one.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    # Products that agree, seeds that differ: the seeds alone make the interval.
    _, low, high = comparing.interval(np.array([[0.0] * 50, [1.0] * 50]), draw)
    assert (low, high) == (0, 100)


def test_arms_are_compared_by_seed_and_product(tmp_path):
    right, wrong = [("Pattern", "Plaid", "Plaid")], [("Pattern", "Plaid", "Stripe")]
    for seed in (1, 2):
        write_run(tmp_path / f"w-10-no-lbc-seed{seed}", wrong * 4, 5)
        write_run(tmp_path / f"w-10-no-lbc-twice-seed{seed}", wrong * 2 + right * 2, 10)
        write_run(tmp_path / f"w-10-full-seed{seed}", wrong * 2 + right * 2, 10)
    found = {arm: {seed: tmp_path / f"w-10-{arm}-seed{seed}" for seed in (1, 2)} for arm in ("no-lbc", "no-lbc-twice", "full")}
    page = comparing.compare("w", "10", found)
    assert "| no comparisons, as many steps | 10 | 2 | 50.0 ± 0.0 | 50.0 | 0.0 |" in page
    assert "| judge_last - no comparisons, as many steps | 2 | +0.0 (+0.0 to +0.0), not significant" in page
    rows = list(csv.reader(page.splitlines(), delimiter="|"))
    assert any(cell.strip().startswith("+50.0") for row in rows for cell in row)


def test_without_families_no_errors_are_counted_apart(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"w-10-full-seed{seed}", [("Neckline", "Crew Neck", "V Neck")], 10)
        write_run(tmp_path / f"w-10-no-lbc-twice-seed{seed}", [("Neckline", "Crew Neck", "Crew Neck")], 10)
    page = comparing.compare("w", "10", {arm: {seed: tmp_path / f"w-10-{arm}-seed{seed}" for seed in (1, 2)}
                                         for arm in ("full", "no-lbc-twice")})
    assert "| judge_last | 10 | 2 | 0.0 ± 0.0 | - | - |" in page
    assert "| 2 | -100.0 (-100.0 to -100.0), significant | - | - |" in page


@pytest.mark.parametrize("more, said", [({"micro_f1": "95"}, "micro_f1 is '95', but must be a number from 0 to 100"),
                                        ({"merged": None}, "has no 'merged'"), ({"n": -1}, "n is -1, but must be")])
def test_scores_that_were_edited_are_refused(tmp_path, more, said):
    metrics = {"micro_f1": 95, "n": 10, "sources": "", "merged": False, "constrained": False, "temperature": 0.1, "top_p": 0.75}
    path = paper_tables.run_folder(tmp_path, "general", "full", "10", 0) / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(metrics))
    assert paper_tables.scores(tmp_path, "general", "full", "10", [0, 1]) == ([95], 10)
    path.write_text(json.dumps(metrics | more))
    with pytest.raises(UserError, match=said):
        paper_tables.scores(tmp_path, "general", "full", "10", [0])
