"""Handing on of a run to its trackers, in a thread beside the training, as far as checkpoints cover it.

What a run logs after its newest checkpoint may be done again, after a kill or a return to a checkpoint. Trackers
cannot take anything back, so they are given a step once a checkpoint that is on the disk covers it. The source is
always `metrics.jsonl` and the pictures; a tracker that fails is tried again at the next checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event as Flag
from threading import Thread

from mae.settings import flatten, to_dict
from mae.training.job import Job
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings
from mae.training.trackers.adapters import ADAPTERS, Adapter
from mae.training.trackers.events import events_of
from mae.training.trackers.position import Position, read_positions, write_positions
from mae.training.trackers.settings import TrackerName

_MOST_OF_REASON = 200
# Seconds that a run waits for its trackers: at its start, at its end, and when it was told to stop.
_START_TIMEOUT, END_TIMEOUT, STOP_TIMEOUT = 60.0, 120.0, 10.0


class Trackers:
    """Thread that hands a run on to its trackers; no error of theirs reaches the run."""

    def __init__(self, folder: RunFolder, settings: TrainSettings, say: Callable[[str], None]) -> None:
        """Open the trackers, and wait a while for that: what they print then comes before the training."""
        self._say, self._opened = say, Flag()
        self._committed: SimpleQueue[int | None] = SimpleQueue()
        self._sink = _Sink(folder, settings, say)
        self._thread = Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()
        self._opened.wait(_START_TIMEOUT)

    def cover(self, step: int) -> None:
        """Hand on everything up to `step`, which a checkpoint covers; returns at once."""
        self._committed.put(step)

    def finish(self, timeout: float) -> None:
        """Wait until the trackers have everything, but not longer than `timeout` seconds."""
        self._committed.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._say(f"warning: the trackers need more than {timeout:.0f} s; the same command hands the rest on")

    def _work(self) -> None:
        self._sink.open()
        self._opened.set()
        is_last = False
        while not is_last:
            steps = [self._committed.get()]
            while True:  # several checkpoints may have been written meanwhile
                try:
                    steps.append(self._committed.get_nowait())
                except Empty:
                    break
            is_last = None in steps
            covered = [step for step in steps if step is not None]
            if covered:
                self._sink.hand_on(max(covered))
        self._sink.finish()


@dataclass
class _Sink:
    """The trackers of a run, used by the thread only."""

    folder: RunFolder
    settings: TrainSettings
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.positions = read_positions(self.folder.path)
        self.adapters: dict[TrackerName, Adapter] = {}
        self.told: set[str] = set()

    def open(self) -> None:
        """Open every tracker that is not open."""
        for name in dict.fromkeys(self.settings.trackers):
            if name not in self.adapters:
                self.guard(name, lambda name=name: self.open_one(name))  # type: ignore[misc]

    def open_one(self, name: TrackerName) -> None:
        """Open the run of a tracker again, or begin it."""
        position = self.positions.get(name, Position(self.settings.tracker_project, ""))
        adapter = ADAPTERS[name](self.folder.path, position.project, position.run)
        if position.run != adapter.run:
            self.save(name, replace(position, run=adapter.run))
        if adapter.takes_settings_again or not position.has_settings:
            adapter.store_settings(flatten(to_dict(self.settings)))
            self.save(name, replace(self.positions[name], has_settings=True))
        self.adapters[name] = adapter

    def hand_on(self, last: int) -> None:
        """Give every tracker the events up to step `last` that it lacks."""
        self.open()
        for name in list(self.adapters):
            self.guard(name, lambda name=name: self.hand_on_to(name, last))  # type: ignore[misc]

    def hand_on_to(self, name: TrackerName, last: int) -> None:
        """Give one tracker the events up to step `last` that it lacks, and save how far it has come."""
        adapter, position = self.adapters[name], self.positions[name]
        events = [event for event in events_of(self.folder, last) if position.lacks(event)]
        if not events:
            return
        held: set[tuple[str, int]] = set()
        if position.in_doubt:
            held = adapter.held()
        else:
            self.save(name, replace(position, in_doubt=True))
        for event in events:
            if (rest := event.without(held)) is not None:
                adapter.give(rest)
        adapter.flush()
        self.save(name, position.after(events))

    def save(self, name: TrackerName, position: Position) -> None:
        """Note the position of a tracker, also in the run folder."""
        self.positions[name] = position
        write_positions(self.folder.path, self.positions)

    def finish(self) -> None:
        """End the sessions of all trackers."""
        for name, adapter in self.adapters.items():
            self.guard(name, adapter.finish)

    def guard(self, name: TrackerName, act: Callable[[], None]) -> None:
        """Do something with a tracker; its first error is reported, and none ends the run."""
        try:
            act()
        except Exception as error:
            if name not in self.told:
                self.told.add(name)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_MOST_OF_REASON]
                self.say(
                    f"warning: the tracker {name} fails ({reason}); the run goes on, metrics.jsonl has everything, and "
                    "the tracker is tried again at each checkpoint"
                )


def open_trackers(job: Job) -> Trackers | None:
    """Open the trackers of a run, on the main process, and hand on what a checkpoint covers already."""
    if not (job.settings.trackers and job.accelerator.is_main_process):
        return None
    trackers = Trackers(job.folder, job.settings, job.progress.say)
    trackers.cover(job.start.step)
    if job.writer is not None:
        job.writer.on_commit.append(trackers.cover)
    return trackers
