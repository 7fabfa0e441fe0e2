"""Each image read is the one that was indexed, or the loss is told."""

import errno
import gc
import gzip
import multiprocessing
import os
import pickle
import resource
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import png, write_shards

from data import servers
from data.servers import WebServer
from mae.data import reader as module
from mae.data.indexing import open_index
from mae.data.reader import ImageReader
from mae.data.store.unpacked import CACHE_BYTES
from mae.data.tar import members
from mae.errors import UserError

web, impatient = servers.web, servers.impatient


@pytest.fixture
def reader_of(tmp_path: Path) -> Callable[..., ImageReader]:
    """A function that gives a reader of the shards that patterns name."""

    def make(*patterns: Path) -> ImageReader:
        return ImageReader(open_index([str(p) for p in patterns], tmp_path / "cache"), tmp_path / "cache", CACHE_BYTES)

    return make


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed reads are tried again at once."""
    monkeypatch.setattr(module, "_SECONDS_BEFORE_RETRIES", (0.0, 0.0, 0.0))


def read(reader: ImageReader, number: int) -> bytes:
    (place,) = reader.locate(np.array([number]))
    return reader.read(place)


def test_the_bytes_read_are_those_packed(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    reader = reader_of(make_shards([3, 1, 4]))
    numbers = [7, 0, 3, 3, 5, 1, 2, 6, 4]
    places = reader.locate(np.array(numbers))
    assert [place.sample_id for place in places] == numbers
    assert [place.shard for place in places] == [2, 0, 1, 1, 2, 0, 0, 2, 2]
    assert [reader.read(place) for place in places] == [png(n) for n in numbers]
    assert reader.locate(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_folders_and_long_names_are_read_in_any_tar_format(
    write_tar: Callable[..., Path], reader_of: Callable[..., ImageReader], tar_format: int
) -> None:
    keys = ["a/1", "a/2", "b.c/1", "/".join(["long" * 10] * 5)]
    reader = reader_of(write_tar("x.tar", {f"{key}.png": png(n) for n, key in enumerate(keys)}, tar_format))
    assert [read(reader, n) for n in range(4)] == [png(n) for n in range(4)]


def test_a_name_tells_shard_and_key(make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]) -> None:
    folder = make_shards([2, 2])
    reader = reader_of(folder)
    assert [reader.name(n) for n in range(4)] == [f"{folder}/train-{n // 2:06d}.tar: {n:06d}.png" for n in range(4)]


@pytest.mark.usefixtures("no_patience")
def test_what_has_lost_its_name_is_told_by_its_place(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    folder = make_shards([2])
    reader = reader_of(folder)
    offset = int(reader.index.records["offset"][1])
    os.truncate(folder / "train-000000.tar", 600)
    assert reader.name(1) == f"{folder}/train-000000.tar: the image at byte {offset}"
    reader = reader_of_deleted(folder, reader)
    assert reader.name(1) == f"{folder}/train-000000.tar: the image at byte {offset}"


def reader_of_deleted(folder: Path, reader: ImageReader) -> ImageReader:
    copy: ImageReader = pickle.loads(pickle.dumps(reader))
    (folder / "train-000000.tar").unlink()
    return copy


def test_a_gzipped_shard_is_named_as_the_user_named_it_and_read_from_the_cache(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader], tmp_path: Path
) -> None:
    plain = make_shards([3])
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress((plain / "train-000000.tar").read_bytes()))
    reader = reader_of(packed)
    assert [read(reader, n) for n in range(3)] == [png(n) for n in range(3)]
    assert reader.name(1) == f"{packed}: 000001.png"
    assert open_files(tmp_path / "cache" / "shards") == 1
    assert reader.index.fingerprint == reader_of(plain).index.fingerprint


@pytest.mark.parametrize("position", [0, 17, -1])
def test_one_flipped_bit_of_an_image_is_a_loss_d12(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader], position: int
) -> None:
    folder = make_shards([2])
    reader = reader_of(folder)
    offset, size, crc32, _ = reader.index.records[1].tolist()
    with (folder / "train-000000.tar").open("r+b") as file:
        at = offset + (position % size)
        old = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old[0] ^ 4]), at)
    assert read(reader, 0) == png(0)
    with pytest.raises(
        UserError, match=rf"its crc32 is [0-9a-f]{{8}}, but was {crc32:08x} when it was indexed: .* restore it"
    ):
        read(reader, 1)


def test_a_shard_cut_after_indexing_is_a_loss_d11(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    folder = make_shards([2])
    reader = reader_of(folder)
    os.truncate(folder / "train-000000.tar", int(reader.index.records["offset"][1]) + 10)
    assert read(reader, 0) == png(0)
    with pytest.raises(UserError, match="the shard has become shorter since it was indexed; restore it"):
        read(reader, 1)


@pytest.mark.usefixtures("no_patience")
def test_a_shard_that_vanished_is_a_loss_d13(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    folder = make_shards([2])
    reader = reader_of(folder)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(UserError, match="the shard cannot be read: No such file or directory; restore it"):
        read(reader, 0)


def test_a_shard_replaced_in_mid_run_is_a_loss_or_goes_unnoticed_by_open_files_d11(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    folder, other = make_shards([2]), make_shards([5], name="other", classes=1)
    reader, later = reader_of(folder), reader_of(folder)
    assert read(reader, 0) == png(0)
    (other / "train-000000.tar").write_bytes((other / "train-000000.tar").read_bytes()[2048:])
    (other / "train-000000.tar").rename(folder / "train-000000.tar")
    assert read(reader, 1) == png(1)
    with pytest.raises(UserError, match="its crc32 is"):
        read(later, 1)


@pytest.mark.usefixtures("no_patience")
def test_a_file_system_that_fails_for_a_moment_is_tried_again_d13(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle must be opened anew, and three failures are survived, not four."""
    folder = make_shards([1])
    reader = reader_of(folder)
    failures, pread, opened = [3], os.pread, []

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        opened.append(descriptor)
        if failures[0]:
            failures[0] -= 1
            raise OSError(116, "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert read(reader, 0) == png(0)
    assert len(opened) == 4
    failures[0] = 4
    with pytest.raises(UserError, match="the shard cannot be read: Stale file handle; restore it"):
        read(reader, 0)


def test_what_does_not_pass_by_waiting_is_not_waited_for(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of images of one shard would add up to hours."""
    reader = reader_of(make_shards([3, 1]))
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    failure, pread = OSError(5, "Input/output error"), os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        raise failure

    monkeypatch.setattr(os, "pread", failing)
    for number in range(3):
        with pytest.raises(UserError, match="Input/output error; restore it"):
            read(reader, number)
    assert len(slept) == len(module._SECONDS_BEFORE_RETRIES), "only for the first image of a shard"
    monkeypatch.setattr(os, "pread", pread)
    assert read(reader, 0) == png(0)
    failure = OSError(13, "Permission denied")
    monkeypatch.setattr(os, "pread", failing)
    slept.clear()
    with pytest.raises(UserError, match="Permission denied; make it readable for this user"):
        read(reader, 3)
    assert slept == []


def test_patience_lasts_seconds_and_ends() -> None:
    assert 1 < sum(module._SECONDS_BEFORE_RETRIES) < 60


def test_a_reader_works_in_forked_processes_and_after_pickling(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    reader = reader_of(make_shards([2, 2]))
    assert read(reader, 0) == png(0)
    places = reader.locate(np.arange(4))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.read, places) == [png(n) for n in range(4)]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.read(place) for place in places] == [png(n) for n in range(4)]
    assert read(reader, 3) == png(3)


@pytest.mark.usefixtures("no_patience")
def test_a_forked_process_whose_files_were_closed_opens_its_own(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    reader = reader_of(make_shards([1]))
    read(reader, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.closerange(3, 64)
            status = 0 if read(reader, 0) == png(0) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def open_files(folder: Path) -> int:
    """How often this process has files of a folder open."""
    return sum(os.path.realpath(link).startswith(str(folder)) for link in Path("/proc/self/fd").iterdir())


def test_a_reader_that_is_no_longer_used_closes_its_files(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    """A run makes a new one for every picture."""
    folder = make_shards([1, 1, 1])
    reader = reader_of(folder)
    for number in range(3):
        read(reader, number)
    assert open_files(folder) == 3
    del reader
    gc.collect()
    assert open_files(folder) == 0


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open 300 files beside those that earlier tests have left open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300 + len(list(Path("/proc/self/fd").iterdir())), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_a_set_may_have_more_shards_than_a_process_may_open(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    folder = make_shards([1] * 330)
    reader = reader_of(folder)
    places = reader.locate(np.random.default_rng(0).integers(0, 330, 2000))
    with ThreadPoolExecutor(6) as threads:
        for place, data in zip(places, threads.map(reader.read, places), strict=True):
            assert data == png(place.sample_id)
    assert open_files(folder) <= 256


def test_a_file_that_is_pushed_out_while_it_is_read_stays_open(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may by then mean another file, whose bytes would pass for damage."""
    reader = reader_of(make_shards([1, 1]))
    pread = os.pread

    def slow(descriptor: int, size: int, offset: int) -> bytes:
        reader._open.clear()  # as another thread does that opens many
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    monkeypatch.setattr(module, "_SECONDS_BEFORE_RETRIES", ())
    assert [read(reader, n) for n in (0, 1)] == [png(0), png(1)]


def test_what_will_be_needed_is_only_advice(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    folder = make_shards([2, 2])
    reader = reader_of(folder)
    assert not reader.is_remote
    assert max(reader.steps_ahead(1000)) < 100
    (folder / "train-000001.tar").unlink()
    reader.will_need(np.array([0, 1, 2, 3]))
    assert read(reader, 1) == png(1)


def test_threads_do_not_share_a_position(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader]
) -> None:
    reader = reader_of(make_shards([40]))
    places, start = reader.locate(np.arange(40)), threading.Barrier(4)

    def all_of_them(first: int) -> list[bytes]:
        start.wait()
        return [reader.read(places[(first + n) % 40]) for n in range(40)]

    with ThreadPoolExecutor(4) as threads:
        for first, found in zip(range(0, 40, 10), threads.map(all_of_them, range(0, 40, 10)), strict=True):
            assert found == [png((first + n) % 40) for n in range(40)]


def test_too_many_open_files_are_told_with_the_limit_to_raise(
    make_shards: Callable[..., Path], reader_of: Callable[..., ImageReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(make_shards([1]))
    monkeypatch.setattr(module, "_SECONDS_BEFORE_RETRIES", ())

    def none_left(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"Too many open files; raise .*: ulimit -n"):
        patch.setattr(os, "open", none_left)
        read(reader, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"Too many open files; raise .*: ulimit -n"):
        patch.setattr("builtins.open", none_left)
        members(Path(reader.index.entries[0].url))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_hard_links_are_read_as_their_targets_also_from_a_remote_shard(
    web: WebServer, write_tar: Callable[..., Path], tmp_path: Path, chunk: int
) -> None:
    path = write_tar("x.tar", {f"{n}.png": png(n) for n in range(5)})
    with tarfile.open(path, "a") as tar:
        for name, target in (("7.png", "4.png"), ("8.png", "0.png"), ("9.png", "2.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    web.files["/x.tar"] = path.read_bytes()
    for place in (str(path), f"{web.url}/x.tar"):
        reader = ImageReader(
            open_index([place], tmp_path / "cache"), tmp_path / "cache", CACHE_BYTES, chunk_samples=chunk
        )
        assert [read(reader, n) for n in range(8)] == [png(n) for n in (0, 1, 2, 3, 4, 4, 0, 2)]


def test_copies_of_whole_shards_leave_less_room_for_ranges(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "cache" / "shards" / "0").mkdir(parents=True)
    (tmp_path / "cache" / "shards" / "0" / "x.tar").write_bytes(bytes(300))
    write_shards(tmp_path / "shards", [2])
    web.files["/x.tar"] = (tmp_path / "shards" / "train-000000.tar").read_bytes()
    index = open_index([f"{web.url}/x.tar"], tmp_path / "cache")
    assert ImageReader(index, tmp_path / "cache", 1000.0)._cache.budget == 700
