"""Output that is closed, full, or lost on the way: what matters goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import png
from pipelines.test_pretrain import TINY
from webdataset import TarWriter

from mae.output import one_line, say
from mae.pipelines import index, pretrain
from mae.progress import progress_bar
from mae.settings import parse
from mae.training.settings import TrainSettings

PRINTS = """
import os, sys, warnings
from contextlib import suppress
from mae.output import make_output_safe, newly_lost
make_output_safe()
make_output_safe()
opened = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
assert opened > 2
for _ in range(3):
    print("x" * 9000, "\\u1234", "\\udcff")
    print("y", file=sys.stderr)
    warnings.warn("z")
    with suppress(OSError):
        os.write(2, b"from C")
sys.stdout.flush()
os.write(opened, " | ".join(newly_lost()).encode())
assert not list(newly_lost())
"""


@pytest.mark.parametrize(
    ("redirection", "lost"),
    [
        (">&- 2>&-", "standard output is lost from here on: it was closed at the start | standard error"),
        ("> /dev/full 2> /dev/full", "standard output is lost from here on: No space left on device | standard error"),
        ("2>&1 | true", "standard output is lost from here on: Broken pipe | standard error"),
        ("<&- 2>&1 | cat > /dev/null", ""),
    ],
    ids=["p13-closed", "p13-full", "p13-broken", "p13-all-is-well"],
)
def test_a_print_cannot_fail(redirection: str, lost: str, tmp_path: Path) -> None:
    command = f'"$0" -c "$1" found {redirection}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PRINTS], cwd=tmp_path, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0
    assert (tmp_path / "found").read_text().startswith(lost)
    assert lost or not (tmp_path / "found").read_text()


def test_a_stream_that_another_has_put_in_place_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from mae.output import make_output_safe

    before = sys.stdout, sys.stderr
    make_output_safe()
    assert (sys.stdout, sys.stderr) == before


def test_a_run_goes_on_without_its_output_and_says_so_in_its_log_p13(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards, run_dir = make_shards([13, 12]), tmp_path / "run"
    command = [*TINY, "--epochs", "2", "--data.shards", str(shards), "--run_dir", str(run_dir)]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
            os.close(2)
            sys.stdout, sys.stderr = sys.__stdout__, None
            pretrain.main(command)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["message"] for record in records if record["kind"] == "output"] == [
        "standard output is lost from here on: Broken pipe",
        "standard error is lost from here on: it was closed at the start",
    ]
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == "finished"
    assert (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünï, 猫, a\udcff", "plain, ünï, 猫, a\udcff"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x9b1m \x7f \u2028 \u2029", r"\x9b1m \x7f \u2028 \u2029"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_names_with_control_characters_make_neither_lines_nor_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In what is printed, in warnings, and in errors."""
    name = "a\x1b[31m\nerror: b\r"
    path = tmp_path / "shards" / "x\n.tar"
    path.parent.mkdir()
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        tar.write({"__key__": "good", "png": png(0)})
        tar.write({"__key__": name, "png": png(1)[:40]})
    with pytest.raises(SystemExit) as end:
        index.main([str(path), "--check", "--workers", "0", "--out", str(tmp_path / "index")])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert [line.partition(":")[0] for line in said.err.splitlines()] == ["error"]
    assert r"a\x1b[31m\nerror: b\r.png" in said.err
    with pytest.raises(SystemExit):
        pretrain.main(
            [*TINY, "--data.shards", str(path), "--run_dir", str(tmp_path / "run"), "--data.reader", "stream",
             "--data.stream_samples", "8", "--data.max_bad_samples", "0", "--data.mean", "0.5", "--data.std", "0.5"]
        )  # fmt: skip
    said = capsys.readouterr()
    assert r"a\x1b[31m\nerror: b\r" in said.err
    assert "\x1b" not in said.out + said.err
    assert "\r" not in said.out + said.err
    recorded = json.loads((tmp_path / "run" / "exit.json").read_text())["message"]
    assert "\n" not in recorded


def test_quiet_leaves_warnings_and_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In any place among the words of a command; a file of settings knows no such setting."""
    monkeypatch.setattr("mae.output._quiet", set())
    say("before")
    settings = parse(TrainSettings, ["--seed", "3", "--quiet", "--run_dir", "run"], prog="train")
    assert (settings.seed, settings.run_dir) == (3, Path("run"))
    say("a step")
    say("warning: the disk is nearly full")
    say("the model is written", is_result=True)
    with progress_bar("packing", 7) as advance:
        advance(7)
    assert capsys.readouterr() == ("before\nwarning: the disk is nearly full\nthe model is written\n", "")
