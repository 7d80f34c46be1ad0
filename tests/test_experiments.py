"""The experiments count what they say: tables by hand, intervals that a formula gives, and both sides of the
speed comparison on a tiny model.
"""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, command, randomize
from test_eiven import CLS_TOKENS, EXAMPLES

from base.console import UserError, write_json
from base.tsv import COLUMNS, read_tsv, write_tsv
from data import Product, read_split
from eiven import EIVEN
from experiments import baselines, comparing, count, figures, gpu, paper_tables, peer, speed, table_4
from llama import LLAMA_7B, LLaMA


METHODS = ("bag-of-words", "discriminative", "full", "no-lbc")          # columns of the pages' tables


def product(i, value, title="", attribute="Pattern"):
    return Product(f"P{i}", f"P{i}.jpg", "Clothing", title, attribute, value)


def write_run(folder, *answers):
    """A run whose products are (attribute, gold value, answer)."""
    rows = [[f"P{i}", "", "", "", *answer] for i, answer in enumerate(answers)]
    write_tsv(folder / "predictions.tsv", rows, [*COLUMNS, "prediction"])
    f1 = 100 * sum(gold == answer for _, gold, answer in answers) / len(answers)
    write_json(folder / "metrics.json", {"micro_f1": f1, "n": len(answers), "sources": "here"})


# ---------------------------------------------------------------------------------------- tables, intervals


def test_tables_show_means_and_the_papers_figures(tmp_path):
    for seed, answer in enumerate(("Plaid", "Argyle")):
        write_run(tmp_path / f"general-50-full-seed{seed}", ("Pattern", "Plaid", answer))
    page = paper_tables.tables(tmp_path, "general", [50, None], [0, 1])
    assert "| EIVEN | 50.0 ± 70.7 (2) | - | 57.31 / 64.98 |" in page and "here n = 1" in page


def test_runs_with_other_flags_do_not_enter_the_same_tables(tmp_path):
    paper_tables.same_flags(tmp_path, "general")
    with pytest.raises(UserError, match="name another folder with --runs"):
        paper_tables.same_flags(tmp_path, "general", "--llama", "X")


def test_the_interval_is_the_normal_one_for_many_products():
    """Equal in all seeds, so only products vary: mean ± 1.96 standard errors."""
    x = np.random.default_rng(1).random(2000)
    expected = x.mean() + 1.96 * x.std() / 2000 ** 0.5 * np.array([0, -1, 1])
    interval = comparing.interval(np.stack([x] * 3), np.random.default_rng(0))
    assert interval == pytest.approx(100 * expected, abs=0.1)


def test_arms_are_compared_by_seed(tmp_path):
    """The first arm is right once, wrong twice inside a family and twice outside; the second always right."""
    answers = [("Plaid", "Plaid"), ("Plaid", "Argyle"), ("Plaid", "Floral"), ("Round Toe", "Pointed Toe"),
               ("Flat", "Low Heel")]
    write_run(tmp_path / "a", *[("Pattern", *pair) for pair in answers])
    write_run(tmp_path / "b", *[("Pattern", gold, gold) for gold, _ in answers])
    [cells] = comparing.compare({"a": [tmp_path / "a"] * 2, "b": [tmp_path / "b"] * 2})
    assert [cell.split(" (")[0] for cell in cells] == ["b - a", "+80.0", "-40.0", "-40.0", "+80.00 +80.00"]


def test_the_data_set_without_an_attribute(tmp_path):
    """Its train and val do not have the attribute, its test has nothing else."""
    for split in "train", "val", "test":
        write_tsv(tmp_path / "data" / "toys" / f"{split}.tsv", [["P0", "", "", "", "Pattern", "Plaid"],
                                                                ["P1", "", "", "", "Material", "Wool"]])
    table_4.write_without("Pattern", tmp_path, tmp_path / "data", "toys")
    assert [p.id for split in ("train", "test") for p in read_split(tmp_path, "toys", split)] == ["P1", "P0"]


# ---------------------------------------------------------------------------------------- baselines, figures


def test_the_extractive_ceiling_counts_whole_words():
    titles = {"a ROUND box": "Round", "surround box": "Round", "polka-dot dress": "Polka Dot",
              "dot": "Polka Dot"}
    products = [product(0, value, title) for title, value in titles.items()]
    assert baselines.extractive_ceiling(products) == 50


