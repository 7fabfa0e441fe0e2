"""Scale, as far as two cores show it: 1e9 samples, 64 ranks, and the arithmetic of a run on 64 GPUs.

`python benchmarks/scale.py [whole index ranks arithmetic] [--samples N] [--out FILE]`

- `whole` walks through a whole epoch of the order, all ranks' shares one after another, and ticks off every sample id:
  each must come exactly once. Peak memory is noted along the way; a byte of it per sample is the list of ticks.
- `index` writes and loads an index of this many samples in 10,000 shards; its records are a sparse file.
- `ranks` divides 65,536 real JPEGs in 64 shards among 1, 8 and 64 ranks, and lets one rank after another make its
  batches of an epoch, in a process of its own: bytes read, files open and CPU seconds of each.
- `arithmetic` prints what the formulas of the code say about a run on 64 GPUs.

FILE gets all figures as JSON, with the command and the versions.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.data import noise, write_shards
from mae.data import index as indexes
from mae.data.batch import BatchRecipe
from mae.data.images.augment import AugmentSettings
from mae.data.index import ShardIndex
from mae.data.manifest import Manifest, write_manifest
from mae.data.order import Order
from mae.data.plan import plan_batches
from mae.data.prepare import open_shards
from mae.data.scan import RECORD
from mae.data.settings import DataSettings
from mae.data.store.shards import expand
from mae.data.train_batches import TrainBatches
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.settings import MaskedAutoencoderSettings
from mae.training.checkpoints.room import checkpoint_bytes

BATCH, RANKS = 4096, 64
SHARDS, SHARD_SAMPLES = 64, 1024
BLOCK = 244 * BATCH
"""Positions that `whole` looks at together; about a million."""
IMAGE_BYTES = 110_000
"""Mean size of an ImageNet photo."""
SPARSE_SHARDS = 10_000


def megabytes() -> float:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def whole(samples: int) -> dict[str, Any]:
    """Tick off every sample id of an epoch that begins in the midst of a batch, as the second epoch does."""
    order = Order(seed=0, count=samples, batch=BATCH)
    seen = np.zeros(samples, dtype=bool)
    began, peaks = time.process_time(), []
    for start in range(samples, 2 * samples, BLOCK):
        ids, epochs = order.at(start, min(start + BLOCK, 2 * samples))
        assert (epochs == 1).all()
        seen[ids] = True
        peaks.append(megabytes())
    # There were as many positions as samples, so none came twice if all came.
    ticked = int(np.count_nonzero(seen))
    assert ticked == samples, f"{ticked} of {samples} samples came"
    return {
        "samples": ticked,
        "microseconds_per_global_batch": round((time.process_time() - began) / (samples / BATCH) * 1e6),
        "peak_megabytes_after_the_first_block": round(peaks[0]),
        "peak_megabytes_at_the_end": round(peaks[-1]),
    }


def index(samples: int) -> dict[str, Any]:
    """Write and load an index; then find the images of the last batch of rank 63 as a resumed run would."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "shards", noise(4, 64, 64, "jpg", "RGB"), 1)
        data = DataSettings(shards=(str(folder / "shards"),), workers=0, cache_dir=folder / "cache")
        near = open_shards(data.shards, data, print)
        (shard,) = expand(data.shards)
        links = folder / "links"
        links.mkdir()
        for number in range(SPARSE_SHARDS):
            (links / f"{number:05}.tar").hardlink_to(shard.url)
        each = samples // SPARSE_SHARDS
        shards = expand([str(links)])
        entries = [replace(near.entries[0], url=one.url, samples=each) for one in shards]
        records = np.memmap(folder / "samples.bin", dtype=RECORD, mode="w+", shape=(samples,))
        order = Order(seed=0, count=samples, batch=BATCH)
        last = samples // BATCH - 1
        plan = plan_batches(BATCH, RANKS, None)
        ids, _ = order.at(*plan.positions(last, RANKS - 1))
        records[ids] = near.records[ids % len(near)]
        records.flush()
        write_manifest(folder, Manifest(tuple(entries), None, 0))
        before, began = megabytes(), time.perf_counter()
        found = indexes.load(folder, shards)
        loaded = time.perf_counter() - began
        batch = batches_of(found, data, RANKS, RANKS - 1)[last]
        assert not batch.bad
        assert not batch.lost, batch.lost
        return {
            "samples": len(found),
            "shards": len(shards),
            "index_gigabytes": round(records.nbytes / 1e9, 1),
            "manifest_megabytes": round((folder / "manifest.json").stat().st_size / 1e6, 1),
            "seconds_to_load": round(loaded, 2),
            "seconds_to_the_last_batch": round(time.perf_counter() - began - loaded, 3),
            "megabytes_more": round(megabytes() - before),
        }


def batches_of(found: ShardIndex, data: DataSettings, ranks: int, rank: int) -> TrainBatches:
    """Return the batches of one rank, without workers."""
    recipe = BatchRecipe(0, data, AugmentSettings(), noise_columns=1)
    return TrainBatches(found, plan_batches(BATCH, ranks, None), rank, recipe)


