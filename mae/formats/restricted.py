"""PyTorch checkpoints (torch.save) of other programs, by torch's restricted reader.

Such a file is a pickle, which can name code to run. The restricted reader builds tensors and plain values only, and
stops at anything else. Files of this program are never pickles, so it reads only what a user names as a model.
"""

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from mae.errors import UserError

# "GLOBAL os.system was not an allowed global", "unsupported GLOBAL posix.system whose module posix is blocked"
_UNKNOWN = re.compile(r"GLOBAL ([\w.]+)")


def read_checkpoint(path: Path) -> Any:
    """Return the content of a file that torch.save has written; large tensors stay on the disk until they are used.

    The arguments of a training (`argparse.Namespace`), which the published training program saves, are read too.

    Raises:
        UserError: if the file asks for any other code, naming it, or is damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of old kinds of pickle, in the line before an error that says enough
            is_zip = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            if is_zip:
                _check_sums(path)
            return content
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch says of no other kind which a damaged file raises
        text, remedy = str(error), "give its weights as a .safetensors file"
        if found := _UNKNOWN.search(text):
            problem = f"asks for code ({found[1]})"
        elif type(error).__name__ == "UnpicklingError":
            problem = "is no checkpoint of tensors and plain values"
        else:
            problem = f"is not an intact PyTorch checkpoint: {text.splitlines()[0] if text else 'it is cut off'}"
            remedy = "copy or download it again"
    raise UserError(f"{path} {problem}; it is not opened: {remedy}")


def _check_sums(path: Path) -> None:
    """Compare each part of a zip file with its CRC-32, which torch's own reader does not."""
    with zipfile.ZipFile(path) as file:
        for part in file.infolist():
            if part.CRC == 0:
                continue  # written without, by torch.serialization.set_crc32_options(False)
            with file.open(part) as data:
                while data.read(1 << 20):
                    pass
