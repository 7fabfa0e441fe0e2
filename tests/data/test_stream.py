"""Streams: strict about tars, their own share for each worker, weaker in the rest and open about it."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png

from mae.data.batch import Batch, BatchRecipe
from mae.data.images.augment import AugmentSettings
from mae.data.images.decode import decode
from mae.data.indexing import open_index
from mae.data.loader import load
from mae.data.plan import plan_batches
from mae.data.prepare import not_used
from mae.data.settings import DataSettings
from mae.data.store.shards import expand
from mae.data.stream import StreamBatches, not_used_of_stream, read_samples
from mae.errors import UserError

WHOLE = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)


def stream(
    folder: Path, batch: int = 4, processes: int = 1, rank: int = 0, seed: int = 0, **changes: object
) -> StreamBatches:
    data = DataSettings(
        shards=(str(folder),), image_size=(8,), channels=1, reader="stream", stream_samples=100,
        chunk_samples=2, window_chunks=2, cache_dir=folder.parent / "cache", **changes,
    )  # type: ignore[arg-type]  # fmt: skip
    recipe = BatchRecipe(seed, data, WHOLE, noise_columns=4)
    return StreamBatches(expand([str(folder)]), plan_batches(batch, processes, None), rank, recipe)


def taken(batches: StreamBatches, count: int, start: int = 0, workers: int = 0) -> list[Batch]:
    return list(islice(load(batches.starting_at(start), range(0), workers), count))


def numbers_in(batches: Sequence[Batch], total: int) -> list[int]:
    """Which of the images that `make_shards` writes each row shows."""
    known = {bytes(decode(png(n), 1).numpy()): n for n in range(total)}
    return [known[bytes(image.contiguous().numpy())] for batch in batches for image in batch.images]


def test_a_stream_shows_images_of_all_shards_with_their_labels(make_shards: Callable[..., Path]) -> None:
    batches = taken(stream(make_shards([3, 4, 5])), 30)
    seen = numbers_in(batches, 12)
    assert set(seen) == set(range(12))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [number % 4 for number in seen]
    assert all((batch.ids == -1).all() for batch in batches)


def test_the_same_seed_and_start_give_the_same_stream_and_others_do_not(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([5, 5, 5])
    first, again, resumed, other = (
        numbers_in(taken(stream(folder, seed=seed), 8, start), 15) for seed, start in ((0, 0), (0, 0), (0, 8), (1, 0))
    )
    assert first == again
    assert first != resumed
    assert first != other


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_processes_take_turns_at_the_shards_that_are_drawn(
    make_shards: Callable[..., Path], workers: int
) -> None:
    # 64 shards of one image: hardly any is drawn twice in so few draws, unless two workers draw the same ones.
    folder = make_shards([1] * 64)
    seen = [
        number
        for rank in range(2)
        for number in numbers_in(taken(stream(folder, batch=8, processes=2, rank=rank), 2, workers=workers), 64)
    ]
    assert len(set(seen)) >= 12 == len(seen) - 4


def test_a_damaged_tar_stops_the_stream_before_any_of_it_is_used_d03(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([6])
    (shard,) = folder.glob("*.tar")
    damaged = bytearray(shard.read_bytes())
    damaged[-3000] ^= 1  # in the last samples
    shard.write_bytes(damaged)
    batches = taken(stream(folder), 3)
    assert all("is not a valid tar file" in batch.lost for batch in batches)
    assert not any(batch.images.any() for batch in batches)


def test_a_bad_image_is_named_and_the_next_takes_its_place_s01(write_tar: Callable[..., Path]) -> None:
    files = {f"{n:06d}.png": png(n) if n != 2 else png(n)[:40] for n in range(5)}
    folder = write_tar("x.tar", files).parent
    batches = taken(stream(folder, max_bad_samples=100), 10)
    assert 2 not in numbers_in(batches, 5)
    assert {name.partition(" (")[0] for batch in batches for name in batch.bad} == {f"{folder}/x.tar: 000002.png"}


def test_with_too_many_bad_images_the_stream_does_not_search_for_ever_s01(write_tar: Callable[..., Path]) -> None:
    folder = write_tar("x.tar", {f"{n}.png": b"\x89PNG\r\n\x1a\n" for n in range(3)}).parent
    (batch,) = taken(stream(folder, max_bad_samples=2), 1)
    assert len(batch.bad) == 3
    assert not batch.images.any()


def test_two_views_of_an_image_are_neighbours_under_masks_of_their_own(make_shards: Callable[..., Path]) -> None:
    (batch,) = taken(stream(make_shards([6]), views_per_image=2), 1)
    first, second = numbers_in([batch], 6)[::2], numbers_in([batch], 6)[1::2]
    assert first == second
    assert len(np.unique(batch.noise.numpy(), axis=0)) == 4
    with pytest.raises(UserError, match="not a multiple of the 3 views"):
        stream(make_shards([6], name="other"), views_per_image=3)


def test_nothing_in_a_shard_is_run_x01(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    import pickle

    class Canary:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "canary",)

    dangerous = {f"0.{extension}": pickle.dumps(Canary()) for extension in ("pkl", "pickle", "pyd", "pth", "pt")}
    path = write_tar("x.tar", {**dangerous, "0.png": png(0)})
    (sample,) = read_samples(expand([str(path)])[0], tmp_path / "cache")
    assert sample.image == png(0)
    assert not (tmp_path / "canary").exists()


def test_empty_shards_and_what_is_left_out_are_told_once_d06(
    make_shards: Callable[..., Path], write_tar: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards([6])
    for name in ("x", "y"):
        write_tar(f"{folder.name}/{name}.tar", {})
    assert set(numbers_in(taken(stream(folder), 10), 6)) <= set(range(6))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: shard {folder}/")
    assert line.endswith(" has no images; other shards like this are not named")


def test_each_kind_that_is_left_out_is_told_with_its_count(
    write_tar: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    good = {f"{number}.png": png(number) for number in range(4)}
    folder = write_tar("shards/x.tar", {**good, ".a": b"", ".b": b""}).parent
    write_tar("shards/y.tar", {**good, ".c": b"", "README": b""})
    taken(stream(folder), 10)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == said.count("; other shards like this are not named\n") == 2
    assert "hidden files" in said
    assert "README" in said
    shards = expand([str(folder)])
    (line,) = not_used_of_stream(shards, folder, stream(folder).recipe.data.rules)
    index = open_index([str(folder)], folder.parent / "cache", say=lambda text: None)
    assert [line] == not_used(index)
    assert "hidden files: 3" in line


def test_a_stream_of_empty_shards_ends_d06(write_tar: Callable[..., Path]) -> None:
    write_tar("shards/x.tar", {"README": b""})
    folder = write_tar("shards/y.tar", {}).parent
    (batch,) = taken(stream(folder), 1)
    assert batch.lost == f"none of the 2 shards has an image, the first: {folder}/x.tar"


def test_the_images_of_a_stream_may_be_named_by_their_extension(write_tar: Callable[..., Path]) -> None:
    files = {f"{n}.{name}.png": png(n if name == "image" else 9) for n in range(5) for name in ("image", "mask")}
    folder = write_tar("x.tar", files).parent
    batches = taken(stream(folder, image_extension="image.png"), 5)
    assert set(numbers_in(batches, 5)) <= set(range(5))
    (batch,) = taken(stream(folder), 1)
    assert "5 samples have several images" in batch.lost
