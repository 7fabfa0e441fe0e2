"""Checks of the data: shards, images, pixels, labels and starting weights."""

import shutil
import statistics
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mae.data.images.levels import ValueRange, WideValues
from mae.data.labelled_sets import empty_classes
from mae.data.prepare import not_used
from mae.data.source import IndexedSource, StreamedSource
from mae.data.statistics import PixelStatistics
from mae.data.store.unpacked import is_gzipped
from mae.data.stream import not_used_of_stream
from mae.doctor.examination import Examination
from mae.doctor.finding import Finding, gigabytes
from mae.doctor.places import nearest_folder
from mae.doctor.stages import FinetuneExamination, PretrainExamination
from mae.errors import first_of
from mae.evaluation.online import open_sets
from mae.formats.opening import open_model
from mae.output import counted
from mae.training.settings import SCRATCH

# On a scale of 0..1; several times the error of a mean over 256 images.
_MEAN_TOLERANCE = 0.05
_STD_TOLERANCE = 0.25
_FEW_SMALL_IMAGES = 0.1


def shards(examination: Examination) -> Finding:
    """Check that all shards are there, intact and different, and that the cache has room for remote ones."""
    found, data, source = examination.shards, examination.settings.data, examination.source
    size = sum(shard.size for shard in found)
    remote = [shard for shard in found if shard.is_remote]
    zipped = [shard for shard in found if is_gzipped(shard)]
    text = f"{counted(len(found), 'remote shard' if remote else 'local shard')}, {gigabytes(size)}"
    if isinstance(source, IndexedSource):
        text += f", {source.samples:,} samples, index in {source.index.folder}"
    else:
        text += ", read as a stream, without an index: an epoch is data.stream_samples samples"
    if zipped:
        text += f", {len(zipped):,} of them unpacked into {data.cache}"
    room = shutil.disk_usage(nearest_folder(data.cache)).free
    wanted = min(sum(shard.size for shard in remote), data.cache_bytes)
    problem = (
        f"the cache of remote shards may grow to {gigabytes(wanted)}, {data.cache} has {gigabytes(room)} free: "
        "set data.cache_dir to a larger disk, or lower data.cache_bytes"
    )
    if isinstance(source, IndexedSource):
        left_out = not_used(source.index)
    else:
        left_out = not_used_of_stream(found, data.cache, data.rules)
    return Finding(text, problems=(problem,) if wanted > room else (), warnings=(*_repeated(source), *left_out))


def _repeated(source: IndexedSource | StreamedSource) -> tuple[str, ...]:
    entries = source.index.entries if isinstance(source, IndexedSource) else []
    counts = Counter(entry.digest for entry in entries)
    twice = [str(entry.shard) for entry in entries if counts[entry.digest] > 1]
    if not twice:
        return ()
    return (f"{len(twice)} shards hold the same samples under several names: {first_of(twice)}; list each set once",)


def images(examination: Examination) -> Finding:
    """Decode some images as in training: name bad ones, and compare sizes and channels with the settings."""
    data, sample = examination.settings.data, examination.image_sample
    found = f"{len(sample.sizes)} of {sample.images} decoded"
    if sample.sizes:
        found += "".join(f", {n} with {counted(planes, 'channel')}" for planes, n in sorted(sample.planes.items()))
        sides = sorted(min(size) for size in sample.sizes)
        found += f", short sides {sides[0]} to {sides[-1]} pixels, median {statistics.median(sides):.0f}"
    expected = len(sample.bad) / sample.images * examination.source.samples
    problems = []
    if expected > data.max_bad_samples:
        problems.append(
            f"{len(sample.bad)} are bad, so about {expected:,.0f} in all, but {data.max_bad_samples} are allowed: "
            f"{first_of(sample.bad, most=2)}; set data.channels to what the images have, pack the shards without bad "
            "images (mae pack SHARDS --out DIR --skip_bad True), or allow them with --data.max_bad_samples"
        )
    warnings = (
        *_channels(sample.planes, data.channels),
        *_sizes(sample.sizes, data.size),
        *_values(sample.wide, data.value_range),
    )
    return Finding(found, tuple(problems), warnings)


