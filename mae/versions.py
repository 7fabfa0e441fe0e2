"""Versions of the libraries that a run depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from mae import __version__


def installed(name: str) -> str | None:
    """Return the version of a package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library_versions() -> dict[str, str]:
    """Return the version of everything that can change a number or a file."""
    return {
        "python": platform.python_version(),
        "mae": __version__,
        "torch": torch.__version__,  # with its build, unlike the version of the package
        **{name: version(name) for name in ("timm", "accelerate", "numpy", "safetensors")},
    }
