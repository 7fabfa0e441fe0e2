"""Data card: what the shards of a run hold, in numbers and pictures."""

import html
import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mae.data.images.decode import decode
from mae.errors import BadImageError, UserError
from mae.report import page
from mae.report.charts import percent
from mae.report.images import Tile, displayable, embedded, grid
from mae.report.reading import RunFiles
from mae.report.run_images import RunImages, held_out_patterns, open_images
from mae.training.overview import splits_of

_THUMBNAILS, _MEASURED = 14, 48
_MOST_CLASSES, _MOST_NAMES = 24, 20


def data_card(run: RunFiles) -> str:
    """Return the card of the training and the validation shards; of shards that are not there, a sentence."""
    parts = []
    for title, patterns in (
        ("Training images", run.texts("data.shards")),
        ("Validation images", held_out_patterns(run)),
    ):
        if patterns:
            parts.append(page.subheading(title) + _of_shards(run, patterns))
    if run.bad_samples:
        shown = [[name] for name in run.bad_samples[:_MOST_NAMES]]
        more = len(run.bad_samples) - len(shown)
        parts.append(page.subheading("Bad images that were replaced") + page.table(("image and reason",), shown))
        parts.append(page.paragraph(f"and {more:,} more, in bad-samples.txt") if more > 0 else "")
    return "".join(parts) or page.paragraph("The settings name no shards.")


def _of_shards(run: RunFiles, patterns: tuple[str, ...]) -> str:
    text = page.paragraph(" ".join(patterns))
    try:
        images = open_images(run, patterns)
        return text + _facts(images) + _classes(images) + _thumbnails(run, images)
    except (UserError, OSError) as error:
        return text + page.paragraph(f"Counts and pictures are left out: {error}.")


def _facts(images: RunImages) -> str:
    index = images.index
    kinds: Counter[str] = Counter()
    for entry in index.entries:
        kinds.update(entry.extensions)
    labelled = int((index.label >= 0).sum())
    size = sum(entry.size for entry in index.entries)
    splits = ", ".join(
        f"{name or 'unnamed'} {count:,}" for name, count in splits_of([e.shard for e in index.entries]).items()
    )
    rows = [
        ("images", f"{len(index):,}"),
        ("shards", f"{len(index.entries):,} ({splits})"),
        ("size", f"{size / 1e9:.2f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB"),
        ("files by extension", ", ".join(f"{name} {count:,}" for name, count in kinds.most_common())),
        ("with a label", f"{labelled:,}"),
    ]
    if index.pixels is not None:
        rows.append(("mean and std of the pixels", f"{_numbers(index.pixels.mean)}; {_numbers(index.pixels.std)}"))
    left_out = index.left_out()
    rows += [(f"left out: {kind}", f"{found.number:,}, the first: {found.first}") for kind, found in left_out.items()]
    if bad := index.bad():
        rows.append(("bad images", f"{len(bad):,}, the first: {bad[0]}"))
    return page.table(("what", "value"), rows)


def _classes(images: RunImages) -> str:
    """Return the number of images of each class as bars; of many classes, the largest and the smallest."""
    labels = images.index.label[images.index.label >= 0]
    if not len(labels):
        return ""
    counts = np.bincount(labels, minlength=len(images.names))
    order = np.argsort(-counts, kind="stable").tolist()
    shown = order if len(order) <= _MOST_CLASSES else order[: _MOST_CLASSES // 2] + order[-_MOST_CLASSES // 2 :]
    rows = []
    for label in shown:
        name = images.names[label] if label < len(images.names) else str(label)
        width, share = 10 * counts[label] / max(counts.max(), 1), percent(counts[label] / len(labels))
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td class='number'>{counts[label]:,}</td>"
            f'<td><span class="bar" style="width:{width:.2f}rem"></span> {share}</td></tr>'
        )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("class", "images", "share"))
    largest, smallest = int(counts.max()), int(counts.min())
    balance = f"{len(counts):,} classes, from {smallest:,} to {largest:,} images each"
    if len(order) > _MOST_CLASSES:
        balance += f"; the {_MOST_CLASSES // 2} largest and the {_MOST_CLASSES // 2} smallest"
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return page.details(f"Class balance: {balance}", body)


def _thumbnails(run: RunFiles, images: RunImages) -> str:
    """Return some images, spread evenly, as they are in the shards, and the sizes of some more."""
    channels, value_range = run.number("data.channels"), run.settings.get("data.value_range")
    is_range = isinstance(value_range, list) and all(type(value) in (int, float) for value in value_range)
    numbers = tuple(map(float, value_range or ())) if is_range else None
    tiles, sizes, unreadable = list[Tile](), list[tuple[int, int]](), 0
    wanted = set(images.spread(_THUMBNAILS).tolist())
    ids = np.union1d(images.spread(_MEASURED), images.spread(_THUMBNAILS))
    for sample_id, name, data in images.read(ids):
        try:
            if sample_id in wanted:
                picture = decode(data, int(channels or 3), numbers)
                url = embedded(displayable(picture))
                tiles.append(Tile(url, name, images.class_of(sample_id)))
            sizes += _size(data)
        except BadImageError:
            unreadable += 1
    return grid((), [tiles[:7], tiles[7:]]) + page.paragraph(_sizes(sizes, unreadable))


def _size(data: bytes) -> list[tuple[int, int]]:
    """Return width and height of an image, from its first bytes; nothing for an array."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return [image.size]
    except (OSError, ValueError, Image.DecompressionBombError):
        return []


def _sizes(sizes: Sequence[tuple[int, int]], unreadable: int) -> str:
    bad = f" {unreadable} of these images cannot be decoded." if unreadable else ""
    if not sizes:
        return f"The sizes of the images are not known.{bad}"
    small, large = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    if len(set(sizes)) == 1:
        return f"Each of {len(sizes)} images looked at has {small[0]}x{small[1]} pixels.{bad}"
    return f"{len(sizes)} images looked at have from {small[0]}x{small[1]} to {large[0]}x{large[1]} pixels.{bad}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
