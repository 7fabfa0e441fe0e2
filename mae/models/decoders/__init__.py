"""The decoders. `DECODERS` is the only list of them: `model.decoder` takes its names."""

from mae.models.decoders.base import Decoder
from mae.models.decoders.cross_attention import CrossDecoder
from mae.models.decoders.self_attention import SelfDecoder

__all__ = ["DECODERS", "Decoder"]

DECODERS: dict[str, type[Decoder]] = {"self": SelfDecoder, "cross": CrossDecoder}
