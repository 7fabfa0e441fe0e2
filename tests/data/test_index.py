import gc
import gzip
import multiprocessing
import os
import pickle
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import png

from mae.data.index import NO_LABEL, ImageReader, ShardIndex, build_index, split_name
from mae.errors import BadImageError, UserError


def index_of(*patterns: Path | str, cache: Path = Path("/nowhere")) -> ShardIndex:
    return build_index([str(pattern) for pattern in patterns], cache)


def sample(number: int, label: int | bytes | None = None, key: str | None = None) -> dict[str, bytes]:
    key = f"{number:06d}" if key is None else key
    text = label if isinstance(label, bytes) else str(label).encode()
    return {f"{key}.png": png(number)} | ({} if label is None else {f"{key}.cls": text})


def test_ids_run_over_all_shards_in_the_order_named(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([3, 1, 4], classes=3)
    index = index_of(folder)
    assert len(index) == 8
    assert index.shard_of.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert index.label.tolist() == [n % 3 for n in range(8)]
    assert index.keys == tuple(f"{n:06d}.png" for n in range(8))
    assert index.shards == tuple(folder / f"train-{n:06d}.tar" for n in range(3))
    backwards = index_of(folder / "train-{000002..000000}.tar")
    assert backwards.keys == tuple(f"{n:06d}.png" for n in (4, 5, 6, 7, 3, 0, 1, 2))


def test_the_bytes_read_are_those_packed(make_shards: Callable[..., Path]) -> None:
    reader = ImageReader(index_of(make_shards([3, 1, 4])))
    for number in [7, 0, 3, 3, 5, 1, 2, 6, 4]:
        assert reader.read(number) == png(number)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_folders_and_long_keys_are_read_in_any_tar_format(write_tar: Callable[..., Path], tar_format: int) -> None:
    keys = ["a/1", "a/2", "b.c/1", "/".join(["long" * 10] * 5)]
    files = [item for n, key in enumerate(keys) for item in sample(n, n, key).items()]
    index = index_of(write_tar("x.tar", files, tar_format))
    assert index.keys == tuple(f"{key}.png" for key in keys)
    assert index.label.tolist() == [0, 1, 2, 3]
    assert [ImageReader(index).read(n) for n in range(4)] == [png(n) for n in range(4)]


def test_a_name_tells_shard_and_key(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([2, 2])
    assert index_of(folder).name(3) == f"{folder}/train-000001.tar: 000003.png"


def test_a_gzipped_shard_is_named_as_the_user_named_it_and_read_from_the_cache(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    plain = make_shards([3])
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress((plain / "train-000000.tar").read_bytes()))
    index = index_of(packed, cache=tmp_path / "cache")
    assert index.shards == (packed,)
    assert index.files[0].is_relative_to(tmp_path / "cache")
    assert index.name(1) == f"{packed}: 000001.png"
    assert ImageReader(index).read(2) == png(2)
    assert index.fingerprint == index_of(plain).fingerprint


def test_moved_and_renamed_shards_keep_their_fingerprint(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards([3, 2])
    before = index_of(folder).fingerprint
    (tmp_path / "elsewhere").mkdir()
    for number in range(2):
        shutil.move(folder / f"train-{number:06d}.tar", tmp_path / "elsewhere" / f"part{number}.tar")
    assert index_of(tmp_path / "elsewhere").fingerprint == before


def test_every_change_of_the_samples_changes_the_fingerprint(write_tar: Callable[..., Path]) -> None:
    a, b, c = sample(0, 0), sample(1, 1), sample(2, 0)
    sets = {
        "original": [a | b | c],
        "order": [b | a | c],
        "label": [a | b | sample(2, 1)],
        "no label": [a | b | sample(2)],
        "fewer": [a | b],
        "key": [a | b | sample(2, 0, key="000003")],
        "extension": [a | b | {"000002.jpg": png(2), "000002.cls": b"0"}],
        "size": [a | b | {"000002.png": png(2) + b"x", "000002.cls": b"0"}],
        "cut into shards": [a | b, c],
        "cut elsewhere": [a, b | c],
        "order of shards": [b | c, a],
    }
    found = {
        name: index_of(*(write_tar(f"{name}/{n}.tar", files) for n, files in enumerate(shards))).fingerprint
        for name, shards in sets.items()
    }
    assert len(set(found.values())) == len(sets)
    assert index_of(write_tar("again.tar", a | b | c)).fingerprint == found["original"]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npy", "JPG", "Png"])
def test_each_image_extension_is_found_in_either_case(write_tar: Callable[..., Path], extension: str) -> None:
    index = index_of(write_tar("x.tar", {f"a.{extension}": b"bytes", "a.CLS": b"3"}))
    assert index.keys == (f"a.{extension.lower()}",)
    assert index.label.tolist() == [3]
    assert ImageReader(index).read(0) == b"bytes"


def test_hidden_files_and_files_without_extension_are_no_samples(write_tar: Callable[..., Path]) -> None:
    files = {
        ".hidden.png": png(9),
        "README": b"text",
        "dir/._000000.png": png(8),
        **sample(0, 1, "dir/000000"),
        "dir/.DS_Store": b"x",
        "dir/000001.png": png(1),
        "dir/LICENSE": b"text",
        "dir/000001.cls": b"2",
    }
    index = index_of(write_tar("x.tar", files))
    assert index.keys == ("dir/000000.png", "dir/000001.png")
    assert index.label.tolist() == [1, 2]


def test_side_files_belong_to_their_image(write_tar: Callable[..., Path]) -> None:
    files = {
        "a.cls": b"1",
        "a.json": b"{}",
        "a.png": png(0),
        "a.seg.png": png(5),
        "a.txt": b"",
        "b.seg.png": png(6),
        "b.jpg": png(1),
    }
    index = index_of(write_tar("x.tar", files))
    assert index.keys == ("a.png", "b.jpg")
    assert index.label.tolist() == [1, NO_LABEL]
    assert [ImageReader(index).read(n) for n in range(2)] == [png(0), png(1)]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.png", "a", "png"),
        ("a.b/img.seg.PNG", "a.b/img", "seg.png"),
        ("../x.jpg", "../x", "jpg"),
        ("dir/.hidden", "dir/", "hidden"),
        ("noext", "noext", ""),
        ("/abs/a.png", "/abs/a", "png"),
    ],
)
def test_names_split_as_webdataset_splits_them(name: str, key: str, extension: str) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == (key, extension)
    base, rest = base_plus_ext(name)
    # webdataset gives (None, None) for what is no sample
    assert base is None or (base, rest.lower()) == (key, extension)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"1", "a.jpg": b"2"}, r"sample 'a' holds 2 images \(png, jpg\)"),
        ({"a.cls": b"1", "a.txt": b"2"}, r"sample 'a' holds 0 images \(cls, txt\)"),
        ({"a.seg.png": b"1"}, r"sample 'a' holds 0 images \(seg\.png\)"),
        ({"a.png": b"", "a.cls": b"1"}, r"image 'a\.png' is empty"),
        ({"a.png": b"1", "b.png": b"2", "a.cls": b"3"}, r"key 'a' occurs twice, or its files are not side by side"),
        ([("a.png", b"1"), ("b.png", b"2"), ("a.png", b"3")], "key 'a' occurs twice"),
        ([("a.png", b"1"), ("a.png", b"2")], "key 'a' occurs twice"),
        ([("a.png", b"1"), ("a.PNG", b"2")], "key 'a' occurs twice"),
        ({"img.v2.1.jpg": b"1", "img.v2.2.jpg": b"2"}, "sample 'img' holds 0 images"),
        ({"README": b"x", ".hidden.png": b"y"}, r"holds no image; an image is a file \.jpg, "),
        ({}, "holds no image"),
    ],
)
def test_shards_that_are_no_list_of_images_are_refused_by_name(
    write_tar: Callable[..., Path], files: dict[str, bytes], message: str
) -> None:
    good, bad = write_tar("good.tar", sample(0)), write_tar("bad.tar", files)
    with pytest.raises(UserError, match=rf"shard {bad}\b.*{message}"):
        index_of(good, bad)


