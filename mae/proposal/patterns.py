"""Patterns that name shards, and the split that their names tell."""

import re
from collections.abc import Sequence

from mae.data.packing.sources import DEFAULT_SPLIT, SPLITS
from mae.data.store.shards import SUFFIXES, Shard, expand
from mae.errors import UserError

_NUMBER = rf"[0-9]+(?=({'|'.join(map(re.escape, SUFFIXES))})$)"


def by_split(shards: Sequence[Shard]) -> dict[str, list[Shard]]:
    """Divide shards by the split in their names, such as `val` in `photos-val-000000.tar`; others are trained on."""
    groups: dict[str, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(split_of(shard.name), []).append(shard)
    return {name: groups[name] for name in SPLITS if name in groups}


def split_of(name: str) -> str:
    """Return the split that the name of a shard tells; that to train on if it tells none."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((word for word in words if word in SPLITS), DEFAULT_SPLIT)


def patterns_of(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Return one glob that names exactly these shards; if there is none, their names."""
    urls = [shard.url for shard in shards]
    globs = {re.sub(_NUMBER, "*", url) for url in urls}
    if len(urls) > 1 and len(globs) == 1:
        try:
            if [shard.url for shard in expand(sorted(globs))] == urls:
                return tuple(globs)
        except UserError:  # a web server has no globs
            pass
    return tuple(urls)
