"""Imports point one way; pipelines never import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mae.cli import COMMANDS

ROOT = Path(__file__).parent.parent

# From the ground up; a module may import from its own floor and from the floors below.
FLOORS = (
    ("mae", "mae.errors", "mae.output"),
    (
        "mae.settings",
        "mae.schema",
        "mae.help",
        "mae.classes",
        "mae.keyed",
        "mae.files",
        "mae.processes",
        "mae.progress",
        "mae.run_files",
        "mae.safetensors_file",
        "mae.versions",
        "mae.yaml_files",
    ),
    ("mae.data.store", "mae.data.images", "mae.models"),
    ("mae.data",),
    ("mae.data.packing",),
    ("mae.formats",),
    ("mae.export",),
    ("mae.inference",),
    ("mae.training",),
    ("mae.tasks",),
    ("mae.evaluation",),
    ("mae.report",),
    ("mae.explore",),
    ("mae.doctor",),
    ("mae.proposal",),
    ("mae.cli", "mae.__main__"),
    ("mae.demo", "mae.pipelines"),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mae", *parts) if parts[0] == "pipelines" else parts
    return ".".join(part for part in parts if part != "__init__")


def floor(module: str) -> int:
    """The floor of the longest prefix that fits."""
    fitting = [
        (len(prefix), number)
        for number, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if module == prefix or (prefix != "mae" and module.startswith(f"{prefix}."))
    ]
    assert fitting, f"{module} stands on no floor: add it to FLOORS"
    return max(fitting)[1]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    if path == ROOT / "mae" / "__init__.py":
        return names  # names what it imports on first use, for type checkers only
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    known = {module_name(p) for p in SOURCES}
    return {name for name in names if name in known}


SOURCES = sorted([*(ROOT / "mae").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])


def test_nothing_but_the_command_line_imports_a_pipeline() -> None:
    importing = [module_name(path) for path in SOURCES if any(".pipelines." in name for name in imported(path))]
    assert importing == []
    assert {module for module, _ in COMMANDS.values()} >= {"mae.pipelines.pretrain", "mae.pipelines.finetune"}


def test_the_readme_lists_every_folder() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Folders")[2].split("```")[1]
    listed: list[str] = []
    parents: list[str] = []
    for line in tree.strip().splitlines():
        name, depth = line.split()[0].rstrip("/"), (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        listed.append("/".join(parents))
    packages = [path.parent.relative_to(ROOT) for path in (ROOT / "mae").rglob("__init__.py")]
    others = ["pipelines", "configs", "tests", "benchmarks", "examples"]
    assert sorted(listed) == sorted([*map(str, packages), *others])


def test_no_import_cycles() -> None:
    """Lazy imports count as well."""
    graph = {module_name(path): imported(path) - {module_name(path)} for path in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    for name in imported(path):
        assert floor(name) <= floor(module), f"{module} imports {name} from a higher floor"
        if module.startswith("mae.pipelines."):
            assert not name.startswith("mae.pipelines."), f"pipeline {module} imports pipeline {name}"


def test_data_and_models_do_not_know_each_other_or_accelerate() -> None:
    for path in SOURCES:
        module = module_name(path)
        names = {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        if module.startswith("mae.data"):
            assert not any(name.startswith("mae.models") for name in names), module
        if module.startswith(("mae.data", "mae.models")):
            assert not any(name.startswith("accelerate") for name in names), module
