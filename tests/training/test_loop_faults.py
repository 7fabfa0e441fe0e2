"""Steps that cannot be taken, checkpoints that cannot be written, requests to stop: on one rank and on two."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae.data.batch import Batch
from mae.errors import CheckpointError, PreemptedError, UserError
from mae.training import context
from mae.training.checkpoints.manifest import step_folder
from mae.training.checkpoints.reader import newest_checkpoint, verify_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.context import training
from mae.training.job import Job
from mae.training.run_folder.folder import RunFolder
from training.jobs import job_of

OnTwoRanks = Callable[[Callable[[], Any]], list[Any]]
Weights = dict[str, list[Any]]  # to the last bit, and fit to be sent from one process to another
TOTAL = 12


@pytest.fixture
def shard(make_shards: Callable[..., Path]) -> Path:
    return make_shards([24]) / "train-000000.tar"


def job(shard: Path, run_dir: Path, bad_steps: Sequence[int] = (), bad_rank: int = 0, log_every: int = 1) -> Job:
    """Twelve steps with a checkpoint after every second; the loss of some calls on one rank is not finite."""
    base = job_of(shard, run_dir, allowed=0)
    base.folder.pictures.mkdir(parents=True, exist_ok=True)
    settings = replace(base.settings, checkpoint_every=2, log_every=log_every, skip_at_most=3)
    main = base.accelerator.is_main_process
    counted: list[int] = []

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        counted.append(len(counted))
        loss: Tensor = base.loss_of(model, batch)
        spoilt = counted[-1] in bad_steps and base.accelerator.process_index == bad_rank
        return loss * math.nan if spoilt else loss

    writer = CheckpointWriter(base.folder.checkpoints, keep=9) if main else None
    return replace(base, settings=settings, loss_of=loss_of, total=TOTAL, writer=writer)


def run(job: Job) -> Weights:
    """Train to the end, and give the weights."""
    with training(job) as steps:
        for _ in steps:
            pass
    return plain(job.state.tensors()["model"])


def plain(weights: dict[str, Tensor]) -> Weights:
    return {name: tensor.tolist() for name, tensor in weights.items()}


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_samples_written_n01_n05(
    shard: Path, tmp_path: Path
) -> None:
    one = job(shard, tmp_path / "run", bad_steps=[5])
    run(one)
    records = one.folder.metrics()
    assert [record["skipped"] for record in records] == [int(step == 6) for step in range(1, TOTAL + 1)]
    assert [record["loss"] is None for record in records] == [step == 6 for step in range(1, TOTAL + 1)]
    assert [record["lr"] for record in records] == [one.schedule(step) for step in range(TOTAL)]
    assert one.folder.skipped.name == "skipped-steps.jsonl"
    (line,) = map(json.loads, one.folder.skipped.read_text().splitlines())
    assert line["step"] == 5
    assert len(set(line["ids"])) == 8
    # Step 6 was due for a checkpoint, but is the skipped one.
    saved = sorted(path.name for path in one.folder.checkpoints.iterdir())
    assert saved == [f"step-{step:09d}" for step in (2, 4, 8, 10, 12)]


def spoilt_run(shard: Path, run_dir: Path, bad_rank: int) -> Weights:
    return run(job(shard, run_dir, bad_steps=[5], bad_rank=bad_rank))


def test_a_skip_on_one_rank_is_a_skip_on_all_n01(shard: Path, tmp_path: Path, on_two_ranks: OnTwoRanks) -> None:
    for bad_rank in (0, 1):
        folder = RunFolder(tmp_path / f"run{bad_rank}")
        first, second = on_two_ranks(partial(spoilt_run, shard, folder.path, bad_rank))
        assert first == second
        assert all(torch.tensor(values).isfinite().all() for values in first.values())
        (line,) = map(json.loads, folder.skipped.read_text().splitlines())
        assert line["step"] == 5
        assert len(set(line["ids"])) == 8


@pytest.mark.parametrize("log_every", [1, 5])
def test_after_so_many_skips_in_a_row_the_weights_go_back_once_and_the_data_go_on_n02(
    log_every: int, shard: Path, tmp_path: Path
) -> None:
    """Calls 6, 7, 8 fail (steps 6, 7, 8): back to the checkpoint of step 6, with the data after those three steps."""
    one = job(shard, tmp_path / "run", bad_steps=[6, 7, 8], log_every=log_every)
    run(one)
    rollback = one.folder.rollback()
    assert rollback is not None
    assert (rollback.step, rollback.samples) == (6, 9 * 8)
    final = verify_checkpoint(step_folder(one.folder.checkpoints, TOTAL))
    assert final.position.samples == (TOTAL + 3) * 8
    steps = [record["step"] for record in one.folder.metrics()]
    assert steps == sorted(set(steps))

    # The same as a run that had never seen those data.
    before = job(shard, tmp_path / "run", log_every=log_every)
    found = verify_checkpoint(step_folder(one.folder.checkpoints, 6))
    before.state.restore(found)
    position = replace(found.position, samples=9 * 8)
    run_position = replace(found.run_position, position=position)
    expected = run(replace(before, start=run_position, folder=RunFolder(tmp_path / "other"), writer=None))
    assert plain(final.tensors("model")) == expected


def test_the_second_time_the_run_ends_with_good_checkpoints_n02_n03(shard: Path, tmp_path: Path) -> None:
    one = job(shard, tmp_path / "run", bad_steps=[6, 7, 8, 11, 12, 13])
    with pytest.raises(UserError, match=r"3 steps in a row were skipped .* again after a return to a checkpoint"):
        run(one)
    found = newest_checkpoint(one.folder.checkpoints, lambda text: None)
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in found.tensors("model").values())
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["reason"] == "error"


def test_without_a_checkpoint_there_is_nothing_to_go_back_to_n02(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to go back to"):
        run(job(shard, tmp_path / "run", bad_steps=[0, 1, 2]))


def test_a_weight_that_is_not_finite_is_never_saved_n03(shard: Path, tmp_path: Path) -> None:
    one = job(shard, tmp_path / "run")
    weight = one.state.tensors()["model"]["weight"]
    with pytest.raises(UserError, match="a weight is not finite after step 4"), training(one) as steps:
        for step in steps:
            weight[0, 0] = math.inf if step == 4 else weight[0, 0]
    assert [path.name for path in one.folder.checkpoints.iterdir()] == ["step-000000002"]


class Unwritable(CheckpointWriter):
    """A disk that is full at some saves."""

    failing: Sequence[int] = ()

    def _write(self, save: Any) -> None:
        if save.run_position.step in self.failing:
            self.failure = "disk full"
            self.failures_in_a_row += 1
        else:
            super()._write(save)


@pytest.mark.parametrize("failing", [[4], [4, 6]])
def test_a_save_that_fails_is_said_and_tried_again_c03(
    failing: list[int], shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = job(shard, tmp_path / "run")
    writer = Unwritable(one.folder.checkpoints, keep=9)
    writer.failing = failing
    run(replace(one, writer=writer))
    saved = {int(path.name[5:]) for path in one.folder.checkpoints.glob("step-*")}
    assert saved == {2, 4, 6, 8, 10, 12} - set(failing)
    assert "warning: disk full; training continues" in capsys.readouterr().out


def test_after_three_failures_in_a_row_the_run_ends_c03(shard: Path, tmp_path: Path) -> None:
    one = job(shard, tmp_path / "run")
    writer = Unwritable(one.folder.checkpoints, keep=9)
    writer.failing = [4, 6, 8]
    with pytest.raises(CheckpointError, match="disk full"):
        run(replace(one, writer=writer))
    assert {path.name for path in one.folder.checkpoints.glob("step-*")} == {"step-000000002"}


def test_a_last_save_that_fails_is_an_error_c03(shard: Path, tmp_path: Path) -> None:
    one = job(shard, tmp_path / "run")
    writer = Unwritable(one.folder.checkpoints, keep=9)
    writer.failing = [TOTAL]
    with pytest.raises(CheckpointError, match="disk full"):
        run(replace(one, writer=writer))


def interrupted(one: Job, at: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Train, with a signal to oneself after step `at`."""
    with training(one) as steps:
        for step in steps:
            if step == at:
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # until the thread that listens has read it


