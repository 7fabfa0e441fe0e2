"""Standard output and error that end nothing: a job goes on when its pipe is closed, or the disk of its log is full."""

import codecs
import io
import os
import select
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_NAMES = {1: "standard output", 2: "standard error"}
_ERRORS = "mae.output"
_CONTROLS = ("Cc", "Zl", "Zp")
"""Unicode categories of control characters, and of separators of lines and paragraphs."""
_lost: dict[int, str] = {}
_told: set[int] = set()
_quiet: set[bool] = set()


def make_output_safe() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams on which every write succeeds: what cannot be written is lost.

    A stream that somebody else has put in their place is left alone. Streams that were closed before the program
    started lead nowhere, and so do their descriptors, lest a file that is opened later gets the number of one.
    """
    _fill_closed_descriptors()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8", errors=_ERRORS))  # noqa: SIM115 (for the whole process)
            _lost[number] = "it was closed at the start"
        elif stream is getattr(sys, f"__{name}__") and not isinstance(getattr(stream.buffer, "raw", None), _Lossy):
            setattr(sys, name, _safe(stream, number))
            setattr(sys, f"__{name}__", getattr(sys, name))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 worker`, `2 processes`, `3 batches`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def one_line(text: str) -> str:
    """Return text with control characters as escapes, such as `\\n`.

    Names in data may hold line breaks and colour codes; as escapes they cannot forge lines or rule a terminal.
    """
    if text.isprintable():
        return text
    return "".join(repr(letter)[1:-1] if unicodedata.category(letter) in _CONTROLS else letter for letter in text)


def valid_text(text: str) -> str:
    """Return text in which bytes that are not UTF-8, as names of files may hold, are written as `\\xff`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def be_quiet() -> None:
    """Print nothing from now on but errors, warnings and results; show no bar and no view."""
    _quiet.add(True)


def is_quiet() -> bool:
    """Return whether `be_quiet` was called."""
    return bool(_quiet)


def is_said(text: str, is_result: bool = False) -> bool:
    """Return whether a line is printed: a quiet command prints warnings and its result only."""
    return is_result or not _quiet or text.startswith("warning:")


def say(text: str, is_result: bool = False) -> None:
    """Print one line, whose characters the locale may lack; an output that is full or closed ends nothing.

    A quiet command prints it if it is a warning or its result.
    """
    if sys.stdout and is_said(text, is_result):
        encoding = sys.stdout.encoding or "utf-8"
        with suppress(OSError):
            print(one_line(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201


def warn(text: str) -> None:
    """Print a warning of one line to standard error, which may be closed or full."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"warning: {one_line(text)}\n")


def newly_lost() -> Iterator[str]:
    """Yield, once for each stream of which something was lost, its name and the reason."""
    for number in sorted(_lost.keys() - _told):
        _told.add(number)
        yield f"{_NAMES[number]} is lost from here on: {_lost[number]}"


def _in_utf8(error: UnicodeError) -> tuple[bytes, int]:
    """Write what the encoding of the terminal has not: names of files may be UTF-8, or any bytes."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    try:
        return text.encode("utf-8", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace"), error.end


codecs.register_error(_ERRORS, _in_utf8)


class _Lossy(io.FileIO):
    """File of a standard stream."""

    def write(self, data: object, /) -> int:
        """Write what can be written, and claim that it was everything."""
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]  # a full pipe that does not wait
                select.select([], [self], [])
        except OSError as error:
            _lost.setdefault(self.fileno(), error.strerror or str(error))
            return memoryview(data).nbytes  # type: ignore[arg-type]
        return written


def _safe(stream: TextIO, number: int) -> io.TextIOWrapper:
    with suppress(OSError):
        stream.flush()
    raw = _Lossy(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, _ERRORS, line_buffering=True)


def _fill_closed_descriptors() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            else:
                os.set_inheritable(opened, True)
