"""What the launcher promised is compared with what there is."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mae.errors import UserError
from mae.training.processes.accelerator import Ballot, Stacks, library_versions, require_agreement, start_accelerator


def test_one_process_on_the_cpu_runs_in_fp32() -> None:
    accelerator = start_accelerator("auto")
    assert accelerator.num_processes == 1
    if not torch.cuda.is_available():
        assert accelerator.mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_k09_bf16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="no GPU with bf16"):
        start_accelerator("bf16")


def test_fp16_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16"):
        start_accelerator("auto")


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
            "versions of mae, which compare: nothing on rank 0, plan on rank 1",
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


def test_versions_of_all_that_changes_a_number_or_a_file() -> None:
    versions = library_versions()
    assert set(versions) == {"python", "mae", "torch", "timm", "accelerate", "numpy", "safetensors"}
    assert versions["torch"] == torch.__version__


def test_p02_each_place_of_a_ballot_goes_to_the_greatest_vote(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    def vote() -> list[list[int]]:
        rank = int(os.environ["RANK"])
        ballot = Ballot(start_accelerator("fp32"), 20.0)
        results = []
        for step in range(50):
            ballot.cast(rank * step, 1 - rank, 2**40)
            results.append(ballot.result())
        return results

    expected = [[step, 1, 2**40] for step in range(50)]
    assert on_two_ranks(vote) == [expected, expected]


def test_a_ballot_of_one_returns_its_vote() -> None:
    ballot = Ballot(start_accelerator("fp32"), 20.0)
    ballot.cast(3, 0)
    assert ballot.result() == [3, 0]


def test_a_vote_is_cast_without_waiting_for_the_others(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    def vote() -> tuple[float, list[int]]:
        ballot = Ballot(start_accelerator("fp32"), 20.0)
        ballot.cast(0)
        ballot.result()
        if os.environ["RANK"] == "1":
            time.sleep(0.5)
        began = time.perf_counter()
        ballot.cast(1)
        seconds = time.perf_counter() - began
        return seconds, ballot.result()

    for seconds, result in on_two_ranks(vote):
        assert seconds < 0.4
        assert result == [1]


def test_r03_a_ballot_ends_by_its_timeout(on_two_ranks: Callable[[Callable[[], Any]], list[Any]]) -> None:
    def vote() -> float:
        ballot = Ballot(start_accelerator("fp32"), 1.0)
        began = time.perf_counter()
        if os.environ["RANK"] == "1":
            time.sleep(3)
            return 0.0
        ballot.cast(1)
        with pytest.raises(RuntimeError, match="Timed out waiting 1000ms"):
            ballot.result()
        return time.perf_counter() - began

    assert 0.9 < on_two_ranks(vote)[0] < 2.9


def test_r03_the_stacks_of_a_step_that_is_stuck_are_written_and_of_no_other(tmp_path: Path) -> None:
    def step(stacks: Stacks, seconds: float) -> None:
        stacks.alive()
        time.sleep(seconds)

    def train() -> None:
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115 - a descriptor
        stacks = Stacks(1.0)
        for _ in range(15):
            step(stacks, 0.1)
        os.write(2, b"alive\n")
        step(stacks, 1.5)
        stacks.stop()
        time.sleep(1.2)

    rank = multiprocessing.get_context("fork").Process(target=train)
    rank.start()
    rank.join()
    assert rank.exitcode == 0
    before, after = (tmp_path / "stderr").read_text().split("alive\n")
    assert before == ""
    assert after.count("Timeout (") == 1
    assert "in step" in after


def test_being_alive_costs_next_to_nothing() -> None:
    stacks = Stacks(600.0)
    stacks.alive()
    seconds = []
    for _ in range(10):  # others that keep the processor busy do not disturb all of them
        began = time.perf_counter()
        for _ in range(1000):
            stacks.alive()
        seconds.append(time.perf_counter() - began)
    stacks.stop()
    assert min(seconds) / 1000 < 20e-6  # about 1 us


def test_k05_accelerate_started_one_process_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="asked for several CPU processes but started one"):
        start_accelerator("fp32")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_k05_processes_that_do_not_know_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    start = partial(start_accelerator, "fp32")
    with pytest.raises(UserError, match="asked for 2 processes but each runs alone"):
        start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("devices", "on_cpu", "is_refused"),
    [
        pytest.param("0", "false", True, id="k09-number"),
        pytest.param("GPU-8932f937", "false", True, id="k09-name"),
        pytest.param("0,1", "true", False, id="k09-cpu-asked-for"),
        pytest.param("", "false", False, id="k09-hidden"),
        pytest.param("-1", "false", False, id="k09-hidden-too"),
        pytest.param("NoDevFiles", "false", False, id="k09-none-by-slurm"),
    ],
)
def test_a_gpu_that_is_asked_for_and_absent(
    devices: str, on_cpu: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.setenv("ACCELERATE_USE_CPU", on_cpu)
    refusal = pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES is {devices} but torch .* sees no GPU")
    with refusal if is_refused else nullcontext():
        start_accelerator("auto")


def test_r06_a_port_in_use_is_named() -> None:
    def meet() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            AcceleratorState._reset_state(reset_partial_state=True)
            try:
                start_accelerator("fp32")
            except UserError as error:
                messages.put((port, str(error)))

    context = multiprocessing.get_context("fork")
    messages = context.Queue()
    rank = context.Process(target=meet)
    rank.start()
    port, message = messages.get(timeout=30)
    rank.join()
    assert message.startswith(f"the processes cannot meet at 127.0.0.1:{port} (The server socket has failed to listen")
    assert "another port" in message
