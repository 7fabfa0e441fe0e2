"""A table with one row per image, written in parts that processes share, and joined at the end.

Each part is a Parquet file of its own in a hidden folder beside the table, which names the plan: model, images and
settings. A start with the same plan keeps the parts that are there. So a run that was killed continues, memory stays
flat, and each image has one row, in the order given.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from mae.data.store.lock import lock_for_process
from mae.data.store.regular import read_json
from mae.errors import UserError
from mae.files import write_atomically, written_atomically
from mae.inference.image_set import ImageSet
from mae.inference.parts import Part, compute_share, lacking_parts, part_ranges
from mae.inference.table_formats import JOINERS

_PLAN, _LOCK = "plan.json", ".lock"


@dataclass(frozen=True)
class Table:
    """Table to write."""

    out: Path
    schema: pa.Schema
    plan: Mapping[str, Any]
    """All that decides the rows, as a JSON mapping."""

    @property
    def parts(self) -> Path:
        """Folder of the parts."""
        return self.out.with_name(f".{self.out.name}.parts")

    def part(self, number: int) -> Path:
        """Return the file of a part."""
        return self.parts / f"part-{number:06d}.parquet"

    def check(self) -> None:
        """Raise a `UserError` if the table is there already, or its format is not known."""
        if self.out.suffix not in JOINERS:
            raise UserError(f"out is {self.out}; allowed: a name that ends in {', '.join(JOINERS)}")
        if self.out.exists():
            raise UserError(f"{self.out} exists; remove it, or give another --out")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder of the parts, and keep every other process out of it until the context ends.

        Raises:
            UserError: if another process writes this table.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        with (self.parts / _LOCK).open("wb") as file:
            if not lock_for_process(file):
                raise UserError(f"another process is writing {self.out}; wait for it or end it, or give another --out")
            yield

    def lacking(self, parts: int, say: Callable[[str], None]) -> list[int]:
        """Return the numbers of the parts that are still to be computed; remove parts of another plan."""
        try:
            same = read_json(self.parts / _PLAN) == json.loads(json.dumps(self.plan))
        except (OSError, ValueError):
            same = False
        if not same and (others := list(self.parts.glob("part-*"))):
            say(f"{self.parts} has parts for another model, other images or other settings; they are removed")
            for part in others:
                part.unlink()
        write_atomically(self.parts / _PLAN, json.dumps(self.plan, indent=1).encode())
        lacking = [number for number in range(parts) if not self.part(number).exists()]
        if len(lacking) < parts:
            say(f"{parts - len(lacking)} of {parts} parts are done already")
        return lacking

    def write_part(self, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the rows of a part, given by column."""
        with written_atomically(self.part(number)) as file:
            pq.write_table(pa.table(dict(columns), schema=self.schema), file)

    def join(self, parts: int, images: int) -> list[str]:
        """Write the table from its parts, and remove them; return the images that could not be used, with reasons."""
        rows = sum(pq.read_metadata(self.part(number)).num_rows for number in range(parts))
        assert rows == images, f"{rows} rows for {images} images"
        with written_atomically(self.out) as file:
            JOINERS[self.out.suffix](file, self.schema, [self.part(number) for number in range(parts)])
        bad = [text for number in range(parts) for text in _errors(self.part(number))]
        shutil.rmtree(self.parts)
        return bad


def _errors(part: Path) -> list[str]:
    rows = pq.read_table(part, columns=["key", "error"]).to_pylist()
    return [f"{row['key']} ({row['error']})" for row in rows if row["error"] is not None]


def write_table(
    table: Table,
    images: ImageSet,
    compute: Callable[[Sequence[range]], Iterator[Part]],
    columns: Callable[[Part], Mapping[str, Sequence[Any]]],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> list[str]:
    """Compute the rows of all images that are lacking, and write the table. Collective.

    `compute` returns the results of some parts in order, and `columns` makes rows of them. Return the images that could
    not be used, with reasons, on the first process.
    """
    ranges = part_ranges(len(images))
    with table.locked() if accelerator.is_main_process else nullcontext():
        lacking = lacking_parts(accelerator, lambda: table.lacking(len(ranges), say))
        for number, part in compute_share(lacking, ranges, compute, accelerator, "images"):
            table.write_part(number, columns(part))
        accelerator.wait_for_everyone()
        return table.join(len(ranges), len(images)) if accelerator.is_main_process else []