def test_tf_idf_by_hand():
    """`red` stands in both labelled texts, `hat` in one; `blue` in none, so it is left out."""
    rows, asked = baselines.tf_idf(["Red hat", "red-red"], ["hat, hat: red", "blue"])
    rare = math.log(3 / 2) + 1                          # the weight of hat; that of red is ln(3 / 3) + 1 = 1
    length = math.hypot(rare, 1), math.hypot(2 * rare, 1)
    expected = [[rare / length[0], 1 / length[0]], [0, 1], [2 * rare / length[1], 1 / length[1]], [0, 0]]
    assert np.allclose(torch.cat([rows, asked]), expected)          # the columns are sorted: hat, red


def test_the_logistic_regression_reaches_the_optimum():
    """There the gradient is 0.  In numpy: C x' (p - y) + weight; the bias has no weight decay."""
    draw = np.random.default_rng(0)
    x, target = draw.random((12, 5)), np.arange(12) % 3
    weight = baselines.logistic_regression(torch.tensor(x), torch.tensor(target)).numpy()
    p = np.exp(x @ weight[:-1] + weight[-1])
    error = baselines.C * (p / p.sum(1, keepdims=True) - np.eye(3)[target])
    assert abs(weight).max() > 0.1
    assert np.allclose([*x.T @ error + weight[:-1], error.sum(0)], 0, atol=1e-5)


