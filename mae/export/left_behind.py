"""What an export does not hold of a model, in words."""

from collections.abc import Collection

from mae.errors import first_of
from mae.export.targets import TARGETS
from mae.export.trained_model import TrainedModel


def describe_left_behind(model: TrainedModel, names: Collection[str]) -> str:
    """Return what an export does not hold in words, and which targets hold it."""
    others = [(target, target.left_behind(model)) for target in TARGETS.values() if not target.refusal(model)]
    parts = []
    for part, all_names in (("decoder", model.decoder_names), ("head", model.head_names)):
        left = [name for name in all_names if name in names]
        holding = [target.name for target, also_left in others if not set(left) & set(also_left)]
        if left:
            text = f"the {part} ({len(left)} tensors: {first_of(left, most=2)})"
            parts.append(f"{text}, which --to {' or '.join(holding)} holds" if holding else text)
    return "; ".join(parts)
