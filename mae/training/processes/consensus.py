"""Small numbers that all ranks agree on in each step."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import Tensor, distributed


class RankConsensus:
    """Small numbers that all ranks agree on in each step, while the device computes.

    It has connections of its own, through the processors: the host of a rank learns the outcome without waiting for
    its device, and a rank that is gone is noticed within the step.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self._group: distributed.ProcessGroup | None = None
        if accelerator.num_processes > 1:
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, distributed.ProcessGroup)
            self._group = group
        self._votes: Tensor | list[int] | None = None
        self._work: distributed.Work | None = None

    def submit(self, *votes: int) -> None:
        """Give this rank's votes; returns at once."""
        assert self._votes is None, "the last result has not been asked for"
        if self._group is None:
            self._votes = list(votes)
        else:
            self._votes = torch.tensor(votes, dtype=torch.int64)
            self._work = distributed.all_reduce(
                self._votes, op=distributed.ReduceOp.MAX, group=self._group, async_op=True
            )

    def maximum(self) -> list[int]:
        """The greatest vote of each place over all ranks; waits for the last of them.

        Raises:
            RuntimeError: if contact to a rank is lost, or it has not voted within the timeout.
        """
        assert self._votes is not None, "nothing has been cast"
        if self._work is not None:
            self._work.wait()
        votes, self._votes, self._work = self._votes, None, None
        return votes if isinstance(votes, list) else votes.tolist()
