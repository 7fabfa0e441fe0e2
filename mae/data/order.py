"""Order of the training samples: a pure function of (seed, epoch, position).

The only state of the data is one integer, the number of samples consumed. Nothing has to be stored, replayed or
exchanged between processes. Any position is computed in O(1), without a table, for any number of samples.

Large sets are shuffled in two stages, so that they can be read in large pieces. First, all samples are divided into
*chunks* of consecutive ids, and each epoch permutes the chunks. The permuted stream is divided among *lanes*: a lane
is a fixed set of rows in every global batch and has a consecutive part of the stream. Second, within a lane the
samples of each *window* of chunks are permuted. A batch thus draws from `lanes * window` chunks from the whole set,
while a process reads only the chunks of its own few lanes. A set that fits into the windows of all lanes is permuted
as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mae import keyed
from mae.keyed import Purpose

ORDER_VERSION = 2
"""Version of the order; every checkpoint stores it, and a run can only resume with the order it started with."""

_ROUNDS = 6
# Upper bound of the window numbers within a lane; reached only by windows of one chunk of one sample.
_WINDOWS_PER_LANE = np.int64(1 << 40)

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
_Network = Callable[[Words, Words, Words], Words]


@dataclass(frozen=True)
class Order:
    """Endless stream of the sample ids of a run; position p belongs to epoch p // count."""

    seed: int
    count: int
    """Number of samples in an epoch."""
    batch: int
    """Number of samples in a global batch."""
    chunk: int = 64
    """Number of consecutive samples that are permuted as one."""
    window: int = 16
    """Number of chunks of a lane whose samples are mixed."""
    lanes: int = 64
    """Number of parts of a global batch; each reads from its own part of the stream."""

    def at(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Return the sample ids and epochs of the positions start ... stop - 1.

        Within an epoch every sample occurs exactly once. A batch at the end of an epoch continues with the next
        epoch: no sample is dropped or repeated.

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
        """Number of positions after which all windows have changed: how far ahead it pays to read."""
        chunk, window, lanes = self._shape
        return chunk * window * lanes

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Samples per chunk, chunks per window, lanes; (count, 1, 1) for a set that is permuted as a whole."""
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
        """Count the positions before `positions` that belong to `lane`, from the start of the run."""
        lanes = self._shape[2]
        first = -(-lane * self.batch // lanes)
        rows = -(-(lane + 1) * self.batch // lanes) - first
        batches, rest = np.divmod(positions, self.batch)
        counted: Integers = batches * rows + np.clip(rest - first, 0, rows)
        return counted

    def _through_chunks(self, places: Integers, epoch: int) -> Integers:
        """Map places in the stream of permuted chunks to sample ids. The last chunk of the set may be short."""
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
    """Map `places`, each in 0 ... count - 1, by the bijection of that range which the key `base` selects.

    `count` and `base` each have one element, or one for each place. A balanced Feistel network permutes the smallest
    range 4**k >= count. A value outside `count` passes through the network again until it is inside ("cycle walking",
    Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9).
    """
    return _walk(places, count, base, _feistel)


def invert(places: Integers, count: int, base: np.uint64) -> Integers:
    """Invert `permute`, with one `count` and one `base` for all places."""
    return _walk(places, np.array(count), np.array(base), _feistel_inverse)


def _walk(places: Integers, count: Integers, base: Words, network: _Network) -> Integers:
    # Each has one column for all places, or one for each place.
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
    """Select the columns of some places; an array with a single column serves all places."""
    return array if array.shape[-1] == 1 else array[..., places]


def _half_bits(count: Integers) -> Words:
    """Return half the number of bits of the greatest place, rounded up; at least one."""
    # frexp is exact below 2**53: the exponent of n - 1 is its bit length.
    bits = np.frexp(np.maximum(count - 1, 1).astype(np.float64))[1]
    half: Words = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    return half


def _feistel(values: Words, half: Words, keys: Words) -> Words:
    """Permute the integers of 2 * half bits, with one row of `keys` for each round."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (keyed.mix(right + key) & mask)
    return (left << half) | right


def _feistel_inverse(values: Words, half: Words, keys: Words) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys[::-1]:
        left, right = np.bitwise_xor(right, keyed.mix(left + key) & mask), left
    return (left << half) | right