def resumed(shard: Path, run_dir: Path, log_every: int = 1) -> Job:
    """The job of the same command, started again."""
    again = job(shard, run_dir, log_every=log_every)
    found = newest_checkpoint(again.folder.checkpoints, lambda text: None)
    assert found is not None
    again.state.restore(found)
    return replace(again, start=found.run_position)


def trace(folder: RunFolder) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in folder.metrics()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=["p01-term", "p05-usr1", "int"])
def test_a_signal_saves_and_leaves_within_a_step_and_the_log_goes_on_as_if_nothing_had_been(
    number: signal.Signals, shard: Path, tmp_path: Path
) -> None:
    """Step 7 is due for no checkpoint and no line of the log; weights and lines are those of the straight run."""
    straight = job(shard, tmp_path / "straight", log_every=5)
    expected = run(straight)
    with pytest.raises(PreemptedError, match=rf"{number.name}: saved at step 7 of {TOTAL}"):
        interrupted(job(shard, tmp_path / "cut", log_every=5), 6, number)
    assert json.loads((tmp_path / "cut" / "exit.json").read_text())["reason"] == "preempted"
    again = resumed(shard, tmp_path / "cut", log_every=5)
    assert again.start.step == 7
    assert run(again) == expected
    assert trace(again.folder) == trace(straight.folder)
    assert json.loads((tmp_path / "cut" / "exit.json").read_text())["reason"] == "finished"


