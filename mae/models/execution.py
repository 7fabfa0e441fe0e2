"""Execution of a model's blocks: compiled, or computed twice to save memory.

Both change a model in place and keep the names of its state dict. Use them before the model is wrapped in DDP or FSDP2.
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

# Compiled versions of a block for other numbers of tokens, evaluation, and no gradients.
_SPARE_VERSIONS = 16


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch compile each transformer block when it first runs; blocks of one kind share the result.

    Sums may be rounded differently, but all random numbers stay the same. Call it after `checkpoint_activations`.
    """
    blocks = transformer_blocks(model)
    # Above this number of versions torch runs uncompiled. Each rate of drop path is a constant and needs a version.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, len(blocks) + _SPARE_VERSIONS)
    # The compiler would draw other random numbers; drop path must draw the same ones.
    inductor_config.fallback_random = True
    for block in blocks:
        block.compile(backend=backend)


def checkpoint_activations(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Discard some activations and compute them again for the gradient.

    `gelu` discards the output of each MLP's GELU, and takes a few percent more time; `blocks` keeps only the input of
    each transformer block. The results are the same to the last bit, random numbers of drop path included.

    Raises:
        UserError: for `gelu`, if a block has no MLP of timm's class.
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
    """Return all blocks of an autoencoder (encoder and decoder) or of a classifier."""
    return list(model.blocks)  # type: ignore[arg-type]  # a list or a sequence of modules


def _with_gelu_again(mlp: Mlp) -> Callable[[Tensor], Any]:
    """Return a forward of the MLP that discards the GELU's output.

    The second layer is part of it, since it would keep its input. torch stops before it computes that layer again.
    """

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