def ranks(_: int) -> dict[str, Any]:
    """Let one rank after another make its batches of an epoch, for several numbers of ranks and two kinds of order."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = noise(64, 64, 64, "jpg", "RGB") * (SHARDS * SHARD_SAMPLES // 64)
        named = [(f"{number:06}", content, label) for number, (_, content, label) in enumerate(photos)]
        write_shards(folder / "shards", named, SHARDS)
        found = {}
        # The first is the default, whose windows hold this whole set; the second has them for a sixteenth of it, as
        # the default does for a million samples.
        for kind, chunk, window in (("whole set in the windows", 64, 16), ("a sixteenth in the windows", 16, 4)):
            data = DataSettings(
                shards=(str(folder / "shards"),), image_size=(32, 32), workers=0, cache_dir=folder / "cache",
                chunk_samples=chunk, window_chunks=window,
            )  # fmt: skip
            opened = open_shards(data.shards, data, print)
            for count in (1, 8, RANKS):
                shares = [in_a_process(share_of_rank, opened, data, count, rank) for rank in range(count)]
                found[f"{kind}, {count} ranks"] = summary(shares)
                print(f"{kind}, {count} ranks: {found[f'{kind}, {count} ranks']}", flush=True)
        return found


def share_of_rank(found: ShardIndex, data: DataSettings, count: int, rank: int) -> dict[str, Any]:
    """Make the batches of one rank; return what it cost and which samples they held."""
    batches = batches_of(found, data, count, rank)
    ids, most = [], 0
    bytes_before, files_before, began = bytes_read(), open_files(), time.process_time()
    for step in range(len(found) // BATCH):
        batch = batches[step]
        ids.append(batch.ids)
        most = max(most, open_files() - files_before)
    seconds = time.process_time() - began
    return {"ids": torch.cat(ids).tolist(), "files": most, "bytes": bytes_read() - bytes_before, "seconds": seconds}


def summary(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all ranks; together they must have had every sample once."""
    together = sorted(sample for share in shares for sample in share["ids"])
    assert together == list(range(SHARDS * SHARD_SAMPLES)), "the ranks do not share the epoch"
    return {
        "samples_per_rank": len(shares[0]["ids"]),
        "megabytes_read_per_rank": round(mean(share["bytes"] for share in shares) / 1e6, 2),
        "most_files_open": max(share["files"] for share in shares),
        "cpu_seconds_per_rank": round(mean(share["seconds"] for share in shares), 2),
        "cpu_milliseconds_per_sample": round(1e3 * mean(s["seconds"] / len(s["ids"]) for s in shares), 3),
    }


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def open_files() -> int:
    """Return the number of files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def in_a_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the result of a function that is called in a process forked for it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(work(*arguments)))
    process.start()
    there.close()
    result: dict[str, Any] = here.recv()
    process.join()
    return result


def arithmetic(_: int) -> dict[str, Any]:
    """Return, for each size, what a run on 64 GPUs in 8 nodes writes and reads, by the formulas of the code."""
    data, found = DataSettings(), {}
    for size in ("base", "large", "huge"):
        settings = MaskedAutoencoderSettings(size=size, patch_size=(14 if size == "huge" else 16,))
        with torch.device("meta"):
            model = MaskedAutoencoder(settings, (224, 224), 3)
        checkpoint = checkpoint_bytes(model, has_average=False, optimizer="adamw")
        found[size] = {
            "parameters_millions": round(sum(each.numel() for each in model.parameters()) / 1e6),
            "checkpoint_gigabytes": round(checkpoint / 1e9, 2),
            "seconds_to_write_at_1_gigabyte_per_second": round(checkpoint / 1e9, 1),
            "fsdp2_megabytes_per_rank": round(checkpoint / RANKS / 1e6),
        }
    order = Order(0, 10**9, BATCH, data.chunk_samples, data.window_chunks, data.lanes)
    found["data"] = {
        "samples_per_rank_and_step": plan_batches(BATCH, RANKS, None).per_process,
        "lanes_per_rank": data.lanes / RANKS,
        "samples_in_all_windows": order.horizon,
        "cache_per_node_of_8_gigabytes": round(2 * order.horizon * IMAGE_BYTES * 8 / RANKS / 1e9, 2),
        "index_gigabytes_of_1e9_samples": 10**9 * RECORD.itemsize / 1e9,
    }
    return found


STAGES = {each.__name__: each for each in (whole, index, ranks, arithmetic)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.stages) - STAGES.keys():
        parser.error(f"no stage {', '.join(sorted(unknown))}; allowed: {', '.join(STAGES)}")
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "command": "python benchmarks/scale.py",
        "versions": {"numpy": np.__version__, "torch": version("torch")},
    }
    for name in options.stages or STAGES:
        figures[name] = STAGES[name](options.samples)
        print(f"{name}: {json.dumps(figures[name], indent=1)}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
