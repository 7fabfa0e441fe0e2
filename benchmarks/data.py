"""Speed and memory of the input pipeline, compared with other loaders: from shards to finished batches.

`python benchmarks/data.py [--parts decode,loader,small,memory,index,device] [--rounds N] [--images N]`

Times are CPU times of threads, workers and main process together, so other programs on the machine matter little. They
are medians over rounds in which the candidates run in random order: each loader in a separate process, one thread per
worker, the page cache warm, the first epoch not counted. Linux only; about ten minutes on two cores. It reads the packs
in `../shared/data` beside the repository; without them it makes photos of smooth noise and prints SYNTHETIC.
"""

import argparse
import gzip
import io
import math
import mmap
import multiprocessing
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import webdataset
from numpy.typing import NDArray
from peers import DECODERS, PEERS, REFERENCE, REFERENCE_DECODER, SCALE, SIDE, Epoch, Forms, Photo, v1_view
from PIL import Image, ImageOps
from torch import Tensor

from mae import keyed
from mae.data.batch import BatchRecipe, to_device
from mae.data.images import turbojpeg
from mae.data.images.augment import FLIP, NUMBERS_PER_SAMPLE, AugmentSettings, TrainViews, crop_box
from mae.data.images.decode import decode_pixels
from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.loader import load
from mae.data.packing.shrink import shrink
from mae.data.plan import plan_batches
from mae.data.scan import scan
from mae.data.settings import DataSettings
from mae.data.train_batches import TrainBatches
from mae.keyed import Purpose

DATA = Path(__file__).parents[2] / "shared" / "data"
BATCH, MEMORY_BATCH, MEMORY_BATCHES = 64, 256, 24
SMALL_IMAGES = 2000
TIME_LIMIT = 300
"""Maximum seconds of one measurement."""
SECONDS_TO_END = 20


# Our own side: everything that depends on the interface of `mae.data`.

AUGMENTATION = AugmentSettings(crop_scale=SCALE)
CROP_DECODER = os.environ.get("MAE_TURBOJPEG")


@dataclass(frozen=True)
class Ours:
    """One way of running this project's own pipeline."""

    workers: int = 2
    threads: int = 1
    """Threads of each worker."""
    crop_decode: bool = False
    """Decode only the crop, with a libjpeg-turbo 3 found on the machine; otherwise use only what pip installs."""
    views: int = 1
    """Number of views of each decoded photo."""
    short_side: int | None = None
    """Shorter side of the photos in the shards [pixels]; None: the original photos."""
    keep_decoded: bool = False

    def __str__(self) -> str:
        words = [
            "ours",
            "crop decode" * self.crop_decode,
            f"{self.views} views" * (self.views > 1),
            f"short side {self.short_side}" * (self.short_side is not None),
        ]
        return ", ".join(filter(None, words))

    def missing(self) -> str:
        """Return why it cannot run here; empty if it can."""
        return "no libjpeg-turbo 3 found; MAE_TURBOJPEG names one" * (self.crop_decode and not ours_crop_decoder(True))


OUR_DECODERS = {
    str(how): how
    for how in (
        Ours(crop_decode=crop, short_side=side, views=views)
        for crop, side, views in product((False, True), (None, 384), (1, 2))
    )
}
OUR_LOADERS = {
    f"{how}, {processes}": how
    for crop in (False, True)
    for side, views in ((None, 1), (384, 1), (384, 2))
    for processes, workers, threads in (("2 processes", 2, 1), ("1 process of 2 threads", 1, 2))
    for how in (Ours(workers, threads, crop, views, side),)
}


def ours_crop_decoder(wanted: bool) -> bool:
    """Turn decoding of only the crop on or off in this process; return whether it is on now."""
    if wanted and CROP_DECODER is None:
        os.environ.pop("MAE_TURBOJPEG", None)
    else:
        os.environ["MAE_TURBOJPEG"] = (CROP_DECODER or "") if wanted else ""
    turbojpeg.find.cache_clear()
    return turbojpeg.find() is not None


def ours_numbers(count: int, views: int, epoch: int) -> NDArray[np.float64]:
    """Return the uniform numbers [count, views, numbers] that choose the crops of one epoch."""
    key = keyed.key(Purpose.CROP, 0, epoch)
    return keyed.uniform(key, np.arange(count), views * NUMBERS_PER_SAMPLE).reshape(count, views, -1)


