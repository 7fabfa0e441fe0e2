"""Images to pack: where their bytes are, and the source that lists them."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mae.data.packing.not_packed import NotPacked
from mae.data.scan import IMAGE_EXTENSIONS, NO_LABEL
from mae.errors import UserError

_AGAIN = "then run the same command again: finished shards are kept"


class Extent(NamedTuple):
    """Range of `size` bytes of a file, from `offset`."""

    path: str
    offset: int
    size: int
    is_whole_file: bool = False

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
            UserError: if they cannot be read, or their number has changed since they were listed.
        """
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 (ten million paths are kept as plain strings)
                file.seek(self.offset)
                # One more byte of a whole file shows whether it has grown.
                data = file.read(self.size + self.is_whole_file)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}; fix that, {_AGAIN}") from None
        except UnicodeEncodeError:  # listed by a process with another encoding of file names
            raise UserError(f"{self.path!r} cannot be read in this locale; set LC_ALL=C.UTF-8, {_AGAIN}") from None
        if len(data) != self.size:
            raise UserError(f"{self.path} has changed while it was being packed; restore it, {_AGAIN}")
        return data


class Item(NamedTuple):
    """Image to pack."""

    name: str
    """Origin of the image, for messages and provenance."""
    extension: str
    image: Extent | bytes
    label: int = NO_LABEL
    """Class; `NO_LABEL` for images of shards too, because their .cls files are copied as side files."""
    side_files: tuple[tuple[str, Extent], ...] = ()

    @property
    def size(self) -> int:
        """Number of bytes of the image and its side files."""
        image = len(self.image) if isinstance(self.image, bytes) else self.image.size
        return image + sum(extent.size for _, extent in self.side_files)


@dataclass
class Source:
    """Source whose images are listed one by one, so that ten million of them need no memory."""

    name: str
    """Absolute path, or URL without secrets."""
    items: Iterator[Item]
    """Images; after one pass over them, the following attributes are complete."""
    classes: list[str] = field(default_factory=list)
    """Class names in the order of labels; empty if there are no labels or names."""
    left_out: NotPacked = field(default_factory=NotPacked)
    """Files that belong to no image."""
    remarks: list[str] = field(default_factory=list)
    """Facts that the user should know, besides the files left out."""
    splits: tuple[str, ...] = ()
    """Names of all splits that the same command packs, if there are several."""

    def notices(self) -> list[str]:
        """Return the lines to show to the user once the images are listed."""
        return [*self.remarks, *([str(self.left_out)] if self.left_out else [])]


def no_image(name: str) -> UserError:
    """Return the error for a source without images."""
    return UserError(f"{name} contains no image (.{', .'.join(IMAGE_EXTENSIONS)}, or .gif, .avif, .heic to convert)")


def shown(name: str) -> str:
    """Return a file name for a message of one line."""
    return name if name.translate(_WITHOUT_CONTROLS) == name else repr(name)


_WITHOUT_CONTROLS = dict.fromkeys([*range(32), *range(127, 160), 0x2028, 0x2029])


def to_line(item: Item, root: str) -> bytes:
    """Return an item as a line of JSON, which omits the path of a file `root/name`."""
    image: object
    if isinstance(item.image, bytes):
        image = base64.b64encode(item.image).decode()
    elif item.image.path == f"{root}/{item.name}":
        image = item.image.size
    else:
        image = item.image
    fields = (item.name, item.extension, item.label, image, item.side_files)
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes, root: str) -> Item:
    """Parse a line written by `to_line`."""
    name, extension, label, image, side_files = json.loads(line)
    content: Extent | bytes
    if isinstance(image, str):
        content = base64.b64decode(image)
    elif isinstance(image, int):
        content = Extent(f"{root}/{name}", 0, image, is_whole_file=True)
    else:
        content = Extent(*image)
    return Item(name, extension, content, label, tuple((other, Extent(*extent)) for other, extent in side_files))
