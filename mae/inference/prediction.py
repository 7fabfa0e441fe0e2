"""Most probable classes of images."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from mae.settings import check


class Prediction(NamedTuple):
    """Most probable classes of one image, the best first."""

    labels: tuple[int, ...]
    names: tuple[str, ...]
    """Names of these classes; their numbers where the model knows no names."""
    probabilities: tuple[float, ...]


def most_probable(logits: Float[Tensor, "images classes"], classes: tuple[str, ...], top: int) -> list[Prediction]:
    """Return the `top` most probable classes of each row (all if there are fewer); equal ones by label.

    Raises:
        UserError: if `top` is less than 1.
    """
    check(top >= 1, "top", top, "1 or more")
    probabilities = logits.double().softmax(dim=1)
    order = probabilities.argsort(dim=1, descending=True, stable=True)[:, :top]
    return [
        Prediction(tuple(labels), tuple(classes[label] for label in labels), tuple(values))
        for labels, values in zip(order.tolist(), probabilities.gather(1, order).tolist(), strict=True)
    ]
