"""One thing that a stage finds out, and how a stage goes through all of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from . import markdown
from .place import Place
from .results import Figures, Results, record_of, write_atomically


class Measurement(NamedTuple):
    """A check or a measurement; it is started only if enough time is left."""

    name: str
    run: Callable[[], Figures]
    """Returns the figures, or raises an error of `results`."""
    least: float = 20.0
    """Seconds that must be left, or it is left to the next call."""


def run_stage(stage: str, measurements: Iterable[Measurement], place: Place, results: Results, device: str) -> None:
    """Run what is left of a stage, and write the results after each measurement."""
    for measurement in measurements:
        if results.is_done(stage, measurement.name):
            if results.has_failed(stage, measurement.name):
                print(f"{stage}, {measurement.name}: failed before; --again tries it once more", flush=True)
            continue
        if place.seconds_left() <= (0.0 if place.rehearse else measurement.least):
            print(f"{stage}, {measurement.name}: left to the next call", flush=True)
            continue
        record = record_of(stage, measurement.name, measurement.run, device)
        results.add(record)
        write_atomically(place.out / "results.md", markdown.page(results))
        figures = ", ".join(f"{name} {markdown.shown(value)}" for name, value in record.figures.items())
        words = [record.status, f"{record.seconds:.0f} s", figures, markdown.one_line(record.message)]
        print(f"{stage}, {record.name}: {'; '.join(filter(None, words))}", flush=True)
