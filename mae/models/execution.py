"""How the blocks of a model are run: compiled, or computed twice to save memory.

Both change a model in place, before DDP, FSDP2 or a checkpoint look at it; the names of its state dict stay.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from mae.errors import UserError

Checkpointing = Literal["none", "gelu", "blocks"]

# Versions of a block beside one for each rate of drop path: other numbers of tokens, training or not, gradients or not.
_SPARE_VERSIONS = 16


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch compile each transformer block when it first runs; blocks that are alike share the result.

    Sums may be rounded otherwise, but all random numbers are the same. Call it after `checkpoint_activations`.
    """
    blocks = transformer_blocks(model)
    # Past this number of versions torch goes on uncompiled. Each rate of drop path, a constant of its block, makes one.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, len(blocks) + _SPARE_VERSIONS)
    # The compiler has random numbers of its own; drop path is to draw what it draws uncompiled.
    inductor_config.fallback_random = True
    for block in blocks:
        block.compile(backend=backend)


def checkpoint_activations(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Forget some activations and compute them again for the gradient.

    `gelu` forgets what the MLP's GELU gives, for some hundredths of the time; `blocks` keeps of each transformer block
    its input only. The results are the same to the last bit, for the random numbers of drop path are drawn again too.
    """
    if checkpointing == "none":
        return
    for block in transformer_blocks(model):
        if checkpointing == "blocks":
            block.forward = _checkpointed(block.forward)
            continue
        mlp = getattr(block, "mlp", None)
        if not isinstance(mlp, Mlp):
            raise UserError(
                f"activation_checkpointing is gelu, but {type(block).__name__} has no `mlp` of timm's class Mlp; "
                "allowed for this model: none, blocks"
            )
        mlp.forward = _with_gelu_again(mlp)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of an autoencoder, of encoder and decoder, or of a classifier."""
    return list(model.blocks)  # type: ignore[arg-type]  # a list or a sequence of modules


def _with_gelu_again(mlp: Mlp) -> Callable[[Tensor], Any]:
    """The second layer is within, since it keeps its input; torch stops before it is computed again."""

    def end(hidden: Tensor) -> Any:
        return mlp.fc2(mlp.act(hidden))

    def forward(tokens: Tensor) -> Any:
        hidden = mlp.fc1(tokens)
        if not torch.is_grad_enabled():
            return end(hidden)
        return checkpoint(end, hidden, use_reentrant=False, preserve_rng_state=False)

    return forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_twice(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return forward_twice
