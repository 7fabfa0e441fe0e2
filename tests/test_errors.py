"""One line for each mistake, and an exit code for each kind."""

import time

import pytest
import torch

from mae.errors import (
    BadDataError,
    CheckpointError,
    PreemptedError,
    UserError,
    first_of,
    is_out_of_memory,
    is_rank_zero,
    one_line_errors,
    user_error_of,
    world_size,
)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        pytest.param(UserError, 2, id="p12-user-error"),
        pytest.param(BadDataError, 3, id="p12-bad-data"),
        pytest.param(CheckpointError, 4, id="p12-checkpoint"),
        pytest.param(PreemptedError, 75, id="p12-preempted"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code_of_its_kind(
    error: type[UserError], exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error("what, got, allowed")
    assert end.value.code == exit_code
    assert capsys.readouterr().err == "error: what, got, allowed\n"


def test_a_full_memory_of_the_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: CUDA out of memory; end other programs that use the device. pretrain and")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA out of memory"),
        ("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA", "CUDA error: out of memory"),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 8 bytes. Error code 12 (Cannot allocate memory)",
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        ),
    ],
)
def test_memory_is_full_in_the_words_of_torch_the_driver_and_cublas(text: str, told: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert str(user_error_of(RuntimeError(text))).startswith(f"{told}; end other programs")


def test_other_errors_of_the_device_keep_their_traceback() -> None:
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), MemoryError("out of memory")):
        assert not is_out_of_memory(error)
        assert user_error_of(error) is None


def test_p12_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_other_ranks_leave_rank_zero_the_time_to_speak(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said_before_sleep: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(time, "sleep", lambda seconds: said_before_sleep.append(capsys.readouterr().err))
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("what, got, allowed")
    assert said_before_sleep == [""]
    assert capsys.readouterr().err == "rank 1: error: what, got, allowed\n"


@pytest.mark.parametrize(
    ("rank", "world", "is_first"),
    [
        (None, None, True), ("1", None, True), ("abc", None, True), ("1", "1", True), ("0", "2", True),
        ("1", "2", False), ("", "2", True), ("1", "x", False),
    ],
)  # fmt: skip
def test_what_a_shell_has_left_of_a_launcher_silences_nobody(
    rank: str | None, world: str | None, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert is_rank_zero() == is_first


@pytest.mark.parametrize("text", ["x", "", "0", "-1"])
def test_a_number_of_processes_that_is_none_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match=f"^WORLD_SIZE is '{text}'; allowed: a number of processes"):
        world_size()


def test_a_long_list_is_cut_and_counted() -> None:
    assert first_of(["a", "b"]) == "a; b"
    assert first_of(["a", "b", "c"], most=2, separator=", ") == "a, b and 1 more"
