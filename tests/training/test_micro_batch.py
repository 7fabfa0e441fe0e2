"""The search for the largest micro-batch: by costs that are made up, and by a model that is there."""

import multiprocessing
import os
import random
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_own_process, results_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mae.data.batch import Batch
from mae.data.plan import BatchPlan, plan_batches
from mae.data.settings import DataSettings
from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.settings import MaskedAutoencoderSettings
from mae.training import micro_batch
from mae.training.memory import memory_in_use
from mae.training.micro_batch import (
    MicroBatch,
    agree_on_micro_batch,
    find_micro_batch,
    largest_fit,
    micro_batch_sizes,
)
from mae.training.processes.accelerator import start_accelerator
from mae.training.settings import TrainSettings
from mae.training.step_cost import Cost, OutOfRoomError, bytes_beside, gradient_bytes, take_steps
from mae.training.task import LossOf
from training.jobs import Shrinking

DATA = DataSettings(channels=1, image_size=(4,), mean=(0.5,), std=(0.5,))
POWERS = [1 << power for power in range(9)]


@given(st.integers(1, 2000), st.integers(1, 4))
def test_sizes_rise_to_the_whole_share_and_each_divides_it(share: int, unit: int) -> None:
    sizes = micro_batch_sizes(share, unit)
    assert bool(sizes) == (share % unit == 0)
    assert sizes == sorted(set(sizes))
    assert all(share % size == 0 and size % unit == 0 for size in sizes)
    assert sizes == [] or sizes[-1] == share
    parts = [part for part in range(unit, share + 1, unit) if share % part == 0]
    for size, following in pairwise(sizes):
        between = [part for part in parts if size < part < following]
        assert following <= 2 * size or not between, "as near as there is one"


def test_of_a_power_of_two_the_powers_of_two_are_tried() -> None:
    assert micro_batch_sizes(256, 1) == POWERS
    assert micro_batch_sizes(96, 3) == [3, 6, 12, 24, 48, 96]
    assert micro_batch_sizes(100, 1) == [1, 2, 4, 5, 10, 20, 25, 50, 100]


class Device:
    """Costs by a formula; `tried` lists what was asked for."""

    def __init__(self, fixed: int = 1000, per_image: int = 100, room: int = 10**9, overhead: float = 1e9) -> None:
        self.fixed, self.per_image, self.room, self.overhead = fixed, per_image, room, overhead
        self.tried: list[int] = []

    def cost_of(self, images: int) -> Cost:
        self.tried.append(images)
        peak = self.fixed + self.per_image * images
        if peak > self.room:
            raise OutOfRoomError
        seconds = 1e-12 * (self.overhead + images)
        return Cost(images, 1.0, seconds, seconds, 0.0, self.fixed - 200, peak)


@pytest.mark.parametrize("is_cuda", [True, False], ids=["gpu", "cpu"])
@pytest.mark.parametrize(("room", "images"), [(1100, 1), (1199, 1), (1200, 2), (13_799, 64), (13_800, 128)])
def test_the_largest_that_fits_is_taken_and_on_a_cpu_none_is_tried_that_does_not(
    room: int, images: int, is_cuda: bool
) -> None:
    device = Device(room=room)
    fit = largest_fit(device.cost_of, POWERS, float(room), gradients=200, is_cuda=is_cuda)
    assert fit.images == images
    assert device.tried == POWERS[: POWERS.index(images) + (2 if is_cuda else 1)]
    assert f"{2 * images} " in fit.why


def test_what_there_is_memory_for_is_not_taken_to_the_last_tenth() -> None:
    """A GPU takes the step, but less was to be used."""
    device = Device(room=10**9)
    assert largest_fit(device.cost_of, POWERS, 2000.0, gradients=200, is_cuda=True).images == 8
    assert device.tried == [1, 2, 4, 8, 16]


def test_the_whole_share_is_the_end() -> None:
    fit = largest_fit(Device().cost_of, POWERS, 1e9, gradients=200, is_cuda=False)
    assert fit == MicroBatch(256, "they are the whole share of a process")


def test_on_a_cpu_more_images_that_are_no_faster_are_not_taken() -> None:
    device = Device(overhead=4.0)
    fit = largest_fit(device.cost_of, POWERS, 1e9, gradients=200, is_cuda=False)
    # An image takes 1 + 4 / n: 1.125 in 32, 1.0625 in 64, 1.03125 in 128.
    assert (fit.images, device.tried) == (64, [*POWERS[:8], 128, 64])
    assert fit.why == "128 are no faster, and take more memory"
    assert largest_fit(Device(overhead=4.0).cost_of, POWERS, 1e9, 200, is_cuda=True).images == 256, "a GPU"