def ours_views(photos: Sequence[bytes], numbers: NDArray[np.float64], side: int = SIDE, channels: int = 3) -> Tensor:
    """Return one view for each row of `numbers` [photos, views, numbers], all made together."""
    count, views = numbers.shape[:2]
    out = torch.zeros(count * views, side, side, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
    cut = TrainViews(out, numbers.reshape(count * views, -1), AUGMENTATION)
    for number, data in enumerate(photos):
        cut.add(data, range(number * views, (number + 1) * views))
    cut.finish()
    return out


def ours_decode(data: bytes, channels: int) -> object:
    """Decode the whole image, without making a view."""
    return decode_pixels(data, channels)


def ours_batches(index: ShardIndex, how: Ours, batch: int, side: int = SIDE, channels: int = 3) -> TrainBatches:
    ours_crop_decoder(how.crop_decode)
    data = DataSettings(
        image_size=(side,), channels=channels, threads=how.threads, views_per_image=how.views,
        keep_decoded=how.keep_decoded, cache_dir=index.folder.parent,
    )  # fmt: skip
    return TrainBatches(index, plan_batches(batch, 1, None), 0, BatchRecipe(0, data, AUGMENTATION))


def ours_loader(shards: Sequence[Path], how: Ours, batch: int, side: int = SIDE, channels: int = 3) -> Epoch:
    """Return our loader: one endless stream, divided into epochs of as many views as there are photos."""
    index = ours_index(shards, shards[0].parent / "cache")
    stream = load(ours_batches(index, how, batch, side, channels), range(10**9), how.workers)
    return lambda: (made.images for made in islice(stream, math.ceil(len(index) / batch)))


def ours_index(shards: Sequence[Path], cache: Path) -> ShardIndex:
    """Return the index of shards; build it if there is none."""
    return open_index([str(path) for path in shards], cache)


def ours_scan(shard: Path) -> None:
    """Scan a shard once, with crc32."""
    scan(shard)


# The photos.


def read_pack(path: Path) -> list[Photo]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file, tarfile.open(fileobj=file) as tar:  # type: ignore[arg-type]
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    images = [name for name in contents if name.endswith((".jpg", ".png"))]
    return [(name[:-4], contents[name], int(contents[name[:-4] + ".cls"])) for name in images]


def encoded(image: Image.Image, extension: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "png": "PNG"}[extension], quality=quality)
    return buffer.getvalue()


