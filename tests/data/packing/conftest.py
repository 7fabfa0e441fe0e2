from pathlib import Path

import pytest
from conftest import png

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """ant/ 0 3 6 9, bee/ 1 4 7 10 and cat/ 2 5 8 11: colour PNG files."""
    root = tmp_path / "tree"
    for number in range(12):
        path = root / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, mode="RGB"))
    return root


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Nine gray PNG files in one folder."""
    root = tmp_path / "flat"
    root.mkdir()
    for number in range(9):
        (root / f"{number}.png").write_bytes(png(number))
    return root
