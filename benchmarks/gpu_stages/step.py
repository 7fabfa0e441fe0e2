"""Stage step: speed, memory and largest batch of the training step, by model and by the way it is computed.

MFU is `images per second x FLOPs per image / peak FLOPs of the device`: FLOPs are those of our model with the settings
of the row (`mae.models.flops`: matrix products only, two operations per multiply-add, forward and backward once), the
peak is the dense bf16 rate of the data sheet. *Plain* computes more than it is credited with, as in its own code.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

from .measurement import Measurement
from .place import Place
from .worker import Worker

MODELS = {"b": "ViT-B/16", "l": "ViT-L/16", "h": "ViT-H/14", "s": "ViT-S/16", "t": "toy"}
# Rounds of (rows, models), the most important first, so that a cut loses the least.
ROUNDS = (
    (("plain", "ours", "ours, compiled"), "bl"),
    (("ours, compiled", "ours, heads of 64, compiled"), "h"),
    (("ours, heads of 64, compiled", "ours, cross, compiled", "ours, fused loss"), "lb"),
    (("ours, CUDA graphs",), "b"),
    (("plain", "ours", "ours, compiled", "ours, CUDA graphs", "ours, cross, compiled"), "s"),
    (("transformers, SDPA",), "bl"),
    (("ours, largest batch", "plain, largest batch"), "lb"),
    (("plain", "ours", "ours, cross, compiled", "ours, largest batch"), "h"),
    (("ours, heads of 64", "ours, cross"), "lb"),
    (("ours, blocks recomputed, largest batch",), "lh"),
    (("ours, max-autotune",), "bs"),
    (("ours, CUDA graphs", "ours, max-autotune"), "l"),
    (("transformers, SDPA",), "sh"),
    (("ours, heads of 64, compiled", "ours, fused loss", "ours, max-autotune", "ours, largest batch"), "s"),
)
TOY_ROUNDS = ((tuple(dict.fromkeys(row for rows, _ in ROUNDS for row in rows)), "t"),)
LIMIT = 150.0
"""Most seconds of a row; searching kernels for a large model may take longer, and is given up then."""


def measurements(place: Place, worker: Worker) -> Iterator[Measurement]:
    """Return the measurements of this stage, the most important first."""
    yield Measurement("matrix product", partial(worker.ask, "step_rows.matrix_product", limit=60.0))
    for rows, models in TOY_ROUNDS if place.rehearse else ROUNDS:
        for model, row in product(models, rows):
            run = partial(worker.ask, "step_rows.measure", model, row, limit=LIMIT)
            yield Measurement(f"{MODELS[model]}: {row}", run)
