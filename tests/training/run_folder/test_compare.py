"""Comparison of saved settings with today's: what was added, removed, or may change."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from mae.schema import Before, Formerly, MayChange
from mae.training.run_folder.compare import deciding, differences


@dataclass(frozen=True)
class Inner:
    workers: MayChange[int] = 4
    sizes: tuple[int, ...] = (1,)
    order: Annotated[int, Before(1)] = 2
    color: Annotated[str, Formerly(lambda value: "red" if value == 0 else value)] = "blue"


@dataclass(frozen=True)
class Outer:
    REMOVED: ClassVar[dict[str, object]] = {"inner.old": [0.5]}

    run_dir: MayChange[Path]
    seed: int = 0
    inner: Inner = field(default_factory=lambda: Inner(sizes=(2, 3)))


SETTINGS = Outer(Path("a"))
SAVED = {"seed": 0, "inner.sizes": [2, 3], "inner.order": 2, "inner.color": "blue"}


def test_what_may_change_does_not_decide() -> None:
    assert deciding(SETTINGS) == SAVED
    assert differences(SAVED | {"run_dir": "b", "inner.workers": 9}, SETTINGS) == []


def test_an_added_setting_counts_as_before_or_as_its_section_s_default() -> None:
    assert differences({"seed": 0}, SETTINGS) == ["inner.order was 1, is 2"]
    assert differences({"seed": 0}, Outer(Path("a"), inner=Inner(sizes=(2, 3), order=1))) == []
    assert differences({"seed": 0, "inner.order": 2}, Outer(Path("a"), inner=Inner())) == [
        "inner.sizes was [2, 3], is [1]"
    ]


def test_a_removed_setting_counts_only_if_it_was_changed() -> None:
    assert differences(SAVED | {"inner.old": [0.5]}, SETTINGS) == []
    assert differences(SAVED | {"inner.old": [0.6]}, SETTINGS) == ["inner.old was [0.6], is [0.5] since it was removed"]
    assert differences(SAVED | {"newer": None}, SETTINGS) == ["newer was None, is (not set)"]


def test_a_value_in_the_form_of_an_earlier_version_counts_as_that_of_today() -> None:
    red = Outer(Path("a"), inner=Inner(sizes=(2, 3), color="red"))
    assert differences(SAVED | {"inner.color": 0}, red) == []
    assert differences(SAVED | {"inner.color": 0}, SETTINGS) == ["inner.color was red, is blue"]