def test_a_moment_in_which_others_keep_the_processor_busy_does_not_end_the_search() -> None:
    device = Device(overhead=1e3)

    def disturbed(images: int) -> Cost:
        cost = device.cost_of(images)
        return replace(cost, least_seconds=1.0) if device.tried.count(4) == 1 else cost

    assert largest_fit(disturbed, POWERS, 1e9, gradients=200, is_cuda=False).images == 256
    assert device.tried == [1, 2, 4, 4, 2, 8, 16, 32, 64, 128, 256]


def test_on_a_cpu_steps_that_are_long_already_end_the_search() -> None:
    device = Device(overhead=3e12)
    fit = largest_fit(device.cost_of, POWERS, 1e9, gradients=200, is_cuda=False)
    assert fit == MicroBatch(1, "they take 3 s, and more would not be faster")
    assert device.tried == [1]


@pytest.mark.parametrize("is_cuda", [False, True])
def test_no_room_for_the_least_is_an_error(is_cuda: bool) -> None:
    with pytest.raises(UserError, match="not even 4 images at a time fit into memory"):
        largest_fit(Device(room=1000).cost_of, [4, 8], 1000.0, 200, is_cuda)


def test_what_a_step_does_not_show() -> None:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    found = [bytes_beside(model, processes, average) for processes in (1, 2) for average in (False, True)]
    assert found == [0, 12, 12, 24]


class Layer(nn.Module):
    """Whose dropout draws random numbers, and whose hidden values take memory."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(16, width), nn.Linear(width, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = nn.functional.dropout(self.hidden(pixels), 0.5)
        return self.out(hidden.relu())  # type: ignore[no-any-return]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    np.random.rand()  # as mixup does
    random.random()
    assert batch.labels.min() >= 0
    loss: Tensor = model(batch.images.float().flatten(1)).square().mean()
    return loss


@dataclass(frozen=True)
class Dropping(Shrinking):
    """Whose model is `Layer`, of some width, in micro-batches of multiples of `multiple` images."""

    build: Callable[[], nn.Module] = Layer
    multiple: int = 1

    @property
    def unit(self) -> int:
        return self.multiple

    def build_model(self) -> nn.Module:
        return self.build()

    def loss_of(self, images: int) -> LossOf:
        return loss_of


def task_of(build: Callable[[], nn.Module] = Layer, unit: int = 1, **settings: Any) -> Dropping:
    no_source: Any = None
    return Dropping(TrainSettings(Path("run"), data=DATA, **settings), no_source, build, unit)


def find(plan: BatchPlan, unit: int = 1, **settings: Any) -> MicroBatch:
    return find_micro_batch(task_of(unit=unit, **settings), start_accelerator("fp32"), plan, here=1, running=1)


def test_nothing_is_left_of_a_trial() -> None:
    """A run draws the same numbers after it as without it. Python's own beartype draws from, in tests only."""
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    assert find(plan_batches(8, 1, None), ema_decay=0.9).images in (1, 2, 4, 8)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before
    random.seed(1)
    with micro_batch._without_trace(torch.device("cpu")):
        expected = random.random()
    assert random.random() == expected


def test_a_step_costs_time_and_memory() -> None:
    in_own_process(step_costs_time_and_memory)


def step_costs_time_and_memory() -> None:
    accelerator = start_accelerator("fp32")
    model = Layer(width=1 << 16)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch = micro_batch._random_batch(64, DATA, noise_columns=0)
    # The first steps of a process load libraries, of about as many bytes as are measured here.
    take_steps(accelerator, model, optimizer, loss_of, batch, micro_batches=2)
    before = memory_in_use(accelerator.device)
    cost = take_steps(accelerator, model, optimizer, loss_of, batch, micro_batches=2)
    assert 0 < cost.least_seconds <= cost.seconds
    assert cost.update_seconds > 0
    hidden = 64 * (1 << 16) * 4
    assert cost.peak_bytes - before > 2 * hidden, "before and after the dropout"
    assert cost.resting_bytes - before < hidden
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_twice_as_many_images_take_is_foreseen_to_a_quarter() -> None:
    foreseen, growing = in_own_process(foreseen_and_measured)
    assert growing > 1e8
    assert foreseen == pytest.approx(growing, rel=0.25)


