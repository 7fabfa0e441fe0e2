"""Links, commands, settings and imports in README and docs/ are right."""

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_help import COMMANDS, POSITIONAL

from docs.pages import NAMES, ROOT, anchors, blocks, command_of, inline, lines, links
from examples import anomaly, segmentation
from mae.errors import UserError
from mae.schema import settings_of
from mae.settings import parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.settings import spelled_out

# Programs that guides show and that are nobody's dependency here.
OTHER_PROGRAMS = {"pandas", "renumics", "datasets"}
# Flags in guides that are of torchrun, of timm, or of a script in examples/.
OTHER_FLAGS = {"max-restarts", "train-img-sizes", "ignore", "rates", "head_rates", "val"}
# Settings that some commands cannot do without.
NEEDED = {"run_dir": "runs/some", "data.shards": "a.tar", "eval_shards": "b.tar", "init": "none", "out": "out.yaml"}
# Words that stand for a number of the reader's.
NUMBERS = {"T", "S", "N"}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_lead_somewhere(name: str) -> None:
    page = ROOT / name
    wrong = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue  # an address
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_commands_have_only_settings_that_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / name):
        if block.language in ("sh", "shell", "bash"):
            for words in lines(block):
                if (command := command_of(words)) is not None:
                    try_command(command)
    for code in inline(ROOT / name):
        if re.match(r"mae [a-z]", code):
            check_flags(code.split()[1:])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/guides/")])
def test_flags_in_the_text_of_guides_are_settings_and_take_their_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [code.split() for code in inline(ROOT / name) if code.startswith("--")]
    refused = [words for words in flags if not any(takes(command, words) for command in COMMANDS)]
    assert [words for words in refused if words[0].removeprefix("--") not in OTHER_FLAGS] == []


def takes(command: str, words: list[str]) -> bool:
    """Whether a command has a flag, and takes its value if there is one."""
    known = {each.name for each in settings_of(COMMANDS[command])}
    for name, value in NEEDED.items():
        if name in known and f"--{name}" not in words:
            words = [*words, f"--{name}", value]
    try:
        check_flags([*command.split(), *words])
        if not words[1].startswith("--"):
            try_command([*command.split(), *POSITIONAL.get(command, []), *words])
    except (AssertionError, UserError, SystemExit):
        return False
    return True


def test_commands_of_the_examples_have_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {"examples/segmentation.py": segmentation, "examples/anomaly.py": anomaly}
    page = ROOT / "docs" / "guides" / "transfers.md"
    commands = [
        words[1:] for block in blocks(page) if block.language == "sh" for words in lines(block) if words[0] == "python"
    ]
    assert [name for name, *_ in commands] == list(scripts)
    for name, *words in commands:
        with pytest.raises(SystemExit):
            scripts[name].main(words)
        assert capsys.readouterr().err.startswith("error: ")  # no such encoder; a wrong flag would begin with "usage:"


def schema_of(words: list[str]) -> tuple[Any, list[str]]:
    """The settings of a command, and its arguments."""
    for length in (2, 1):
        if (command := " ".join(words[:length])) in COMMANDS:
            return COMMANDS[command], words[length:]
    raise AssertionError(f"there is no command {words[0]}")


def check_flags(words: list[str]) -> None:
    schema, arguments = schema_of(words)
    known = {setting.name for setting in settings_of(schema)} | {"config", "quiet", "help"}
    flags = {word[2:].partition("=")[0] for word in arguments if re.match(r"--\w", word)}
    unknown = {flag for flag in flags if flag not in known and not flag.endswith(".*")}
    assert not unknown, f"mae {' '.join(words)}"


def try_command(words: list[str]) -> None:
    """Parse a command as the program does; what only the reader has (files of settings, models) is left out."""
    check_flags(words)
    schema, arguments = schema_of(words)
    if "..." in arguments or "--help" in arguments:
        return
    kept: list[str] = []
    named_elsewhere = False  # a file or a model of the reader's may name the folder of the run
    for word, before in zip(arguments, ["", *arguments], strict=False):
        if before == "--config" and not Path(word).exists():
            kept.pop()
            named_elsewhere = True
        elif before == "--init":
            kept.append("none")
            named_elsewhere = True
        else:
            kept.append("2" if word in NUMBERS else word)
    if named_elsewhere and "--run_dir" not in kept and any(each.name == "run_dir" for each in settings_of(schema)):
        kept += ["--run_dir", "runs/some"]
    parse(schema, spelled_out(kept), prog="mae")


@pytest.mark.parametrize("name", NAMES)
def test_settings_in_yaml_are_valid(name: str, tmp_path: Path) -> None:
    for block in blocks(ROOT / name):
        if block.language in ("yaml", "yml"):
            file = tmp_path / "settings.yaml"
            file.write_text(block.text)
            is_finetuning = bool({"init", "head", "eval_shards"} & yaml.safe_load(block.text).keys())
            parse(FinetuneSettings if is_finetuning else PretrainSettings, ["--config", str(file)], prog="mae")


@pytest.mark.parametrize("name", NAMES)
def test_python_compiles_and_finds_what_it_imports(name: str) -> None:
    for block in blocks(ROOT / name):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        check_import(alias.name, [])
                elif isinstance(node, ast.ImportFrom):
                    check_import(node.module or "", [alias.name for alias in node.names])


def check_import(module: str, names: list[str]) -> None:
    top = module.partition(".")[0]
    if top != "mae":
        assert top in OTHER_PROGRAMS or find_spec(top) is not None, module
        return
    imported = import_module(module)
    assert all(hasattr(imported, name) for name in names), f"{module}: {names}"


def test_every_page_has_its_place_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    shown = set(re.findall(r"([\w/.-]+\.md)$", text, re.MULTILINE))
    pages = {name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")}
    assert pages <= shown
    assert {name.removeprefix("repository/") for name in shown - pages} <= set(NAMES)
