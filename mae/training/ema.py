"""Running average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae.training.processes.fsdp2 import part_of


class WeightAverage:
    """Exponential moving average: average = decay * average + (1 - decay) * weights, after every step."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        """Averages, under the names of the weights and sharded like them."""
        # Local tensors of both, which this process owns alone.
        self._weights = [_local(weight) for weight in weights.values()]
        self._averages = [_local(average) for average in self.tensors.values()]

    def update(self) -> None:
        """Update the average with the current weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)

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