def foreseen_and_measured() -> tuple[float, float]:
    """Bytes that grow with the batch, for 128 images: by the steps with 64 of them, and by their own."""
    size = {"width": 64, "depth": 2, "heads": 2, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2}
    model = MaskedAutoencoder(MaskedAutoencoderSettings(**size, patch_size=(4,)), (32, 32), 1)
    accelerator, data = start_accelerator("fp32"), replace(DATA, image_size=(32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    few, half, whole = (
        take_steps(accelerator, model, optimizer, pretraining_loss, micro_batch._random_batch(images, data, 64), 2)
        for images in (8, 64, 128)
    )
    fixed = few.resting_bytes + gradient_bytes(model)
    return half.bytes_for(128, fixed) - fixed, whole.peak_bytes - fixed


def pretraining_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(batch.images.float(), batch.noise).loss
    return loss


def test_a_limit_that_nobody_tells_of_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -v`, say; the process lives on, and so does the search."""
    monkeypatch.setattr(micro_batch, "_LEAST_GAIN", -1e9)
    accelerator = start_accelerator("fp32")
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def with_little_memory() -> None:
        mapped = re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert mapped is not None
        limit = int(mapped[1]) * 1024 + (1 << 28)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        task = task_of(partial(Layer, 1 << 16), unit=32)
        results.put(find_micro_batch(task, accelerator, plan_batches(1 << 12, 1, None), here=1, running=1))

    process = context.Process(target=with_little_memory)
    process.start()
    (fit,) = results_of([process], results)
    # 256 MiB, of which each image takes 0.25 MiB three times or so.
    assert fit.images in (64, 128, 256)
    assert f"{2 * fit.images} do not fit into " in fit.why


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfRoomError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), OutOfRoomError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_only_a_lack_of_memory_is_one(error: Exception, expected: type[Exception]) -> None:
    model = Layer()

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        loss_of(model, batch).backward()
        raise error

    with pytest.raises(expected):
        take_steps(start_accelerator("fp32"), model, torch.optim.AdamW(model.parameters()), failing,
                   micro_batch._random_batch(2, DATA, noise_columns=0))  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_does_not_fit_by_itself_is_told_in_one_line() -> None:
    def too_large() -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"^the model alone does not fit into memory"):
        find_micro_batch(task_of(too_large), start_accelerator("fp32"), plan_batches(8, 1, None), here=1, running=1)


def test_processes_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "total_memory", lambda device: 1000)
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: 500)
    monkeypatch.setattr(micro_batch, "memory_in_use", lambda device: 100)
    cpu = torch.device("cpu")
    assert micro_batch._room(cpu, here=1, running=1) == 500
    assert micro_batch._room(cpu, here=4, running=1) == 125, "the three others are not there yet"
    assert micro_batch._room(cpu, here=4, running=4) == 200
    assert micro_batch._room(torch.device("cuda"), here=4, running=1) == 500, "each has a GPU of its own"


def test_a_share_that_is_no_multiple_of_what_stays_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"takes 5 images of the global batch, .*not a multiple of 2 .*batch_size$"):
        find(plan_batches(10, 2, None), unit=2)


OnTwoRanks = Callable[[Callable[[], Any]], list[Any]]


def test_the_rank_with_the_least_room_decides_and_says_why(
    on_two_ranks: OnTwoRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree() -> tuple[BatchPlan, list[str]]:
        rank, said = int(os.environ["RANK"]), list[str]()
        fit = MicroBatch(8, "16 do not fit into 1 GB") if rank else MicroBatch(16, "32 do not fit into 2 GB")
        plan = plan_batches(128, 2, None)
        monkeypatch.setattr(micro_batch, "find_micro_batch", lambda *given: fit)
        return agree_on_micro_batch(task_of(), start_accelerator("fp32"), plan, said.append), said

    first, second = on_two_ranks(agree)
    assert first == second
    plan, (said,) = first
    assert plan == BatchPlan(128, processes=2, per_process=8, accumulation=8)
    assert said == ("micro_batch_size auto takes 8 images at a time: 16 do not fit into 1 GB; batch of 128 = 2 x 8 x 8")


def test_two_ranks_that_try_at_once_agree(on_two_ranks: OnTwoRanks) -> None:
    def agree() -> BatchPlan:
        plan = plan_batches(16, 2, None)
        return agree_on_micro_batch(task_of(), start_accelerator("fp32"), plan, lambda text: None)

    first, second = on_two_ranks(agree)
    assert first == second
    assert replace(first, per_process=1, accumulation=8) == BatchPlan(16, 2, 1, 8)
    assert first.per_process * first.accumulation == 8
