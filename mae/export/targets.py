"""All targets of an export by name."""

from collections.abc import Mapping

from mae.export.onnx import Onnx, OnnxFromPixels
from mae.export.published import Published
from mae.export.safetensors import Safetensors
from mae.export.target import Target
from mae.export.timm import Timm
from mae.export.torch_export import TorchExport
from mae.export.torchvision import Torchvision
from mae.export.transformers_code import TransformersCode
from mae.export.transformers_mae import TransformersMae
from mae.export.transformers_vit import Transformers

_ALL = (
    Timm(),
    Transformers(),
    TransformersCode(),
    TransformersMae(),
    Torchvision(),
    Onnx(),
    OnnxFromPixels(),
    TorchExport(),
    Safetensors(),
    Published(),
)
TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}
ALL = "all"
"""In place of names: every target that can hold the model, and whose packages are installed."""