def test_one_key_may_occur_in_two_shards(write_tar: Callable[..., Path]) -> None:
    index = index_of(write_tar("1.tar", sample(0, 0)), write_tar("2.tar", sample(0, 1)))
    assert index.label.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "label"), [(b"0", 0), (b"7\n", 7), (b" 12\r\n", 12), (b"007", 7), (b"9" * 18, 10**18 - 1)]
)
def test_labels_are_integers_with_white_space_around(write_tar: Callable[..., Path], text: bytes, label: int) -> None:
    assert index_of(write_tar("x.tar", sample(0, text))).label.tolist() == [label]


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "1.0", "cat", "1 2", "+1", "0x1", "²", "9" * 19, "9" * 20, "1" * 40, "3" + " " * 40 + "x"],
    ids=lambda text: repr(text[:8]),
)
def test_a_label_that_is_no_class_number_is_refused(write_tar: Callable[..., Path], text: str) -> None:
    path = write_tar("x.tar", sample(0, text.encode()))
    with pytest.raises(UserError, match=rf"shard {path}: label '000000\.cls' is b'.*'; allowed: an integer >= 0"):
        index_of(path)


def test_class_count_is_one_more_than_the_greatest_label(write_tar: Callable[..., Path]) -> None:
    assert index_of(write_tar("x.tar", sample(0, 2) | sample(1, 5))).class_count() == 6


