"""Files of other programs that are given as a model: what they are, in the words of the person who has them."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mae.errors import UserError
from mae.files import open_regular

_NEVER_OPENED = "which can run code when it is opened, so this program never does"
# First bytes of a file, and what it is.
_BEGINNINGS = (
    (b"PK\x03\x04", f"a zip file, probably a PyTorch checkpoint (torch.save), {_NEVER_OPENED}"),
    (b"\x80", f"a pickle, probably an old PyTorch checkpoint (torch.save), {_NEVER_OPENED}"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file, which `git lfs pull` fetches"),
    (b"<", "a web page, probably in place of a download that failed"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file, probably of Keras"),
    (b"GGUF", "a GGUF file"),
)
# Beginnings of names of tensors, and the library that uses them.
_NAMES = (
    (("blocks.", "patch_embed."), "timm or of the original MAE code"),
    (("vit.", "embeddings.", "encoder.layer", "vision_model."), "Hugging Face transformers"),
)
_REMEDY = "give the folder of a finished run of mae, one of its checkpoints, or its model.safetensors"


def refuse_foreign_file(path: Path) -> None:
    """Raise a `UserError` that says what a model file is if another program has written it.

    A damaged safetensors file is left to those who read it.
    """
    with suppress(OSError):  # so is one that cannot be read
        with open_regular(path) as file:
            beginning = file.read(64)
        if not beginning:
            raise UserError(f"{path} is empty; {_REMEDY}")
        is_safetensors = beginning[4:9] == b"\0\0\0\0{"  # the length of its header may look like any other beginning
        for first, kind in () if is_safetensors else _BEGINNINGS:
            if beginning.lstrip().startswith(first):
                raise UserError(f"{path} is {kind}; {_REMEDY}")
        with suppress(SafetensorError), safe_open(path, framework="pt") as weights:
            if "mae" not in (weights.metadata() or {}):
                raise UserError(f"{path} holds weights of {_library(weights.keys())}, not of mae; {_REMEDY}")


def _library(names: Iterable[str]) -> str:
    first = list(names)
    libraries = (name for beginnings, name in _NAMES if any(each.startswith(beginnings) for each in first))
    return next(libraries, "another program")
