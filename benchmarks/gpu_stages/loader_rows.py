"""What the worker process measures for the stage loader."""

import io
import multiprocessing
import os
import tarfile
import time
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mae.data.batch import BatchRecipe, to_device
from mae.data.images.augment import AugmentSettings
from mae.data.indexing import open_index
from mae.data.loader import load
from mae.data.plan import plan_batches
from mae.data.settings import DataSettings
from mae.data.train_batches import TrainBatches

from .results import Figures

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_WARM_UP, _SECONDS = 4, 5.0


def measure(photos: str, where: Literal["cpu", "device"], workers: int, side: int, batch: int, is_toy: bool) -> Figures:
    """Return the speed of finished batches on the device, without a model."""
    cache = Path(photos).parent / "cache"
    index = open_index(sorted(map(str, Path(photos).glob("*.tar"))), cache)
    data = DataSettings(image_size=(side,), decode_on=where, cache_dir=cache)
    batches = TrainBatches(index, plan_batches(batch, 1, None), 0, BatchRecipe(0, data, AugmentSettings()))
    stream = load(batches, range(10**9), workers, DEVICE.type == "cuda")
    for made in islice(stream, 1 if is_toy else max(_WARM_UP, 2 * workers)):
        to_device(made, DEVICE)
    views, began, cpu = 0, time.perf_counter(), _cpu_seconds()
    while time.perf_counter() < began + (0.5 if is_toy else _SECONDS):
        images = to_device(next(stream), DEVICE).images
        views += len(images)
        images[:, 0, 0, 0].sum().item()  # waits for the device
    seconds, used = time.perf_counter() - began, _cpu_seconds() - cpu
    return {"images_per_second": views / seconds, "images_per_cpu_second": views / used}


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its running workers."""
    used = os.times()
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return used.user + used.system + ticks / os.sysconf("SC_CLK_TCK")


def write_noise(path: str, count: int) -> Figures:
    """Write JPEGs of smooth noise, 500x375, which take about as many bytes as photos."""
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            coarse = torch.rand(1, 3, 48, 64, generator=generator)
            pixels = F.interpolate(coarse, (375, 500), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
            grain = torch.randn(375, 500, 1, generator=generator) * 12
            array = (255 * pixels + grain).clamp(0, 255).to(torch.uint8).numpy()
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(array)).save(buffer, "JPEG", quality=95)
            member = tarfile.TarInfo(f"{number:06}.jpg")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return {"bytes": Path(path).stat().st_size}
