"""Settings with which shards are read."""

from dataclasses import dataclass

from mae.data.scan import IMAGE_EXTENSIONS
from mae.data.store.unpacked import CACHE_BYTES
from mae.settings import check


@dataclass(frozen=True)
class ReadRules:
    """Settings with which shards are read."""

    image_extension: str | None = None
    """Extension, after the first dot, of the images; None: the usual extensions of images. See `scan.samples`."""
    cache_bytes: float = CACHE_BYTES
    """Greatest total size of the copies of shards on this machine [bytes]."""


USUAL = ReadRules()


def check_image_extension(name: str, value: str | None) -> None:
    """Raise a `UserError` that names the setting `name` if its value is not the extension of an image."""
    check(
        value is None or (value == value.lower().strip(". /") and value.rpartition(".")[2] in IMAGE_EXTENSIONS),
        name,
        value,
        "None, or small letters after the first dot of the images' names, such as image.jpg, that end in "
        + ", ".join(IMAGE_EXTENSIONS),
    )
