"""The first signal asks, the next ends, whatever the main thread is doing."""

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mae.training.processes import signals
from mae.training.processes.signals import STOP_SIGNALS, StoppedError, signals_end_a_start, stop_on_signal


def soon(condition: Callable[[], object]) -> bool:
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return bool(condition())


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With which the process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """A function that gives all that was written to stderr so far."""
    texts: list[str] = []

    def read() -> str:
        texts.append(capsys.readouterr().err)
        return "".join(texts)

    return read


@pytest.fixture(autouse=True)
def _without_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_the_end_of_the_terminal_is_no_request(said: Callable[[], str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_end_a_start(), stop_on_signal() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert request.reason is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert said() == ""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_and_is_announced(number: signal.Signals, said: Callable[[], str]) -> None:
    with stop_on_signal() as request:
        assert (request.reason, request.number) == (None, 0)
        os.kill(os.getpid(), number)
        assert soon(lambda: request.reason and said())
        assert (request.reason, request.number) == (number.name, number)
    assert said() == (f"{number.name}: the run saves and exits after this step; another signal ends it at once\n")


def test_what_was_before_is_restored() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), stop_on_signal():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup) == -1
    assert threading.active_count() == threads


def test_p04_a_repeat_is_an_echo_for_two_seconds_then_the_process_ends_at_once(
    exit_codes: list[int], said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stop_on_signal() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert soon(lambda: request.reason)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun forwards the SIGINT of a terminal to those who had it
        time.sleep(0.2)
        assert exit_codes == []
        monkeypatch.setattr(signals, "_SECONDS_OF_ECHOES", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(lambda: exit_codes)
        assert request.reason == "SIGINT"
    assert exit_codes == [128 + signal.SIGTERM]
    assert said().count("\n") == 1


def test_p04_a_main_thread_that_is_stuck_in_c_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for a lock of C, it never runs a handler of Python again."""
    monkeypatch.setattr(signals, "_SECONDS_OF_ECHOES", 0.5)

    def train() -> None:
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - a descriptor
        lock = ctypes.create_string_buffer(64)
        with stop_on_signal():
            ctypes.CDLL(None).pthread_mutex_lock(lock)
            ready.set()
            ctypes.CDLL(None).pthread_mutex_lock(lock)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    trainer = context.Process(target=train)
    trainer.start()
    assert ready.wait(10)
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGTERM)
    trainer.join(1)
    assert trainer.exitcode is None
    os.kill(trainer.pid, signal.SIGINT)
    trainer.join(10)
    assert trainer.exitcode == 128 + signal.SIGINT
    assert (tmp_path / "stderr").read_text().startswith("SIGTERM: the run saves")


def test_the_last_process_of_a_job_is_stopped_as_one_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with signals_end_a_start():
        assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(StoppedError, match="SIGTERM"), signals_end_a_start(is_last=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_of_others_are_let_through(exit_codes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has a handler for SIGCHLD, whose numbers come through the same pipe."""
    monkeypatch.setattr(signals, "_SECONDS_OF_ECHOES", 0.0)
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    with stop_on_signal() as request:
        for _ in range(2000):
            os.kill(os.getpid(), signal.SIGCHLD)
        assert heard
        assert request.reason is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert soon(lambda: request.reason)
    signal.signal(signal.SIGCHLD, before)
    assert exit_codes == []


def test_p03_what_a_forked_process_is_sent_is_not_for_its_parent() -> None:
    def live() -> None:
        ready.set()
        time.sleep(0.5)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    with stop_on_signal() as request:
        child = context.Process(target=live)
        child.start()
        assert ready.wait(10)
        for number in STOP_SIGNALS:
            os.kill(child.pid or 0, number)
        child.join()
        assert child.exitcode == 0
        assert request.reason is None


def test_a_worker_that_outlives_the_context_does_not_hold_it_up() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    began = time.monotonic()
    with stop_on_signal():
        child.start()
    assert time.monotonic() - began < 5
    child.kill()
    child.join()


def test_use_within_itself_or_in_a_thread_is_refused() -> None:
    refused: list[str] = []

    def use() -> None:
        try:
            with stop_on_signal():
                pass
        except RuntimeError as error:
            refused.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    with stop_on_signal() as request:
        use()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert soon(lambda: request.reason), "the outer one goes on"
    assert refused == ["stop_on_signal works in the main thread only", "stop_on_signal is active already"]


@pytest.mark.parametrize(
    ("environment", "is_said"),
    [({"RANK": "1", "WORLD_SIZE": "2"}, False), ({"RANK": "0", "WORLD_SIZE": "2"}, True)],
    ids=["p02-rank-1", "p02-rank-0"],
)
def test_rank_zero_alone_announces(
    environment: dict[str, str], is_said: bool, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with stop_on_signal() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(lambda: request.reason)
        time.sleep(1)
    assert bool(said()) == is_said


def test_r01_a_rank_that_fails_at_once_was_only_cleared_away(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.suppress(ZeroDivisionError), stop_on_signal() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(lambda: request.reason)
        raise ZeroDivisionError
    time.sleep(1)
    assert said() == ""


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_closed_stderr_changes_nothing(
    is_closed: bool, exit_codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    monkeypatch.setattr(signals, "_SECONDS_OF_ECHOES", 0.0)
    monkeypatch.setattr(sys, "stderr", Full())
    if is_closed:
        sys.stderr.close()
    with stop_on_signal() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(lambda: request.reason)
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(lambda: exit_codes)
