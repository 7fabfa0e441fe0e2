"""Ranks that do not start with the same facts do not start."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.agreement import require_agreement


@pytest.mark.parametrize(
    ("values", "difference"),
    [
        pytest.param({}, None, id="equal"),
        pytest.param({"data": "5eed1"}, "data: 5eed on rank 0, 5eed1 on rank 1", id="r05-index"),
        pytest.param(
            {"settings": "seed: 1\nlr: 0.1\nwd: 0\n"},
            "settings: lr: 0.2 on rank 0, lr: 0.1 on rank 1",
            id="k10-settings",
        ),
        pytest.param(
            {"libraries": '{"mae": "1", "torch": "2.14.1"}'},
            'libraries: "torch": "2.15.0"} on rank 0, "torch": "2.14.1"} on rank 1',
            id="k10-versions",
        ),
        pytest.param({"data": ""}, "data: 5eed on rank 0, nothing on rank 1", id="none"),
        pytest.param(
            {"data": "x", "settings": "seed: 1"},
            "settings: lr: 0.2 on rank 0, nothing on rank 1; data: 5eed on rank 0, x on rank 1",
            id="two",
        ),
        pytest.param(
            {"plan": "64"},
            "versions of mae (the facts that they compare): nothing on rank 0, plan on rank 1",
            id="k10-other-facts-r04-plan",
        ),
    ],
)
def test_ranks_must_hold_the_same_facts(
    values: dict[str, str], difference: str | None, on_two_ranks: Callable[[Callable[[], Any]], list[Any]]
) -> None:
    def agree() -> str:
        facts = {
            "settings": "seed: 1\nlr: 0.2\nwd: 0\n",
            "data": "5eed",
            "libraries": '{"mae": "1", "torch": "2.15.0"}',
        }
        if os.environ["RANK"] == "1":
            facts |= values
        require_agreement(start_accelerator("fp32"), **facts)
        return "agreed"

    first, second = on_two_ranks(agree)
    assert first == second
    assert first == (
        f"error: the processes differ in their {difference}; "
        "start them all with the same command, files and library versions"
        if difference
        else "agreed"
    )


def test_one_process_agrees_with_itself() -> None:
    require_agreement(start_accelerator("fp32"), data="anything")
