"""Reconstructions through time: the pictures that a run has saved, with a slider."""

import html
import io
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import Image

from mae.data.spread import spread_evenly
from mae.files import read_bounded
from mae.report import page

MOST_BYTES = 1_200_000
"""Budget of the embedded pictures of one page, as text [bytes]."""
_MOST_FRAMES, _MOST_WIDTH, _QUALITY = 16, 760, 70
_MOST_BYTES_OF_PICTURE, _MOST_PIXELS = 1 << 26, 1 << 26


def through_time(pictures: Sequence[Path], most_bytes: int = MOST_BYTES) -> str:
    """Return a slider over the saved pictures: as many as fit, the first and the last among them."""
    frames = _frames(pictures, most_bytes)
    if not frames:
        return page.paragraph("No picture of a reconstruction is saved, or none can be read.")
    last = len(frames) - 1
    images = "".join(
        f'<img class="sheet" data-name="{html.escape(name)}" alt="Reconstructions at {html.escape(name)}" '
        f'src="{url}"{"" if number == last else " hidden"}>'
        for number, (name, url) in enumerate(frames)
    )
    control = (
        '<div class="slider" hidden><label for="{0}">Step</label>'
        f'<input id="{{0}}" type="range" min="0" max="{last}" step="1" value="{last}">'
        '<output for="{0}"></output><button type="button">Play</button></div>'
    ).format(f"slider-{zlib.crc32(os.fsencode(pictures[0])):08x}")
    note = page.paragraph(
        "Always the same images under the same masks. Columns: original, masked, reconstruction, reconstruction with "
        "the visible patches."
    )
    return f'{note}<div class="through-time">{control}<div class="frames">{images}</div></div>'


def _frames(pictures: Sequence[Path], most_bytes: int) -> list[tuple[str, str]]:
    """Return name and URL of some pictures, spread evenly, that together fit into `most_bytes`."""
    wanted = min(len(pictures), _MOST_FRAMES)
    width = _MOST_WIDTH
    while wanted:
        chosen = [pictures[at] for at in spread_evenly(len(pictures), wanted)]
        frames = [(_name(path), url) for path in chosen if (url := _embedded(path, width)) is not None]
        if sum(len(url) for _, url in frames) <= most_bytes:
            return frames
        wanted, width = (wanted // 2, width) if wanted > 2 else (wanted - (width <= 300), width * 2 // 3)
    return []


def _embedded(path: Path, width: int) -> str | None:
    """Return the URL of a saved picture as a smaller file; None if it cannot be read, is no picture, or is huge."""
    with suppress(OSError):
        return _smaller(path, path.stat().st_mtime_ns, width)
    return None


@lru_cache(maxsize=4 * _MOST_FRAMES)
def _smaller(path: Path, changed: int, width: int) -> str | None:
    """Do the work of `_embedded`, once for each picture: a run refreshes its report many times."""
    with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        with Image.open(io.BytesIO(read_bounded(path, _MOST_BYTES_OF_PICTURE)), formats=("PNG",)) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            picture = image.convert("RGB")
        if picture.width > width:
            picture = picture.resize((width, max(1, round(picture.height * width / picture.width))))
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=_QUALITY, method=4)
        return page.data_url(buffer.getvalue(), "webp")
    return None


def _name(path: Path) -> str:
    digits = path.stem.removeprefix("step-")
    return f"step {int(digits):,}" if digits.isdecimal() else path.stem
