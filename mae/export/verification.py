"""Proof of an export: what was compared, on which inputs and versions, and how much it differed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from mae.errors import UserError
from mae.export.publish import VERIFICATION_FILE
from mae.export.target import Difference, Target
from mae.export.trained_model import TrainedModel
from mae.files import write_atomically
from mae.versions import library_versions


def verify(target: Target, model: TrainedModel, folder: Path) -> list[Difference]:
    """Load an export back, compare it with the model, and write what was found beside its weights.

    Raises:
        UserError: if an output differs by more than the target's tolerance.
    """
    differences = list(target.compare(model, folder))
    require_equal_outputs(target, differences)
    content = {
        "target": target.name,
        "model": {"file": model.path.name, "sha256": model.sha256},
        "versions": library_versions() | target.versions(),
        "inputs": target.inputs,
        "tolerance": target.tolerance,
        "tolerance_is": "share of the greatest absolute value of the output",
        "outputs": [
            {"output": each.output, "greatest_difference": each.greatest, "greatest_value": each.scale}
            for each in differences
        ],
        "left_behind": list(target.left_behind(model)),
    }
    write_atomically(folder / VERIFICATION_FILE, json.dumps(content, indent=2).encode() + b"\n")
    return differences


def require_equal_outputs(target: Target, differences: Sequence[Difference]) -> None:
    """Raise a `UserError` if an output of the loaded export differs from the model's by more than is allowed."""
    for each in differences:
        if not math.isfinite(each.scale):
            raise UserError(
                f"the {each.output} of the model itself are not finite; nothing was exported. Its weights are damaged, "
                "or its training has diverged: give an earlier checkpoint"
            )
        if not each.is_within(target.tolerance):
            raise UserError(
                f"the {each.output} of the export to {target.name} differ by {each.greatest:.2e} from the model's, at "
                f"most {target.tolerance * each.scale:.1e} is allowed; nothing was exported. Please report this with "
                "the run's settings.yaml"
            )
