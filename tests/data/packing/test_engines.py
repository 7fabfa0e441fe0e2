import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mae.data.packing.engines import Advance, Engine, process_engine, ray_engine
from mae.errors import UserError


def write_number(folder: Path, number: int, advance: Advance) -> None:
    (folder / str(number)).write_text(str(os.getpid()))
    advance(1, number)


def fail_at_three(folder: Path, number: int, advance: Advance) -> None:
    if number == 3:
        raise UserError("three is no number")
    write_number(folder, number, advance)


def die_at_three(folder: Path, number: int, advance: Advance) -> None:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write_number(folder, number, advance)


def run(engine: Engine, task: object, folder: Path, count: int = 8) -> tuple[list[int], tuple[int, int]]:
    """The numbers that were done, and what was told of them."""
    told = [(0, 0)]
    engine(partial(task, folder), range(count), lambda images, size: told.append((images, size)))  # type: ignore[operator]
    images, size = map(sum, zip(*told, strict=True))
    return sorted(int(path.name) for path in folder.iterdir()), (images, size)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_task_is_done_once_and_told_of(tmp_path: Path, workers: int) -> None:
    assert run(process_engine(workers), write_number, tmp_path) == (list(range(8)), (8, 28))
    others = {path.read_text() for path in tmp_path.iterdir()} - {str(os.getpid())}
    assert bool(others) == (workers > 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_tasks_are_no_work(tmp_path: Path, workers: int) -> None:
    assert run(process_engine(workers), write_number, tmp_path, 0) == ([], (0, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_of_the_user_comes_through_as_it_is(tmp_path: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"^three is no number$"):
        run(process_engine(workers), fail_at_three, tmp_path, 30)
    assert not (tmp_path / "29").exists()


def test_p09_a_worker_that_is_killed_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a worker process was killed, probably because memory ran out; .*--workers"):
        run(process_engine(2), die_at_three, tmp_path)


SLEEPERS = """
import sys, time
from functools import partial
from pathlib import Path
from mae.data.packing.engines import process_engine

def sleep(folder, number, advance):
    (folder / str(number)).touch()
    time.sleep(60)

if __name__ == "__main__":
    process_engine(2)(partial(sleep, Path(sys.argv[1])), range(4), print)
"""


def processes_with(mark: str) -> list[str]:
    """The processes whose environment holds this word; zombies have none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue  # it has ended, or belongs to another
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_p08_workers_do_not_outlive_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script, mark = tmp_path / "sleepers.py", f"MAE_TEST_{time.monotonic_ns()}"
    script.write_text(SLEEPERS)
    (tmp_path / "done").mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "done")],
        env={**os.environ, mark: "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(list((tmp_path / "done").iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.02)
    # Ctrl-C reaches every process of a terminal.
    os.killpg(parent.pid, how) if how == signal.SIGINT else parent.send_signal(how)
    parent.wait(timeout=30)
    deadline = time.monotonic() + 20
    while processes_with(mark):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ray_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install 'mae-pretraining\[ray\]'"):
        ray_engine(2)


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 \(RAY_ADDRESS\)"):
        run(ray_engine(2), write_number, tmp_path)


@pytest.fixture(scope="module")
def ray() -> Iterator[Engine]:
    """Ray over a local cluster of two workers, started once."""
    module = pytest.importorskip("ray")
    module.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},  # for the tasks of this file
    )
    yield ray_engine(2)
    module.shutdown()


@pytest.mark.slow
def test_ray_does_every_task_once_in_other_processes(ray: Engine, tmp_path: Path) -> None:
    assert run(ray, write_number, tmp_path) == (list(range(8)), (8, 28))
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_ray_passes_a_mistake_of_the_user_on_as_it_is(ray: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^three is no number$"):
        run(ray, fail_at_three, tmp_path)


@pytest.mark.slow
def test_ray_tells_of_a_worker_that_is_killed(ray: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Ray failed .*; run the same command again"):
        run(ray, die_at_three, tmp_path)
