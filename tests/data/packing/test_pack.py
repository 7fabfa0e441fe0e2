import errno
import io
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import png
from PIL import Image

from data.packing.packs import (
    NOWHERE,
    RULES,
    contents,
    images_of,
    index_of,
    jpeg,
    keys_of,
    pack,
    packed_files,
    planned,
    statistics_of,
)
from mae.data.packing import pack as module
from mae.data.packing.engines import process_engine
from mae.data.packing.items import Item
from mae.data.packing.pack import pack_shard, pack_shards
from mae.data.packing.plan import PackRules, plan_split
from mae.data.packing.publish import publish
from mae.data.packing.record import ShardRecord
from mae.data.packing.sources import find_images
from mae.data.scan import NO_LABEL
from mae.data.store.lock import lock
from mae.errors import UserError

AS_LISTED = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_a_labelled_tree_becomes_shards_with_labels_and_untouched_bytes(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path / "out")
    assert packed.filenames == [f"train-00000{n}.tar" for n in range(3)]
    assert packed.shard_lengths == [5, 5, 2]
    assert (packed.samples, packed.bad) == (12, [])
    assert keys_of(tmp_path / "out") == [f"{n:09d}.png" for n in range(12)]
    assert index_of(tmp_path / "out").label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images_of(tmp_path / "out") == [png(n, mode="RGB") for n in AS_LISTED]
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncat\n"


def test_a_flat_folder_has_no_labels(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out")
    assert set(index_of(tmp_path / "out").label.tolist()) == {NO_LABEL}
    assert images_of(tmp_path / "out") == [png(n) for n in range(9)]
    assert not (tmp_path / "out" / "classes.txt").exists()
    entry = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]
    assert "samples_per_class" not in entry


def test_shards_are_packed_again_with_their_side_files(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    files = {
        "x/a.cls": b"2",
        "x/a.jpg": jpeg(0),
        "x/a.seg.png": png(5),
        "x/a.txt": b"a caption\n",
        "b.png": png(1),
        "b.json": b'{"id": 1}',
        ".hidden.png": b"x",
    }
    source = write_tar("source/in.tar", files)
    pack(source, tmp_path / "out")
    assert index_of(tmp_path / "out").label.tolist() == [2, NO_LABEL]
    assert contents(tmp_path / "out" / "train-000000.tar") == {
        "000000000.cls": b"2",
        "000000000.jpg": files["x/a.jpg"],
        "000000000.seg.png": files["x/a.seg.png"],
        "000000000.txt": files["x/a.txt"],
        "000000001.json": files["b.json"],
        "000000001.png": files["b.png"],
    }


def test_s09_names_of_a_source_are_never_paths_of_the_output(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    source = write_tar("source/in.tar", {"/etc/x.png": png(0), "../../y.png": png(1)})
    pack(source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out" / "train-000000.tar")) == ["000000000.png", "000000001.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_s01_bad_images_are_left_out_and_listed_if_asked_for(flat: Path, tmp_path: Path, workers: int) -> None:
    """Their keys stay unused: which images are bad in one shard changes nothing in another."""
    (flat / "3.png").write_bytes(b"<html>")
    (flat / os.fsdecode(b"4\xff.png")).write_bytes(b"not UTF-8")
    packed = pack(flat, tmp_path / "out", skip_bad=True, workers=workers)
    assert packed.shard_lengths == [4, 4]
    listed = (tmp_path / "out" / "train-bad-images.txt").read_bytes().splitlines()
    assert [line.split(b" ")[0] for line in listed] == [b"3.png", b"4\xff.png"]
    assert keys_of(tmp_path / "out") == [f"{n:09d}.png" for n in (0, 1, 2, 4, 6, 7, 8, 9)]
    assert packed.statistics == statistics_of([png(n) for n in range(9) if n != 3], 1)


def test_shards_are_the_same_for_any_number_of_workers(tree: Path, tmp_path: Path) -> None:
    (tree / "ant" / "bad.png").write_bytes(b"<html>")
    rules = PackRules(shard_samples=3)
    for name, workers in (("a", 0), ("b", 1), ("c", 2)):
        pack(tree, tmp_path / name, rules=rules, skip_bad=True, workers=workers)
    assert len(packed_files(tmp_path / "a")) == 8
    assert packed_files(tmp_path / "a") == packed_files(tmp_path / "b") == packed_files(tmp_path / "c")


# A child process that has loaded torch already, and shares no thread or lock with this one.
children = multiprocessing.get_context("forkserver")


def pack_slowly(source: Path, out: Path, stop: int) -> None:
    """What the children run: so slow that a kill finds them in the middle of a shard."""
    module._read = _slow_read
    plan = plan_split(find_images(str(source), NOWHERE), out, "train", TWO_EACH)
    pack_shards(plan, range(stop), process_engine(0), lambda images, size: None)
    publish(plan, skip_bad=False)


TWO_EACH = PackRules(shard_samples=2, provenance=True)
_read = module._read


def _slow_read(item: Item, rules: PackRules, record: ShardRecord) -> dict[str, bytes]:
    time.sleep(0.03)
    return _read(item, rules, record)


def test_a_pack_that_is_killed_again_and_again_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "whole", rules=TWO_EACH)
    parts = tmp_path / "out" / ".train.parts"
    for done in (1, 2, 4):
        child = children.Process(target=pack_slowly, args=(tree, tmp_path / "out", 6))
        child.start()
        # Not before it is in the middle of a shard.
        while len(list(parts.glob("*.json"))) < done or not list(parts.glob("*.part")):
            assert child.is_alive()
            time.sleep(0.002)
        child.kill()
        child.join()
        assert not list((tmp_path / "out").glob("*.tar")), "nothing has its final name yet"
        assert list(parts.glob("*.tar.*.part")), "it was killed in the middle"
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.tar")}
    pack(tree, tmp_path / "out", rules=TWO_EACH, workers=2)
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}.items()
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == [".mae-index"]
    assert images_of(tmp_path / "out") == images_of(tmp_path / "whole")


def test_d18_two_packs_of_the_same_shards_at_once_come_to_one_result(tree: Path, tmp_path: Path) -> None:
    """The second is turned away, having done what the first had not begun; what there is, is whole."""
    pack(tree, tmp_path / "whole", rules=TWO_EACH)
    both = [children.Process(target=pack_slowly, args=(tree, tmp_path / "out", stop)) for stop in (6, 6)]
    for child in both:
        child.start()
    for child in both:
        child.join()
    assert any(child.exitcode == 0 for child in both) or (tmp_path / "out" / ".train.parts").exists()
    if (tmp_path / "out" / ".train.parts").exists():
        pack(tree, tmp_path / "out", rules=TWO_EACH)
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["no tar", "short tar", "no records", "short records", "no json", "short json"])
def test_a_shard_whose_files_are_not_whole_is_packed_again(flat: Path, tmp_path: Path, damage: str) -> None:
    pack(flat, tmp_path / "whole")
    plan = planned(flat, tmp_path / "out")
    pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    how, what = damage.split()
    path = plan.parts / f"train-000001.tar{ {'tar': '', 'records': '.bin', 'json': '.json'}[what] }"
    path.unlink() if how == "no" else path.write_bytes(path.read_bytes()[:-1])
    pack(flat, tmp_path / "out")
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")


