"""Other loaders, with which `benchmarks/data.py` compares ours; each follows its own documented recipe.

A peer turns photos on disk into an `Epoch`: a function that is called once per epoch and yields the images of each
batch. All do the same work: a random resized crop to 224 px of 20 to 100 % of the area, bicubic with antialiasing,
mirrored half of the time. Each imports its package only when it runs.
"""
# ruff: noqa: PLC0415, S311 -- a peer is imported when it runs; crops need no cryptographic randomness

import contextlib
import io
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

SIDE, SCALE, RATIO = 224, (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = v2.InterpolationMode.BICUBIC

Epoch = Callable[[], Iterable[Tensor]]
Photo = tuple[str, bytes, int]
"""Key, JPEG bytes, label."""


@dataclass(frozen=True)
class Forms:
    """One set of photos in the forms that the loaders read; each form is made before the timing begins."""

    root: Path

    def shards(self, short_side: int | None = None) -> list[Path]:
        """Return the WebDataset tars: of the original photos, or reduced to a shorter side of `short_side` pixels."""
        return sorted((self.root / f"shards-{short_side or 'original'}").glob("*.tar"))

    def form(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True)
class Peer:
    load: Callable[[Forms, int, int], Epoch]
    """Function (forms, batch size, workers) -> epochs."""
    distributions: tuple[str, ...] = ()
    """Packages, one of which must be installed in addition to this project's own; () if none is needed."""
    form: str = ""
    """Folder with the photos in the peer's own form, if it does not read tars."""
    convert: Callable[[Path, Sequence[Photo]], None] | None = None
    """Function (folder, photos) that writes this form."""

    def version(self) -> str | None:
        """Return the version of the package; None if it is not installed."""
        return installed(self.distributions) if self.distributions else version("torchvision")


@dataclass(frozen=True)
class Decoder:
    decode_all: Callable[[Sequence[bytes]], Callable[[], Iterable[Tensor]]]
    """Function: photos in memory -> a function that makes a view of each, on one thread."""
    distributions: tuple[str, ...] = ()

    def version(self) -> str | None:
        """Return the version of the package; None if it is not installed."""
        return installed(self.distributions) if self.distributions else version("torchvision")


def installed(distributions: Sequence[str]) -> str | None:
    """Return the version of the first installed one of `distributions`; None if none is installed."""
    for distribution in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return None


def v1_view(side: int, channels: int = 3) -> Callable[[Image.Image], Tensor]:
    """Return the recipe of the MAE paper's code: Pillow and torchvision v1, to normalised float32."""
    return v1.Compose([  # type: ignore[no-any-return]
        v1.RandomResizedCrop(side, SCALE, RATIO, interpolation=BICUBIC),
        v1.RandomHorizontalFlip(),
        v1.ToTensor(),
        v1.Normalize(MEAN[:channels], STD[:channels]),
    ])  # fmt: skip


V1_VIEW = v1_view(SIDE)

V2_VIEW: Callable[[Tensor], Tensor] = v2.Compose([
    v2.RandomResizedCrop(SIDE, SCALE, RATIO, interpolation=BICUBIC, antialias=True),
    v2.RandomHorizontalFlip(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
])  # fmt: skip
"""torchvision's current recipe: uint8 tensors until the last step, then normalised float32."""


def decode_with_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_with_torchvision(data: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def v2_view(data: bytes) -> Tensor:
    return V2_VIEW(decode_with_torchvision(data))


def repeat(loader: Iterable[Any]) -> Epoch:
    """Turn a loader of (images, labels) into an `Epoch`."""
    return lambda: (images for images, _ in loader)


# ImageFolder


def write_tree(folder: Path, photos: Sequence[Photo]) -> None:
    for key, data, label in photos:
        (folder / f"{label:04}").mkdir(parents=True, exist_ok=True)
        (folder / f"{label:04}" / f"{key}.jpg").write_bytes(data)


def image_folder_v1(forms: Forms, batch: int, workers: int) -> Epoch:
    dataset = ImageFolder(str(forms.form("tree")), V1_VIEW)
    return repeat(DataLoader(dataset, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0))


def image_folder_v2(forms: Forms, batch: int, workers: int) -> Epoch:
    dataset = ImageFolder(str(forms.form("tree")), V2_VIEW, loader=lambda path: decode_image(path, ImageReadMode.RGB))
    return repeat(DataLoader(dataset, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0))


# webdataset


def web_dataset(forms: Forms, batch: int, workers: int) -> Epoch:
    import webdataset as wds

    dataset = (
        wds.WebDataset([str(path) for path in forms.shards()], shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(V1_VIEW, int)
        .batched(batch)
    )
    return repeat(wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0))


# DALI


def dali(dtype: str) -> Callable[[Forms, int, int], Epoch]:
    def load(forms: Forms, batch: int, workers: int) -> Epoch:
        from nvidia.dali import fn, pipeline_def
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

        @pipeline_def(batch_size=batch, num_threads=workers, device_id=None)
        def pipeline() -> Any:
            images, labels = fn.readers.webdataset(
                paths=[str(path) for path in forms.shards()],
                ext=["jpg", "cls"],
                random_shuffle=True,
                missing_component_behavior="error",
                name="shards",
            )
            return dali_view(images, dtype), fn.pad(labels)

        iterator = DALIGenericIterator(
            [pipeline()], ["images", "labels"], reader_name="shards", auto_reset=True,
            last_batch_policy=LastBatchPolicy.PARTIAL,
        )  # fmt: skip
        return lambda: (parts[0]["images"] for parts in iterator)

    return load


def dali_view(images: Any, dtype: str) -> Any:
    """Turn encoded images into views: normalised "float32", channels first, or "uint8", channels last."""
    from nvidia.dali import fn, types

    crops = fn.decoders.image_random_crop(images, random_area=list(SCALE), random_aspect_ratio=list(RATIO))
    views = fn.resize(crops, resize_x=SIDE, resize_y=SIDE, interp_type=types.INTERP_CUBIC, antialias=True)
    mirror = fn.random.coin_flip(probability=0.5)
    if dtype == "uint8":
        return fn.flip(views, horizontal=mirror)
    return fn.crop_mirror_normalize(
        views, mirror=mirror, dtype=types.FLOAT, output_layout="CHW",
        mean=[255 * value for value in MEAN], std=[255 * value for value in STD],
    )  # fmt: skip


def decode_with_dali(photos: Sequence[bytes]) -> Callable[[], Iterable[Tensor]]:
    from nvidia.dali import fn, pipeline_def

    arrays = [np.frombuffer(data, dtype=np.uint8) for data in photos]

    @pipeline_def(batch_size=len(photos), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        return dali_view(fn.external_source(source=lambda: arrays, batch=True), "float32")

    built = pipeline()
    built.build()

    def run() -> Iterator[Tensor]:
        (views,) = built.run()
        return (torch.from_numpy(np.asarray(view)) for view in views)

    return run


# spdl


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) by the rule of torchvision's RandomResizedCrop, without its tensors."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def spdl_frames(data: bytes) -> Any:
    """Decode, crop, resize and mirror in one FFmpeg graph."""
    import spdl.io

    packets = spdl.io.demux_image(data)
    top, left, height, width = random_box(packets.height, packets.width)
    steps = [f"crop={width}:{height}:{left}:{top}", f"scale={SIDE}:{SIDE}:flags=bicubic"]
    steps += ["hflip"] if random.random() < 0.5 else []
    return spdl.io.decode_packets(packets, filter_desc=",".join([*steps, "format=rgb24"]))


def spdl_stack(frames: list[Any]) -> Tensor:
    import spdl.io

    images: Tensor = spdl.io.to_torch(spdl.io.convert_frames(frames))
    return images


def spdl_threads(view: Callable[[bytes], Any], stack: Callable[[list[Any]], Tensor]) -> Callable[..., Epoch]:
    """Return spdl's pipeline of threads in the trainer's process, with a given decoder."""

    def load(forms: Forms, batch: int, workers: int) -> Epoch:
        import spdl.io
        from spdl.pipeline import PipelineBuilder

        def photos(path: Path) -> Iterator[bytes]:
            for name, content in spdl.io.iter_tarfile(path.read_bytes()):
                if name.endswith(".jpg"):
                    yield bytes(content)

        def epoch() -> Iterator[Tensor]:
            shards = random.sample(forms.shards(), len(forms.shards()))
            builder = PipelineBuilder().add_source(shards).pipe(photos)
            builder = builder.pipe(view, concurrency=workers).aggregate(batch).pipe(stack).add_sink()
            pipeline = builder.build(num_threads=workers, max_failures=0)
            with pipeline.auto_stop():
                yield from pipeline.get_iterator()

        return epoch

    return load


def decode_with_spdl(photos: Sequence[bytes]) -> Callable[[], Iterable[Tensor]]:
    return lambda: (spdl_stack([spdl_frames(data)])[0] for data in photos)


# litdata


def write_litdata(folder: Path, photos: Sequence[Photo]) -> None:
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, (_, data, label) in enumerate(photos):
        writer.add_item(number, {"image": data, "label": label})
    writer.done()
    writer.merge()


def litdata(forms: Forms, batch: int, workers: int) -> Epoch:
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(
        str(forms.form("litdata")), shuffle=True,
        transform=lambda item: (v2_view(item["image"]), item["label"]),
    )  # fmt: skip
    return repeat(StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=workers > 0))


# mosaicml-streaming


def write_mds(folder: Path, photos: Sequence[Photo]) -> None:
    from streaming import MDSWriter

    with MDSWriter(columns={"image": "bytes", "label": "int"}, out=str(folder)) as writer:
        for _, data, label in photos:
            writer.write({"image": data, "label": label})


def mosaic_streaming(forms: Forms, batch: int, workers: int) -> Epoch:
    from streaming import StreamingDataset

    class Views(StreamingDataset):  # type: ignore[misc]
        def __init__(self, local: str) -> None:
            super().__init__(local=local, shuffle=True, batch_size=batch)

        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            item = super().__getitem__(at)
            return v2_view(item["image"]), item["label"]

    dataset = Views(str(forms.form("mds")))
    return repeat(DataLoader(dataset, batch, num_workers=workers, persistent_workers=workers > 0))


# ffcv


def write_ffcv(share_as_jpeg: float) -> Callable[[Path, Sequence[Photo]], None]:
    """Return a writer of ffcv's ImageNet recipe: at most 500 px, JPEG 90 for a share of the photos, the rest raw."""

    def write(folder: Path, photos: Sequence[Photo]) -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        class Photos:
            def __len__(self) -> int:
                return len(photos)

            def __getitem__(self, at: int) -> tuple[Image.Image, int]:
                return decode_with_pillow(photos[at][1]), photos[at][2]

        folder.mkdir(parents=True)
        image = RGBImageField(
            write_mode="proportion", max_resolution=500, compress_probability=share_as_jpeg, jpeg_quality=90
        )
        writer = DatasetWriter(str(folder / "photos.beton"), {"image": image, "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(Photos())

    return write


def ffcv(form: str) -> Callable[[Forms, int, int], Epoch]:
    def load(forms: Forms, batch: int, workers: int) -> Epoch:
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

        crop = RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=SCALE, ratio=RATIO)
        pipelines = {
            "image": [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        }
        return repeat(
            Loader(
                str(forms.form(form) / "photos.beton"), batch, num_workers=workers, os_cache=True, drop_last=False,
                order=OrderOption.RANDOM, pipelines=pipelines,
            )
        )  # fmt: skip

    return load


REFERENCE = "ImageFolder, reference recipe"
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
PEERS = {
    REFERENCE: Peer(image_folder_v1, form="tree", convert=write_tree),
    "ImageFolder, torchvision v2": Peer(image_folder_v2, form="tree", convert=write_tree),
    'webdataset, decode("pil")': Peer(web_dataset, ("webdataset",)),
    "DALI, CPU": Peer(dali("float32"), _DALI),
    "DALI, CPU, uint8": Peer(dali("uint8"), _DALI),
    "spdl threads, its FFmpeg decode": Peer(spdl_threads(spdl_frames, spdl_stack), ("spdl",)),
    "spdl threads, torchvision v2": Peer(spdl_threads(v2_view, torch.stack), ("spdl",)),
    "litdata, torchvision v2": Peer(litdata, ("litdata",), "litdata", write_litdata),
    "mosaicml-streaming, torchvision v2": Peer(mosaic_streaming, ("mosaicml-streaming",), "mds", write_mds),
    "ffcv, JPEG 90, area resize": Peer(ffcv("ffcv-jpeg"), ("ffcv",), "ffcv-jpeg", write_ffcv(1.0)),
    "ffcv, half JPEG 90, half raw": Peer(ffcv("ffcv-half"), ("ffcv",), "ffcv-half", write_ffcv(0.5)),
}

REFERENCE_DECODER = "reference recipe: Pillow, torchvision v1"
DECODERS = {
    REFERENCE_DECODER: Decoder(lambda photos: lambda: (V1_VIEW(decode_with_pillow(data)) for data in photos)),
    "torchvision v2": Decoder(lambda photos: lambda: (v2_view(data) for data in photos)),
    "DALI, CPU": Decoder(decode_with_dali, _DALI),
    "spdl, its FFmpeg decode": Decoder(decode_with_spdl, ("spdl",)),
}
