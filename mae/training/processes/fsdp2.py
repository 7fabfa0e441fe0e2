"""FSDP2: each process holds a part of every weight, of its gradient and of its optimiser state.

Accelerate wraps the model (`configs/accelerate/fsdp2.yaml`). Here stands what it leaves out: its own arithmetic is not
that of the other launches, it forgets FSDP on CPUs without a word, and it does not give out or take in whole tensors.
Functions that say so are collective: every process has to call them.
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

# What has been tried here, by the variables in which `accelerate launch` hands on its fsdp_config.
_TRIED = {
    "FSDP_VERSION": ("fsdp_version", "1", "2"),
    "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", "NO_WRAP", "TRANSFORMER_BASED_WRAP"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("fsdp_transformer_layer_cls_to_wrap", "", "Block"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", "true", "true"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false", "false"),
}


def sharding_asked_for() -> FullyShardedDataParallelPlugin | None:
    """What the launcher's `fsdp_config` asks for, with the arithmetic of every other launch; None if for nothing.

    Accelerate would round the inputs to bf16, and with them the noise that chooses the masks, the loss, and the sums
    of gradients. Instead the weights travel as they are, and autocast decides, as it does without sharding.

    Raises:
        UserError: if it asks for what has not been tried here, naming the setting.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    _require_tried_settings()
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def shard_on_any_device(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let `accelerator.prepare` shard on CPUs, where Accelerate falls back to DDP without a word."""
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP


def shard_each_block(accelerator: Accelerator, model: nn.Module) -> None:
    """Let `accelerator.prepare` gather each transformer block of this model by itself, whatever its class.

    Raises:
        TypeError: if blocks of different classes have the same name, by which alone Accelerate finds them.
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
    """Whether the processes hold parts of this model."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights for a while and may run the model alone, as often as it likes; no backward.

    Collective at its begin. Nothing happens if the model is not sharded.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = [part for part in parts if part is not model]  # the outermost keeps what it has gathered anyway
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
    """What this process keeps of a tensor that all hold: its part if `like` is sharded, else all of it."""
    here = whole_tensor.to(like.device)
    if not isinstance(like, DTensor):
        return here
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors, which every process holds, into a model that may be sharded."""
    model.load_state_dict({name: part_of(weights[name], tensor) for name, tensor in model.state_dict().items()})


def local_value(tensor: Tensor) -> Tensor:
    """A plain tensor of a replicated one, such as the norm of sharded gradients."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _require_tried_settings() -> None:
    for variable, (name, default, tried) in _TRIED.items():
        value = os.environ.get(variable, default)
        if value.lower() != tried.lower():
            raise UserError(
                f"the launcher's fsdp_config has {name} {value or '(not set)'}, allowed: {tried}; "
                "take configs/accelerate/fsdp2.yaml"
            )