def test_the_classifier_learns_from_the_modality_that_tells():
    """The photo tells the value of Shape, the text that of Material; the other modality is noise."""
    draw = torch.Generator().manual_seed(0)
    embedded = {}
    for i in range(120):
        modalities = torch.randn(2, 6, generator=draw)
        modalities[i % 2, 0] += 6 if i // 2 % 2 else -6
        embedded[product(i, "AB"[i // 2 % 2], attribute=("Shape", "Material")[i % 2])] = modalities
    method = partial(baselines.discriminative, embedded=embedded, seed=0)
    products = list(embedded)
    answers = baselines.answer(method, products[:40], products[40:])
    assert sum(answer == p.value for p, answer in zip(products[40:], answers)) > 72


def test_words_only_needs_neither_model_nor_photos(tmp_path):
    """The folder has texts alone, and no LLaMA is given.  A word tells two values, each of its attribute."""
    told = "Checks Pattern Plaid, diamonds Pattern Argyle, diamonds Material Wool, checks Material Metal"
    rows = [["P", "", "Shirts", *cells.split()] for cells in told.split(",")]
    for split, n in (("train", 3), ("test", 2)):
        write_tsv(tmp_path / "shirts" / f"{split}.tsv", rows * n)
    arguments = f"--words-only --dataset shirts --data {tmp_path} --labels 2 --seeds 0 --runs {tmp_path}"
    done = command("-m experiments.baselines", arguments.split(), tmp_path)
    assert "shirts, 2 labels, seed 0, bag-of-words: micro-F1 100.00, test split, n = 8" in done.out
    assert "DEMO" not in done.out
    assert paper_tables.scores(tmp_path, "shirts", "bag-of-words", 2, [0]) == [100]


def test_figures_show_points_and_products_that_differ(tmp_path):
    """100 % is at the top line, 40; the only column is in the middle, 212."""
    write_run(tmp_path / "general-10-full-seed0", ("Pattern", "Plaid", "Plaid"))
    assert "<circle cx='212.0' cy='40.0' r='3'/>" in figures.figure_4(tmp_path, "general", [10], [0])
    products = [product(i, "Plaid", f"title {i}") for i in range(2)]
    page = figures.figure_5(products, tmp_path, ["Plaid", "Plaid"], ["Plaid", ""])
    assert "title 0" not in page and "title 1" in page and "without: (no answer) (wrong)" in page


def test_figure_6_is_a_difference():
    """Comparisons turn two of three wrong answers right: the largest changes are shown first."""
    products = [product(i, "Plaid") for i in range(4)]
    answers = ["Plaid", "Plaid", "Argyle", "Plaid"], ["Argyle", "Argyle", "Argyle", "Plaid"]
    page = figures.figure_6(products, *answers)
    assert re.findall("Plaid → .*?(?=<)", page) == ["Plaid → Plaid: +2", "Plaid → Argyle: -2"]


def test_the_pages_have_the_scores_of_the_file():
    """results.md has each line of the table, and each interval; a line of README's table is one of them."""
    results, readme = (Path(PROJECT, page).read_text(encoding="utf-8")
                       for page in ("docs/results.md", "README.md"))
    table = {}
    for _, row in read_tsv(PROJECT / "docs" / "scores.tsv", "", figures.SCORES):
        f1s = np.array(row["micro_f1"].split(), float)
        if row["interval"]:
            interval = "{:+.1f} ({:+.1f} to {:+.1f})".format(f1s.mean(), *map(float, row["interval"].split()))
            assert interval in " ".join(results.split())
        else:
            cells = table.setdefault(f"{row['dataset']}, {row['labels']} labels", dict.fromkeys(METHODS, "-"))
            cells[row["method"]] = f"{f1s.mean():.1f}" + (f" ± {f1s.std(ddof=1):.1f}" if len(f1s) > 1 else "")
    lines = {f"| {' | '.join([name, *cells.values()])} |" for name, cells in table.items()}
    assert len(lines) > 7 and lines <= set(results.splitlines())
    shown = {line for line in readme.splitlines() if re.match(r"\| (demo|\w+ texts), ", line)}
    assert len(shown) > 6 and shown <= lines


def test_the_plots_are_those_of_the_file():
    for name, plot in figures.draw_scores(PROJECT / "docs" / "scores.tsv").items():
        assert (PROJECT / "docs" / name).read_text(encoding="utf-8") == plot, (
            "python -m experiments.figures --scores docs/scores.tsv draws it again")


# ---------------------------------------------------------------------------------------- speed, memory


@pytest.fixture
def subject(tiny):
    pytest.importorskip("transformers")
    model = randomize(EIVEN(*tiny, 24, adapter_dim=4, projector_dim=6))
    return "tiny", model, EXAMPLES, CLS_TOKENS


def test_both_sides_have_the_same_loss_gradients_and_answers(subject, capsys):
    """They are compared before they are timed."""
    speed.bench_train(1, *subject[:2], [subject[2]], subject[3])
    speed.bench_generate(1, *subject)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "4 answers the same" in lines[1]


def test_a_difference_is_an_error(subject, monkeypatch):
    loss = peer.Peer.loss
    monkeypatch.setattr(peer.Peer, "loss", lambda *given: loss(*given) * 1.001)
    with pytest.raises(AssertionError, match="tiny: loss: ours and that of transformers differ"):
        speed.bench_train(1, *subject[:2], [subject[2]], subject[3])


def test_operations_are_those_of_a_gpu():
    """Two matmuls, a norm, a product and attention, in both directions; views are none."""
    x = torch.ones(2, 3, 4, 8, device="meta", requires_grad=True)
    with count.OnGpu(), count.Operations() as forward:
        q = F.rms_norm(x.flatten(0, 2) @ x[0, 0].T @ x[0, 0], (8,), None, 1e-6).view(x.shape)
        y = F.scaled_dot_product_attention(q * 2, q, q, is_causal=True)
    assert forward.started == 5
    with count.OnGpu(), count.Operations() as backward:
        torch.autograd.grad(y, q, y)
    assert backward.started == 1 + 1 + 2                # attention, the product, and two sums of gradients


def test_ours_starts_less_than_transformers(subject, capsys):
    """A training step, and a token."""
    _, model, rows, cls_tokens = subject
    model, cls_tokens = model.to("meta"), cls_tokens.to("meta")
    count.count("tiny", model, peer.Peer(model), rows, 2, cls_tokens)
    step, theirs, token, their_token = map(int, re.findall(r"(\d+) operations", capsys.readouterr().out))
    assert 100 < step < theirs and 50 < token < their_token


def test_kept_bytes_grow_with_the_tokens_alone():
    """On the meta device.  With attention weights, which a GPU does not keep, they would grow faster."""
    with torch.device("meta"):
        model = EIVEN(LLaMA(LLAMA_7B).half(), None, 768)
    first, second, third = (count.kept(model, tokens) * tokens for tokens in (128, 256, 384))
    assert second - first == pytest.approx(third - second) and second > first


def test_a_part_that_takes_too_long_is_stopped(monkeypatch, tmp_path, capsys):
    """What it has printed is kept, and the next part is started."""
    parts = "slow 2 -c print(1,flush=True);__import__('time').sleep(60)\nnext 60 -c print(2)"
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
    gpu.main()
    assert re.findall(r"\d\n=== .*code (.*)", capsys.readouterr().out) == ["stopped at its limit", "0"]
    assert (tmp_path / "out" / "slow.txt").read_text() == "1\n"
