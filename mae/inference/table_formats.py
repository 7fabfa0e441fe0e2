"""Formats of tables, written from Parquet parts with flat memory."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Joiner = Callable[[BinaryIO, pa.Schema, Sequence[Path]], None]


def join_parquet(file: BinaryIO, schema: pa.Schema, parts: Sequence[Path]) -> None:
    """Write all rows as Parquet, one group of rows per part."""
    with pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, schema=schema))


def join_csv(file: BinaryIO, schema: pa.Schema, parts: Sequence[Path]) -> None:
    """Write all rows as CSV; a list becomes one column per element, named by its place from 1."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    lists = {field.name for field in schema if pa.types.is_list(field.type)}
    writer = csv.writer(text, lineterminator="\n")
    widths: dict[str, int] = {}
    for row in _rows(parts):
        if not widths:
            widths = {name: _longest(parts, name) for name in lists}
            writer.writerow(
                f"{name}_{place}" if place else name
                for name in schema.names
                for place in (range(1, widths[name] + 1) if name in lists else (0,))
            )
        cells: list[Any] = []
        for name in schema.names:
            values = (row[name] or []) if name in lists else [row[name]]
            cells += ["" if value is None else value for value in values]
            cells += [""] * (widths[name] - len(values) if name in lists else 0)
        writer.writerow(cells)
    text.detach()


def join_jsonl(file: BinaryIO, schema: pa.Schema, parts: Sequence[Path]) -> None:
    """Write each row as a JSON object in a line of its own."""
    for row in _rows(parts):
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def join_npz(file: BinaryIO, schema: pa.Schema, parts: Sequence[Path]) -> None:
    """Write one array per column: lists of numbers become rows, missing numbers NaN or -1, missing texts ""."""
    rows = sum(pq.read_metadata(part).num_rows for part in parts)
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for field in schema:
            if pa.types.is_struct(field.type):
                continue  # thumbnails: NumPy has no images
            blocks = _blocks(parts, field)
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as member:
                for number, block in enumerate(blocks):
                    if number == 0:
                        header = {
                            "descr": np.lib.format.dtype_to_descr(block.dtype),
                            "fortran_order": False,
                            "shape": (rows, *block.shape[1:]),
                        }
                        np.lib.format.write_array_header_2_0(member, header)
                    member.write(block.tobytes())


JOINERS: dict[str, Joiner] = {
    ".csv": join_csv,
    ".jsonl": join_jsonl,
    ".parquet": join_parquet,
    ".npz": join_npz,
}
"""How a table is written, by the end of its name."""


def _rows(parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from pq.read_table(part).to_pylist()


def _longest(parts: Sequence[Path], name: str) -> int:
    lists = (column for part in parts for column in pq.read_table(part, columns=[name])[name].to_pylist())
    return max((len(values) for values in lists if values is not None), default=0)


def _blocks(parts: Sequence[Path], field: pa.Field) -> Iterator[NDArray[Any]]:
    """Yield the values of a column, part by part, with one data type and one number of values per row."""
    if pa.types.is_string(field.type):
        columns = (pq.read_table(part, columns=[field.name])[field.name].to_pylist() for part in parts)
        texts = [["" if text is None else text for text in column] for column in columns]
        width = max([len(text) for column in texts for text in column], default=0)
        yield from (np.array(column, dtype=f"<U{max(1, width)}") for column in texts)
        return
    size = _longest(parts, field.name) if pa.types.is_list(field.type) else 0
    for part in parts:
        column = pq.read_table(part, columns=[field.name])[field.name].to_pylist()
        if size:
            yield np.array([[np.nan] * size if row is None else row for row in column], dtype="<f4")
        elif pa.types.is_floating(field.type):
            yield np.array([np.nan if value is None else value for value in column], dtype="<f8")
        else:
            yield np.array([-1 if value is None else value for value in column], dtype="<i8")
