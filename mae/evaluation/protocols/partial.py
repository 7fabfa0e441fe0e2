"""Partial fine-tuning (arXiv 2111.06377, figure 9): a linear head and the last blocks of an encoder are trained."""

from collections.abc import Iterator

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, TrainingRules
from mae.evaluation.protocols.tuned import RATES, WARMUP, layerwise

HALF = 0.5
"""Number of blocks that stands for the second half of the last block: its MLP and the norm before it."""


def recipes(start: Start, classes: int, rules: TrainingRules) -> dict[str, Recipe]:
    """Return the recipes by name: 0, 1/2, 1, 2, 4, 8, ... blocks, fewer than the encoder has."""
    return {
        f"partial {'1/2' if blocks == HALF else int(blocks)}": _recipe(start, classes, rules, blocks)
        for blocks in numbers_of_blocks(start.description.depth)
    }


def numbers_of_blocks(depth: int) -> Iterator[float]:
    """Yield the numbers of blocks that are trained in an encoder of `depth` blocks."""
    yield from (0.0, HALF)
    blocks = 1.0
    while blocks < depth:
        yield blocks
        blocks *= 2


def _recipe(start: Start, classes: int, rules: TrainingRules, blocks: float) -> Recipe:
    def build() -> nn.Module:
        classifier: nn.Module = start.classifier(classes, rules.regularization.drop_path)
        train_last(classifier, blocks)
        return classifier

    return Recipe(build, layerwise, RATES, WARMUP, rules.augment, rules.regularization, {"blocks": blocks})


def train_last(classifier: VisionTransformer, blocks: float) -> None:
    """Let only the head learn, and for more than 0 `blocks` the last norm and the last blocks.

    What does not learn has no stochastic depth.
    """
    classifier.requires_grad_(False)
    layers = list(classifier.blocks)
    whole = layers[len(layers) - int(blocks) :]
    trained = [classifier.head, *whole]
    if blocks == HALF:
        trained += [layers[-1].norm2, layers[-1].mlp]
        layers[-1].drop_path1 = nn.Identity()
    if blocks > 0:
        trained.append(classifier.norm)
    for part in trained:
        part.requires_grad_(True)
    for block in layers:
        if not any(parameter.requires_grad for parameter in block.parameters()):
            block.drop_path1 = block.drop_path2 = nn.Identity()
