"""The running average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae.training.processes.fsdp2 import part_of


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        """The averages, under the names of the weights and sharded like them."""
        # The plain storage of both, which a process owns alone.
        self._weights = [_local(weight) for weight in weights.values()]
        self._averages = [_local(average) for average in self.tensors.values()]

    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from whole tensors of an earlier average."""
        for name, average in self.tensors.items():
            average.copy_(part_of(tensors[name], average))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in for the weights while the context lasts."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
