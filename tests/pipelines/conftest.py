"""Pictures cost most of a tiny run's time, and few tests look at them."""

import io
from typing import IO, Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mae.training.checkpoints.manifest import RunPosition
from mae.training.checkpoints.writer import CheckpointWriter


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Let the loop die right before it saves the checkpoint of `step`."""
    save = CheckpointWriter.save

    def dying_save(self: CheckpointWriter, tensors: Any, metadata: Any, run_position: RunPosition) -> None:
        if run_position.step == step:
            raise error
        save(self, tensors, metadata, run_position)

    monkeypatch.setattr(CheckpointWriter, "save", dying_save)


@pytest.fixture
def rendered() -> None:
    """A test that takes this has its pictures rendered."""


@pytest.fixture(autouse=True)
def _white_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a figure that is ready to be rendered, a white pixel is written; commands of their own render."""
    if "rendered" in request.fixturenames:
        return
    buffer = io.BytesIO()
    Image.new("L", (1, 1), 255).save(buffer, format="PNG")

    def savefig(figure: Figure, file: IO[bytes], **options: Any) -> None:
        assert options == {"format": "png"}
        file.write(buffer.getvalue())

    monkeypatch.setattr(Figure, "savefig", savefig)
