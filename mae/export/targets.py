"""All targets of an export by name."""

from collections.abc import Mapping

from mae.export.published import Published
from mae.export.safetensors import Safetensors
from mae.export.target import Target
from mae.export.timm import Timm
from mae.export.torchvision import Torchvision

TARGETS: Mapping[str, Target] = {target.name: target for target in (Timm(), Torchvision(), Safetensors(), Published())}
ALL = "all"
"""In place of names: every target that can hold the model, and whose packages are installed."""
