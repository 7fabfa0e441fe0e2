"""Equal content gives equal files, in every process and at every time."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mae import safetensors_file
from mae.models.weights import write_weights
from mae.safetensors_file import sha256

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3).T,
    "a": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(5, dtype=torch.int64),
    "none": torch.zeros(0, 2),
}
# Of the bytes that another process, on another day, has written.
SHA256 = "ea1ede96edd2e4f28e1e2d5f3f4f32f4231022f1173df73cd842630450257f1e"


def test_the_bytes_depend_on_the_content_alone() -> None:
    metadata = dict.fromkeys(("mae", "format", "classes"), "x")
    assert sha256(TENSORS, metadata) == SHA256
    assert sha256(TENSORS, dict(reversed(metadata.items()))) == SHA256
    assert sha256(TENSORS, metadata | {"mae": "y"}) != SHA256


def test_safetensors_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 7)
    path, metadata = tmp_path / "m.safetensors", {"format": "pt", "mae": '{"ä": 1}'}
    assert write_weights(path, TENSORS, metadata) == sha256(TENSORS, metadata)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    found: dict[str, Tensor] = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
