"""Pretraining over S3 and HTTP: the same samples and losses as from a local folder; streams; lost data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data import servers
from data.servers import WebServer

from mae.data.prepare import open_shards
from mae.errors import UserError
from mae.pipelines.pretrain import run
from mae.training.run_folder.folder import RunFolder
from pipelines.test_pretrain import settings

web, impatient, s3 = servers.web, servers.impatient, servers.s3


def trace(run_dir: Path) -> list[tuple[list[int], float]]:
    """Sample ids and loss of every step of a run on one process."""
    ids = [json.loads(line)["ids"] for line in (run_dir / "samples-rank0.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in RunFolder(run_dir).metrics() if record["kind"] == "train"]
    return list(zip(ids, losses, strict=True))


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([13, 12])


def pretrain(shards: Path, run_dir: Path, *flags: str) -> list[tuple[list[int], float]]:
    # Chunks of 4 samples: several ranges of each shard are fetched.
    run(settings(shards, run_dir, "--record_samples", "True", "--data.chunk_samples", "4", *flags))
    return trace(run_dir)


def serve(web: WebServer, shards: Path) -> str:
    for path in shards.glob("*.tar"):
        web.files[f"/shards/{path.name}"] = path.read_bytes()
    return f"{web.url}/shards/train-{{000000..000001}}.tar"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_over_http_and_one_over_s3_are_the_local_one(
    web: WebServer, s3: Any, shards: Path, tmp_path: Path, workers: str
) -> None:
    local = pretrain(shards, tmp_path / "local", "--data.workers", workers)
    over_http = ["--data.shards", serve(web, shards), "--data.workers", workers]
    assert pretrain(shards, tmp_path / "http", *over_http) == local

    for path in shards.glob("*.tar"):
        s3.put_object(Bucket="bucket", Key=f"shards/{path.name}", Body=path.read_bytes())
    over_s3 = ["--data.shards", "s3://bucket/shards/train-*.tar", "--data.workers", workers]
    assert pretrain(shards, tmp_path / "s3", *over_s3) == local


def test_an_object_replaced_in_the_middle_of_a_run_stops_it(
    web: WebServer, impatient: None, shards: Path, tmp_path: Path
) -> None:
    url = serve(web, shards)
    flags = ["--data.shards", url, "--data.max_bad_samples", "100"]
    begun = settings(shards, tmp_path / "run", "--data.chunk_samples", "4", *flags)

    def replaced(name: str) -> None:
        web.files[name] = bytes(len(web.files[name]))

    index = open_shards(begun.data.shards, begun.data, lambda text: None)
    replaced("/shards/train-000001.tar")
    assert len(index) == 25
    with pytest.raises(UserError) as stopped:
        run(begun)
    assert "train-000001.tar" in str(stopped.value)


def test_a_cache_that_cannot_hold_two_windows_is_refused_r11(web: WebServer, shards: Path, tmp_path: Path) -> None:
    url = serve(web, shards)
    total = sum(path.stat().st_size for path in shards.glob("*.tar"))
    with pytest.raises(UserError, match=r"data\.cache_bytes is .*lower data\.lanes"):
        pretrain(shards, tmp_path / "run", "--data.shards", url, "--data.cache_bytes", str(total - 1))
    narrow = ["--data.lanes", "1", "--data.window_chunks", "1", "--data.cache_bytes", str(total * 0.7)]
    assert len(pretrain(shards, tmp_path / "other", "--data.shards", url, *narrow)) == 13


def test_a_stream_trains_from_a_server_without_ranges(web: WebServer, shards: Path, tmp_path: Path) -> None:
    web.has_ranges = False
    flags = ["--data.reader", "stream", "--data.stream_samples", "25", "--data.mean", "0.5", "--data.std", "0.3"]
    folder = run(settings(shards, tmp_path / "run", "--data.shards", serve(web, shards), *flags))
    losses = [record["loss"] for record in folder.metrics() if record["kind"] == "train"]
    assert len(losses) == 13
    assert losses[-1] < losses[0]


def test_the_indexed_reader_tells_of_a_server_without_ranges(
    web: WebServer, impatient: None, shards: Path, tmp_path: Path
) -> None:
    web.has_ranges = False
    with pytest.raises(UserError, match=r"data\.reader"):
        pretrain(shards, tmp_path / "run", "--data.shards", serve(web, shards))
