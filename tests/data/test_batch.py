"""One micro-batch: how it begins, and its way to the device."""

import torch

from mae.data.batch import empty_batch, to_device
from mae.data.settings import DataSettings


def test_an_empty_batch_is_black_without_labels_and_ids() -> None:
    batch = empty_batch(3, DataSettings(channels=2, image_size=(4, 6)), noise_columns=5)
    assert batch.images.shape == (3, 2, 4, 6)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.noise.shape == (3, 5)
    assert not batch.images.any()
    assert not batch.noise.any()
    assert batch.labels.tolist() == batch.ids.tolist() == [-1, -1, -1]
    assert (batch.bad, batch.encoded, batch.lost) == ([], None, "")


def test_the_tensors_that_a_loss_reads_move_to_the_device() -> None:
    """The ids stay where the run records them."""
    batch = empty_batch(3, DataSettings(channels=1, image_size=(4,)), noise_columns=5)
    moved = to_device(batch._replace(bad=["a"], lost="b"), torch.device("meta"))
    assert {moved.images.device.type, moved.labels.device.type, moved.noise.device.type} == {"meta"}
    assert moved.ids is batch.ids
    assert (moved.bad, moved.lost) == (["a"], "b")
