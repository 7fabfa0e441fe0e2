"""Masked-autoencoder pretraining: image shards in, a ViT encoder out, fine-tuned and exported.

`mae.load(SOURCE)` gives a trained model ready to use: `model.embed(images)`, `model.predict(images)`,
`model.reconstruct(images)` and `model.attention(images)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae.inference.model import Model as Model
    from mae.inference.model import load as load

__version__ = "0.1.0"
_IN_MODEL = ("load", "Model")


def __getattr__(name: str) -> Any:
    """Import torch only when a model is used, so that `import mae` stays fast."""
    if name in _IN_MODEL:
        return getattr(import_module("mae.inference.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_IN_MODEL]
