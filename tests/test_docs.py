"""README and docs: every link leads somewhere, and every command and flag exists."""

import pkgutil
import re
import shlex
from functools import lru_cache

import pytest
import torch
from conftest import PROJECT, command

from adapters import Adapter
from base.tsv import COLUMNS, write_tsv
from eiven import Projector, cls_layers, nucleus
from experiments import one_example
from llama import LLAMA_7B
from vit import ViTConfig

PAGES = {path.name: path for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}


def commands(text):
    """("train.py" or "-m module", arguments) of each command in code blocks and code spans."""
    text = text.replace("\\\n", " ")                    # a command on two lines
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [line for block in blocks for line in block.splitlines()] + spans:
        for part in re.split(r"#|&&|\|| > ", line):
            call = re.search(r"(?:python3?|torchrun .*?) (-m [\w.]+|\w+\.py)( .*)?$", part)
            if call and not re.match(r"-m (pip|venv|pytest)\b", call[1]):
                yield call[1], tuple(shlex.split(call[2] or ""))


FOUND = sorted({(name, *call) for name, text in TEXTS.items() for call in commands(text)})


@lru_cache
def help_of(script, arguments, folder):
    done = command(script, [*arguments, "--help"], folder)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.parametrize("page, script, arguments", FOUND,
                         ids=[" ".join([*row[:2], *row[2]]) for row in FOUND])
def test_every_command_and_flag_exists(page, script, arguments, tmp_path_factory):
    assert pkgutil.resolve_name(script.removeprefix("-m ").removesuffix(".py"))
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    if flags:
        folder = tmp_path_factory.getbasetemp()
        known = help_of(script, arguments[:script == "-m dataset"], folder)
        if script == "-m experiments.paper_tables":     # it hands on what it does not know
            known += help_of("train.py", (), folder)
        for flag in flags:
            assert re.search(rf"{flag}\b(?!-)", known), f"{page}: {script} has no {flag}"


def test_the_commands_are_found():
    """The test above would pass if the pages were read wrongly."""
    assert ("README.md", "train.py", ("--dataset", "general", "--labels", "50")) in FOUND and len(FOUND) > 40


def anchors(text):
    """GitHub's anchors of the headings of a page."""
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """And every file that is named exists."""
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) + re.findall(r'(?:src|href)="([^"]+)"', TEXTS[page])
    for link in links:
        name, _, anchor = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert link.startswith("https://") or target.exists(), f"{page} links to {link}"
        assert not anchor or name.startswith("https://") or anchor in anchors(TEXTS[target.name]), link
    folders = "base|support|tools|dataset|demo|experiments|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", TEXTS[page]):
        assert (PROJECT / name).is_file(), f"{page} names {name}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_.]+\.\w+)`", TEXTS["code-map.md"]))))
def test_what_the_code_map_names_is_there(name):
    assert (PROJECT / name).exists() or pkgutil.resolve_name(name)


def test_the_exercises_can_be_done():
    """What they tell to replace stands in the code once, and the tests that they name exist."""
    page = TEXTS["exercises.md"]
    changes = re.findall(r"In `([\w/.]+)`, replace `([^`]+)`\s+by\s+`([^`]+)`", page)
    checks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(changes) == len(checks) == 4
    for file, old, new in changes:
        code = (PROJECT / file).read_text(encoding="utf-8")
        assert code.count(old) == 1
        checks.append(code.replace(old, new))
    for code in checks:
        compile(code, "docs/exercises.md", "exec")
    tests = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page)
    assert len(names) > 6 and not [name for name in names if f"def {name}(" not in tests]


# ---------------------------------------------------------------------------------------- pictures


def picture(name):
    return (PROJECT / "docs" / name).read_text(encoding="utf-8")


def test_the_example_is_what_the_code_computes():
    """`python -m experiments.one_example` writes it again."""
    for name, content in one_example.one_example().items():
        assert picture(name) == content, name


def test_the_numbers_in_the_drawings_are_those_of_the_paper_size():
    vit, D = ViTConfig(), LLAMA_7B.hidden_size
    adapter, projector = Adapter("rep", D), Projector(vit.hidden_size, D)
    n_adapter, n_projector = (sum(p.numel() for p in part.parameters()) for part in (adapter, projector))
    layers = cls_layers(vit.num_hidden_layers)
    wanted = {
        "figure-2.svg": [
            f"I ({len(layers)}, {vit.hidden_size})", f"I′ ({len(layers)}, {D})",
            f"{n_adapter:,} parameters", f"{n_projector:,} parameters", ", ".join(map(str, layers)),
            f"{LLAMA_7B.vocab_size:,} logits", f"{LLAMA_7B.num_hidden_layers} layers", f"(tokens, {D})"],
        "merge.svg": [
            f"up {tuple(adapter.up_matrix().shape)}", str(tuple(adapter.up_weight[0].shape)), f"({D}, {D})",
            str(tuple(adapter.down.weight.shape))],
    }
    for name, texts in wanted.items():
        for text in texts:
            assert text in picture(name), f"{name} lacks {text}"


def test_the_nucleus_is_drawn_as_it_is():
    """The probabilities of DEMO04466; those that are left are together 0.020."""
    tokens = ["Plaid", "Argyle", "Polka", "Camouflage", "Galaxy", "others"]
    logits = torch.tensor([[0.527, 0.191, 0.182, 0.057, 0.023, 0.020]]).log()
    for temperature, mass in (1, "0.90"), (0.1, "1.00"):
        for uniform in 0.385, 0.8:
            token = tokens[nucleus(logits, temperature, 0.75, [uniform])]
            assert f">{uniform} × {mass}: {token}<" in picture("nucleus.svg")


def test_pictures_of_answers_are_drawn_from_a_run(tmp_path):
    rows = [(id, "", "Home", "A pillow", "Pattern", "Argyle", answer, 0.886)
            for id, answer in ((one_example.CARD, "Argyle"), ("DEMO00001", "Plaid"))]
    write_tsv(tmp_path / "predictions.tsv", rows, [*COLUMNS, "prediction", "probability"])
    drawn = one_example.answers_of(tmp_path)
    assert ">Argyle, probability 0.89<" in drawn["product-card.svg"]
    demo = drawn["demo.svg"]
    assert ">Argyle<" in demo and ">Plaid (wrong)<" in demo and demo.count("data:image/jpeg") == 2
