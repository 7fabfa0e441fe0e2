"""What the doctor concludes from a few steps: memory, waiting for data, time of the whole run."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from doctor.conftest import TINY_DECODER, Doctor
from mae.doctor import speed
from mae.doctor.stages import PretrainExamination
from mae.doctor.trial import Trial
from mae.pipelines import pretrain
from mae.training import micro_batch, step_cost

MEASURED = Trial(
    asked=16,
    fitting=16,
    images=16,
    loss=1.0,
    seconds_per_image=0.01,
    update_seconds=0.04,
    data_seconds_per_image=0.005,
    fixed_bytes=1 << 20,
    peak_bytes=2 << 20,
)


@pytest.fixture
def examined(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., PretrainExamination]:
    """A function that gives an examination of the tiny run whose trial has this outcome, on eight cores."""
    monkeypatch.setattr("mae.doctor.examination.default_workers", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def examination(outcome: Trial, *words: str) -> PretrainExamination:
        made = PretrainExamination([*flags, *words], lambda text: None)
        made.known["trial"] = outcome
        return made

    return examination


@pytest.mark.parametrize(
    ("words", "data", "step", "wait"),
    [
        pytest.param(["--data.workers", "0"], 0.005, 0.28, 0.08, id="nobody-works-beside"),
        pytest.param(["--data.workers", "2"], 0.005, 0.2, 0.0, id="workers-keep-up"),
        pytest.param(["--data.workers", "2"], 0.02, 0.36, 0.16, id="workers-do-not-keep-up"),
        pytest.param(["--data.workers", "2", "--processes", "8"], 0.005, 0.08, 0.02, id="processes-share-the-cores"),
        pytest.param(["--data.workers", "2", "--micro_batch_size", "4"], 0.005, 0.2, 0.0, id="accumulation"),
    ],
)
def test_the_pace(
    examined: Callable[..., PretrainExamination], words: list[str], data: float, step: float, wait: float
) -> None:
    pace = speed.pace_of(examined(replace(MEASURED, data_seconds_per_image=data), *words))
    assert pace == pytest.approx((step, wait))


def test_waiting_for_data_is_a_warning(examined: Callable[..., PretrainExamination]) -> None:
    slow = replace(MEASURED, data_seconds_per_image=0.02)
    assert speed.data_speed(examined(MEASURED, "--data.workers", "2")).warnings == ()
    (warning,) = speed.data_speed(examined(slow, "--data.workers", "2")).warnings
    assert "set --data.workers 8" in warning
    (warning,) = speed.data_speed(examined(slow, "--data.workers", "8")).warnings
    assert "--data.workers" not in warning


def test_the_time_of_the_whole_run_and_of_what_a_crash_costs(examined: Callable[..., PretrainExamination]) -> None:
    run = speed.whole_run(examined(MEASURED, "--epochs", "2000", "--data.workers", "2"))
    assert run.found.startswith("5,000 steps of 0.2 s take about 16:40, ")
    assert run.warnings == ()
    slow = replace(MEASURED, update_seconds=99.84)
    run = speed.whole_run(examined(slow, "--epochs", "2000", "--data.workers", "2", "--checkpoint_every", "1000"))
    assert run.warnings == ("a crash can cost 27:46:40, the time between checkpoints: lower checkpoint_every to 36",)


def test_memory_is_scaled_to_the_batch_asked_for(
    examined: Callable[..., PretrainExamination], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_memory_available", lambda examination: (10 << 20, "available"))
    few = replace(MEASURED, images=4)
    found = speed.memory(examined(few))
    assert found.problems == ()
    assert "about 5.24 MB per process" in found.found
    assert "scaled from 2.10 MB with 4 of 16 images" in found.found
    found = speed.memory(examined(replace(few, peak_bytes=4 << 20)))
    assert found.problems == ("set --micro_batch_size 8; the batch of 16 stays",)


def test_the_first_loss_must_be_a_number(examined: Callable[..., PretrainExamination]) -> None:
    assert "the first loss is not finite" in speed.step(examined(replace(MEASURED, loss=float("nan")))).problems[0]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_becomes_a_micro_batch(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ordinary = step_cost._step

    def step_of_a_small_device(*given: object) -> object:
        if len(given[4].images) > 3:  # type: ignore[attr-defined]
            raise error
        return ordinary(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(step_cost, "_step", step_of_a_small_device)
    code, found = doctor(*flags)
    assert code == 2
    assert found["memory"][0] == "problem"
    assert "a step with 16 images does not fit" in found["memory"][1]
    assert "set --micro_batch_size 2; the batch of 16 stays" in found["memory"][1]
    assert found["whole run"] == ("unknown", "not examined, see memory")
    assert doctor(*flags, "--micro_batch_size", "2")[0] == 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_doctor_finds_the_batch_that_the_run_would_find(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """And examines the run with that one."""
    ordinary = step_cost._step

    def step_of_a_small_device(*given: object) -> object:
        if len(given[4].images) > 3:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ordinary(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(step_cost, "_step", step_of_a_small_device)
    monkeypatch.setattr(micro_batch, "_LEAST_GAIN", -1e9)  # on a busy machine 2 images may seem to be slower than 1
    at = flags.index(TINY_DECODER[0])
    words = flags if stage == "pretrain" else [*flags[:at], *flags[at + len(TINY_DECODER) :]]
    code, found = doctor(stage, *words, "--batch_size", "auto")
    assert code == 0
    told = "16 = 1 process x 2 x 8 accumulated; micro_batch_size auto takes 2 images at a time: 4 do not fit into "
    assert found["batches"][1].startswith(told)
    assert "for 2 images on cpu" in found["step"][1]
    assert found["run folder"] == ("ok", "a new run")


def test_the_doctor_holds_a_run_that_goes_on_against_the_batch_that_it_began_with(
    doctor: Doctor, flags: list[str]
) -> None:
    pretrain.main([*flags, "--micro_batch_size", "4"])
    code, found = doctor(*flags, "--micro_batch_size", "auto")
    assert code == 0
    assert found["batches"][1].startswith("16 = 1 process x 4 x 4 accumulated; 2 x ")
    assert found["run folder"][1].startswith("resumes from step-000000005")


def test_a_device_without_room_for_one_image(doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_cost, "_step", full)
    code, found = doctor(*flags)
    assert code == 2
    assert "not even 1 images at a time fit into memory" in found["step"][1]
