"""The live view in a real terminal: a child process behind a pseudo-terminal, whose screen is then read."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise

import pyte
import pytest

from mae.training.view import View

RECORD = {
    "kind": "train", "step": 249_999, "epoch": 799.9, "loss": 0.1234, "lr": 1e-3, "images_per_second": 123_456.0,
    "data_wait": 0.12, "mfu": 0.45, "peak_memory": 12.5 * 2**30,
}  # fmt: skip
BASELINES = {"kind": "baselines", "step": 0, "patch_mean": 0.616, "place_mean": 0.513, "images": 256}
KNN = {"kind": "evaluation", "step": 200_000, "epoch": 640.0, "knn": 0.4532}
SCRIPT = f"""
from mae.output import be_quiet
from mae.training.progress import TrainingProgress
import sys
if "--quiet" in sys.argv:
    be_quiet()
progress = TrainingProgress("pretrain", "--rank1" not in sys.argv)
with progress.running(0, 250_000, [{BASELINES}]):
    progress.say("the run begins")
    progress.say("warning: the disk is nearly full")
    progress.report({RECORD}, 36_100.0)
    progress.record({KNN})
    progress.checkpoint(249_000)
progress.say("model written", is_result=True)
"""
CELLS = (
    "loss 0.1234", "to beat: the mean 0.616, the mean of each place 0.513", "epoch 799.9 of 799.9", "lr 1.00e-03",
    "123,456 images/s", "data wait 12%", "MFU 45%", "memory 12.50 GiB", "k-NN 45.3% at epoch 640.0",
    "checkpoint 249,000 written 0:00 ago",
)  # fmt: skip


def in_terminal(columns: int, *words: str, **variables: str) -> tuple[list[str], str]:
    """Run the script in a terminal of so many columns; return the lines of its screen, and all that it wrote."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        stdin=inner, stdout=inner, stderr=inner, env=kept | {"TERM": "xterm-256color"} | variables,
    )  # fmt: skip
    os.close(inner)
    written = b""
    while True:
        try:
            written += os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert child.wait() == 0, written.decode()
    os.close(terminal)
    screen = pyte.Screen(columns, 40)
    pyte.ByteStream(screen).feed(written)
    return [line.rstrip() for line in screen.display if line.strip()], written.decode()


@pytest.mark.parametrize(("columns", "lines"), [(80, 4), (200, 2)])
def test_every_figure_is_whole_and_the_lines_are_full(columns: int, lines: int) -> None:
    shown, _ = in_terminal(columns)
    assert shown[:2] == ["the run begins", "warning: the disk is nearly full"]
    assert shown[-1] == "model written"
    bar, *figures = shown[2:-1]
    assert bar.startswith("pretrain ━")
    assert bar.endswith("249,999/250,000  100%  ETA 10:01:40")
    assert len(bar) == columns
    assert re.split(r" {3,}", "   ".join(figures)) == list(CELLS)
    assert len(figures) == lines
    for line, following in pairwise(figures):
        assert len(line) <= columns < len(line) + 3 + len(re.split(r" {3,}", following)[0])


def test_without_colours_where_nobody_wants_them() -> None:
    colours = re.compile(r"\x1b\[[\d;]*\b(?:3\d|4\d|9\d)m")
    assert colours.search(in_terminal(80)[1])
    shown, written = in_terminal(80, NO_COLOR="1")
    assert not colours.search(written)
    assert "loss 0.1234   to beat: the mean 0.616, the mean of each place 0.513" in shown


def test_a_quiet_command_prints_warnings_and_its_result() -> None:
    assert in_terminal(80, "--quiet")[0] == ["warning: the disk is nearly full", "model written"]


def test_only_rank_0_shows_anything() -> None:
    assert in_terminal(80, "--rank1") == ([], "")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    shown, written = in_terminal(200, TERM="dumb")
    assert "\x1b" not in written
    assert shown[2] == (
        "pretrain 249999/250000 epoch 799.9  loss 0.1234  lr 1.00e-03  123,456 images/s  data wait 12%  MFU 45%  "
        "ETA 10:01:40"
    )


def test_the_loss_is_smoothed_and_green_below_what_needs_no_learning() -> None:
    view = View("pretrain", 0, 100)
    for record, text, style in (
        (RECORD | {"loss": 1.0}, "loss 1.0000", "bold"),
        (BASELINES, "loss 1.0000", "bold"),
        (RECORD | {"loss": 0.6}, "loss 0.8000", "bold"),
        (RECORD | {"loss": None}, "loss not finite", "bold"),
        (RECORD | {"loss": 0.2}, "loss 0.5000", "bold green"),
    ):
        view.report(record, 1.0) if record["kind"] == "train" else view.record(record)
        assert dict(view.cells())["loss"] == text
        assert view._style("loss") == style


def test_what_is_not_known_yet_is_left_out() -> None:
    view = View("finetune", 0, 100)
    assert dict(view.cells()) == {"checkpoint": "no checkpoint yet"}
    view.record({"kind": "eval", "step": 1, "epoch": 2.0, "accuracy": 0.5})
    view.record({"kind": "evaluation", "step": 1, "epoch": 2.0, "knn": None})
    assert dict(view.cells())["accuracy"] == "accuracy 50.0% at epoch 2.0"
    assert "k-NN" not in dict(view.cells())
