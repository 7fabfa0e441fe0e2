"""`benchmarks/scale.py`: what it counts is counted right; docs/clusters.md shows its figures."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks/data.py imports its neighbours by their names

from benchmarks import scale  # noqa: E402


def test_a_whole_epoch_has_every_sample_once() -> None:
    assert scale.whole(5 * scale.BATCH + 17)["samples"] == 5 * scale.BATCH + 17


def test_ranks_that_do_not_share_the_epoch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "SHARDS", 1)
    monkeypatch.setattr(scale, "SHARD_SAMPLES", 4)
    share = {"files": 1, "bytes": 10, "seconds": 0.5}
    halves = [share | {"ids": [0, 3]}, share | {"ids": [2, 1]}]
    assert scale.summary(halves)["samples_per_rank"] == 2
    with pytest.raises(AssertionError, match="do not share the epoch"):
        scale.summary([halves[0], share | {"ids": [2, 3]}])


def test_the_page_about_clusters_shows_the_stored_figures() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    stored = json.loads((ROOT / "docs" / "figures" / "scale.json").read_text())
    for name, count in (("1 ranks", 1), ("8 ranks", 8), ("64 ranks", 64)):
        found = stored["ranks"][f"whole set in the windows, {name}"]
        cells = (count, f"{found['samples_per_rank']:,}", found["megabytes_read_per_rank"], found["most_files_open"])
        times = (found["cpu_seconds_per_rank"], f"{found['cpu_milliseconds_per_sample']:.2f}")
        assert f"| {' | '.join(map(str, (*cells, *times)))} |\n" in page
    assert scale.arithmetic(0) == stored["arithmetic"]
    for size, name in (("base", "ViT-B/16"), ("large", "ViT-L/16"), ("huge", "ViT-H/14")):
        found = stored["arithmetic"][size]
        gigabytes = f"{found['checkpoint_gigabytes']:.1f}"
        part = f"{found['fsdp2_megabytes_per_rank']} MB"
        cells = (name, f"{found['parameters_millions']} million", f"{gigabytes} GB", f"{gigabytes} s", part)
        assert f"| {' | '.join(cells)} |\n" in page
