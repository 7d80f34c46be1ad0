"""The layout of the project: what stands at the top, that imports run one way, and what files look like."""

import ast
import re
import sys

import pytest
from conftest import PROJECT

SEVEN = {"llama", "vit", "adapters", "eiven", "data", "train", "evaluate"}
PACKAGES = {"torch", "numpy", "sentencepiece", "safetensors", "PIL"}    # what runs need
# What a module or folder may import, beside these and Python's own.
RULES = """
base              base
llama             base
vit               base
adapters          base
data              base
eiven             base llama adapters
demo.drawing
demo.world        base demo.drawing
demo.pretrain     base demo.drawing demo.world llama vit
support           base llama vit adapters data eiven demo.world support
evaluate          base llama vit adapters data eiven demo.world support
train             base llama vit adapters data eiven demo.world support evaluate
tools             base llama vit adapters data eiven demo.world support evaluate train tools
dataset           base dataset
dataset.check     base dataset data llama
dataset.table     base dataset dataset.check
dataset.__main__  base dataset dataset.check dataset.table
experiments       base llama vit data eiven demo.world support evaluate train tools experiments transformers
"""
RULES = {part: allowed for part, *allowed in map(str.split, RULES.strip().splitlines())}
FOLDERS = ("base", "support", "tools", "dataset", "demo", "experiments", "tests")
FILES = [*PROJECT.glob("*.py"), *(path for folder in FOLDERS for path in PROJECT.glob(f"{folder}/**/*.py"))]
MODULES = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in FILES}


def part_of(name):
    """The entry of RULES that a module belongs to; the name of another package."""
    return name if name in RULES else name.split(".")[0]


def imports(tree):
    """Dotted names of all that a file imports: of `from a import b`, a.b where that is a module, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def test_the_top_holds_the_seven_modules():
    assert {path.stem for path in PROJECT.glob("*.py")} == SEVEN
    assert len(MODULES) > 40 and not any(name.endswith("__init__") for name in MODULES)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.startswith("tests.")))
def test_imports_run_one_way(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for name in imports(tree):
        assert part_of(name) in {*RULES[part_of(module)], *PACKAGES, *sys.stdlib_module_names}, name
    for node in ast.walk(tree):                         # Pillow reads many formats, some by other programs
        opens = isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open"
        assert not opens or module == "base.photo", f"{module}, line {node.lineno}: open_photo does this"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_lines_are_short_and_name_no_machine(module):
    for number, line in enumerate(MODULES[module].read_text(encoding="utf-8").splitlines(), start=1):
        assert len(line) <= 110, f"{module}, line {number}: {len(line)} columns"
        assert not re.search(r"/(work|home|root|Users)/", line), f"{module}, line {number}: a machine's path"
