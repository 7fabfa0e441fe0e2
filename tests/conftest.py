"""What the whole suite shares: shape checks at every border, an empty cache, and shards made on the fly."""

import functools
import io
import multiprocessing
import os
import platform
import queue
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read as torch is imported. Tests fork, and pools of OpenMP threads do not live on in a forked process: torch and MKL
# would wait for them there without end, or crash.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

# Every jaxtyping annotation of the library is checked at run time, in tests only.
install_import_hook("mae", "beartype.beartype")


SHOWN = ("torchvision", "timm", "accelerate", "webdataset", "tyro", "numpy", "pillow", "transformers", "pytest")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say in the log what it ran on; pytest's own header is not shown with `-q`."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        libraries = ", ".join(f"{name} {version(name)}" for name in SHOWN)
        reporter.write_line(f"Python {platform.python_version()}, torch {torch.__version__}, {libraries}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test unpacks lands in the user's cache, and no launcher's environment leaks in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def png(number: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> bytes:
    """A PNG of (height, width) whose pixels depend on `number`: no two are alike."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(number).integers(0, 256, (*size, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze() if channels == 1 else pixels, mode=None).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(
    folder: Path,
    lengths: Sequence[int],
    classes: int = 4,
    size: tuple[int, int] = (8, 8),
    mode: str = "L",
) -> Path:
    """Write shards of the given lengths into a new folder and return it.

    Sample n (counted over all shards) is `png(n)` with the label n % classes.
    """
    from webdataset import TarWriter

    folder.mkdir()
    number = 0
    for shard, length in enumerate(lengths):
        with (
            (folder / f"train-{shard:06d}.tar").open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for _ in range(length):
                label = str(number % classes).encode()
                tar.write({"__key__": f"{number:06d}", "png": png(number, size, mode), "cls": label})
                number += 1
    return folder


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work`, a function of a module, returns in a new process, with one thread.

    For what is told by the memory of the whole process: there, no other test has freed or kept any.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(work, *arguments).result()


def results_of(
    processes: Sequence[multiprocessing.process.BaseProcess], results: "multiprocessing.Queue[Any]"
) -> list[Any]:
    """What each of these processes put into a queue, once all have ended; on a busy machine that may take minutes.

    A process that ends without a result is an error at once.
    """
    found: list[Any] = []
    while len(found) < len(processes):
        is_running = any(process.is_alive() for process in processes)
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            codes = [process.exitcode for process in processes]
            assert is_running, f"{len(processes)} processes ended, {len(found)} of them with a result: {codes}"
    for process in processes:
        process.join()
    return found


def in_fork(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a forked process, with which all that it does to the state of the process ends.

    After a fake GPU, for one, torch refuses to train in processes that are forked later, as other tests do.
    """

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)

        def work() -> None:
            try:
                test(*arguments, **named)
            except BaseException:
                there.send(traceback.format_exc())
                raise

        process = context.Process(target=work)
        process.start()
        there.close()
        failure = ""
        with suppress(EOFError):  # it has ended without one
            failure = here.recv()
        process.join()
        assert process.exitcode == 0, failure or f"exit code {process.exitcode}"

    return run


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """`write_shards` into a folder of this test, by its name."""

    def make(lengths: Sequence[int], name: str = "shards", **rest: Any) -> Path:
        return write_shards(tmp_path / name, lengths, **rest)

    return make