def test_ranges_of_shards_make_the_whole(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "whole", rules=replace(RULES, shard_samples=3))
    plan = planned(tree, tmp_path / "out", rules=replace(RULES, shard_samples=3))
    pack_shards(plan, range(2, 4), process_engine(2), lambda images, size: None)
    with pytest.raises(
        UserError, match=r"2 of 4 shards are not packed: train-000000\.tar, train-000001\.tar; pack them"
    ):
        publish(plan, skip_bad=False)
    assert not list((tmp_path / "out").glob("*.tar"))
    pack_shards(plan, range(2), process_engine(0), lambda images, size: None)
    before = {p.name: p.stat().st_mtime_ns for p in plan.parts.glob("*.tar")}
    pack(tree, tmp_path / "out", rules=replace(RULES, shard_samples=3))
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")} == before
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")


def test_d18_a_shard_that_another_process_packs_is_left_to_it(flat: Path, tmp_path: Path) -> None:
    plan = planned(flat, tmp_path / "out")
    with (
        lock(plan.parts / "train-000001.tar.lock"),
        pytest.raises(UserError, match=r"another mae pack is writing train-000001\.tar; run the same command again"),
    ):
        pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    assert pack(flat, tmp_path / "out").samples == 9


def test_what_a_killed_process_left_of_a_shard_is_swept_away(flat: Path, tmp_path: Path) -> None:
    plan = planned(flat, tmp_path / "out")
    left_over = plan.parts / "train-000001.tar.elsewhere.1234.part"
    left_over.write_bytes(b"half")
    pack_shard(plan.out, "train", 1, lambda images, size: None)
    assert not left_over.exists()
    assert (plan.parts / "train-000001.tar").exists()


def test_an_image_that_changes_while_it_is_packed_ends_the_pack(flat: Path, tmp_path: Path) -> None:
    plan = planned(flat, tmp_path / "out")
    for changed in (png(7) + b"x", png(7)[:-1]):
        (flat / "7.png").write_bytes(changed)
        with pytest.raises(UserError, match=r"7\.png has changed while it was being packed; restore it, then run"):
            pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    (flat / "7.png").unlink()
    with pytest.raises(UserError, match=r"7\.png cannot be read: No such file"):
        pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    (flat / "7.png").write_bytes(png(7))
    assert pack(flat, tmp_path / "out").samples == 9


