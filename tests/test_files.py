"""Writes that are atomic, also of the same file by several at once."""

from pathlib import Path

import pytest

from mae.files import write_atomically, written_atomically


def test_two_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_atomically(path, shared=True) as slow:
        slow.write(b"slow")
        with written_atomically(path, shared=True) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_former_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"former")
    with pytest.raises(type(error)) as found, written_atomically(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(found.value, OSError):
        assert found.value.filename == str(path)
