import errno
import fcntl
import multiprocessing
from pathlib import Path

import pytest

from mae.data.store.lock import lock


def hold_until_killed(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with lock(path) as is_ours:
        assert is_ours
        ready.set()
        multiprocessing.Event().wait()


def test_a_lock_is_had_once(tmp_path: Path) -> None:
    with lock(tmp_path / "a") as first, lock(tmp_path / "a", wait=False) as second, lock(tmp_path / "b") as other:
        assert (first, second, other) == (True, False, True)
    with lock(tmp_path / "a", wait=False) as again:
        assert again


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    child = context.Process(target=hold_until_killed, args=(tmp_path / "a", ready))
    child.start()
    ready.wait()
    with lock(tmp_path / "a", wait=False) as is_ours:
        assert not is_ours
    child.kill()
    with lock(tmp_path / "a") as is_ours:
        assert is_ours
    child.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_work_goes_on(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / "a") as is_ours:
        assert is_ours


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(NotADirectoryError), lock(Path("/dev/null/a")):
        pass
