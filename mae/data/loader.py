"""Workers that make batches ahead, and what is done to a batch on the device."""

import signal
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mae.data.batches import Batch
from mae.data.statistics import PixelStatistics

_SECONDS_WITHOUT_A_BATCH = 600


def load(batches: Dataset[Batch], numbers: Sequence[int], workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """The batches of the given numbers, in that order, made ahead by `workers` processes; a stream knows no numbers."""
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=None if isinstance(batches, IterableDataset) else numbers,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batch_size it is given one item
            worker_init_fn=_leave_signals_to_the_trainer,
            timeout=_SECONDS_WITHOUT_A_BATCH if workers else 0,
        )
    )


def normalize(
    images: UInt8[Tensor, "batch channels height width"], statistics: PixelStatistics
) -> Float32[Tensor, "batch channels height width"]:
    """uint8 pixels -> float32 with the data's own mean and standard deviation, on the images' device."""
    mean = torch.tensor(statistics.mean, device=images.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(statistics.std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - mean) / std


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches the whole process group; only the trainer decides what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
