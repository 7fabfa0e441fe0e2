"""Samples that are in two sets of shards: found by size and crc32, and confirmed byte by byte."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae.data.index import ShardIndex
from mae.data.reader import ImageReader
from mae.data.settings import DataSettings


class SharedSample(NamedTuple):
    """One image that both sets hold, as `shard: key.jpg` in each."""

    first: str
    second: str


def shared_samples(
    first: ShardIndex, second: ShardIndex, data: DataSettings, subset: NDArray[np.int64] | None = None
) -> Iterator[SharedSample]:
    """Yield the samples of `second` whose images `first` holds too, byte for byte, in the order of their ids.

    Of `first` only the sample ids in `subset` count, if it is given. Only images of equal size and crc32 are read:
    among millions, some of these are different images.

    Raises:
        UserError: if such an image cannot be read, or differs from its index.
    """
    ids = np.arange(len(first)) if subset is None else subset
    keys = _keys(first, ids)
    order = np.argsort(keys, kind="stable")
    ids, keys = ids[order], keys[order]
    wanted = _keys(second, np.arange(len(second)))
    begins, ends = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    # From remote shards, single images are fetched instead of whole chunks.
    one, other = (ImageReader(index, data.cache, data.cache_bytes, chunk_samples=1) for index in (first, second))
    for sample_id in np.flatnonzero(ends > begins):
        (place,) = other.locate(np.array([sample_id]))
        image = other.read(place)
        for candidate in one.locate(ids[begins[sample_id] : ends[sample_id]]):
            if one.read(candidate) == image:
                yield SharedSample(one.name(candidate.sample_id), other.name(place.sample_id))
                break


def _keys(index: ShardIndex, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return size and crc32 of images in one number each: uint64 [ids]."""
    records = index.records[ids]
    keys: NDArray[np.uint64] = records["size"].astype(np.uint64) << np.uint64(32) | records["crc32"]
    return keys
