"""Running average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae.training.processes.fsdp2 import part_of


class WeightAverage:
    """Exponential moving average: average = decay * average + (1 - decay) * weights, after every step."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float, warmup: bool = False) -> None:
        self._decay, self._warmup = decay, warmup
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        """Averages, under the names of the weights and sharded like them."""
        # Local tensors of both, which this process owns alone.
        self._weights = [_local(weight) for weight in weights.values()]
        self._averages = [_local(average) for average in self.tensors.values()]

    def update(self, step: int) -> None:
        """Update the average with the current weights, which are those after `step` steps."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay_at(step))

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after `step` steps, 1 or more.

        With warm-up it rises as in timm's `ModelEmaV3` (timm/utils/model_ema.py, `use_warmup`): 1 - step^(-2/3), at
        most `decay`. The first update thus takes the weights as they are, and random starting weights are forgotten.
        """
        return min(self._decay, 1 - step ** (-2 / 3)) if self._warmup else self._decay

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy whole tensors of an earlier average, of which a sharded average takes its part."""
        for name, average in self.tensors.items():
            average.copy_(part_of(tensors[name], average))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the weights by their averages until the context ends."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
