"""Every fault case has a test that bears its code, or a reason in docs/reliability.md why it cannot have one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# All that docs/data.md and docs/reliability.md promise to cover.
CODES = {
    *(f"d{n:02}" for n in range(1, 20)),  # shards
    *(f"s{n:02}" for n in range(1, 15)),  # samples
    *(f"o{n:02}" for n in range(1, 17)),  # order and resume
    *(f"c{n:02}" for n in range(1, 20)),  # checkpoints
    *(f"p{n:02}" for n in range(1, 15)),  # processes and signals
    *(f"k{n:02}" for n in range(1, 11)),  # settings
    *(f"n{n:02}" for n in range(1, 10)),  # numbers
    *(f"x{n:02}" for n in range(1, 11)),  # security
    *(f"r{n:02}" for n in range(1, 13)),  # distributed and remote
}
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NOT_TESTED = {code.lower(): reason for code, reason in re.findall(r"^\| ([A-Z][0-9]{2}) \| (.+) \|$", DOCUMENT, re.M)}


def test_every_fault_case_has_a_test_of_its_name() -> None:
    assert sorted(CODES - _tested() - NOT_TESTED.keys()) == []


def test_a_case_is_called_untestable_only_while_it_has_no_test() -> None:
    assert sorted(NOT_TESTED.keys() & _tested()) == []
    assert sorted(NOT_TESTED.keys() - CODES) == []


def test_every_test_that_the_document_names_is_there() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", DOCUMENT)
    assert len(named) > 50
    assert [f"{path}::{name}" for path, name in named if not _is_there(ROOT / path, name)] == []


def test_the_document_names_a_test_for_every_case() -> None:
    named = _codes(" ".join(re.findall(r"^\|.*\|$", DOCUMENT, re.M)))
    assert sorted({code for code in CODES if code[0] in "cpkn"} - named) == []


def _is_there(path: Path, name: str) -> bool:
    """The codes at the end of a name need not be repeated in the document."""
    return path.exists() and bool(re.search(rf"^def {name}(_[a-z][0-9]{{2}})*\(", path.read_text("utf-8"), re.M))


def _tested() -> set[str]:
    """The codes in the names of test functions, in the ids of their parameters, and in parameters that are strings."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    return _codes(" ".join(words for tree in trees for words in _names(tree)))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name
            for decorator in node.decorator_list:
                yield from _strings(decorator)
        elif isinstance(node, ast.keyword) and node.arg in ("id", "ids"):
            yield from _strings(node.value)


def _strings(tree: ast.AST) -> Iterator[str]:
    yield from (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _codes(text: str) -> set[str]:
    return set(re.findall(r"(?<![a-z0-9])[cdknoprsx][0-9]{2}(?![0-9])", text.lower().replace("_", " ")))
