"""What this machine can do: its cores, memory and GPU, and the speed of a few training steps."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mae.data.batch import Batch, empty_batch
from mae.data.loader import normalize
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.flops import autoencoder_flops
from mae.models.settings import MaskedAutoencoderSettings
from mae.processes import default_workers
from mae.proposal.facts import MachineFacts
from mae.training.memory import total_memory
from mae.training.step_cost import take_steps

_BATCH_ON_CPU, _BATCH_ON_GPU = 16, 128
_TIMED_STEPS, _ENOUGH_SECONDS = 4, 0.4
# Twice the cores train this many times as fast.
_GAIN_OF_DOUBLING = 1.8
_SMALL = MaskedAutoencoderSettings(size="tiny", depth=4, patch_size=(8,), decoder_width=96, decoder_depth=2)
_SMALL_IMAGES = (64, 64)


def look_at_machine(accelerator: Accelerator) -> MachineFacts:
    """Count cores, memory and GPUs, and measure the speed with which a small autoencoder is trained."""
    device = accelerator.device
    is_gpu = device.type == "cuda"
    return MachineFacts(
        cores=default_workers(),
        memory=total_memory(torch.device("cpu")),
        flops=measured_flops(accelerator, _SMALL, _SMALL_IMAGES, 3),
        gpu=torch.cuda.get_device_name(device) if is_gpu else "",
        gpus=torch.cuda.device_count() if is_gpu else 0,
        has_bf16=accelerator.mixed_precision == "bf16",
        load=os.getloadavg()[0],
    )


def measured_flops(
    accelerator: Accelerator, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int
) -> float:
    """Train an autoencoder on random images for a few steps; return the counted operations per second.

    On a CPU, the time that one thread computes is measured and scaled to all cores, so that other programs, which may
    end before the run does, hardly change the result.
    """
    device = accelerator.device
    images = _BATCH_ON_GPU if device.type == "cuda" else _BATCH_ON_CPU
    model = MaskedAutoencoder(settings, image_size, channels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    data = DataSettings(image_size=image_size, channels=channels)
    batch = empty_batch(images, data, math.prod(model.grid))
    batch.images.random_(0, 256)
    batch.noise.uniform_()
    half = PixelStatistics((0.5,) * channels, (0.25,) * channels)

    def loss_of(trained: nn.Module, of: Batch) -> Tensor:
        loss: Tensor = trained(normalize(of.images, half), of.noise).loss
        return loss

    operations = autoencoder_flops(settings, image_size, channels).training * images
    if device.type == "cuda":
        cost = take_steps(accelerator, model, optimizer, loss_of, batch)
        return operations / (cost.seconds + cost.update_seconds)
    with _one_thread():
        seconds = _least_cpu_seconds(lambda: _step(optimizer, loss_of(model, batch)))
    return float(operations / seconds * default_workers() ** math.log2(_GAIN_OF_DOUBLING))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _least_cpu_seconds(step: Callable[[], None]) -> float:
    """Return the shortest time that a step took, in seconds of this process, after one that warms up."""
    step()
    least, began, done = math.inf, time.process_time(), 0
    while done < _TIMED_STEPS or time.process_time() - began < _ENOUGH_SECONDS:
        before = time.process_time()
        step()
        least, done = min(least, time.process_time() - before), done + 1
    return least


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
