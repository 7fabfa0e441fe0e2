"""Machines that refuse: full and read-only disks, users without a home or a name, a locale without the characters."""

import errno
import io
import os
import pwd
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import png
from pipelines.test_pretrain import TINY

from mae.pipelines import export, index, pretrain

Command = Callable[[Path, Path], None]
PACK_AND_PRETRAIN = """
import sys
from mae.pipelines import pack, pretrain
then = sys.argv.index("then")
pack.main(sys.argv[1:then])
pretrain.main(sys.argv[then + 1:])
"""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _export(data: Path, out: Path) -> None:
    export.main([str(data / "run"), "--out", str(out / "export")])


def _pretrain(data: Path, out: Path) -> None:
    pretrain.main([*TINY, "--epochs", "2", "--data.shards", str(data / "shards"), "--run_dir", str(out / "run")])


def _index(data: Path, out: Path) -> None:
    index.main([str(data / "shards"), "--out", str(out / "index"), "--workers", "0"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed shards, and a finished run."""
    from conftest import write_shards

    root = tmp_path_factory.mktemp("machine")
    write_shards(root / "shards", [5, 4])
    _pretrain(root, root)
    return root


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """Let no file grow beyond a few bytes: a limit of the system, as near to a full disk as an ordinary user gets."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _refusing(folder: Path, number: int) -> Iterator[None]:
    """Let every change below a folder fail; the administrator, as whom containers run tests, may change all others."""

    def refuse(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            is_path = isinstance(path, str | os.PathLike)
            if is_path and Path(path).is_relative_to(folder) and writes(*arguments, **named):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", refuse(io.open, lambda mode="r", *_, **__: not set(mode).isdisjoint("wax+")))
        patch.setattr(os, "open", refuse(os.open, lambda flags, *_, **__: bool(flags & _WRITES)))
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, refuse(getattr(os, name), lambda *_, **__: True))
        yield


@pytest.mark.parametrize(
    "disk",
    [
        pytest.param(_full, id="file size limit"),
        pytest.param(lambda folder: _refusing(folder, errno.ENOSPC), id="full"),
        pytest.param(lambda folder: _refusing(folder, errno.EROFS), id="read-only"),
    ],
)
@pytest.mark.parametrize("command", [_export, _pretrain, _index])
def test_a_disk_that_takes_nothing_is_one_line(
    command: Command,
    disk: Callable[[Path], Any],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with disk(tmp_path), pytest.raises(SystemExit) as end:
        command(data, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code in (2, 4), said
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert not any("Traceback" in line for line in said)
    assert any(os.strerror(number) in said[-1] for number in (errno.EFBIG, errno.ENOSPC, errno.EROFS))
    assert "None" not in said[-1]


def test_a_user_without_home_or_name_is_told_what_to_set(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nameless(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nameless)
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as end:
        _pretrain(data, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert said == [
        "error: this user has no home folder for the cache; set XDG_CACHE_HOME or cache_dir",
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _pretrain(data, tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


def test_names_of_other_scripts_need_no_locale(tmp_path: Path) -> None:
    """Pack, train a step and report, in a locale of ASCII."""
    for number in range(8):
        path = tmp_path / "bilder" / ("naïve-猫", "犬")[number % 2] / f"ñ-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    packing = ["bilder", "--out", "scherben-é", "--workers", "0"]
    training = [*TINY, "--epochs", "2", "--data.shards", "scherben-é", "--run_dir", "lauf-ü"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"XDG_CACHE_HOME": "cache", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PACK_AND_PRETRAIN, *packing, "then", *training],
        cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    said = done.stdout.decode("utf-8") + done.stderr.decode("utf-8")
    assert done.returncode == 0, said
    assert "2 classes (" in said
    assert (tmp_path / "scherben-é" / "classes.txt").read_text("utf-8") == "naïve-猫\n犬\n"
    assert "lauf-ü" in (tmp_path / "lauf-ü" / "report.html").read_text("utf-8")
