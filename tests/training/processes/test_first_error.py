"""Whichever rank fails, and however: one message, the first one, and no rank stays behind."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from torch.distributed import HashStore, TCPStore

from mae.errors import BadDataError, PreemptedError, UserError
from mae.training.processes import first_error
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.consensus import RankConsensus
from mae.training.processes.first_error import errors_said_once, failure_of
from mae.training.processes.signals import signals_end_a_start

HOST = socket.gethostname()


@dataclass
class Job:
    """Ranks forked from the test."""

    folder: Path
    ranks: list[ForkProcess]

    def wait(self, *ranks: int, seconds: float = 30) -> None:
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].join(seconds)
            assert self.ranks[rank].exitcode is not None, f"rank {rank} stays behind"

    @property
    def exit_codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    @property
    def said(self) -> list[str]:
        """What each rank wrote to stderr, without the log of gloo and c10d."""
        texts = [(self.folder / f"{rank}.txt").read_text() for rank in range(len(self.ranks))]
        return [re.sub(r"^\[.*\n", "", text, flags=re.MULTILINE) for text in texts]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks, forked from the test, wait for each other."""
    monkeypatch.setattr(first_error, "_SECONDS_OF_ROLL_CALL", 1.25)
    monkeypatch.setattr(first_error, "_SECONDS_BEHIND_THE_REPORTER", 0.2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def on_rank(rank: int, environment: dict[str, str], folder: Path, work: Callable[[int], object]) -> None:
    os.environ |= {**environment, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - a descriptor
    with errors_said_once():
        work(rank)


def keep_store(port: Connection) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    time.sleep(600)


@pytest.fixture
def launcher() -> Iterator[Callable[[], int]]:
    """A function that starts a launcher, as far as it is needed: a store, whose port it returns.

    It is a process of its own: with threads of C++ in the test's process, forking would not be safe.
    """
    context = multiprocessing.get_context("fork")
    launchers: list[ForkProcess] = []

    def run() -> int:
        here, there = context.Pipe()
        launchers.append(context.Process(target=keep_store, args=(there,)))
        launchers[-1].start()
        port: int = here.recv()
        return port

    yield run
    for process in launchers:
        process.kill()
        process.join()


@pytest.fixture
def start(tmp_path: Path, launcher: Callable[[], int]) -> Iterator[Callable[..., Job]]:
    """A function that starts some work on each of several ranks, which meet at the port of a launcher's store; with
    None, rank 0 has its own."""
    jobs: list[Job] = []

    def run(work: Callable[[int], object], world: int = 2, restart: int = 0, store: int | None = 0) -> Job:
        if store == 0:
            store = launcher()
        folder = tmp_path / f"{len(jobs)}"
        folder.mkdir()
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{store or free_port()}",
            "TORCHELASTIC_USE_AGENT_STORE": f"{store is not None}",
            "TORCHELASTIC_RESTART_COUNT": f"{restart}",
            "WORLD_SIZE": f"{world}",
            "OMP_NUM_THREADS": "1",
        }
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=on_rank, args=(rank, environment, folder, work)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        jobs.append(Job(folder, ranks))
        return jobs[-1]

    yield run
    for job in jobs:
        for rank in job.ranks:
            rank.kill()
            rank.join()


def train(rank: int, fails: int, failure: Callable[[], object], timeout: float = 20.0, steps: int = 10_000) -> None:
    """Vote in each step; one rank does something else at step 5."""
    consensus = RankConsensus(start_accelerator("fp32", timeout), timeout)
    for step in range(steps):
        if step == 5 and rank == fails:
            failure()
        consensus.submit(0)
        consensus.maximum()


def raise_error(error: BaseException) -> None:
    raise error


def test_r01_a_bug_on_one_rank_is_shown_once_with_its_traceback_and_its_rank(start: Callable[..., Job]) -> None:
    job = start(lambda rank: train(rank, 1, lambda: raise_error(ZeroDivisionError("of rank one"))))
    job.wait()
    quiet, loud = job.said
    assert quiet == ""
    assert loud.startswith(f"rank 1 of 2 on {HOST}:\nTraceback (most recent call last):\n")
    assert loud.endswith("\nZeroDivisionError: of rank one\n")
    assert job.exit_codes == [1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_r01_a_mistake_on_one_rank_is_one_line_and_all_leave_with_its_exit_code(
    rank: int, start: Callable[..., Job]
) -> None:
    job = start(lambda me: train(me, rank, lambda: raise_error(BadDataError("shard 3 is lost"))))
    job.wait()
    assert job.said[rank] == "error: shard 3 is lost\n"
    assert job.said[1 - rank] == ""
    assert job.exit_codes == [3, 3]


@pytest.mark.slow
def test_one_of_64_ranks_fails_and_says_so_alone(start: Callable[..., Job]) -> None:
    job = start(lambda me: train(me, 37, lambda: raise_error(BadDataError("shard 3 is lost")), timeout=120.0), world=64)
    job.wait(seconds=240)
    assert {rank: text for rank, text in enumerate(job.said) if text} == {37: "error: shard 3 is lost\n"}
    assert job.exit_codes == [3] * 64


def test_the_roll_call_goes_on_as_long_as_ranks_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many ranks on few cores wait for their turn, and must not be taken for dead."""
    store, answers = HashStore(), iter([[4, 0], [2], [3], []])

    def wait(*_: object) -> bool:
        for rank in next(answers):
            store.set(f"alive/{rank}", "")
        return False

    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setattr(first_error, "_appears", wait)
    assert first_error._call_roll(store) == ["1 on an unknown host"]


@pytest.mark.slow
def test_one_of_64_ranks_is_killed_and_another_names_it(start: Callable[..., Job]) -> None:
    job = start(lambda me: train(me, 41, lambda: os.kill(os.getpid(), signal.SIGKILL), timeout=120.0), world=64)
    job.wait(seconds=240)
    (line,) = [text for text in job.said if text]
    assert "41" in line, line
    assert HOST in line, line
    assert job.exit_codes.count(1) == 63
    assert job.exit_codes[41] == -signal.SIGKILL


@pytest.mark.parametrize(
    ("error", "line", "exit_code"),
    [
        (UserError("lr is -1"), "error: lr is -1\n", 2),
        (PreemptedError("saved at step 3"), "error: saved at step 3\n", 75),
        (KeyboardInterrupt(), "interrupted\n", 130),
    ],
)
@pytest.mark.parametrize("is_initialized", [False, True])
def test_what_all_ranks_meet_is_said_by_one(
    error: BaseException, line: str, exit_code: int, is_initialized: bool, start: Callable[..., Job]
) -> None:
    def work(rank: int) -> None:
        if is_initialized:
            start_accelerator("fp32")
        raise error

    job = start(work, world=3)
    job.wait()
    assert sorted(job.said) == ["", "", line]
    assert job.exit_codes == [exit_code] * 3


def test_r01_an_echo_waits_for_the_error_that_comes_after_it(start: Callable[..., Job]) -> None:
    def lose_contact_then_fail() -> None:
        from torch import distributed

        distributed.destroy_process_group()
        time.sleep(2)
        raise ZeroDivisionError("the cause")

    job = start(lambda rank: train(rank, 1, lose_contact_then_fail))
    job.wait()
    assert job.said[0] == ""
    assert job.said[1].endswith("ZeroDivisionError: the cause\n")


def test_r02_ranks_that_were_killed_are_named_while_the_launcher_clears_away(start: Callable[..., Job]) -> None:
    job = start(lambda rank: train(rank, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)), world=3)
    job.wait(1)
    time.sleep(1)
    for rank in (0, 2):
        os.kill(job.ranks[rank].pid or 0, signal.SIGTERM)  # as torchrun does
    job.wait()
    assert (job.exit_codes, job.said[1]) == ([1, -9, 1], "")
    (line,) = filter(None, job.said)
    assert line.startswith(f"error: rank 1 on {HOST} of 3 ranks stopped answering: killed, frozen, or cut off; look at")
    assert line.endswith("the same command resumes from the last checkpoint\n")
    assert line.count("\n") == 1


def test_r03_a_frozen_rank_is_named_after_the_timeout(start: Callable[..., Job]) -> None:
    began = time.monotonic()
    job = start(lambda rank: train(rank, 0, lambda: os.kill(os.getpid(), signal.SIGSTOP), timeout=2.0))
    job.wait(1)
    assert time.monotonic() - began < 20
    assert job.said[1].startswith(f"error: rank 0 on {HOST} of 2 ranks stopped answering: killed, frozen, or cut off;")
    assert job.exit_codes == [None, 1]


def test_ranks_that_all_answer_are_not_blamed(start: Callable[..., Job]) -> None:
    job = start(lambda rank: train(rank, 0, lambda: time.sleep(60), timeout=2.0))
    job.wait(1)
    assert re.match(
        r"error: rank 1 lost contact with the others, none of which is known to be gone \(.*Timed out waiting 2000ms.*",
        job.said[1],
    )
    assert job.said[1].count("\n") == 1


def test_r01_a_rank_whose_main_thread_is_stuck_follows_the_first_to_fail(
    start: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_error, "_SECONDS_LEFT_TO_THE_STUCK", 1.0)

    def work(rank: int) -> None:
        start_accelerator("fp32")
        if rank:
            raise UserError("what, got, allowed")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(60)

    job = start(work)
    job.wait()
    assert job.said == ["", "error: what, got, allowed\n"]
    assert job.exit_codes == [2, 2]


@pytest.mark.parametrize("restarts", [(0, 1, 2), (0, 0, 0)], ids=["one machine", "restarted for another's sake"])
def test_r02_after_a_restart_the_ranks_find_each_other_and_their_own_first_error(
    restarts: tuple[int, ...], start: Callable[..., Job], launcher: Callable[[], int]
) -> None:
    """The launcher keeps its store, in which the addresses of ranks that are gone remain."""
    store = launcher()
    for count, restart in enumerate(restarts):
        job = start(
            lambda rank, n=count: train(rank, n % 2, lambda: raise_error(UserError(f"start {n}"))),
            restart=restart,
            store=store,
        )
        job.wait()
        assert job.said[count % 2] == f"error: start {count}\n"
        assert job.said[1 - count % 2] == ""
        assert job.exit_codes == [2, 2]


@pytest.mark.parametrize(
    ("error", "text"),
    [(UserError("lr is -1"), "error: lr is -1\n"), (ZeroDivisionError(), "\nTraceback")],
    ids=["mistake", "bug"],
)
def test_without_a_store_each_rank_speaks_for_itself(
    error: BaseException, text: str, start: Callable[..., Job]
) -> None:
    def fail_alone() -> None:
        os.environ["MASTER_PORT"] = f"{free_port()}"
        raise error

    job = start(lambda rank: train(rank, 1, fail_alone))
    job.wait(1)
    assert job.said[1].startswith(f"rank 1 of 2 on {HOST}:{text}" if "T" in text else f"rank 1 of 2 on {HOST}: {text}")


def test_the_first_call_decides_who_speaks(start: Callable[..., Job]) -> None:
    def work(rank: int) -> None:
        start_accelerator("fp32")
        errors = UserError("why"), UserError("why not"), ZeroDivisionError()
        answers = {failure_of(error).is_first for error in errors}
        raise UserError(f"{answers}")

    job = start(work)
    job.wait()
    assert sorted(job.said) == ["", "error: {True}\n"]


@pytest.mark.parametrize("store", [0, None], ids=["launcher's store", "rank 0's store"])
@pytest.mark.parametrize("last", [0, 1])
def test_a_job_that_finishes_says_nothing(store: int | None, last: int, start: Callable[..., Job]) -> None:
    def work(rank: int) -> None:
        train(rank, -1, lambda: None, steps=10)
        time.sleep(0.3 if rank == last else 0.0)

    job = start(work, store=store)
    job.wait()
    assert [(job.folder / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]
    assert job.exit_codes == [0, 0]


def test_r02_the_rank_that_kept_the_store_is_killed(start: Callable[..., Job]) -> None:
    job = start(lambda rank: train(rank, 0, lambda: os.kill(os.getpid(), signal.SIGKILL)), store=None)
    job.wait()
    assert job.exit_codes == [-9, 1]
    assert job.said[1].startswith(f"rank 1 of 2 on {HOST}: error: rank 1 lost contact with the others")
    assert job.said[1].count("\n") == 1


@pytest.mark.parametrize(("end", "words"), [("leave", "closed|reset"), ("freeze", "Timed out")])
def test_the_words_of_gloo_still_tell_a_loss_of_contact(
    end: str, words: str, on_two_ranks: Callable[[Callable[[], Any]], list[Any]]
) -> None:
    """Texts of libraries may change with any release."""

    def lose_contact() -> tuple[str, bool]:
        from torch import distributed

        consensus = RankConsensus(start_accelerator("fp32"), 1.0)
        if os.environ["RANK"] == "1":
            if end == "freeze":
                time.sleep(3)
            distributed.destroy_process_group()
            return "", True
        consensus.submit(0)
        with pytest.raises(RuntimeError) as failure:
            consensus.maximum()
        return str(failure.value), first_error._is_echo(failure.value)

    (text, is_echo), _ = on_two_ranks(lose_contact)
    assert re.search(words, text)
    assert is_echo


def test_one_process_keeps_its_tracebacks_and_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, errors_said_once():
        raise BadDataError("what, got, allowed")
    assert end.value.code == 3
    assert capsys.readouterr().err == "error: what, got, allowed\n"
    with pytest.raises(ZeroDivisionError), errors_said_once():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as end, errors_said_once():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
    assert capsys.readouterr().err.startswith("error: data worker 1 on ")
    failure = failure_of(UserError("what"))
    assert failure.is_first
    assert failure.text == "error: what"


def test_a_number_of_processes_that_is_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(SystemExit) as ended, errors_said_once(), signals_end_a_start():
        pytest.fail("it should not start")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE is 'x'; allowed: a number of processes")