def test_provenance_is_stored_beside_each_image(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", rules=replace(RULES, provenance=True))
    assert json.loads(contents(tmp_path / "out" / "train-000000.tar")["000000001.json"]) == {"source": "ant/03.png"}


def test_provenance_never_replaces_a_side_file(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    source = write_tar("source/in.tar", {"a.png": png(0), "a.json": b"{}"})
    with pytest.raises(UserError, match=r"in\.tar/a already has a \.json file"):
        pack(source, tmp_path / "out", rules=replace(RULES, provenance=True))
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"cat", r"in\.tar/a\.cls is b'cat'; allowed: an integer >= 0 of at most 18 digits; .*--labels none$"),
        (b"-1", r"in\.tar/a\.cls is b'-1'; allowed"),
        (b" " * 30 + b"1", r"in\.tar/a\.cls is b' +'; allowed"),
        (b"2", r"in\.tar/a has label 2, but there are 2 classes, whose labels begin at 0; .*--labels none$"),
    ],
)
def test_a_wrong_label_is_named_by_its_source(
    write_tar: Callable[..., Path], tmp_path: Path, label: bytes, message: str
) -> None:
    source = write_tar("source/in.tar", {"a.png": png(0), "a.cls": label})
    (tmp_path / "source" / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=message):
        pack(source, tmp_path / "out")


def test_a_huge_label_needs_no_huge_memory(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    source = write_tar("source/in.tar", {"a.png": png(0), "a.cls": b"999999999999"})
    assert pack(source, tmp_path / "out").samples_per_class == []
    assert index_of(tmp_path / "out").label.tolist() == [999999999999]


def test_side_files_of_any_extension_are_kept(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    source = write_tar("source/in.tar", {"a.png": png(0), "a._meta": b"x"})
    pack(source, tmp_path / "out")
    assert contents(tmp_path / "out" / "train-000000.tar")["000000000._meta"] == b"x"
    with pytest.raises(UserError, match=r"key\.tar/a has a file \.__key__, a name that webdataset needs itself"):
        pack(write_tar("source/key.tar", {"a.png": png(0), "a.__key__": b"x"}), tmp_path / "other")


def test_large_images_are_reduced_and_all_others_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = {
        "large.png": png(0, (40, 60), "RGB"),
        "small.png": png(1, (16, 60), "RGB"),
        "x.png": png(2, (40, 60), "RGBA"),
    }
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    packed = pack(tmp_path / "in", tmp_path / "out", rules=replace(RULES, short_side=16))
    found = contents(tmp_path / "out" / "train-000000.tar")
    assert list(found) == ["000000000.jpg", "000000001.png", "000000002.png"]
    assert Image.open(io.BytesIO(found["000000000.jpg"])).size == (24, 16)
    assert (found["000000001.png"], found["000000002.png"]) == (files["small.png"], files["x.png"])
    assert (packed.shrunk, packed.unsuited) == (1, 1)
    assert packed.statistics == statistics_of(list(found.values()), 3), "measured on what is stored"


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_is_told_of_every_image_and_byte(flat: Path, tmp_path: Path, workers: int) -> None:
    told: list[tuple[int, int]] = []
    size = sum(path.stat().st_size for path in flat.iterdir())
    pack(flat, tmp_path / "out", workers=workers, advance=lambda *done: told.append(done))
    assert tuple(map(sum, zip(*told, strict=True))) == (9, size)


def test_an_out_folder_may_have_any_name(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "50% {of} *it* %d %%"
    assert pack(flat, out).samples == 9
    assert len(contents(out / "train-000000.tar")) == 5


def test_an_out_folder_that_cannot_be_written_is_named(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/out cannot be written: Not a directory"):
        pack(flat, tmp_path / "file" / "out")


def pack_with_little_memory(source: Path, out: Path) -> None:
    """With no more than 30 MB besides what is in use once a pack of one image has loaded all that is needed."""
    (out.parent / "one").mkdir()
    os.link(source / "0.npy", out.parent / "one" / "0.npy")
    pack(out.parent / "one", out, "one")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    most = int(line.split()[1]) * 1024 + 30_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    pack(source, out, rules=PackRules())


@pytest.mark.parametrize("step", ["os.fsync", "Path.rename"])
def test_a_full_disk_is_told_of_and_the_same_command_goes_on(
    flat: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = planned(flat, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written: No space left on device"):
        patch.setattr({"os": os, "Path": Path}[step.partition(".")[0]], step.partition(".")[2], full)
        pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    assert not list(plan.parts.glob("*.part"))
    assert pack(flat, tmp_path / "out").samples == 9


def test_memory_stays_flat_however_many_images_a_shard_has(tmp_path: Path) -> None:
    """100 MB of images in one shard. (What is read of a file by mapping it is no memory in use.)"""
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "0.npy", np.zeros((410, 410, 3), np.uint8))
    for number in range(1, 200):
        os.link(tmp_path / "in" / "0.npy", tmp_path / "in" / f"{number}.npy")
    child = children.Process(target=pack_with_little_memory, args=(tmp_path / "in", tmp_path / "out"))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (tmp_path / "out" / "train-000000.tar").stat().st_size > 100e6
