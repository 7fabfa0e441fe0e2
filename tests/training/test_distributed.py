"""What the launcher promised is compared with what there is."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mae.errors import UserError, one_line_errors
from mae.training.distributed import require_agreement, start_accelerator


def test_one_process_on_the_cpu_runs_in_fp32() -> None:
    accelerator = start_accelerator("auto")
    assert accelerator.num_processes == 1
    if not torch.cuda.is_available():
        assert accelerator.mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bf16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="no GPU with bf16"):
        start_accelerator("bf16")


def test_fp16_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16"):
        start_accelerator("auto")


def test_more_processes_asked_for_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    start_accelerator("auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked for 2 processes but each runs alone"):
        start_accelerator("auto")


def test_a_mistake_is_printed_once_and_a_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise UserError("what, got, allowed")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: what, got, allowed\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("what, got, allowed")
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


@pytest.mark.parametrize("what", ["data", "settings", ""], ids=["r05-index", "k10-settings", "equal"])
def test_ranks_must_hold_the_same_facts(what: str, on_two_ranks: Callable[[Callable[[], Any]], list[Any]]) -> None:
    def agree() -> str:
        facts = {"data": "fingerprint", "settings": "seed: 0"}
        if what and os.environ["RANK"] == "1":
            facts[what] += "1"
        require_agreement(start_accelerator("fp32"), **facts)
        return "agreed"

    expected = f"error: the processes differ in their {what}; start them all with the same command, files and library"
    first, second = on_two_ranks(agree)
    assert first == second
    assert first.startswith(expected if what else "agreed")
