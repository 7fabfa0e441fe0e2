"""Timeline of a run: starts, resumes, skipped steps, checkpoints, ends."""

import html
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import NamedTuple

from mae.progress import duration
from mae.report.finding import Level
from mae.report.reading import RunFiles
from mae.training.run_folder.history import START

_MOST_SHOWN = 12
_ENDINGS: dict[str, Level] = {"finished": "good", "preempted": "warning", "error": "problem"}


class Event(NamedTuple):
    """Entry of the timeline."""

    level: Level
    text: str
    time: str = ""


def timeline(run: RunFiles) -> str:
    """Return the timeline; runs from before histories were kept show what their logs tell."""
    events = list(_history(run)) if run.history else list(_from_the_log(run))
    events += _between(run)
    if not run.history and run.ending:
        events.append(_end(run.ending["reason"], run.ending["message"], run.ending["time"]))
    if not events:
        return "<p>Nothing is known about the starts of this run.</p>"
    return f'<ol class="timeline">{"".join(map(_item, events))}</ol>'


def _history(run: RunFiles) -> Iterator[Event]:
    last = ""
    for record, following in zip_longest(run.history, run.history[1:]):
        if record["kind"] == START:
            if last == START:
                yield Event("warning", "no end is recorded: it was killed")
            how = f"resumed at step {record['step']:,}" if record["step"] else "started"
            yield Event("note", f"{how} on {record['host']}, {record['where']}", record["time"])
        elif following is None or following["kind"] == START:  # a start may record an end before its export
            yield _end(record["reason"], record["message"], record["time"])
        last = record["kind"]
    if last == START and run.ending:  # a run that is at its end, which it has not recorded yet
        yield _end(run.ending["reason"], run.ending["message"], run.ending["time"])
    elif last == START:
        yield Event("note", "running") if run.is_running else Event("warning", "no end is recorded: it was killed")


def _end(reason: str, message: str, time: str) -> Event:
    word = {"finished": "finished", "preempted": "interrupted", "error": "ended with an error"}.get(reason, reason)
    return Event(_ENDINGS.get(reason, "note"), f"{word}: {message}", time)


def _from_the_log(run: RunFiles) -> Iterator[Event]:
    """Yield the starts of an older run: the seconds in the log begin anew with each."""
    before = None
    for record in run.train:
        if before is None:
            yield Event("note", "started")
        elif record["seconds"] < before["seconds"]:
            yield Event(
                "note", f"resumed after step {before['step']:,}, which {duration(before['seconds'])} had led to"
            )
        before = record


def _between(run: RunFiles) -> Iterator[Event]:
    if run.skipped:
        yield Event("warning", f"skipped, because loss or gradient was not finite: {_steps(run.skipped)}")
    if run.rollback is not None:
        yield Event("warning", f"went back to the weights of step {run.rollback:,}")
    if run.checkpoints:
        yield Event("note", f"checkpoints that are kept: {_steps(run.checkpoints)}")
    else:
        yield Event("note", "no checkpoint is kept: this run cannot be resumed")


def _steps(steps: Sequence[int]) -> str:
    plural = "steps" if len(steps) > 1 else "step"
    more = len(steps) - _MOST_SHOWN
    return f"{plural} {', '.join(f'{step:,}' for step in steps[:_MOST_SHOWN])}" + (
        f" and {more:,} more" if more > 0 else ""
    )


def _item(event: Event) -> str:
    when = f"<time>{html.escape(_readable(event.time))}</time> " if event.time else ""
    return f'<li class="{event.level}">{when}<span>{html.escape(event.text)}</span></li>'


def _readable(time: str) -> str:
    """Return a time of ISO 8601 without seconds."""
    try:
        return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M %Z")
    except ValueError:
        return time
