import tempfile
from typing import Any

import pytest

from data import servers
from data.servers import WebServer
from mae.data.store import download as module
from mae.data.store.download import download
from mae.data.store.storage import Shard, find, read_range
from mae.errors import UserError

web, s3, impatient, short_stalls = servers.web, servers.s3, servers.impatient, servers.short_stalls

BLOCK = 1000
DATA = bytes(range(256)) * 40


@pytest.fixture
def shard(web: WebServer) -> Shard:
    web.files["/a.tar"] = DATA
    (found,) = find([f"{web.url}/a.tar?token=hidden"])
    assert found is not None
    web.requests.clear()
    return found


def downloaded(shard: Shard) -> bytes:
    with tempfile.TemporaryFile() as file:
        download(shard, file)
        file.seek(0)
        return file.read()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOWNLOAD_BLOCK", BLOCK)


def test_an_object_of_s3_is_downloaded(s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="a.tar", Body=DATA)
    (shard,) = find(["s3://bucket/a.tar"])
    assert shard is not None
    assert downloaded(shard) == DATA


@pytest.mark.parametrize("faults", [[], ["503", "cut", "reset", "429"], ["", "", "", "cut", "", "endless"]])
def test_r08_a_download_goes_on_after_a_break_where_it_was(
    web: WebServer, small_blocks: None, shard: Shard, faults: list[str]
) -> None:
    web.faults = [*faults]
    assert downloaded(shard) == DATA
    blocks = -(-len(DATA) // BLOCK)
    asks_what_is_there = 1 + faults.count("endless")
    assert len(web.requests) == blocks + sum(map(bool, faults)) + asks_what_is_there


@pytest.mark.parametrize("faults", [[], ["", "", "", "", "cut"], ["", "", "", "", "503", "reset"]])
def test_r08_a_download_without_ranges_begins_again(
    web: WebServer, small_blocks: None, shard: Shard, faults: list[str]
) -> None:
    web.has_ranges, web.faults = False, [*faults]
    assert downloaded(shard) == DATA


def test_r09_a_download_without_ranges_does_not_wait_for_ever(
    web: WebServer, small_blocks: None, short_stalls: None, shard: Shard
) -> None:
    web.has_ranges, web.faults = False, ["", "", "", "", "stall"]
    assert downloaded(shard) == DATA


@pytest.mark.parametrize("has_ranges", [True, False])
def test_r10_an_object_replaced_during_its_download_is_told(
    web: WebServer, small_blocks: None, shard: Shard, has_ranges: bool
) -> None:
    web.has_ranges, web.files["/a.tar"] = has_ranges, DATA[::-1]
    with pytest.raises(UserError, match=r"/a\.tar was replaced while"):
        downloaded(shard)


def test_an_empty_object_is_downloaded(web: WebServer) -> None:
    web.files["/e.tar"] = b""
    (shard,) = find([f"{web.url}/e.tar"])
    assert shard is not None
    assert downloaded(shard) == b""
    assert read_range(shard, 0, 0) == b""
