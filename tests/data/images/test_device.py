"""Decoding on the device, here the processor: the same boxes, nearly the same pixels."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae.data.batch import Batch, BatchRecipe
from mae.data.images import device
from mae.data.images.augment import AugmentSettings
from mae.data.indexing import open_index
from mae.data.plan import plan_batches
from mae.data.settings import DataSettings
from mae.data.train_batches import TrainBatches
from mae.errors import UserError
from mae.training.loop import to_device

CPU = torch.device("cpu")


def photo(number: int, quality: int = 95, mode: str = "RGB") -> bytes:
    """A smooth JPEG of 48x40 pixels, unlike any other."""
    small = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).convert(mode).save(
        buffer, "JPEG", quality=quality
    )
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[list[bytes]], Path]:
    from webdataset import TarWriter

    def make(images: list[bytes]) -> Path:
        path = tmp_path / "train-000000.tar"
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number, image in enumerate(images):
                tar.write({"__key__": f"{number:06d}", "jpg": image, "cls": str(number % 3).encode()})
        return path

    return make


def batches(path: Path, tmp_path: Path, where: str, **changes: object) -> TrainBatches:
    data = DataSettings(image_size=(16,), decode_on=where, cache_dir=tmp_path / "cache", **changes)  # type: ignore[arg-type]
    index = open_index([str(path)], tmp_path / "cache")
    recipe = BatchRecipe(0, data, AugmentSettings(), noise_columns=4)
    return TrainBatches(index, plan_batches(8, 1, None), 0, recipe)


def assert_close(here: Batch, there: Batch) -> None:
    difference = (here.images.int() - there.images.int()).abs().float()
    assert difference.mean() < 0.6
    assert difference.max() <= 8
    assert torch.equal(here.labels, there.labels)
    assert torch.equal(here.ids, there.ids)
    assert torch.equal(here.noise, there.noise)


@pytest.mark.parametrize("views", [1, 2])
def test_what_the_device_cuts_is_what_the_processor_cuts(
    shard: Callable[[list[bytes]], Path], tmp_path: Path, views: int
) -> None:
    path = shard([photo(n) for n in range(10)])
    here = batches(path, tmp_path, "cpu", views_per_image=views)
    there = batches(path, tmp_path, "device", views_per_image=views)
    for step in range(3):
        left = there[step]
        assert not left.images.any()
        assert_close(here[step], to_device(left, CPU))


def test_what_is_no_plain_jpeg_is_decoded_by_the_processor(
    shard: Callable[[list[bytes]], Path], tmp_path: Path
) -> None:
    cmyk = photo(3, mode="CMYK")
    path = shard([cmyk if n % 2 else photo(n) for n in range(8)])
    there = batches(path, tmp_path, "device")[0]
    is_cmyk = there.ids % 2 == 1
    assert there.images[is_cmyk].flatten(1).any(1).all()
    assert not there.images[~is_cmyk].any()
    assert_close(batches(path, tmp_path, "cpu")[0], to_device(there, CPU))


def test_an_image_that_the_device_cannot_decode_is_named(
    shard: Callable[[list[bytes]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = photo(5)

    def picky(files: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        # The processor's decoder refuses nothing that reaches it; nvJPEG does.
        if any(bytes(file.numpy()) == strange for file in files):
            raise RuntimeError("unsupported\nsomewhere")
        return [torch.zeros(3, 48, 40, dtype=torch.uint8) for _ in files]

    monkeypatch.setattr(device, "decode_jpeg", picky)
    batch = batches(shard([photo(n) for n in range(8)]), tmp_path, "device")[0]
    with pytest.raises(UserError, match=r"cannot decode 1 samples of a batch, number 5 \(unsupported\)"):
        to_device(batch, CPU)


def test_options_that_need_the_pixels_in_the_worker_are_refused(
    shard: Callable[[list[bytes]], Path], tmp_path: Path
) -> None:
    path = shard([photo(n) for n in range(8)])
    with pytest.raises(UserError, match="keep_decoded"):
        DataSettings(decode_on="device", keep_decoded=True)
    with pytest.raises(UserError, match=r"1 or 3 channels"):
        DataSettings(decode_on="device", channels=4)
    index = open_index([str(path)], tmp_path / "cache")
    data = DataSettings(image_size=(16,), decode_on="device", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=r"augment\.rand_augment"):
        TrainBatches(index, plan_batches(8, 1, None), 0, BatchRecipe(0, data, AugmentSettings(rand_augment="rand-m9")))
