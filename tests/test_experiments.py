"""The experiments count what they say: tables by hand, intervals that a formula gives, and both sides of the
speed comparison on a tiny model.
"""

import numpy as np
import pytest
import torch
from conftest import randomize

from base.console import UserError, write_json
from base.tsv import COLUMNS, write_tsv
from data import Encoded, Product, read_split
from eiven import EIVEN
from experiments import baselines, comparing, figures, memory_7b, paper_tables, peer, speed, table_4
from experiments.random_weights import LLAMA_7B
from llama import LLaMA


def product(i, value, title="", attribute="Pattern"):
    return Product(f"P{i}", f"P{i}.jpg", "Clothing", title, attribute, value)


def write_run(folder, *answers, steps=10):
    """A run whose products are (attribute, gold value, answer)."""
    rows = [[f"P{i}", "", "", "", *answer] for i, answer in enumerate(answers)]
    write_tsv(folder / "predictions.tsv", rows, [*COLUMNS, "prediction"])
    (folder / "log.jsonl").write_text('{"loss": 1}\n' * steps)
    f1 = 100 * sum(gold == answer for _, gold, answer in answers) / len(answers)
    write_json(folder / "metrics.json", {"micro_f1": f1, "n": len(answers), "sources": "here"})


# ---------------------------------------------------------------------------------------- tables, intervals


def test_tables_show_means_and_the_papers_figures(tmp_path):
    for seed, answer in enumerate(("Plaid", "Argyle")):
        write_run(tmp_path / f"general-50-full-seed{seed}", ("Pattern", "Plaid", answer))
    page = paper_tables.tables(tmp_path, "general", ["50", "all"], [0, 1])
    assert "| EIVEN | 50.0 ± 70.7 (2) | - | 57.31 / 64.98 |" in page and "here n = 1" in page


def test_runs_with_other_flags_do_not_enter_the_same_tables(tmp_path):
    paper_tables.same_flags(tmp_path, "general")
    with pytest.raises(UserError, match="name another folder with --runs"):
        paper_tables.same_flags(tmp_path, "general", "--llama", "X")


def test_errors_inside_a_family_and_outside(tmp_path):
    write_run(tmp_path, ("Pattern", "Plaid", "Plaid"), ("Pattern", "Plaid", "Argyle"),
              ("Pattern", "Plaid", "Floral"), ("Toe Style", "Round Toe", "Pointed Toe"),
              ("Heel Height", "Flat", "Low Heel"), steps=7)
    outcomes, steps = comparing.read_run(tmp_path)
    assert outcomes.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]] and steps == 7


def test_the_interval_is_the_normal_one_for_many_products():
    """Equal in all seeds, so only products vary: mean ± 1.96 standard errors."""
    x = np.random.default_rng(1).random(2000)
    expected = x.mean() + 1.96 * x.std() / 2000 ** 0.5 * np.array([0, -1, 1])
    interval = comparing.interval(np.stack([x] * 3), np.random.default_rng(0))
    assert interval == pytest.approx(100 * expected, abs=0.1)


def test_arms_are_compared_by_seed(tmp_path):
    runs = {"no-lbc": {}, "full": {}}
    for arm, answer in (("no-lbc", "Argyle"), ("full", "Plaid")):
        write_run(tmp_path, ("Pattern", "Plaid", answer))
        runs[arm] = {seed: comparing.read_run(tmp_path) for seed in (1, 2)}
    page = comparing.compare("general-10", runs)
    assert "| no-lbc | 10 | 0.0 ± 0.0 (2) | 100.0 ± 0.0 (2) | 0.0 ± 0.0 (2) |" in page
    assert "| full - no-lbc | 2 | +100.0 (+100.0 to +100.0) | -100.0" in page


def test_the_data_set_without_an_attribute(tmp_path):
    """Its train and val do not have the attribute, its test has nothing else."""
    both = [product(0, "Plaid"), product(1, "Wool", attribute="Material")]
    splits = {"train": both, "test": both}
    table_4.write_without("Pattern", tmp_path, tmp_path, "general", splits)
    assert [p.id for split in splits for p in read_split(tmp_path, "general", split)] == ["P1", "P0"]


# ---------------------------------------------------------------------------------------- baselines, figures


def test_the_extractive_ceiling_counts_whole_words():
    titles = {"a ROUND box": "Round", "surround box": "Round", "polka-dot dress": "Polka Dot",
              "dot": "Polka Dot"}
    products = [product(0, value, title) for title, value in titles.items()]
    assert baselines.extractive_ceiling(products) == 50


def test_the_classifier_learns_from_the_modality_that_tells():
    """The photo tells the value of Shape, the text that of Material; the other modality is noise."""
    draw = torch.Generator().manual_seed(0)
    splits = []
    for n in (40, 20, 80):
        modalities = [torch.randn(n, 6, generator=draw) for _ in range(2)]
        for i in range(n):
            modalities[i % 2][i, 0] += 6 if i // 2 % 2 else -6
        products = [product(i, "AB"[i // 2 % 2], attribute=("Shape", "Material")[i % 2]) for i in range(n)]
        splits.append((products, modalities))
    assert baselines.discriminative(*zip(*splits), seed=0) > 90


def test_figures_show_points_and_products_that_differ(tmp_path):
    write_run(tmp_path / "general-10-full-seed0", ("Pattern", "Plaid", "Plaid"))
    assert "M50.00 100.00h0" in figures.figure_4(tmp_path, "general", ["10"], [0])
    products = [product(i, "Plaid", f"title {i}") for i in range(2)]
    page = figures.figure_5(products, tmp_path, ["Plaid", "Plaid"], ["Plaid", ""])
    assert "title 0" not in page and "title 1" in page and "without: (no answer) (wrong)" in page


# ---------------------------------------------------------------------------------------- speed, memory


@pytest.fixture
def subject(tiny):
    pytest.importorskip("transformers")
    llama, tokenizer = tiny
    model = randomize(EIVEN(llama, tokenizer, 24, adapter_dim=4, projector_dim=6))
    texts = [((0,), "What is it?", "Rain Boots"), ((1, 2), "What is it, this shoe?", "Flat"),
             ((), "No photo", "No.")]
    rows = [Encoded(photos, tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id])
            for photos, prompt, answer in texts]
    return "tiny", model, rows, torch.randn(3, 2, 24)


def test_both_sides_have_the_same_loss_gradients_and_answers(subject, capsys):
    """They are compared before they are timed; 512 tokens of padding change nothing."""
    speed.bench_train(1, *subject)
    speed.bench_generate(1, *subject)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "all answers the same" in lines[3]


def test_a_difference_is_an_error(subject, monkeypatch):
    loss = peer.Peer.loss
    monkeypatch.setattr(peer.Peer, "loss", lambda *given: loss(*given) * 1.001)
    with pytest.raises(AssertionError, match="tiny: loss: ours and that of transformers differ"):
        speed.make_steps(*subject)
    monkeypatch.setattr(peer.Peer, "generate", lambda self, batch, *given: [[5]] * len(batch))
    with pytest.raises(UserError, match="transformers gives other answers"):
        speed.bench_generate(1, *subject)


def test_kept_bytes_grow_with_the_tokens_alone():
    """On the meta device.  With attention weights, which a GPU does not keep, they would grow faster."""
    with torch.device("meta"):
        model = EIVEN(LLaMA(LLAMA_7B).half(), None, 768)
    first, second, third = (memory_7b.kept(model, tokens) * tokens for tokens in (128, 256, 384))
    assert second - first == pytest.approx(third - second) and second > first
