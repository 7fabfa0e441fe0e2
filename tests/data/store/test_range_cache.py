import errno
import fcntl
import os
import pickle
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data import servers
from data.servers import WebServer
from mae.data.store.range_cache import PREFETCH_THREADS, RangeCache, Verify
from mae.data.store.storage import Shard, find
from mae.errors import UserError

web, s3, impatient = servers.web, servers.s3, servers.impatient
# Python warns of a fork beside other threads, here those of the servers and of fsspec; that it works is the test.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

PIECE = 1000
DATA = bytes(range(256)) * 40


def crc_of(start: int, stop: int) -> Verify:
    expected = zlib.crc32(DATA[start:stop])
    return lambda data: None if zlib.crc32(data) == expected else "crc32 differs"


def read(cache: RangeCache, shard: Shard, number: int) -> bytes:
    """Fetch piece `number` of `PIECE` bytes and read it."""
    start, stop = number * PIECE, (number + 1) * PIECE
    descriptor = cache.fetch(shard, start, stop, crc_of(start, stop))
    try:
        return os.pread(descriptor, 2 * PIECE, 0)
    finally:
        os.close(descriptor)


def piece(number: int) -> bytes:
    return DATA[number * PIECE : (number + 1) * PIECE]


def names(cache: RangeCache) -> list[str]:
    """The files of the cache, without its bookkeeping, in the order of the ranges."""
    found = [path.name for path in cache.folder.glob("*/*")]
    return sorted(found, key=lambda name: int(name.partition("-")[0]))


