"""Guard against losses and gradients that are not finite: they never reach the weights, on any rank.

A loss that is not finite is made to give NaN gradients. The sum of the gradients over the ranks, which training needs
anyway, carries NaN to every rank, so the norm is finite on none of them. The optimiser reads this flag on the device,
and no host has to wait for it.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def nan_gradients_if_nonfinite(loss: Tensor) -> Tensor:
    """Return a finite loss unchanged, to the last bit; otherwise a loss of which every gradient is NaN."""
    return loss * (1 + 0 * loss.detach())


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """Take a step, unless `skip`, a flag on the device, is set: then weights and optimiser state stay as they are."""
    # Where reading the flag costs no wait. On a GPU, Muon waits for it: its kernels cannot skip.
    on_host = skip.device.type == "cpu"
    if not on_host and all(group.get("fused") for group in optimizer.param_groups):
        step_unless_on_device(optimizer, skip)
    elif not skip:
        optimizer.step()


def step_unless_on_device(optimizer: Optimizer, skip: Tensor) -> None:
    """Take a step unless `skip` is set, without a wait: torch's fused kernels can skip, for gradient scaling."""
    # Accelerate's wrapper passes on the call, but no attributes.
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    inner.grad_scale, inner.found_inf = None, skip.float()
    optimizer.step()
