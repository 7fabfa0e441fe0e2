"""Consensus: small numbers that all ranks agree on in each step, while the device computes."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import Tensor, distributed


class RankConsensus:
    """Maximum over all ranks of a few numbers.

    Uses gloo connections of its own, on the CPU: a rank learns the result without waiting for its device, and a dead
    rank is noticed within the step.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self._group: distributed.ProcessGroup | None = None
        if accelerator.num_processes > 1:
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, distributed.ProcessGroup)
            self._group = group
        self._numbers: Tensor | list[int] | None = None
        self._work: distributed.Work | None = None

    def submit(self, *numbers: int) -> None:
        """Send this rank's numbers, without waiting for the other ranks."""
        assert self._numbers is None, "the last maximum has not been read"
        if self._group is None:
            self._numbers = list(numbers)
        else:
            self._numbers = torch.tensor(numbers, dtype=torch.int64)
            self._work = distributed.all_reduce(
                self._numbers, op=distributed.ReduceOp.MAX, group=self._group, async_op=True
            )

    def maximum(self) -> list[int]:
        """Wait for all ranks and return, for each number, the greatest that any rank has submitted.

        Raises:
            RuntimeError: if contact with a rank is lost, or it has submitted nothing within the timeout.
        """
        assert self._numbers is not None, "nothing has been submitted"
        if self._work is not None:
            self._work.wait()
        numbers, self._numbers, self._work = self._numbers, None, None
        return numbers if isinstance(numbers, list) else numbers.tolist()
