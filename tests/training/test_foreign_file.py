"""A model of another make is refused by what it is."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mae.errors import UserError
from mae.training.foreign_file import refuse_foreign_file


def zipped(folder: Path) -> bytes:
    torch.save({"a": torch.zeros(2)}, folder / "saved.pt")
    return (folder / "saved.pt").read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (None, r"is a zip file, probably a PyTorch checkpoint \(torch.save\), which can run code when it is opened"),
        (pickle.dumps({}), "is a pickle, probably an old PyTorch checkpoint"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS in place of the file",
        ),
        (b"\n<!DOCTYPE html>", "is a web page, probably in place of a download that failed"),
        (save({"blocks.0.attn.qkv.weight": torch.zeros(2)}), "holds weights of timm or of the original MAE code"),
        (save({"vit.embeddings.cls_token": torch.zeros(2)}), "holds weights of Hugging Face transformers"),
        (save({"x": torch.zeros(2)}, {"format": "pt"}), "holds weights of another program, not of mae"),
    ],
    ids=["empty", "torch", "pickle", "lfs", "html", "timm", "transformers", "unknown"],
)
def test_it_is_said_what_a_file_is(data: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(zipped(tmp_path) if data is None else data)
    with pytest.raises(UserError, match=rf"model.safetensors {words}.*; give the folder of a finished run of mae, one"):
        refuse_foreign_file(path)


def test_what_is_damaged_missing_or_ours_is_left_to_its_reader(tmp_path: Path) -> None:
    ours = save({}, {"mae": "x" * 94})
    assert ours.startswith(b"\x80")  # as a pickle does
    for name, data in (("damaged", b"\7" * 99), ("ours", ours)):
        (tmp_path / name).write_bytes(data)
    for name in ("damaged", "ours", "missing"):
        refuse_foreign_file(tmp_path / name)
