"""The layout of the project: what stands at the top, and that imports run one way."""

import ast
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SEVEN = {"llama.py", "vit.py", "adapters.py", "eiven.py", "data.py", "train.py", "evaluate.py"}
PACKAGES = {"torch", "numpy", "sentencepiece", "safetensors", "PIL"}            # what runs need
# Each line may import the lines above it, and itself.
LAYERS = [{"base"}, {"llama", "vit", "adapters"}, {"eiven", "data", "demo.world"}, {"support"}, {"evaluate"}, {"train"},
          {"experiments"}]
# What has rules of its own, and what it may import.
OTHERS = {"dataset": {"base", "dataset"},
          "dataset.check": {"base", "dataset", "data", "llama"},
          "dataset.__main__": {"base", "dataset", "dataset.check"},
          "demo.world": {"base", "demo.drawing"},
          "demo.drawing": set(),
          "demo.pretrain": {"base", "demo.world", "demo.drawing", "llama", "vit"}}


def tracked():
    """The project's modules as dotted names -> files, without tests."""
    files = [p for p in PROJECT.rglob("*.py") if not any(part.startswith(".") or part in ("tests", "runs", "data", "cache")
                                                         for part in p.relative_to(PROJECT).parts)]
    return {".".join(p.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


MODULES = tracked()
OURS = {name.split(".")[0] for name in MODULES}


def imports(path):
    """Dotted names of all that a file imports: of `from a.b import c`, a.b.c where that is a module, else a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                        for alias in node.names)


def place(name):
    """The longest entry of the rules that a module belongs to."""
    known = set(OTHERS).union(*LAYERS)
    parts = name.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), None)


def allowed(name):
    if name in OTHERS:
        return OTHERS[name]
    layer = next(i for i, names in enumerate(LAYERS) if name in names)
    return set().union(*LAYERS[:layer + 1]) | ({"demo", "dataset"} if name == "experiments" else set())


def test_the_top_level_holds_the_seven_modules():
    assert {p.name for p in PROJECT.glob("*.py")} == SEVEN


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module):
    here = place(module)
    if module == "demo":
        return
    assert here, f"{module} has no place in the layout"
    for name in imports(MODULES[module]):
        if name.split(".")[0] not in OURS:
            fine = PACKAGES | set(sys.stdlib_module_names) | ({"transformers"} if here == "experiments" else set())
            assert name.split(".")[0] in fine, f"{module} imports {name}, which is not one of the packages"
        elif not (here == "experiments" and name.split(".")[0] in ("demo", "dataset")):
            assert place(name) in allowed(here), f"{module} imports {name}: imports run the other way"


def test_there_is_no_circle():
    graph = {name: {other for other in imports(path) if other in MODULES and other != name} for name, path in MODULES.items()}
    done, under = set(), []

    def visit(name):
        assert name not in under, " -> ".join([*under, name])
        if name not in done:
            under.append(name)
            for other in sorted(graph[name]):
                visit(other)
            under.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_pictures_are_opened_in_one_place(module):
    """Image.open reads many formats, some of them with the help of other programs."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        opens = isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") == "Image"
        assert not opens or module == "base.photo", f"{module}, line {node.lineno}: open_photo of base/photo.py opens pictures"


def test_tests_hold_no_tools():
    for path in (PROJECT / "tests").glob("*.py"):
        assert path.name == "conftest.py" or path.name.startswith("test_"), f"{path.name} belongs to experiments/"
