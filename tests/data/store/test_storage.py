import time
from typing import Any

import pytest

from data import servers
from data.servers import WebServer
from mae.data.store import connection, storage
from mae.data.store.storage import Shard, find, glob, is_folder, list_folder, read_range
from mae.errors import UserError

web, s3, impatient, short_stalls = servers.web, servers.s3, servers.impatient, servers.short_stalls

DATA = bytes(range(256)) * 40


def first_bit(data: bytes) -> str | None:
    """Wrong if the first bit of `DATA`, which begins with a zero, has flipped."""
    return "crc32 differs" if data[0] else None


@pytest.fixture
def shard(web: WebServer) -> Shard:
    web.files["/a.tar"] = DATA
    (found,) = find([f"{web.url}/a.tar"])
    assert found is not None
    web.requests.clear()
    return found


def put(s3: Any, *names: str, data: bytes = DATA) -> list[str]:
    for name in names:
        s3.put_object(Bucket="bucket", Key=name, Body=data)
    return [f"s3://bucket/{name}" for name in names]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the file system that were called."""
    methods: list[str] = []

    def request(url: str, method: str, **options: Any) -> Any:
        methods.append(method)
        return connection.request(url, method, **options)

    monkeypatch.setattr(storage, "request", request)
    return methods


def test_an_object_on_the_web_is_found_with_size_and_etag(web: WebServer) -> None:
    web.files["/x/a.tar"] = DATA
    found = find([f"{web.url}/x/{name}.tar" for name in "ab"])
    assert found[1] is None
    assert found[0] is not None
    assert (found[0].size, len(found[0].version), found[0].name) == (len(DATA), 34, "a.tar")
    assert sorted(web.requests) == [("/x/a.tar", "bytes=0-0"), ("/x/b.tar", "bytes=0-0")]


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("data", [b"", DATA])
def test_sizes_are_told_by_servers_with_and_without_ranges(web: WebServer, has_ranges: bool, data: bytes) -> None:
    web.files["/a.tar"], web.has_ranges = data, has_ranges
    assert [shard and shard.size for shard in find([f"{web.url}/a.tar"])] == [len(data)]


def test_a_server_that_tells_no_size_is_refused(web: WebServer) -> None:
    web.files["/a.tar"], web.has_ranges, web.has_lengths = DATA, False, False
    with pytest.raises(UserError, match=r"does not report the size of .*/a\.tar; copy the shard"):
        find([f"{web.url}/a.tar"])


def test_objects_in_s3_are_found_with_size_and_etag(s3: Any) -> None:
    urls = put(s3, "set/a.tar", "set/b.tar")
    listed = list_folder("s3://bucket/set/")
    assert [(shard.url, shard.size) for shard in listed] == [(url, len(DATA)) for url in urls]
    assert listed == find(urls) == glob("s3://bucket/set/*.tar") == glob("s3://bucket/s?t/[ab].tar")
    assert listed[0].version == s3.head_object(Bucket="bucket", Key="set/a.tar")["ETag"]
    assert find(["s3://bucket/set/none.tar", "s3://bucket/set", "s3://other/a.tar"]) == [None, None, None]
    assert (is_folder("s3://bucket/set"), is_folder(urls[0]), is_folder("s3://bucket/none")) == (True, False, False)
    assert list_folder("s3://bucket/none/") == glob("s3://other/*.tar") == []


def test_many_names_of_a_folder_cost_one_listing(s3: Any, asked: list[str]) -> None:
    urls = put(s3, *(f"set/{n:06d}.tar" for n in range(40)), data=b"x")
    found = find([*urls, "s3://bucket/set/none.tar", "s3://bucket/single.tar"])
    assert [shard and shard.url for shard in found] == [*urls, None, None]
    assert sorted(asked) == ["info", "ls"]


def test_a_folder_that_may_not_be_listed_is_asked_name_by_name(
    s3: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = put(s3, "set/a.tar", "set/b.tar")
    monkeypatch.setattr(storage, "MIN_NAMES_FOR_LISTING", 2)
    monkeypatch.setattr(connection.filesystem_of(urls[0]), "_ls", denied)
    assert [shard and shard.url for shard in find(urls)] == urls
    assert asked == ["ls", "info", "info"]


async def denied(*_: object, **__: object) -> None:
    raise PermissionError("Access Denied")


@pytest.mark.parametrize("fault", ["503", "429", "500", "reset", "cut", "endless", "flip", "stall"])
def test_r08_r09_a_range_is_read_again_until_it_is_whole(
    web: WebServer, short_stalls: None, shard: Shard, fault: str
) -> None:
    asks_what_is_there = fault in ("endless", "flip")
    web.faults = [fault, "", fault] if asks_what_is_there else [fault, fault]
    assert read_range(shard, 0, 5000, first_bit) == DATA[:5000]
    assert [span for _, span in web.requests].count("bytes=0-4999") == 3


def test_r09_a_silent_server_is_given_up_in_time(web: WebServer, monkeypatch: pytest.MonkeyPatch, shard: Shard) -> None:
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.3)
    web.always = "stall"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"/a\.tar cannot be read, 3 attempts failed: TimeoutError"):
        read_range(shard, 0, 5000)
    assert 0.9 <= time.monotonic() - start < 10


def test_r08_damage_that_stays_is_named(web: WebServer, shard: Shard) -> None:
    web.always = "flip"
    with pytest.raises(UserError, match=r"3 attempts failed: bytes 0 to 5000 are damaged: crc32 differs; check"):
        read_range(shard, 0, 5000, first_bit)


@pytest.mark.parametrize("now", [b"\1" + DATA[1:], DATA[:6000], DATA + b"1", b"\1"], ids=["=", "<", ">", "1"])
def test_r10_a_replaced_object_is_told_with_both_versions(web: WebServer, shard: Shard, now: bytes) -> None:
    web.files["/a.tar"] = now
    message = rf"/a\.tar was replaced while .*: {len(DATA)} bytes, version {shard.version} before, {len(now)} bytes"
    with pytest.raises(UserError, match=message):
        read_range(shard, 0 if now[0] else 5000, 8000, lambda data: "crc32 differs")
    assert len(web.requests) == 2


def test_r10_a_replaced_object_in_s3_is_told(s3: Any) -> None:
    (url,) = put(s3, "a.tar")
    (shard,) = find([url])
    assert shard is not None
    assert read_range(shard, 3, 500) == DATA[3:500]
    put(s3, "a.tar", data=b"\1" + DATA[1:])
    with pytest.raises(UserError, match=rf"^{url} was replaced while it was in use: .* restore the old object, or"):
        read_range(shard, 0, 500, first_bit)
    put(s3, "a.tar", data=DATA[:10])
    with pytest.raises(UserError, match=rf"^{url} was replaced"):
        read_range(shard, 100, 500)
    s3.delete_object(Bucket="bucket", Key="a.tar")
    with pytest.raises(UserError, match=rf"^{url} does not exist"):
        read_range(shard, 0, 500)


def test_r10_the_same_bytes_under_a_new_etag_are_no_reason_to_stop(web: WebServer, shard: Shard) -> None:
    web.has_etags = False
    assert read_range(shard, 0, 500, first_bit) == DATA[:500]
