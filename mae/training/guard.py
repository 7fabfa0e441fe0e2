"""What is not finite never reaches the weights, on any rank, and no rank waits for its device to know.

A loss that is not finite is made to give gradients that are not finite. The sum of the gradients over the ranks, which
training needs anyway, carries them to every rank, so the norm of the gradient tells all ranks the same. The optimiser
reads that flag on the device.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def nan_gradients_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss itself, to the last bit, if it is finite; otherwise one whose every gradient is NaN."""
    return loss * (1 + 0 * loss.detach())


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """Take a step, or leave weights and optimiser state as they are where `skip`, a flag on the device, is set."""
    on_host = skip.device.type == "cpu"  # which need not wait to know
    if not on_host and all(group["fused"] for group in optimizer.param_groups):
        step_unless_on_device(optimizer, skip)
    elif not skip:
        optimizer.step()


def step_unless_on_device(optimizer: Optimizer, skip: Tensor) -> None:
    """As `step_unless`, while the host goes on: torch's fused kernels know how to skip, for gradient scaling."""
    # Accelerate's wrapper hands on the call, but no attributes.
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    inner.grad_scale, inner.found_inf = None, skip.float()
    optimizer.step()
