"""`mae COMMAND --help`: every setting, in words, within the width of the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from mae import cli
from mae.demo import DemoSettings
from mae.doctor.stages import FinetuneDoctorSettings, PretrainDoctorSettings
from mae.evaluation.settings import EvaluateSettings
from mae.explore.command import ExploreSettings
from mae.help import describe_type, help_of
from mae.pipelines.embed import EmbedSettings
from mae.pipelines.export import ExportSettings
from mae.pipelines.index import IndexSettings
from mae.pipelines.init import InitSettings
from mae.pipelines.pack import PackSettings
from mae.pipelines.predict import PredictSettings
from mae.report.command import ReportSettings
from mae.schema import settings_of
from mae.settings import parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings

COMMANDS: dict[str, Any] = {
    "init": InitSettings,
    "pack": PackSettings,
    "index": IndexSettings,
    "doctor": PretrainDoctorSettings,
    "doctor finetune": FinetuneDoctorSettings,
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
    "predict": PredictSettings,
    "embed": EmbedSettings,
    "evaluate": EvaluateSettings,
    "report": ReportSettings,
    "explore": ExploreSettings,
    "export": ExportSettings,
    "demo": DemoSettings,
}
POSITIONAL = {
    "init": ["SOURCE"],
    "pack": ["SOURCE"],
    "index": ["SHARDS"],
    "predict": ["MODEL", "SOURCE"],
    "embed": ["MODEL", "SOURCE"],
    "evaluate": ["SOURCE"],
    "report": ["RUNS"],
    "explore": ["RUN", "SOURCE"],
    "export": ["SOURCE"],
}


def test_every_command_has_its_help() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(cli.COMMANDS)


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_each_setting_once_with_doc_and_default_within_the_width(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= min(int(columns), 100)
    headings = [line[2:].split("  ")[0] for line in shown.splitlines() if line[:2] == "  " and line[2:3] != " "]
    names = [setting.name for setting in settings_of(COMMANDS[command])]
    words = POSITIONAL.get(command, [])
    flags = {f"--{name}" for name in names if name.upper() not in words}
    assert sorted(headings[1:]) == sorted(["--config FILE", "--quiet", *words, *flags])  # the first is the example
    text = " ".join(shown.split())
    assert text.count("(default: ") + text.count("(required") == len(names)
    assert f"usage: mae {' '.join([command if command != 'doctor' else 'doctor pretrain', *words])} [--config" in text
    assert headings[0].startswith(f"mae {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_is_parsed(command: str) -> None:
    # The model from which a fine-tuning starts has to exist.
    text = COMMANDS[command].EXAMPLE.replace("--init runs/first", "--init none")
    words = text.removeprefix(f"mae {command} ").replace("'", "").split()
    assert parse(COMMANDS[command], words, prog="test")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_that_come_first_are_in_the_order_of_their_class(command: str) -> None:
    shown = help_of(COMMANDS[command], "mae")
    first = getattr(COMMANDS[command], "FIRST", ())
    places = [shown.index(f"\n  --{name}  ") for name in first]
    assert places == sorted(places)
    others = [shown.find(title) for title in ("Others:", "Settings:") if title in shown]
    assert all(place < others[0] for place in places)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (float | None, "number, or None"),
        (tuple[float, float], "two numbers"),
        (tuple[int, int] | None, "two integers, or None"),
        (tuple[float, ...] | None, "numbers, or None"),
        (tuple[str, ...], "texts"),
        (Literal["self", "cross"], "self | cross"),
        (int | Literal["auto"] | None, "integer | auto, or None"),
        (bool, "True | False"),
        (Path, "path"),
    ],
)
def test_a_type_reads_as_a_person_would_write_it(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words


@dataclass(frozen=True)
class Short:
    """Do something."""

    EXAMPLE: ClassVar = "mae short --b 1 2"
    FIRST: ClassVar = ("b",)

    a: float = 1e-3
    """First value, which is long enough to need a second line at a width of fifty columns."""
    b: tuple[float, float] = (3 / 4, 1.0)
    """Second value."""


def test_help_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert help_of(Short, "mae short") == (
        """\
usage: mae short [--config FILE] [--setting value ...]

Do something.

Example:
  mae short --b 1 2

  --config FILE
      Read settings from a YAML file first; flags
      win over it.
  --quiet
      Print errors, warnings and the result only.

Most used:
  --b  two numbers
      Second value. (default: 0.75 1)

Others:
  --a  number
      First value, which is long enough to need a
      second line at a width of fifty columns.
      (default: 0.001)
"""
    )


def test_only_rank_zero_prints_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parse(Short, ["-h"], prog="mae short")
    assert capsys.readouterr().out == ""
