"""README and docs: every link leads somewhere, and every command and flag exists."""

import re
import shlex
from functools import lru_cache

import pytest
from conftest import PROJECT, command

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
    path = PROJECT / script.removeprefix("-m ").replace(".", "/").replace("/py", ".py")
    assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
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
    assert {"-m dataset", "-m tools.catalogue", "evaluate.py"} < {script for _, script, _ in FOUND}


def anchors(text):
    """GitHub's anchors of the headings of a page."""
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) + re.findall(r'(?:src|href)="([^"]+)"', TEXTS[page])
    for link in links:
        name, _, anchor = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert link.startswith("https://") or target.exists(), f"{page} links to {link}"
        assert not anchor or name.startswith("https://") or anchor in anchors(TEXTS[target.name]), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    folders = "base|support|tools|dataset|demo|experiments|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", TEXTS[page]):
        assert (PROJECT / name).is_file(), f"{page} names {name}"
