"""A tiny run to come, and the doctor's word on it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mae.doctor.command import main

Doctor = Callable[..., tuple[int, dict[str, tuple[str, str]]]]

TINY = [
    *("--data.image_size", "8", "--data.channels", "1", "--data.workers", "0"),
    *(
        "--model.size",
        "tiny",
        "--model.width",
        "8",
        "--model.depth",
        "1",
        "--model.heads",
        "2",
        "--model.patch_size",
        "2",
    ),
    *("--batch_size", "16", "--epochs", "2", "--optim.warmup_epochs", "0", "--checkpoint_every", "2"),
]
TINY_DECODER = ["--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """A function that runs `mae doctor WORDS` and gives its exit code, and verdict and text by check."""

    def run(*words: str | Path) -> tuple[int, dict[str, tuple[str, str]]]:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = int(str(end.code))
        shown = capsys.readouterr().out
        sys.stdout.write(shown)  # for whoever reads of a failure
        lines = [line for line in shown.splitlines() if not line.startswith(("start", "do not"))]
        return code, {line[9:26].strip(): (line[:8].strip(), line[26:].strip()) for line in lines}

    return run


@pytest.fixture
def flags(make_shards: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Of a healthy pretraining on 40 images in two shards."""
    return [*TINY, *TINY_DECODER, "--data.shards", str(make_shards([25, 15])), "--run_dir", str(tmp_path / "run")]