def _values(wide: WideValues, value_range: ValueRange) -> Iterable[str]:
    """Compare the values of wide images with the range that is set; without one, the start refuses what is unclear."""
    if not wide.images or value_range is None:
        return
    if wide.least < min(value_range) or wide.greatest >= max(value_range):
        shown = " ".join(f"{value:g}" for value in value_range)
        yield f"{wide}, beyond data.value_range {shown}: they become black or white; {wide.proposal} holds all"


def _channels(planes: Counter[int], asked: int) -> Iterable[str]:
    if asked == 1 and any(number > 1 for number in planes):
        yield "data.channels is 1, so the colour of some images is lost; --data.channels 3 keeps it"
    if asked > 1 and set(planes) == {1}:
        yield f"data.channels is {asked} but all files are gray: --data.channels 1 is faster, with the same information"


def _sizes(sizes: list[tuple[int, int]], asked: tuple[int, int]) -> Iterable[str]:
    small = [size for size in sizes if size[0] < asked[0] or size[1] < asked[1]]
    if small and len(small) > _FEW_SMALL_IMAGES * len(sizes):
        height, width = min(small)
        yield (
            f"{len(small)} are smaller than data.image_size {asked[0]}x{asked[1]}, down to {height}x{width}, and are "
            "enlarged: a smaller data.image_size costs less"
        )


def pixels(examination: Examination) -> Finding:
    """Compare the mean and standard deviation that the run uses with those of some images."""
    used, sample = examination.data_settings, examination.image_sample
    assert used.mean is not None
    assert used.std is not None
    source = "set" if examination.settings.data.mean is not None else "resolved"
    found = f"{source}: {PixelStatistics(used.mean, used.std)}"
    if sample.statistics is None:
        return Finding(f"{found}; no image to compare with", is_unknown=True)
    found += f"; measured on {len(sample.sizes)} images: {sample.statistics}"
    mean_off = max(abs(a - b) for a, b in zip(used.mean, sample.statistics.mean, strict=True))
    std_off = max(abs(a / b - 1) for a, b in zip(used.std, sample.statistics.std, strict=True))
    if mean_off <= _MEAN_TOLERANCE and std_off <= _STD_TOLERANCE:
        return Finding(found)
    remedy = (
        "leave data.mean and data.std out, and they are measured"
        if source == "set"
        else "the run uses those of its folder, init or mae pack: set data.mean and data.std if they are wrong"
    )
    return Finding(found, warnings=(f"these differ by {mean_off:.2f} and {std_off:.0%}: {remedy}",))


def labels(examination: FinetuneExamination) -> Finding:
    """Check that every sample has a label, every class has samples, and evaluation has the same classes, no samples."""
    task = examination.task_without_statistics
    index, held_out = task.source.index, task.held_out
    counts = np.bincount(index.label, minlength=task.classes)
    found = f"{task.classes} classes with {counts.min():,} to {counts.max():,} samples each"
    if task.subset is not None:
        found += f", of which training uses {task.settings.labels_per_class} each"
    warnings = []
    if empty := empty_classes(counts, task.names):
        names = first_of(empty, separator=", ")
        warnings.append(f"{len(empty)} classes have no sample to train on: {names}")
    if held_out is None:
        return Finding(f"{found}; without eval_shards no accuracy is measured", warnings=tuple(warnings))
    return Finding(f"{found}; {len(held_out):,} samples to evaluate on", warnings=tuple(warnings))


def held_out(examination: PretrainExamination) -> Finding:
    """Check the images on which the model is to be measured while it trains."""
    sets = open_sets(examination.task, examination.say)
    if sets is None:
        return Finding("without evaluation.eval_shards, nothing is measured while training")
    found = f"{len(sets.ids):,} of {counted(len(sets.held_out), 'sample')} of evaluation.eval_shards"
    if sets.known is None:
        return Finding(f"{found}; no labels: held-out loss and rank only")
    return Finding(f"{found}; {len(sets.known_ids):,} labelled samples of {sets.classes} classes")


def starting_weights(examination: FinetuneExamination) -> Finding:
    """Check the weights that the encoder starts with."""
    init = examination.settings.init
    parameters = sum(parameter.numel() for parameter in examination.model.parameters())
    if init == SCRATCH:
        return Finding(
            f"{parameters:,} parameters, none pretrained",
            warnings=("init is none: set --init to a pretraining run, unless you want to train from scratch",),
        )
    return Finding(
        f"{parameters:,} parameters, the encoder's from {open_model(init, heads=examination.settings.model.heads).path}"
    )
