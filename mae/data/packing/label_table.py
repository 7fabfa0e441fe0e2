"""Tables of labels: CSV or TSV files with the class of each image, for images in folders of any names."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mae.data.packing.class_list import ClassList, number_classes, quoted, require_writable
from mae.data.packing.items import Item, Source, no_image
from mae.data.packing.trees import image_extension, image_of, walk
from mae.errors import UserError
from mae.files import read_bounded

_MAX_BYTES = 1 << 30
_NEEDED = (
    "it needs a line of headings, then a line for each image: its path in the source, and its class, separated by "
    "commas (in .tsv files by tabs)"
)


@dataclass(frozen=True)
class LabelTable:
    """Class of each image."""

    path: Path
    heading: str
    """Heading of the first column."""
    classes: Mapping[str, str]
    """Name of the class by the path of the image in its source, whose extension may be missing."""


def read_label_table(path: Path) -> LabelTable:
    """Read a table in UTF-8: the first column is the path of an image in the source, the second its class.

    Columns are separated by tabs in a .tsv file, else by commas. Other columns are ignored.

    Raises:
        UserError: if it cannot be read or names no image, a line has no path or no class, or an image occurs twice.
    """
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8-sig")
        table = _parse(text, path)
    except OSError as error:
        raise UserError(f"label_file {path} cannot be read: {error.strerror}; {_NEEDED}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"label_file {path} is no table in UTF-8 ({error}); {_NEEDED}") from None
    if not table.classes:
        raise UserError(f"label_file {path} names no image; {_NEEDED}")
    for name in sorted(set(table.classes.values())):
        require_writable(name, f"class {name!r} in {path}")
    return table


def list_by_table(source: Source, known: ClassList, table: LabelTable) -> Iterator[Item]:
    """Yield the images of a folder, at any depth, that have a line in the table, and fill in `source`.

    Other images are left out and counted, so that two tables may divide one folder.

    Raises:
        UserError: if a line names no image or two, or a class is not in the known list.
    """
    number = number_classes(table.classes.values(), f"{table.path} has classes", known)
    source.classes = list(number)
    images, found = 0, dict[str, str]()
    for name in walk(source.name, "", frozenset()):
        item = image_of(source, name)
        if item is None:
            continue
        images += 1
        line = _line_of(name, table, found)
        if line is None:
            source.left_out.add(name, f"without a line in {table.path.name}")
        else:
            found[line] = name
            yield item._replace(label=number[table.classes[line]])
    if not images:
        raise no_image(source.name)
    if missing := [line for line in table.classes if line not in found]:
        raise UserError(
            f"{len(missing):,} of {len(table.classes):,} images in {table.path} are not in {source.name}: "
            f"{quoted(missing)}; give the paths of image files in that folder, each once, or remove their lines"
        )


def _parse(text: str, path: Path) -> LabelTable:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Without `skipinitialspace`, the quotes of `a.jpg, "cat"` would be a part of the class.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    heading, classes = "", dict[str, str]()
    for row in rows:
        if not row:
            continue
        name, label = (cell.strip() for cell in (*row, "")[:2])
        name = name.removeprefix("./")
        where = f"line {rows.line_num} of label_file {path}"
        if not name or not label:
            raise UserError(f"{where} has no {'class' if name else 'path'}; {_NEEDED}")
        if not heading:
            heading = name
        elif name in classes:
            raise UserError(f"{where} names {name} again; an image has one class, so remove one of the two lines")
        else:
            classes[name] = label
    return LabelTable(path, heading, classes)


def _line_of(name: str, table: LabelTable, found: Mapping[str, str]) -> str | None:
    """Return the path by which the table names an image; None if it does not. `found` has the images before it."""
    stem = name.removesuffix(f".{name.rpartition('.')[2]}")
    if table.heading in (name, stem):
        raise UserError(
            f"line 1 of label_file {table.path} names the image {name}; it must be headings, such as file,class, "
            "and no image may be called like the first"
        )
    # `a.jpg` in the table is not the mask `a.jpg.png`.
    names = (name,) if image_extension(stem) else (name, stem)
    line = next((path for path in names if path in table.classes), None)
    if line is not None and line in found:
        raise UserError(f"{line} in {table.path} names two images, {found[line]} and {name}; give their extensions")
    return line
