"""FSDP2: each process holds a part of every weight, of its gradient and of its optimiser state.

Accelerate wraps the model (`configs/accelerate/fsdp2.yaml`). This module adds what Accelerate lacks: arithmetic as
without FSDP2, FSDP2 on CPUs, one unit per transformer block of any class, and loading and saving of whole tensors.
Every process must call a function that is called collective here.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from mae.errors import UserError
from mae.models.execution import transformer_blocks

# Variables in which `accelerate launch` passes its fsdp_config -> name of the setting, default, and supported value.
_SUPPORTED = {
    "FSDP_VERSION": ("fsdp_version", "1", "2"),
    "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", "NO_WRAP", "TRANSFORMER_BASED_WRAP"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("fsdp_transformer_layer_cls_to_wrap", "", "Block"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", "true", "true"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false", "false"),
}


def sharding_asked_for() -> FullyShardedDataParallelPlugin | None:
    """Return Accelerate's plugin if the launcher's `fsdp_config` requests FSDP2, else None.

    By default Accelerate rounds inputs to bf16, and with them the noise of the masks, the loss, and sums of gradients.
    With this plugin weights are gathered in float32 and autocast chooses the precision, as it does without FSDP2.

    Raises:
        UserError: if a setting of `fsdp_config` has an unsupported value.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    _require_supported_settings()
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def shard_on_any_device(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let `accelerator.prepare` shard on CPUs, where Accelerate silently uses DDP instead."""
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP


def shard_each_block(accelerator: Accelerator, model: nn.Module) -> None:
    """Let `accelerator.prepare` make each transformer block of this model an FSDP2 unit, whatever its class.

    Raises:
        TypeError: if two classes of blocks have the same name, since Accelerate finds them by name.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    classes = {type(block) for block in transformer_blocks(model)}
    names = sorted({kind.__name__ for kind in classes})
    if len(names) < len(classes):
        raise TypeError(
            f"FSDP2 finds transformer blocks by the names of their classes ({', '.join(names)}); "
            "several classes share one: rename the decoder's"
        )
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process holds a part of this model only."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let every process hold all weights within this context, and run forward passes alone, any number of times.

    Entering it is collective. Without sharding it does nothing.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = [part for part in parts if part is not model]  # the outermost keeps its weights gathered anyway
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)


def part_of(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that all processes hold: all of it, unless `like` is sharded."""
    here = whole_tensor.to(like.device)
    if not isinstance(like, DTensor):
        return here
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors, held by every process, into a model that may be sharded."""
    model.load_state_dict({name: part_of(weights[name], tensor) for name, tensor in model.state_dict().items()})


def local_value(tensor: Tensor) -> Tensor:
    """Return a plain, whole tensor, such as the norm of sharded gradients. Collective if the tensor is distributed."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _require_supported_settings() -> None:
    for variable, (name, default, supported) in _SUPPORTED.items():
        value = os.environ.get(variable, default)
        if value.lower() != supported.lower():
            raise UserError(
                f"the launcher's fsdp_config has {name} {value or '(not set)'}, allowed: {supported}; "
                "use configs/accelerate/fsdp2.yaml"
            )