def in_child(work: Callable[[], object]) -> int:
    """The id of a forked process that ends with 0 if `work` does not raise."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def exit_code(child: int) -> int:
    """Wait for the process; one that hangs is killed."""
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(child, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return bool(found)

    try:
        wait_until(has_ended)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return ended[0]


@pytest.fixture
def cache(tmp_path: Path) -> RangeCache:
    """Room for five pieces and a half."""
    return RangeCache(tmp_path / "ranges", 5 * PIECE + PIECE // 2)


@pytest.fixture
def shard(web: WebServer) -> Shard:
    web.files["/a.tar"] = DATA
    (found,) = find([f"{web.url}/a.tar?token=hidden"])
    assert found is not None
    web.requests.clear()
    return found


def test_a_range_is_downloaded_once_and_then_read_from_the_file(
    web: WebServer, cache: RangeCache, shard: Shard
) -> None:
    for _ in range(3):
        assert read(cache, shard, 2) == piece(2)
    assert web.requests == [("/a.tar", "bytes=2000-2999")]
    assert names(cache) == ["2000-3000"]
    assert read(RangeCache(cache.folder, cache.budget), shard, 2) == piece(2)
    assert len(web.requests) == 1


def test_its_threads_end_with_the_cache(cache: RangeCache, shard: Shard) -> None:
    others = set(threading.enumerate())
    short = RangeCache(cache.folder, cache.budget)
    short.prefetch(shard, 0, PIECE, crc_of(0, PIECE))
    threads = [thread for thread in set(threading.enumerate()) - others if "(_serve)" in thread.name]
    assert len(threads) == PREFETCH_THREADS
    del short
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_ranges_of_s3_objects_are_cached(s3: Any, cache: RangeCache) -> None:
    s3.put_object(Bucket="bucket", Key="a.tar", Body=DATA)
    (shard,) = find(["s3://bucket/a.tar"])
    assert shard is not None
    assert [read(cache, shard, number) for number in (0, 9, 0)] == [piece(0), piece(9), piece(0)]


def test_another_version_of_an_object_has_ranges_of_its_own(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    read(cache, shard, 0)
    newer = shard._replace(version="newer")
    read(cache, newer, 0)
    assert len(web.requests) == 2
    assert names(cache) == ["0-1000", "0-1000"]


@pytest.mark.parametrize("fault", ["503", "cut", "endless", "flip", "404"])
def test_r08_nothing_that_failed_is_kept(web: WebServer, cache: RangeCache, shard: Shard, fault: str) -> None:
    web.always = fault
    with pytest.raises(UserError, match=r"/a\.tar (does not exist|cannot be read)") as caught:
        read(cache, shard, 0)
    assert "hidden" not in str(caught.value)
    assert names(cache) == []
    web.always = ""
    assert read(cache, shard, 0) == piece(0)


def test_a_server_without_ranges_is_told_with_the_remedy(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    web.has_ranges = False
    with pytest.raises(UserError, match=r"/a\.tar sends the whole file when asked for a part; set data\.reader to"):
        read(cache, shard, 0)
    assert names(cache) == []


def test_r11_what_was_used_longest_ago_makes_room(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    for number in (0, 1, 2, 3, 4, 0):
        read(cache, shard, number)
        time.sleep(0.01)  # the clock of a file system is coarse
    assert len(web.requests) == 5
    read(cache, shard, 5)
    assert names(cache) == ["0-1000", "3000-4000", "4000-5000", "5000-6000"]
    read(cache, shard, 0)
    assert len(web.requests) == 6


def test_r11_the_budget_holds_over_many_ranges_and_caches(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    other = RangeCache(cache.folder, cache.budget)
    for number in (*range(10), *range(10)):
        assert read(other if number % 2 else cache, shard, number) == piece(number)
        assert sum(path.stat().st_size for path in cache.folder.glob("*/*")) <= cache.budget


def test_r11_an_open_range_stays_readable_when_it_is_evicted(cache: RangeCache, shard: Shard) -> None:
    descriptor = cache.fetch(shard, 0, PIECE, crc_of(0, PIECE))
    for number in range(1, 10):
        read(cache, shard, number)
    assert "0-1000" not in names(cache)
    assert os.pread(descriptor, PIECE, 0) == piece(0)
    os.close(descriptor)


def test_a_budget_below_one_range_is_refused(cache: RangeCache, shard: Shard) -> None:
    message = (
        r"is limited to 5500 bytes, but one range of .*/a\.tar has 6000; set data\.cache_bytes to several dozen times"
    )
    with pytest.raises(UserError, match=message):
        cache.fetch(shard, 0, 6000, crc_of(0, 6000))


def test_r11_files_that_vanish_or_are_cut_are_fetched_again(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    read(cache, shard, 0)
    (path,) = cache.folder.glob("*/0-1000")
    for harm in (path.unlink, lambda: os.truncate(path, 10), path.parent.joinpath("x").touch):
        harm()
        assert read(cache, shard, 0) == piece(0)
    assert len(web.requests) == 3


def test_r11_a_cache_that_is_emptied_during_a_download_is_filled_again(
    web: WebServer, cache: RangeCache, shard: Shard
) -> None:
    def empty_the_cache_once(data: bytes) -> None:
        if len(web.requests) == 1:
            shutil.rmtree(cache.folder)

    os.close(cache.fetch(shard, 0, PIECE, empty_the_cache_once))
    assert len(web.requests) == 2
    assert read(cache, shard, 0) == piece(0)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"999999999999", b"0"])
def test_bookkeeping_that_is_lost_or_wrong_mends_itself(cache: RangeCache, shard: Shard, content: bytes) -> None:
    for number in range(4):
        read(cache, shard, number)
    (cache.folder / "bytes").write_bytes(content)
    for number in range(10):
        assert read(cache, shard, number) == piece(number)
    assert len(names(cache)) <= 5


def failing(times: int, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next writes fail."""
    write, failures = os.pwrite, [error] * times

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > 100 and failures:
            raise OSError(failures.pop(), "a disk that fails")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_r11_a_full_disk_makes_room_first(
    cache: RangeCache, shard: Shard, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    for number in range(4):
        read(cache, shard, number)
    failing(1, error, monkeypatch)
    assert read(cache, shard, 9) == piece(9)
    assert len(names(cache)) < 5
    failing(99, error, monkeypatch)
    with pytest.raises(UserError, match=r"the disk of the cache .* is full: .* needs 1000 bytes, [0-9]+ are free"):
        read(cache, shard, 8)
    assert names(cache) == []


def test_a_cache_that_cannot_be_written_is_named(cache: RangeCache, shard: Shard) -> None:
    cache.folder.write_bytes(b"")
    with pytest.raises(UserError, match=r"cache of remote shards .*ranges cannot be used: .*; set data\.cache_dir"):
        read(cache, shard, 0)


def test_a_disk_that_fails_is_named(cache: RangeCache, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(1, errno.EIO, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be used: a disk that fails; set data\.cache_dir"):
        read(cache, shard, 0)
    assert names(cache) == []


def test_threads_that_want_the_same_range_download_it_once(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda number: read(cache, shard, number % 2), range(16)))
    assert got == [piece(number % 2) for number in range(16)]
    assert len(web.requests) == 2


@forks
def test_processes_that_want_the_same_range_download_it_once(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    def work() -> None:
        assert [read(cache, shard, number) for number in range(5)] == [piece(number) for number in range(5)]

    children = [in_child(work) for _ in range(3)]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    assert sorted(web.requests) == [("/a.tar", f"bytes={n * PIECE}-{n * PIECE + 999}") for n in range(5)]


@forks
def test_a_fork_after_use_reads_on_on_both_sides(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    read(cache, shard, 0)
    cache.prefetch(shard, PIECE, 2 * PIECE, crc_of(PIECE, 2 * PIECE))
    wait_until(lambda: "1000-2000" in names(cache))

    def work() -> None:
        cache.prefetch(shard, 2 * PIECE, 3 * PIECE, crc_of(2 * PIECE, 3 * PIECE))
        wait_until(lambda: "2000-3000" in names(cache))
        assert read(cache, shard, 3) == piece(3)

    assert exit_code(in_child(work)) == 0
    assert [read(cache, shard, number) for number in range(5)] == [piece(number) for number in range(5)]
    assert len(web.requests) == 5


@forks
def test_r11_kill_9_while_downloading_leaves_nothing_that_is_taken_as_whole(
    web: WebServer, cache: RangeCache, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.faults = ["stall"]
    downloading = in_child(lambda: read(cache, shard, 0))
    wait_until(lambda: web.requests)
    waiting = in_child(lambda: read(cache, shard, 0))
    os.kill(downloading, signal.SIGKILL)
    assert exit_code(downloading) == -signal.SIGKILL
    assert exit_code(waiting) == 0
    assert names(cache) == ["0-1000"]
    assert len(web.requests) == 2

    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert exit_code(in_child(lambda: read(cache, shard, 1))) == -signal.SIGKILL
    monkeypatch.undo()
    assert names(cache) == ["0-1000", "1000-2000.part"]
    assert read(cache, shard, 1) == piece(1)
    assert names(cache) == ["0-1000", "1000-2000"]


def test_r11_parts_of_the_dead_are_removed_and_those_of_the_living_are_not(cache: RangeCache, shard: Shard) -> None:
    read(cache, shard, 0)
    (folder,) = (path for path in cache.folder.iterdir() if path.is_dir())
    dead, living = folder / "7000-8000.part", folder / "8000-9000.part"
    dead.write_bytes(b"half")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for number in range(6):
            read(cache, shard, number)
        assert not dead.exists()
        assert living.exists()


def test_a_prefetched_range_is_there_when_it_is_needed(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    for number in (0, 1, 2, 0, 1, 2):
        cache.prefetch(shard, number * PIECE, (number + 1) * PIECE, crc_of(number * PIECE, (number + 1) * PIECE))
    wait_until(lambda: names(cache) == ["0-1000", "1000-2000", "2000-3000"])
    assert [read(cache, shard, number) for number in range(3)] == [piece(number) for number in range(3)]
    assert len(web.requests) == 3


def test_what_fails_ahead_is_met_again_and_does_not_stop_the_others(
    web: WebServer, cache: RangeCache, shard: Shard
) -> None:
    missing = shard._replace(url=f"{web.url}/none.tar")
    for number in range(10):
        cache.prefetch(missing, number * PIECE, (number + 1) * PIECE, crc_of(0, 1))
    cache.prefetch(shard, 0, PIECE, crc_of(0, PIECE))
    wait_until(lambda: "0-1000" in names(cache))
    with pytest.raises(UserError, match=r"/none\.tar does not exist"):
        read(cache, missing, 0)


def test_a_cache_goes_to_another_process_by_pickle(web: WebServer, cache: RangeCache, shard: Shard) -> None:
    cache.prefetch(shard, 0, PIECE, crc_of(0, PIECE))
    wait_until(lambda: names(cache) == ["0-1000"])
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.budget) == (cache.folder, cache.budget)
    assert read(copy, shard, 0) == piece(0)
    assert len(web.requests) == 1
