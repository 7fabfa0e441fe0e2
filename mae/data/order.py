"""The order of training: a pure function of (seed, epoch, position).

The only state of the data is one integer, the number of samples consumed. Nothing has to be stored, replayed or
agreed upon between processes, and any position is reached in O(1), without a table, for any number of samples.

Large sets are shuffled in two stages, so that they can be read in large pieces. All samples are cut into *chunks*
of consecutive ids, and each epoch permutes the chunks. The permuted stream is dealt to *lanes*: fixed rows of every
global batch, each with a consecutive part of the stream. Within a lane the samples of a *window* of chunks are
permuted. A batch thus draws from `lanes * window` chunks from all over the set, while a process, which takes the rows
of a few lanes only, reads no more than its lanes' chunks. Sets that fit into the windows of all lanes are permuted
as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mae import keyed
from mae.keyed import Purpose

ORDER_VERSION = 2
"""Part of every checkpoint: a run may only be resumed under the order it was started with."""

_ROUNDS = 6
# Window numbers within a lane stay below this: 2**40 windows of one chunk of one sample.
_WINDOWS_PER_LANE = np.int64(1 << 40)

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
_Network = Callable[[Words, Words, Words], Words]


@dataclass(frozen=True)
class Order:
    """The endless stream of sample ids of a run; position p belongs to epoch p // count."""

    seed: int
    count: int
    """Samples in an epoch."""
    batch: int
    """Samples of a global batch."""
    chunk: int = 64
    """Consecutive samples that are moved as one."""
    window: int = 16
    """Chunks of a lane whose samples are mixed."""
    lanes: int = 64
    """Parts of a global batch that are read from different parts of the stream."""

    def at(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """The ids and epochs of the positions start ... stop - 1.

        Within an epoch every sample occurs exactly once. A batch that reaches over the end of an epoch goes on with
        the next one: nothing is dropped or repeated.

        Returns:
            (sample ids, epochs), both int64 [stop - start].
        """
        positions = np.arange(start, stop, dtype=np.int64)
        epochs = positions // self.count
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            ids[chosen] = self._of_epoch(positions[chosen], epoch)
        return ids, epochs

    @property
    def horizon(self) -> int:
        """Positions after which a batch draws from other windows: how far ahead it pays to read."""
        chunk, window, lanes = self._shape
        return chunk * window * lanes

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Samples of a chunk, chunks of a window, lanes; one of each for a set that is permuted as a whole."""
        if self.count <= self.chunk * self.window * self.lanes:
            return self.count, 1, 1
        return self.chunk, self.window, min(self.lanes, self.batch)

    def _of_epoch(self, positions: Integers, epoch: int) -> Integers:
        chunk, window, lanes = self._shape
        lane = positions % self.batch * lanes // self.batch
        every = np.arange(lanes, dtype=np.int64)
        before = self._rows_before(every, np.array(epoch * self.count))
        length = self._rows_before(every, np.array((epoch + 1) * self.count)) - before
        begin = np.cumsum(length) - length

        place = self._rows_before(lane, positions) - before[lane]
        number, within = np.divmod(place, chunk * window)
        here = np.minimum(chunk * window, length[lane] - number * chunk * window)
        key = keyed.key(Purpose.ORDER, self.seed, epoch, 1)
        mixed = permute(within, here, keyed.bits(key, lane * _WINDOWS_PER_LANE + number, 1)[:, 0])
        return self._through_chunks(begin[lane] + number * chunk * window + mixed, epoch)

    def _rows_before(self, lane: Integers, positions: Integers) -> Integers:
        """How many positions before `positions` belong to `lane`, counted from the beginning of the run."""
        lanes = self._shape[2]
        first = -(-lane * self.batch // lanes)
        rows = -(-(lane + 1) * self.batch // lanes) - first
        batches, rest = np.divmod(positions, self.batch)
        counted: Integers = batches * rows + np.clip(rest - first, 0, rows)
        return counted

    def _through_chunks(self, places: Integers, epoch: int) -> Integers:
        """Places in the stream of permuted chunks -> sample ids. The last chunk of the set may be a short one."""
        chunk = self._shape[0]
        full, rest = divmod(self.count, chunk)
        chunks = full + (rest > 0)
        base = keyed.key(Purpose.ORDER, self.seed, epoch)
        slot, within = np.divmod(places, chunk)
        if rest:
            short = int(invert(np.array([full]), chunks, base)[0])
            behind = places >= short * chunk + rest
            slot[behind], within[behind] = np.divmod(places[behind] - rest, chunk)
            slot[behind] += 1
        return permute(slot, np.array(chunks), np.array(base)) * chunk + within


def permute(places: Integers, count: Integers, base: Words) -> Integers:
    """Map `places`, each in 0 ... count - 1, by the bijection of that range which `base` selects.

    `count` and `base` are one for all places, or one for each. A balanced Feistel network permutes the smallest range
    4**k >= count; a value that falls outside is sent through again until it comes back inside ("cycle walking", Black
    and Rogaway 2002, doi:10.1007/3-540-45760-7_9).
    """
    return _walk(places, count, base, _feistel)


def invert(places: Integers, count: int, base: np.uint64) -> Integers:
    """The inverse of `permute`, with one `count` and one `base` for all."""
    return _walk(places, np.array(count), np.array(base), _feistel_back)


def _walk(places: Integers, count: Integers, base: Words, network: _Network) -> Integers:
    # One column for all places, or one for each.
    limit, bases = count.reshape(-1).astype(np.uint64), base.reshape(-1)
    half = _half_bits(count.reshape(-1))
    keys = keyed.mix(bases + np.arange(_ROUNDS, dtype=np.uint64)[:, None])
    values = network(places.astype(np.uint64), half, keys)
    (outside,) = np.nonzero(values >= limit)
    while len(outside):
        here = _columns(limit, outside)
        values[outside] = network(values[outside], _columns(half, outside), _columns(keys, outside))
        outside = outside[values[outside] >= here]
    return values.astype(np.int64)


def _columns(array: Words, places: NDArray[np.intp]) -> Words:
    """What belongs to some places, of an array with one column for each place or one for all."""
    return array if array.shape[-1] == 1 else array[..., places]


def _half_bits(count: Integers) -> Words:
    """Half the bits, rounded up, of the greatest place; at least one."""
    # frexp is exact below 2**53: the exponent of n - 1 is its bit length.
    bits = np.frexp(np.maximum(count - 1, 1).astype(np.float64))[1]
    half: Words = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    return half


def _feistel(values: Words, half: Words, keys: Words) -> Words:
    """Permute the integers of 2 * half bits; one row of `keys` for each round."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (keyed.mix(right + key) & mask)
    return (left << half) | right


def _feistel_back(values: Words, half: Words, keys: Words) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys[::-1]:
        left, right = np.bitwise_xor(right, keyed.mix(left + key) & mask), left
    return (left << half) | right
