"""Evaluation batches: centre crops, each sample exactly once; and labelled subsets."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mae import keyed
from mae.data.batch import Batch, empty_batch
from mae.data.images.augment import eval_view
from mae.data.index import ShardIndex
from mae.data.sample_images import SampleImages
from mae.data.settings import DataSettings
from mae.errors import BadImageError, UserError
from mae.keyed import Purpose


class EvalBatches(Dataset[Batch]):
    """Centre crops by batch number; every sample is on exactly one rank, and no rank is padded."""

    def __init__(
        self,
        index: ShardIndex,
        batch_size: int,
        data: DataSettings,
        rank: int = 0,
        processes: int = 1,
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.index, self.images, self.data = index, SampleImages(index, data), data
        everyone = np.arange(len(index)) if ids is None else ids
        self.total = len(everyone)
        mine = everyone[rank::processes]
        self.chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Batch:
        ids = self.chunks[number]
        batch = labelled_batch(self.index, ids, self.data)
        for row, location in enumerate(self.images.reader.locate(ids)):
            try:
                pixels = torch.from_numpy(np.ascontiguousarray(self.images.pixels(location))).permute(2, 0, 1)
                batch.images[row] = eval_view(pixels, self.data.size, self.data.crop_pct)
            except (BadImageError, UserError) as error:
                batch.bad.append(self.images.named(location, error))
        return batch


def labelled_batch(index: ShardIndex, ids: NDArray[np.int64], data: DataSettings, noise_columns: int = 0) -> Batch:
    """Return a batch of black images with the labels and ids of these samples."""
    labels = torch.from_numpy(index.label[ids])
    return empty_batch(len(ids), data, noise_columns)._replace(labels=labels, ids=torch.from_numpy(ids.copy()))


def labelled_subset(index: ShardIndex, per_class: int, seed: int) -> NDArray[np.int64]:
    """Choose `per_class` samples of each class that has any by `seed`, and return their ids in ascending order.

    Raises:
        UserError: if a class has fewer samples.
    """
    for label, members in zip(*np.unique(index.label, return_counts=True), strict=True):
        if members < per_class:
            raise UserError(
                f"class {label} has {members} samples, but labels_per_class is {per_class}; "
                f"allowed: 1 to {members}, or None for all samples"
            )
    order = keyed.shuffled(keyed.key(Purpose.LABELS, seed), np.arange(len(index)))
    return first_per_class(index.label, order, per_class)


def first_per_class(labels: NDArray[np.int64], order: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the first `most` ids of each class in `order`, or all of a class that has fewer, in ascending order."""
    ordered = labels[order]
    return np.sort(np.concatenate([order[ordered == label][:most] for label in np.unique(ordered)]))
