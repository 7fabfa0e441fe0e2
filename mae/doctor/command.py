"""`mae doctor`: check what an expensive run depends on, print one line per check, and say whether to start."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from mae.doctor import data, machine, run, speed
from mae.doctor.finding import Finding, Verdict
from mae.doctor.stages import STAGES, PretrainExamination
from mae.errors import USER_ERROR_EXIT_CODE, UserError, one_line_errors, world_size
from mae.output import counted, is_quiet, is_said, one_line

Check = Callable[[Any], Finding]

CHECKS: dict[str, tuple[Check, ...]] = {
    stage: (
        machine.versions,
        machine.devices,
        run.settings,
        machine.precision,
        data.shards,
        data.images,
        data.pixels,
        *((data.labels, data.starting_weights) if stage == "finetune" else (data.held_out,)),
        run.batches,
        run.schedule,
        run.exports,
        run.run_dir,
        run.run_folder,
        run.disk_space,
        machine.shared_memory,
        machine.open_files,
        machine.processors,
        speed.step,
        speed.memory,
        speed.data_speed,
        speed.whole_run,
    )
    for stage in STAGES
}
_COLORS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red", Verdict.UNKNOWN: "dim"}
_WIDTH = max(len(check.__name__) for checks in CHECKS.values() for check in checks)


def examine(stage: str, argv: Sequence[str], say: Callable[[str], None]) -> Iterator[tuple[str, Finding]]:
    """Make all checks, even after one has failed, and yield the name and the finding of each."""
    examination = STAGES[stage](argv, say)
    with suppress(Exception):  # reported by the check of the settings; --help must end before the first check
        _ = examination.settings
    reported: dict[Exception, str] = {}
    for check in CHECKS[stage]:
        name = check.__name__.replace("_", " ")
        try:
            finding = check(examination)
        except Exception as error:  # any error would also stop the run
            finding = _failure(error, reported.setdefault(error, name), name)
        yield name, finding


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae doctor`; exit with code 2 if the run should not be started."""
    words = list(sys.argv[1:] if argv is None else argv)
    stage = words.pop(0) if words and words[0] in STAGES else PretrainExamination.stage
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    names: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    with one_line_errors():
        if world_size() > 1:
            raise UserError("mae doctor runs in one process: start it without a launcher, and give --processes N")
        for name, finding in examine(stage, words, _say):
            names[finding.verdict].append(name)
            if finding.verdict is not Verdict.OK or not is_quiet():
                console.print(_line(name, finding))
    if problems := names[Verdict.PROBLEM]:
        console.print(f"do not start: {counted(len(problems), 'problem')}: {', '.join(problems)}", style="bold red")
        sys.exit(USER_ERROR_EXIT_CODE)
    console.print(f"start: no problem, {counted(len(names[Verdict.WARNING]), 'warning')}", style="bold green")


def _failure(error: Exception, reported_by: str, name: str) -> Finding:
    if reported_by != name:
        return Finding(f"not examined, see {reported_by}", is_unknown=True)
    if isinstance(error, UserError):
        return Finding("", problems=(str(error),))
    return Finding("", problems=(f"the check failed: {type(error).__name__}: {error}",))


def _line(name: str, finding: Finding) -> Text:
    # Names in shards may hold what is no text or not in the output's encoding; messages may have several lines.
    encoding = sys.stdout.encoding
    shown = " ".join(str(finding).encode(encoding, "backslashreplace").decode(encoding).split())
    return Text.assemble((f"{finding.verdict:<8}", _COLORS[finding.verdict]), f" {name:<{_WIDTH}}  {one_line(shown)}")


def _say(text: str) -> None:
    if is_said(text):
        sys.stderr.write(f"{one_line(text)}\n")


if __name__ == "__main__":
    main()
