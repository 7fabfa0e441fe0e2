"""Versions of the libraries that a run depends on."""

import platform
from importlib.metadata import version

import torch

from mae import __version__


def library_versions() -> dict[str, str]:
    """Version of all that can change a number or a file."""
    return {
        "python": platform.python_version(),
        "mae": __version__,
        "torch": torch.__version__,  # with its build, which the package's version lacks
        **{name: version(name) for name in ("timm", "accelerate", "numpy", "safetensors")},
    }