def noise(count: int, width: int, height: int, extension: str, mode: str) -> list[Photo]:
    """Make images of smooth noise that have about as many bytes as photos of the same size."""
    generator = np.random.default_rng(0)
    photos = []
    for number in range(count):
        pixels = np.full((height, width, 3), 128.0)
        for cells, strength in ((8, 60), (32, 30), (96, 20), (288, 12)):
            octave = generator.normal(128, strength, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
            pixels += np.asarray(Image.fromarray(octave).resize((width, height), Image.Resampling.BICUBIC)) - 128.0
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
        photos.append((f"{number:06}", encoded(image, extension, 95), number % 10))
    return photos


def photos_or_noise() -> tuple[list[Photo], str]:
    packs = sorted((DATA / "photos-imagenet-sample").glob("*.tar"))
    if packs:
        photos = [photo for pack in packs for photo in read_pack(pack)]
        return photos, f"{len(photos)} ImageNet photos"
    return noise(200, 500, 375, "jpg", "RGB"), "SYNTHETIC photos (smooth noise, 500x375, JPEG 95)"


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def repeated(photos: Sequence[Photo], count: int) -> list[Photo]:
    """Repeat the photos, with new keys, until there are `count`."""
    chosen = (photos[number % len(photos)] for number in range(count))
    return [(f"{number:06}-{key}", data, label) for number, (key, data, label) in enumerate(chosen)]


def write_shards(folder: Path, photos: Sequence[Photo], shards: int, extension: str = "jpg") -> None:
    folder.mkdir(parents=True)
    for number in range(shards):
        with tarfile.open(folder / f"{number:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, data, label in photos[number::shards]:
                for ending, content in ((extension, data), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def run_photos(root: Path, images: int) -> dict[str, Any]:
    """Write the photos once, and repeated up to `images`, both original and reduced; return what they are."""
    photos, name = photos_or_noise()
    small = [(key, shrink(data, short_side=384, quality=90)[0], label) for key, data, label in photos]
    for form, these in (("shards-original", photos), ("shards-384", small)):
        write_shards(root / "once" / form, these, 1)
        write_shards(root / "many" / form, repeated(these, images), 4)
    return {"title": name}


# Measuring.


def cpu_seconds() -> float:
    """Return the CPU time of this process with its threads and all its workers, running or ended."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def run_apart(*order: str) -> dict[str, Any]:
    """Return the result of one of `RUNS` in a fork of this process, which has imported everything but the peers."""
    with tempfile.TemporaryFile("w+") as words:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=answer, args=(order, sender, words.fileno()))
        process.start()
        sender.close()
        try:
            result: dict[str, Any] = receiver.recv() if receiver.poll(TIME_LIMIT) else {"error": "took too long"}
        except EOFError:
            words.seek(0)
            result = {"error": ([line for line in words.read().splitlines() if line] or ["the process died"])[-1][:100]}
        process.join(SECONDS_TO_END)
        for child in psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []:
            child.kill()
        process.kill()
        process.join()
    return result


def answer(order: Sequence[str], sender: Connection, words: int) -> None:
    """Run an order; output goes into the file descriptor `words`, whose last line explains a failure."""
    os.dup2(words, 1)
    os.dup2(words, 2)
    sender.send(RUNS[order[0]](*order[1:]))


def interleaved(orders: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return results by name; each round runs all candidates in random order, except those that have failed."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in orders}
    for number in range(rounds):
        for name in random.sample(list(orders), len(orders)):
            if not error_of(results[name]):
                say(f"round {number + 1} of {rounds}: {name}")
                results[name].append(run_apart(*orders[name]))
    return results


def error_of(results: Sequence[Mapping[str, Any]]) -> str:
    return next((f"FAILED: {result['error']}" for result in results if "error" in result), "")


def timed_in_turn(candidates: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds per item, by name; a candidate is a function that returns its number of items."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name in random.sample(list(candidates), len(candidates)):
            began = time.process_time()
            items = candidates[name]()
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - began) / items)
    return {name: statistics.median(values) for name, values in seconds.items()}


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, end="\033[K\r", file=sys.stderr, flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first and last columns are text, the others numbers."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    say("")
    print(f"\n{title}")
    for first, *figures, last in lines:
        cells = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:-1], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells, last]).rstrip(), flush=True)


# decode: one thread, photos in memory.


def run_decode(root: Path, rounds: int) -> dict[str, Any]:
    """Measure each decoder: seconds per view, type of the output, and for ours the difference from Pillow's pixels."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    once = Forms(root / "once")
    photos = {side: [data for _, data, _ in read_pack(once.shards(side)[0])] for side in (None, 384)}
    outputs: dict[str, str] = {}
    candidates: dict[str, Callable[[], int]] = {}
    errors: dict[str, str] = {}
    for name, decoder in DECODERS.items():
        if decoder.version() is not None:
            try:
                candidates[name] = counting(decoder.decode_all(photos[None]), name, outputs)
                candidates[name]()
            except Exception as error:  # the table shows why a peer does not work here
                candidates.pop(name, None)
                errors[name] = str(error)
    for name, how in OUR_DECODERS.items():
        if not how.missing():
            candidates[name] = counting(our_pass(photos[how.short_side], how), name, outputs)
    seconds = timed_in_turn(candidates, rounds)
    ours = {name: how for name, how in OUR_DECODERS.items() if name in candidates}
    psnr = {name: quality(photos[how.short_side], photos[None], how) for name, how in ours.items()}
    return {"seconds": seconds, "outputs": outputs, "errors": errors, "psnr": psnr}


def counting(decode_all: Callable[[], Iterable[Tensor]], name: str, outputs: dict[str, str]) -> Callable[[], int]:
    """Return a function that makes all views, stores their type in `outputs`, and returns their number."""

    def run() -> int:
        for count, view in enumerate(decode_all(), 1):
            made = count, view.dtype
        outputs[name] = str(made[1]).removeprefix("torch.")
        return made[0]

    return run


def our_pass(photos: Sequence[bytes], how: Ours) -> Callable[[], Iterable[Tensor]]:
    epochs = iter(range(10**9))

    def run() -> Iterable[Tensor]:
        ours_crop_decoder(how.crop_decode)
        numbers = ours_numbers(len(photos), how.views, next(epochs))
        return (view for data, own in zip(photos, numbers, strict=True) for view in ours_views([data], own[None]))

    return run


def quality(photos: Sequence[bytes], originals: Sequence[bytes], how: Ours) -> tuple[float, float]:
    """Return the PSNR [dB] of all our views and of the worst, against Pillow's on the same crops of the originals."""
    ours_crop_decoder(how.crop_decode)
    errors = []
    for data, original, numbers in zip(photos, originals, ours_numbers(len(photos), how.views, 0), strict=True):
        for view, of_view in zip(ours_views([data], numbers[None]), numbers.tolist(), strict=True):
            difference = view.permute(1, 2, 0).numpy() - pillow_view(data, original, of_view)
            errors.append(np.square(difference).mean())
    return float(10 * np.log10(255**2 / np.mean(errors))), float(10 * np.log10(255**2 / max(errors)))


def pillow_view(data: bytes, original: bytes, numbers: Sequence[float]) -> NDArray[np.float64]:
    """Return the view that ours makes of `data`, made from the original photo by Pillow."""
    image, (width, height) = upright(original), upright(data).size
    box = crop_box(height, width, numbers, AUGMENTATION)
    across, down = image.width / width, image.height / height
    edges = box.left * across, box.top * down, (box.left + box.width) * across, (box.top + box.height) * down
    if image.size == (width, height):
        view = image.crop(tuple(map(round, edges))).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    else:
        view = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=edges)
    return np.asarray(ImageOps.mirror(view) if numbers[FLIP] < 0.5 else view, dtype=np.float64)


def print_decode(root: Path, rounds: int, title: str) -> None:
    say("decode")
    result = run_apart("decode", str(root), str(2 * rounds + 1))
    head = ("decoder", "CPU ms per view", "x reference", "PSNR dB", "worst view", "output")
    if "error" in result:
        table("Decode", head, [("all", "-", "-", "-", "-", error_of([result]))])
        return
    seconds, rows = result["seconds"], []
    for name in (*DECODERS, *OUR_DECODERS):
        if name in seconds:
            psnr = [f"{decibels:.1f}" for decibels in result["psnr"].get(name, ())] or ["-", "-"]
            speed = f"{1000 * seconds[name]:.2f}", f"{seconds[REFERENCE_DECODER] / seconds[name]:.2f}"
            rows.append((labelled(name), *speed, *psnr, result["outputs"][name]))
        else:
            missing = OUR_DECODERS[name].missing() if name in OUR_DECODERS else "not installed"
            failed = f"FAILED: {result['errors'][name][:100]}" if name in result["errors"] else missing
            rows.append((labelled(name), "-", "-", "-", "-", failed))
    table(
        f"Decode, crop, resize to {SIDE}, flip: one thread, {title}; PSNR against Pillow on the originals", head, rows
    )


def labelled(name: str) -> str:
    """Return a name, with the version if it is a peer."""
    found = (DECODERS | PEERS)[name].version() if name in DECODERS | PEERS else None
    return f"{name} [{found}]" if found else name


# loader: shards to finished batches in the main process, 2 workers.


def run_loader(root: Path, name: str) -> dict[str, Any]:
    """Return CPU seconds and number of images of the second epoch, and the type of a batch."""
    forms = Forms(root / "many")
    if name in OUR_LOADERS:
        how = OUR_LOADERS[name]
        epoch = ours_loader(forms.shards(how.short_side), how, BATCH)
    else:
        epoch = PEERS[name].load(forms, BATCH, 2)
    for _ in epoch():
        pass
    began, images = cpu_seconds(), 0
    for batch in epoch():
        images += len(batch)
    seconds = cpu_seconds() - began
    return {"images": images, "seconds": seconds, "output": f"{batch.dtype}".removeprefix("torch.")}


def run_convert(root: Path, name: str) -> dict[str, Any]:
    """Write the photos in the form that a peer needs."""
    peer, many = PEERS[name], Forms(root / "many")
    assert peer.convert is not None
    peer.convert(many.form(peer.form), [photo for shard in many.shards() for photo in read_pack(shard)])
    return {}


def print_loader(root: Path, rounds: int, title: str) -> None:
    notes = {name: how.missing() for name, how in OUR_LOADERS.items()}
    notes |= {name: "" if peer.version() is not None else "not installed" for name, peer in PEERS.items()}
    for name, peer in PEERS.items():
        if peer.convert is not None and not notes[name] and not (root / "many" / peer.form).exists():
            say(f"converting for {name}")
            notes[name] = error_of([run_apart("convert", str(root), name)])
    names = [name for name in (*PEERS, *OUR_LOADERS) if not notes[name]]
    results = interleaved({name: ("loader", str(root), name) for name in names}, rounds)
    speeds = {
        name: statistics.median(result["images"] / result["seconds"] for result in results[name])
        for name in names
        if not error_of(results[name])
    }
    rows = []
    for name in (*PEERS, *OUR_LOADERS):
        if name in speeds:
            ratio = f"{speeds[name] / speeds[REFERENCE]:.2f}" if REFERENCE in speeds else "-"
            rows.append((labelled(name), f"{speeds[name]:.0f}", ratio, results[name][0]["output"]))
        else:
            rows.append((labelled(name), "-", "-", notes[name] or error_of(results[name])))
    head = ("loader", "views per CPU second", "x reference", "output")
    table(f"Shards to finished batches of {BATCH}: 2 workers, {title}", head, rows)


# small: the cost in addition to decoding, and the mode that keeps decoded images.


@dataclass(frozen=True)
class SmallSet:
    pack: str
    side: int
    channels: int
    extension: str

    def photos(self) -> tuple[list[Photo], bool]:
        """Return the first photos of the pack, or noise, and whether they are real."""
        packs = sorted((DATA / self.pack).glob(f"{self.pack}-train-*.tar.gz"))
        if packs:
            return read_pack(packs[0])[:SMALL_IMAGES], True
        mode = "L" if self.channels == 1 else "RGB"
        return noise(SMALL_IMAGES, self.side, self.side, self.extension, mode), False


SMALL_SETS = {
    "Fashion-MNIST, 28 px PNG": SmallSet("fashion-mnist", 28, 1, "png"),
    "Tiny-ImageNet, 64 px JPEG": SmallSet("tiny-imagenet-100", 64, 3, "jpg"),
}


def run_small(name: str, rounds: int) -> dict[str, Any]:
    """Return seconds per sample: decode alone, decode and view, the loader, and the loader with kept pixels."""
    which = SMALL_SETS[name]
    photos, is_real = which.photos()
    numbers = ours_numbers(len(photos), 1, 0)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        write_shards(shards, photos, 1, which.extension)
        loaders = {
            word: ours_loader(
                [shards / "000000.tar"], Ours(0, keep_decoded=keep), MEMORY_BATCH, which.side, which.channels
            )
            for word, keep in (("loader", False), ("cached", True))
        }

        def decode_alone() -> int:
            for _, data, _ in photos:
                ours_decode(data, which.channels)
            return len(photos)

        def decode_and_view() -> int:
            for at in range(0, len(photos), MEMORY_BATCH):
                together = [data for _, data, _ in photos[at : at + MEMORY_BATCH]]
                ours_views(together, numbers[at : at + MEMORY_BATCH], which.side, which.channels)
            return len(photos)

        reference = v1_view(which.side, which.channels)

        def by_reference() -> int:
            for _, data, _ in photos:
                with Image.open(io.BytesIO(data)) as image:
                    reference(image.convert({1: "L", 3: "RGB"}[which.channels]))
            return len(photos)

        candidates = {"decode": decode_alone, "view": decode_and_view, "reference": by_reference}
        candidates |= {word: (lambda epoch=epoch: sum(map(len, epoch()))) for word, epoch in loaders.items()}
        return timed_in_turn(candidates, rounds) | {"is_real": is_real}


def print_small(rounds: int) -> None:
    rows = []
    for name in SMALL_SETS:
        say(name)
        result = run_apart("small", name, str(2 * rounds + 1))
        if "error" in result:
            rows.append((name, *"-------", error_of([result])))
            continue
        words = ("decode", "view", "loader", "cached", "reference")
        decode_alone, view, loader, cached, reference = (1e6 * result[word] for word in words)
        figures = reference, loader, decode_alone, loader - decode_alone, view - decode_alone, cached
        note = "" if result["is_real"] else "SYNTHETIC noise of that size"
        rows.append((name, *(f"{figure:.0f}" for figure in figures), f"{reference / cached:.1f}", note))
    head = (
        "small images", "reference recipe", "ours", "decode", "the rest", "crop, resize, flip", "ours, kept decoded",
        "reference / kept", "",
    )  # fmt: skip
    table("Small images: CPU microseconds per sample, one thread, no workers", head, rows)


# device: JPEGs decoded on a GPU, compared with the same batches decoded on the CPU.


def run_device(root: Path, where: Literal["cpu", "device"]) -> dict[str, Any]:
    """Return views per second and per CPU second; without a GPU, torch's CPU takes its place."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = ours_index(Forms(root / "many").shards(), root / "many" / "cache")
    data = DataSettings(image_size=(SIDE,), decode_on=where, cache_dir=index.folder.parent)
    batches = TrainBatches(index, plan_batches(BATCH, 1, None), 0, BatchRecipe(0, data, AUGMENTATION))
    stream = load(batches, range(10**9), len(os.sched_getaffinity(0)), device.type == "cuda")
    for batch in islice(stream, 8):  # warms up
        to_device(batch, device)
    views, began, cpu = 0, time.perf_counter(), cpu_seconds()
    for batch in islice(stream, math.ceil(len(index) / BATCH)):
        views += len(to_device(batch, device).images.flatten(1).amax(1).cpu())
    return {
        "clock": views / (time.perf_counter() - began), "cpu": views / (cpu_seconds() - cpu), "device": str(device),
    }  # fmt: skip


def print_device(root: Path, rounds: int) -> None:
    names = {"the CPU": "cpu", "the device": "device"}
    results = interleaved({name: ("device", str(root), where) for name, where in names.items()}, rounds)
    rows = []
    for name, found in results.items():
        if failed := error_of(found):
            rows.append((name, "-", "-", failed))
            continue
        medians = [statistics.median(result[word] for result in found) for word in ("clock", "cpu")]
        rows.append((name, *(f"{figure:.0f}" for figure in medians), found[0]["device"]))
    head = ("decoded by", "views per second", "views per CPU second", "device")
    table(f"Finished batches of {BATCH} on the device, one worker per core", head, rows)


# memory: of one worker.


def run_memory(root: Path, threads: int) -> dict[str, Any]:
    """Return the megabytes of the worker after each batch, and of this process after its imports."""
    imports = memory(os.getpid())
    epoch = ours_loader(Forms(root / "many").shards(), Ours(1, threads), MEMORY_BATCH)
    after: list[dict[str, float]] = []
    while len(after) < MEMORY_BATCHES:
        for _ in epoch():
            (worker,) = (process.pid for process in psutil.Process().children())
            after.append(memory(worker))
    return {"imports": imports, "after": after}


def memory(process: int) -> dict[str, float]:
    """Return megabytes: resident, resident without mapped files such as libraries, proportional share, peak."""
    lines = (Path(f"/proc/{process}/{name}").read_text().splitlines() for name in ("status", "smaps_rollup"))
    words = [line.split() for file in lines for line in file]
    kilobytes = {first: int(rest[0]) for first, *rest in words if rest and rest[-1] == "kB"}
    found = {
        "resident": kilobytes["VmRSS:"],
        "own": kilobytes["RssAnon:"] + kilobytes["RssShmem:"],
        "share": kilobytes["Pss:"],
        "peak": kilobytes["VmHWM:"],
    }
    return {name: number * 1024 / 1e6 for name, number in found.items()}


def print_memory(root: Path, rounds: int) -> None:
    rows = []
    for name, threads in (("1 thread", 1), ("2 threads", 2)):
        say(f"memory of a worker with {name}")
        rows.append((name, *worker_figures(run_apart("memory", str(root), str(threads)))))
    head = ("one worker with", "beyond imports", "second half - first", "resident", "without files", "PSS", "")
    table(f"Memory: maximum MB at batch {MEMORY_BATCH} over {MEMORY_BATCHES} batches", head, rows)


def worker_figures(result: dict[str, Any]) -> tuple[str, ...]:
    if "error" in result:
        return "-", "-", "-", "-", "-", error_of([result])
    imports, after = result["imports"], result["after"]
    halves = after[: len(after) // 2], after[len(after) // 2 :]
    first, second = ({kind: max(each[kind] for each in half) for kind in imports} for half in halves)
    greatest = {kind: max(first[kind], second[kind]) for kind in imports}
    changes = f"{greatest['own'] - imports['own']:.0f}", f"{second['own'] - first['own']:+.1f}"
    rest = (f"{greatest[kind]:.0f}" for kind in ("resident", "own", "share"))
    return *changes, *rest, f"imports alone: {imports['resident']:.0f}, {imports['own']:.0f} without files"


# index: megabytes per second on one core, files in the page cache.


def run_index(root: Path, rounds: int) -> dict[str, Any]:
    """Return the CPU seconds per byte of indexing shards, and of other ways to read them completely."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    shards = Forms(root / "many").shards()
    size = sum(path.stat().st_size for path in shards)

    def ours() -> int:
        for path in shards:
            ours_scan(path)
        return size

    def ours_whole() -> int:
        with tempfile.TemporaryDirectory() as cache:
            ours_index(shards, Path(cache))
        return size

    def checksum() -> int:
        for path in shards:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                zlib.crc32(data)
        return size

    def standard_tar() -> int:
        for path in shards:
            with tarfile.open(path) as tar:
                for member in tar:
                    tar.extractfile(member).read()  # type: ignore[union-attr]
        return size

    def web_dataset() -> int:
        for _ in webdataset.WebDataset([str(path) for path in shards], shardshuffle=False):
            pass
        return size

    candidates = {
        "ours, with crc32": ours,
        "ours, with crc32, and the pixel statistics of at most 2,000 images": ours_whole,
        "zlib.crc32 of the files alone": checksum,
        "tarfile, reading every member": standard_tar,
        f"webdataset [{version('webdataset')}], undecoded": web_dataset,
    }
    return timed_in_turn(candidates, rounds)


def print_index(root: Path, rounds: int) -> None:
    say("index")
    result = run_apart("index", str(root), str(rounds))
    rows = [("all", "-", error_of([result]))]
    if "error" not in result:
        rows = [(name, f"{1e-6 / seconds:,.0f}", "") for name, seconds in result.items()]
    table("Index: reading whole shards, warm page cache", ("reader", "MB per CPU second", ""), rows)


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "photos": lambda root, images: run_photos(Path(root), int(images)),
    "decode": lambda root, rounds: run_decode(Path(root), int(rounds)),
    "loader": lambda root, name: run_loader(Path(root), name),
    "convert": lambda root, name: run_convert(Path(root), name),
    "small": lambda name, rounds: run_small(name, int(rounds)),
    "memory": lambda root, threads: run_memory(Path(root), int(threads)),
    "index": lambda root, rounds: run_index(Path(root), int(rounds)),
    "device": lambda root, where: run_device(Path(root), where),
}
PARTS = ("decode", "loader", "small", "memory", "index", "device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="tables to print, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="images per epoch of the loaders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")  # for workers too: some peers have functions that cannot be pickled
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="mae-benchmark-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # files that peers leave behind are deleted with it
        root = Path(folder)
        title = run_apart("photos", str(root), str(options.images))["title"]
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {title}")
        for part in parts:
            print_part(part, root, options.rounds, title)


def print_part(part: str, root: Path, rounds: int, title: str) -> None:
    if part == "decode":
        print_decode(root, rounds, title)
    elif part == "loader":
        print_loader(root, rounds, title)
    elif part == "small":
        print_small(rounds)
    elif part == "memory":
        print_memory(root, rounds)
    elif part == "device":
        print_device(root, rounds)
    else:
        print_index(root, rounds)


if __name__ == "__main__":
    main()
