"""Images of a run, read again from its shards, if they and their index are still there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae.data.classes import class_names
from mae.data.index import ShardIndex
from mae.data.index import load as load_index
from mae.data.indexing import find_index, index_of
from mae.data.manifest import StaleIndexError
from mae.data.read_rules import USUAL, ReadRules
from mae.data.reader import ImageReader
from mae.data.spread import spread_evenly
from mae.data.store.shards import expand
from mae.data.store.unpacked import default_cache_dir, is_gzipped
from mae.data.store.urls import scheme_of
from mae.errors import UserError
from mae.report.reading import PRETRAINING, RunFiles

_MOST_BYTES = 1e9
"""Size of shards up to which they are indexed, and unpacked if they are gzipped, for a report [bytes]."""


@dataclass(frozen=True)
class RunImages:
    """Indexed images of a run."""

    index: ShardIndex
    names: tuple[str, ...]
    """Names of the classes; empty if they are not known."""
    cache: Path
    cache_bytes: float

    def spread(self, most: int) -> NDArray[np.int64]:
        """Return the ids of at most `most` images, spread evenly."""
        return spread_evenly(len(self.index), most)

    def read(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, str, bytes]]:
        """Yield id, name and bytes of images, without those that cannot be read.

        Raises:
            UserError: if a gzipped shard cannot be unpacked.
        """
        reader = ImageReader(self.index, self.cache, self.cache_bytes, chunk_samples=1)
        reader.will_need(ids)
        for place in reader.locate(ids):
            try:
                yield place.sample_id, reader.name(place.sample_id), reader.read(place)
            except UserError:
                continue

    def class_of(self, sample_id: int) -> str:
        """Return the name of an image's class, its number without a name, or "" without a label."""
        label = int(self.index.label[sample_id])
        if label < 0:
            return ""
        return self.names[label] if label < len(self.names) else str(label)


def held_out_patterns(run: RunFiles) -> tuple[str, ...]:
    """Return the shards on which the run was evaluated, as its settings name them."""
    return run.texts("evaluation.eval_shards" if run.kind == PRETRAINING else "eval_shards")


def open_images(run: RunFiles, patterns: tuple[str, ...]) -> RunImages:
    """Open the images of some shards of the run. Nothing is fetched, and large shards are not indexed anew.

    Raises:
        UserError: if there are none, they are remote, missing or damaged, or too large to index or to unpack.
    """
    if not patterns:
        raise UserError("the settings name no shards")
    if any(scheme_of(pattern) for pattern in patterns):
        raise UserError("the shards are remote, and a report fetches nothing")
    cache_dir, folder = run.settings.get("data.cache_dir"), run.settings.get("data.index")
    cache = Path(cache_dir) if isinstance(cache_dir, str) else default_cache_dir()
    rules = _rules(run)
    shards = expand(patterns)
    index = None
    if isinstance(folder, str) and patterns == run.texts("data.shards"):
        try:
            index = load_index(Path(folder), shards, rules.image_extension)
        except StaleIndexError as error:
            raise UserError(f"the index in {folder} cannot be used: {error}") from None
    index = index or find_index(shards, cache, rules)
    if index is None and sum(shard.size for shard in shards) > _MOST_BYTES:
        raise UserError(f"the index of {' '.join(patterns)} is not there any more; mae index writes it again")
    if sum(shard.size for shard in shards if is_gzipped(shard)) > _MOST_BYTES:
        raise UserError("the shards are gzipped and too large to be unpacked for a report")
    index = index or index_of(shards, cache, rules=rules)
    names = class_names([entry.shard for entry in index.entries], lambda text: None)
    return RunImages(index, names or (), cache, rules.cache_bytes)


def _rules(run: RunFiles) -> ReadRules:
    extension, cache_bytes = (run.settings.get(f"data.{name}") for name in ("image_extension", "cache_bytes"))
    return ReadRules(
        extension if isinstance(extension, str) else USUAL.image_extension,
        cache_bytes if isinstance(cache_bytes, int | float) else USUAL.cache_bytes,
    )
