"""Parts of an encoder that fine-tuning leaves as they are."""

import re

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import UserError

ALL = "encoder"
_NONE = "none"


def frozen_blocks(freeze: str, depth: int) -> int | None:
    """Return how many blocks the setting `freeze` keeps: None for `none`, `depth` + 1 for the last norm as well.

    Raises:
        UserError: if it is neither `none`, `encoder` nor `blocks:N`, or there are fewer blocks.
    """
    if freeze == _NONE:
        return None
    if freeze == ALL:
        return depth + 1
    found = re.fullmatch(r"blocks:(\d{1,4})", freeze)
    if found is None or int(found[1]) > depth:
        raise UserError(f"freeze is {freeze}; allowed: none, encoder, or blocks:N with N from 0 to {depth}")
    return int(found[1])


def freeze(classifier: VisionTransformer, blocks: int | None) -> None:
    """Exclude the stem and the first blocks of a classifier from training, and take their stochastic depth away.

    Args:
        classifier: A classifier; its parameters and blocks are changed in place.
        blocks: As `frozen_blocks` returns it.
    """
    if blocks is None:
        return
    frozen = [classifier.patch_embed, *classifier.blocks[:blocks]]
    if blocks > len(classifier.blocks):
        frozen.append(
            classifier.norm
        )  # without parameters in a classifier with `fc_norm`, which is new, as the head is
    for parameter in (classifier.cls_token, classifier.pos_embed, *(p for part in frozen for p in part.parameters())):
        parameter.requires_grad_(False)
    for block in classifier.blocks[:blocks]:
        block.drop_path1 = block.drop_path2 = nn.Identity()
