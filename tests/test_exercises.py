"""docs/exercises.md: what it tells to replace stands in the code once, and the tests that it names exist."""

import re

import pytest
from conftest import PROJECT

PAGE = (PROJECT / "docs" / "exercises.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"In `([\w/.]+)`, replace `([^`]+)`\s+by\s+`([^`]+)`", PAGE)


@pytest.mark.parametrize("file, old, new", CHANGES)
def test_the_code_to_replace_is_there(file, old, new):
    code = (PROJECT / file).read_text(encoding="utf-8")
    assert code.count(old) == 1
    compile(code.replace(old, new), file, "exec")


def test_the_tests_that_are_named_exist():
    assert len(CHANGES) == 4
    tests = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", PAGE)
    assert len(names) > 6 and not [name for name in names if f"def {name}(" not in tests]


def test_the_checks_can_be_run():
    checks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(checks) == 4
    for check in checks:
        compile(check, "docs/exercises.md", "exec")
