"""What the worker process says about the machine."""

from importlib import import_module
from importlib.metadata import version

import torch

from .place import NEEDED
from .results import Figures


def describe() -> Figures:
    """Return the name of the device and the versions of what decides its speed.

    Raises:
        ImportError: if a module that the stages need is broken, of another Python, or lacks what it needs itself.
    """
    for name in NEEDED:
        import_module(name)
    has_gpu = torch.cuda.is_available()
    packages = ("torchvision", "timm", "accelerate", "numpy")
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory >> 30 if has_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in packages},
    }