def test_what_was_due_at_the_step_of_the_signal_is_done_after_the_resume(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        interrupted(job(shard, tmp_path / "run"), 6)
    with training(resumed(shard, tmp_path / "run")) as steps:
        assert list(steps) == list(range(7, TOTAL + 1))
    with training(resumed(shard, tmp_path / "run")) as steps:
        assert list(steps) == []


def test_a_signal_after_the_last_step_changes_nothing_p06(shard: Path, tmp_path: Path) -> None:
    one = job(shard, tmp_path / "run")
    interrupted(one, TOTAL)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["reason"] == "finished"


@pytest.mark.parametrize(("at", "reason"), [(6, "preempted"), (TOTAL, "finished")])
def test_a_signal_that_is_repeated_while_the_end_is_recorded_does_not_lose_the_record_p03_p08(
    at: int, reason: str, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunFolder.record_exit

    def signalled(self: RunFolder, reason: str, message: str) -> None:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it would end the tests"
        os.kill(os.getpid(), signal.SIGTERM)
        record(self, reason, message)

    monkeypatch.setattr(RunFolder, "record_exit", signalled)
    with suppress(PreemptedError):
        interrupted(job(shard, tmp_path / "run"), at)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["reason"] == reason


def test_an_error_or_a_signal_while_trackers_are_opened_is_recorded(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: Job) -> None:
        raise UserError("trackers.json cannot be used")

    def is_stopped(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # until the thread that listens has read it

    endings = []
    for opening in (fails, is_stopped):
        monkeypatch.setattr(context, "open_trackers", opening)
        one = job(shard, tmp_path / opening.__name__)
        with pytest.raises(UserError):
            run(one)
        endings.append(json.loads((one.folder.path / "exit.json").read_text()))
    assert [each["reason"] for each in endings] == ["error", "preempted"]
    assert f"saved at step 1 of {TOTAL}" in endings[1]["message"]


def test_a_signal_within_skipped_steps_saves_none_of_them_p06(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(PreemptedError, match="within skipped steps, which are not saved"):
        interrupted(job(shard, tmp_path / "run", bad_steps=[4, 5]), 5)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))[-1] == "step-000000004"


def test_a_signal_to_one_rank_is_one_to_all_p02(
    shard: Path, tmp_path: Path, on_two_ranks: OnTwoRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that is told leaves when the end is recorded: the launcher then ends the other."""
    record = RunFolder.record_exit

    def slowly(self: RunFolder, reason: str, message: str) -> None:
        time.sleep(1)
        record(self, reason, message)

    monkeypatch.setattr(RunFolder, "record_exit", slowly)

    def cut() -> None:
        one = job(shard, tmp_path / "cut", log_every=5)
        if one.accelerator.process_index == 0:
            run(one)
        try:
            interrupted(one, 6)
        finally:
            assert (tmp_path / "cut" / "exit.json").exists()

    first, second = on_two_ranks(cut)
    assert first == second == f"error: SIGTERM: saved at step 7 of {TOTAL}; the same command resumes from there"
    straight = on_two_ranks(lambda: run(job(shard, tmp_path / "straight", log_every=5)))
    again = on_two_ranks(lambda: run(resumed(shard, tmp_path / "cut", log_every=5)))
    assert again[0] == straight[0]
    assert trace(RunFolder(tmp_path / "cut")) == trace(RunFolder(tmp_path / "straight"))
