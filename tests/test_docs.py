"""README and docs: every name, path, link, command and flag in them exists, and what they quote from the code is the code."""

import importlib
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import command

from experiments import figure_2

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) <= 210


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_name_in_the_table_of_the_paper_exists():
    rows = [row.split("|")[1:-1] for row in section("From the paper to the code").splitlines() if row.startswith("| ")][1:]
    names = [name for _, code, _ in rows for name in re.findall(r"`([\w.]+)`", code)]
    assert len(names) > 30
    for name in names:
        parts, found = name.split("."), None
        for n in range(len(parts), 0, -1):              # the longest module, then attributes
            try:
                found, rest = importlib.import_module(".".join(parts[:n])), parts[n:]
                break
            except ModuleNotFoundError:
                pass
        assert found, f"README names {name}, and there is no module {parts[0]}"
        for part in rest:
            assert hasattr(found, part), f"README names {name}, which does not exist"
            found = getattr(found, part)


def test_the_table_of_the_paper_is_complete():
    table = section("From the paper to the code")
    for what in ["Figure 1", "Figure 2", "Figure 3", "Figure 4", "Figure 5", "Figure 6", "Table 1", "Tables 2, 3 and 5", "Table 4",
                 "Table 6", "M-JAVE", "CMA-CLIP", "DEFLATE", *(f"Appendix {letter}" for letter in "ABCDE")]:
        assert what in table


def commands(text):
    """[script or module, arguments] of each command line of this project in code blocks and code spans."""
    text = text.replace("\\\n", " ")                    # a command on two lines
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [line for block in blocks for line in block.splitlines()] + spans:
        for part in line.split("#")[0].split("&&"):
            words = part.split()
            while words and (words[0] in ("time", "$") or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
                words = words[1:]
            if words and words[0] == "torchrun":        # its own flags end where the script is named
                script = next(word for word in words if word.endswith(".py"))
                yield script, words[words.index(script) + 1:]
            elif len(words) > 1 and re.fullmatch(r"(\.venv/bin/)?python3?", words[0]):
                words = shlex.split(part)[shlex.split(part).index(words[0]) + 1:]
                if words[0] == "-m" and words[1].split(".")[0] in ("dataset", "demo", "experiments"):
                    yield f"-m {words[1]}", words[2:]
                elif words[0].endswith(".py"):
                    yield words[0], words[1:]


@lru_cache
def help_of(script, folder):
    outcome = command(script.split()[0] if script.endswith(".py") else " ".join(script.split()[:2]),
                      [*script.split()[2:], "--help"], folder)
    assert outcome.code == 0, outcome.err
    return outcome.out


FOUND = sorted({(page.name, script, tuple(arguments)) for page in PAGES for script, arguments in commands(page.read_text("utf-8"))})


@pytest.mark.parametrize("page, script, arguments", FOUND, ids=lambda x: " ".join(x) if isinstance(x, tuple) else x)
def test_every_command_and_flag_exists(page, script, arguments, tmp_path_factory):
    if script.endswith(".py"):
        assert (PROJECT / script).is_file(), f"{page} names {script}"
        if script not in ("train.py", "evaluate.py"):
            return
        said = help_of(script, tmp_path_factory.getbasetemp())
    else:
        name = script.removeprefix("-m ")
        path = PROJECT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page} names {name}"
        words = arguments[:1] if name == "dataset" and arguments and re.fullmatch("[a-z]+", arguments[0]) else ()
        if name in ("experiments.plain", "experiments.figure_2"):       # these take no arguments
            assert not arguments
            return
        said = help_of(" ".join([script, *words]), tmp_path_factory.getbasetemp())
        if name == "experiments.paper_tables":          # passes on what it does not know
            said += help_of("train.py", tmp_path_factory.getbasetemp())
    for flag in (a.split("=")[0] for a in arguments if a.startswith("--")):
        assert re.search(rf"{flag}\b", said), f"{page}: {script} has no {flag}"


def test_the_commands_are_found():
    """The test above would pass if the pages were read wrongly."""
    assert ("README.md", "train.py", ("--dataset", "general", "--labels", "50")) in FOUND
    assert any(script == "-m dataset" for _, script, _ in FOUND) and len(FOUND) > 20
    assert ("scale.md", "train.py", ("--resume", "runs/clothing-100-1")) in FOUND


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_is_named_exists(page):
    for name in re.findall(r"`((?:base|support|dataset|demo|experiments|tests|docs)/[\w/.-]+\.(?:py|md|png|svg|tsv))`",
                           page.read_text(encoding="utf-8")):
        assert (PROJECT / name).is_file(), f"{page.name} names {name}"


def test_plain_md_shows_the_code_as_it_is():
    [shown] = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "plain.md").read_text(encoding="utf-8"), re.S)
    assert shown in (PROJECT / "experiments" / "plain.py").read_text(encoding="utf-8")


def test_figure_2_is_up_to_date():
    assert (PROJECT / "docs" / "figure-2.svg").read_text(encoding="utf-8") == figure_2.figure(), "python -m experiments.figure_2"


