"""docs/guarantees.md names the tests that hold it, and these are the tests marked `guarantee`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/guarantees.md").read_text()
TEST = re.compile(r"`(tests/\S+\.py::test_\w+)`")


def marked_tests():
    """The tests with the marker `guarantee`, as `path::name`."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(is_marker, node.decorator_list)):
                yield f"{path.relative_to(ROOT).as_posix()}::{node.name}"


def is_marker(decorator):
    return ast.unparse(decorator) == "pytest.mark.guarantee"


def test_the_page_names_the_marked_tests_and_no_others():
    assert sorted(set(TEST.findall(PAGE))) == sorted(marked_tests())


def test_every_guarantee_is_held_by_a_test():
    guarantees = [block for block in re.split(r"\n(?=- )|\n\n", PAGE) if block.startswith("- ")]

    assert guarantees
    assert [block for block in guarantees if not TEST.search(block)] == []
