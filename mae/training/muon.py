"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the weights that it trains beside AdamW."""

from collections.abc import Sequence
from typing import Any

from timm.optim import Muon
from torch import nn
from torch.optim import Optimizer

from mae.models.execution import transformer_blocks

# torch's AdamW has this epsilon; timm's Muon would lend its own, 1e-7, to the AdamW beside it.
_ADAMW_EPS = 1e-8


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon trains: the matrices of all transformer blocks, of encoder and decoder.

    Muon's author leaves the first and the last layer to AdamW, with tokens, positions, norms and biases. Here these are
    the patch embedding (which timm alone would flatten to a matrix), the embedding and the prediction of a decoder, and
    the head: their inputs or outputs are pixels, tokens of another model, or classes.
    """
    weights = (parameter for block in transformer_blocks(model) for parameter in block.parameters())
    return [weight for weight in weights if weight.ndim == 2 and weight.requires_grad]


def divide_groups(groups: Sequence[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Divide each parameter group into one for AdamW and one for Muon; both keep its `lr_scale` and weight decay."""
    hidden = {id(weight) for weight in hidden_matrices(model)}
    divided = []
    for group in groups:
        of_muon = [parameter for parameter in group["params"] if id(parameter) in hidden]
        others = [parameter for parameter in group["params"] if id(parameter) not in hidden]
        if others:
            divided.append({**group, "params": others, "use_muon": False, "eps": _ADAMW_EPS})
        if of_muon:
            divided.append({**group, "params": of_muon, "use_muon": True, "name": f"{group['name']}, Muon"})
    return divided


def build_muon(groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    """Return timm's Muon for groups from `divide_groups`, with its defaults: momentum 0.95, five steps, no Nesterov.

    timm would combine Nesterov's momentum with NAdamW instead of AdamW.
    """
    if not all("use_muon" in group for group in groups):
        raise ValueError("Muon needs groups from divide_groups, which say what is left to AdamW")
    # The factor 0.2 * sqrt(longer side) gives steps the size of AdamW's (Liu et al., arXiv 2502.16982).
    optimizer: Optimizer = Muon(list(groups), lr=0.0, betas=betas, adjust_lr_fn="match_rms_adamw")
    return optimizer
