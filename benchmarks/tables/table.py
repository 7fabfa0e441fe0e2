"""A table of the docs: rows, the commands that measure them, and its Markdown."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mae.files import write_atomically

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
"""Folder of the measured figures, one JSON file per table."""
_PACKAGES = ("torch", "timm", "accelerate")
# Small models gain little from a second thread, and results depend on the number of threads.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row: the commands that measure it, in order, and how to read what they found.

    DATA in a command stands for the folder of the image packs, OUT for the folder of the table.
    """

    name: str
    commands: tuple[str, ...]
    read: Callable[[Path], Figures]
    """Takes the folder of the table, and returns the figures of the row."""

    def kept(self, folder: Path) -> Path:
        """Return the file that holds the row, in the folder of the table, once it is measured."""
        return folder / f"{self.name.replace('/', '-')}.json"


@dataclass(frozen=True)
class Table:
    """A table: its rows, and the Markdown that its figures become."""

    name: str
    rows: tuple[Row, ...]
    markdown: Callable[[Mapping[str, Figures]], str]
    """Takes what is known of each row, by its name; some may be missing."""
    prepare: tuple[str, ...] = ()
    """Commands that come before those of all rows."""
    page: str = "docs/results.md"
    """Page that shows the table, relative to the root of the project."""

    def measure(self, data: Path, out: Path, jobs: int, only: Sequence[str] = ()) -> None:
        """Measure the rows that are not measured yet, `jobs` at a time, in the order of `only` if it names some."""
        rows = {row.name: row for row in self.rows}
        chosen = [rows[name] for name in only or rows]
        folder, prepared = out / self.name, out / self.name / "prepared"
        folder.mkdir(parents=True, exist_ok=True)
        if not prepared.exists():
            for command in self.prepare:
                run(command, data, folder, folder / "prepare.log")
            prepared.touch()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for _ in pool.map(lambda row: self._measure(row, data, folder), chosen):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _measure(self, row: Row, data: Path, out: Path) -> None:
        kept = row.kept(out)
        if kept.exists():
            return
        log = kept.with_suffix(".log")
        is_first_start = not log.exists()
        seconds = sum(run(command, data, out, log) for command in row.commands)
        found = {
            "commands": [*self.prepare, *row.commands],
            "figures": row.read(out),
            # The time of an earlier start that was interrupted is not known.
            "cpu_minutes": round(seconds / 60, 1) if is_first_start else None,
            "commit": _commit(),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        write_atomically(kept, json.dumps(found, indent=1).encode())
        print(f"{self.name}, {row.name}: {found['figures']}", flush=True)

    def gather(self, out: Path) -> None:
        """Write what was measured in `out` to the file of figures; rows that were not measured there stay."""
        figures = self.figures()
        for row in self.rows:
            kept = row.kept(out / self.name)
            if kept.exists():
                figures[row.name] = json.loads(kept.read_text())
        ordered = {row.name: figures[row.name] for row in self.rows if row.name in figures}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(ordered, indent=1) + "\n")

    @property
    def path(self) -> Path:
        """File of the figures."""
        return FIGURES / f"{self.name}.json"

    def figures(self) -> dict[str, Any]:
        """Return what is known of each row: commands, figures, CPU minutes, commit and versions."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def run_folder(row: str) -> str:
    """Return the run folder of a row, by its name, as a command names it."""
    return f"OUT/{row.replace(' ', '-').replace(',', '')}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    first, *others = (f"| {' | '.join(line)} |\n" for line in (header, *rows))
    return first + "|" + "---|" * len(header) + "\n" + "".join(others)


FROZEN = {"knn": "k-NN", "linear": "linear probe", "few_shot": "10 labels per class", "svm": "RBF SVM"}
"""Protocols of `mae evaluate` for frozen encoders, and their columns."""
_JUDGED = {"": "pretrained encoder", "untrained ": "untrained encoder", "pixels ": "pixels"}


def frozen_table(title: str, figures: Figures) -> str:
    """Return the table of a frozen encoder, an untrained one and the pixels, with a column per protocol."""
    rows = [
        [shown, *(percent(figures[whose + each]["top1"]) if whose + each in figures else "" for each in FROZEN)]
        for whose, shown in _JUDGED.items()
    ]
    return markdown_table((title, *FROZEN.values()), rows)


def percent(values: Sequence[float]) -> str:
    """Return the mean in percent, and the sample deviation if there are several."""
    shown = f"{100 * statistics.mean(values):.1f}"
    return f"{shown} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else shown


def minutes(row: Figures) -> str:
    """Return the CPU minutes of a row; `-` if they are not known."""
    return "-" if row["cpu_minutes"] is None else f"{row['cpu_minutes']:.0f}"


def run(command: str, data: Path, out: Path, log: Path) -> float:
    """Run a command in a process of its own, with one thread; return its CPU seconds."""
    words = [word.replace("DATA", str(data)).replace("OUT", str(out)) for word in shlex.split(command)]
    words = ["-m", *words] if words[0] == "mae" else words[1:]
    with log.open("a") as file:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, *words], stdout=file, stderr=file, env=os.environ | _ENVIRONMENT, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        (*_, last) = log.read_text().splitlines() or [""]
        raise SystemExit(f"failed with exit code {process.returncode}, see {log}: {command}\n{last}")
    return usage.ru_utime + usage.ru_stime


def _commit() -> str:
    """Return the last commit that changed the code which the commands run, and whether it is changed since."""
    code = ("mae", "pipelines", "configs", "examples", "benchmarks/optimizers.py")
    commit = _git("log", "-1", "--format=%h", "--", *code)
    return f"{commit} with changes" if _git("status", "--porcelain", "--", *code) else commit


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return done.stdout.strip()


def evaluated(folder: str) -> Callable[[Path], Figures]:
    """Return a reader of the results of `mae evaluate` in a folder below that of the table."""

    def read(out: Path) -> Figures:
        rows = json.loads((out / folder / "results.json").read_text())["rows"]
        return {f"{_short(row['encoder'])} {row['protocol']}".strip(): _summary(row) for row in rows}

    return read


def logged(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind in the log of a run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def accuracy(run: Path) -> float:
    """Return the last accuracy of a fine-tuning run."""
    return float(logged(run, "eval")[-1]["accuracy"])


def _short(encoder: str) -> str:
    """Return the first word of what starts without pretraining, such as `pixels 32x32`; nothing of a model's path."""
    return "" if encoder.startswith("/") else encoder.split(maxsplit=1)[0]


def _summary(row: Mapping[str, Any]) -> Figures:
    trials = row["trials"]
    return {
        "top1": [trial["measures"]["top1"] for trial in trials],
        "chosen": [trial["chosen"] for trial in trials],
        "fitted_on": trials[0]["fitted_on"],
    }
