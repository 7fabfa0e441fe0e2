"""Results as Markdown tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .arithmetic import cores_needed
from .results import Record, Results

_MORE = 160


def page(results: Results) -> str:
    """Return all results, one section per stage, and the tracebacks at the end."""
    about = ", ".join(f"{name} {value}" for name, value in results.about.items())
    parts = ["# What the GPU says", about]
    for stage in dict.fromkeys(record.stage for record in results):
        records = results.of(stage)
        rows = step_table(records) if stage == "step" else general_table(records)
        parts += [f"## {stage}", rows, *(cores(results) if stage == "loader" else [])]
    for record in results:
        if record.traceback:
            parts += [f"## {record.stage}: {record.name}", f"```\n{record.traceback}\n```"]
    return "\n\n".join(parts) + "\n"


def general_table(records: Sequence[Record]) -> str:
    """Return one row per measurement, with all its figures."""
    return table([
        {
            "": record.name, "status": record.status, "s": f"{record.seconds:.0f}",
            "figures": ", ".join(f"{name} {shown(value)}" for name, value in record.figures.items()),
            "message": one_line(record.message),
        }
        for record in records
    ])  # fmt: skip


def step_table(records: Sequence[Record]) -> str:
    """Return one row per model and way of computing, with its speed relative to the plain one."""
    figures = {record.name: record.figures for record in records}
    rows = []
    for record in records:
        model, _, row = record.name.partition(": ")
        found, plain = record.figures, figures.get(f"{model}: plain", {})
        cells = {"": record.name, "status": record.status}
        for title, name in (("batch", "batch"), ("ms", "step_ms"), ("images/s", "images_per_second")):
            cells[title] = shown(found.get(name))
        ratio = ratio_of(found.get("images_per_second"), plain.get("images_per_second"))
        cells["x plain"] = "" if ratio is None else f"{ratio:.2f}"
        cells["MFU"] = "" if found.get("mfu") is None else f"{found['mfu']:.1%}"
        cells["peak GB"] = "" if found.get("peak_bytes") is None else f"{found['peak_bytes'] / 1e9:.1f}"
        cells["largest batch"] = shown(found.get("largest_batch"))
        cells["loss"] = shown(found.get("loss"))
        cells["first step s"] = shown(found.get("first_step_seconds"))
        others = "" if row else ", ".join(f"{name} {shown(value)}" for name, value in found.items())
        dropped = "torch did without CUDA graphs" if found.get("graphs_dropped") else ""
        cells["message"] = one_line(record.message) or others or dropped
        rows.append(cells)
    return table(rows)


def ratio_of(found: float | None, reference: float | None) -> float | None:
    """Return the ratio of two figures; None if one of them is missing."""
    return None if found is None or reference is None else found / reference


def cores(results: Results) -> list[str]:
    """Say how many loader processes feed each model at its best measured speed."""
    per_core = results.figures("loader", "decoded on cpu, 1 workers").get("images_per_second")
    lines = []
    models = dict.fromkeys(record.name.partition(": ")[0] for record in results.of("step"))
    for model in models:
        speeds = {
            record.name: record.figures["images_per_second"]
            for record in results.of("step")
            if record.name.startswith(f"{model}: ") and "images_per_second" in record.figures
        }
        if per_core and speeds:
            best = max(speeds, key=lambda name: speeds[name])
            count = cores_needed(speeds[best], per_core)
            lines.append(f"- {best}, {speeds[best]:,.0f} images/s: {count} cores at {per_core:,.0f} images/s each")
    return ["\n".join(lines)] if lines else []


def shown(value: Any) -> str:
    """Return a figure in a few characters."""
    if isinstance(value, list):
        return f"{len(value)} points"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else one_line(str(value))
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def one_line(text: str) -> str:
    """Return the start of a text as it may be in a cell."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= _MORE else f"{line[:_MORE]}..."


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table without the columns that are empty in all rows."""
    titles = [title for title in {title: None for row in rows for title in row} if any(row.get(title) for row in rows)]
    lines = [titles, ["---"] * len(titles), *([row.get(title, "") for title in titles] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