def test_class_count_names_the_first_sample_without_a_label(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", sample(0, 2) | sample(1) | sample(2))
    with pytest.raises(UserError, match=rf"2 of 3 samples have no \.cls label, the first is {path}: 000001\.png"):
        index_of(path).class_count()


def test_a_damaged_or_missing_shard_is_refused(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([2, 2])
    (folder / "train-000001.tar").write_bytes((folder / "train-000001.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"shard .*train-000001\.tar is no intact tar"):
        index_of(folder)
    with pytest.raises(UserError, match=r"1 of 3 shards do not exist"):
        index_of(folder / "train-{000000..000002}.tar")


def test_a_reader_works_in_a_forked_process_and_after_pickling(make_shards: Callable[..., Path]) -> None:
    reader = ImageReader(index_of(make_shards([2, 2])))
    assert reader.read(0) == png(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.read, range(4)) == [png(n) for n in range(4)]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.read(n) for n in range(4)] == [png(n) for n in range(4)]
    assert reader.read(3) == png(3)


def test_a_forked_process_opens_its_own_files(make_shards: Callable[..., Path]) -> None:
    """The numbers of the parent's files may mean other files by the time the child reads."""
    reader = ImageReader(index_of(make_shards([1])))
    reader.read(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.closerange(3, 64)
            status = 0 if reader.read(0) == png(0) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def open_files(folder: Path) -> int:
    """How often this process has files of a folder open."""
    return sum(os.path.realpath(link).startswith(str(folder)) for link in Path("/proc/self/fd").iterdir())


def test_a_reader_that_is_no_longer_used_closes_its_files(make_shards: Callable[..., Path]) -> None:
    """A run makes a new one for every picture."""
    folder = make_shards([1, 1, 1])
    reader = ImageReader(index_of(folder))
    for number in range(3):
        reader.read(number)
    assert open_files(folder) == 3
    del reader
    gc.collect()
    assert open_files(folder) == 0


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open 320 files only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (320, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_a_set_may_have_more_shards_than_a_process_may_open(make_shards: Callable[..., Path]) -> None:
    reader = ImageReader(index_of(make_shards([1] * 400)))
    for number in np.random.default_rng(0).integers(0, 400, 1000).tolist():
        assert reader.read(number) == png(number)


def test_a_shard_cut_after_indexing_gives_a_bad_image(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([2])
    reader = ImageReader(index_of(folder))
    offset = int(reader.index.offset[1])
    os.truncate(folder / "train-000000.tar", offset + 10)
    assert reader.read(0) == png(0)
    with pytest.raises(BadImageError, match="the shard has become shorter"):
        reader.read(1)


def test_a_shard_that_vanished_gives_a_bad_image(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([2])
    index = index_of(folder)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(BadImageError, match="the shard cannot be read: No such file"):
        ImageReader(index).read(0)
