"""Export by `torch.export`: one file with weights and computation, which torch loads without timm and this package."""

import io
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.export.whole_model import (
    COMPARED_BATCHES,
    TRACED_BATCH,
    expected_outputs,
    instructions,
    output_names,
    whole_model,
)
from mae.files import written_atomically

_FILE = "model.pt2"
INSTRUCTIONS_FILE = "instructions.json"
"""File inside the export with what a program has to know to prepare images and to read the outputs."""


class TorchExport(Target):
    """File of `torch.export`, whose input is normalised images in batches of any size."""

    name = "torch_export"
    library = "torch"
    tolerance = 1e-6

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Trace the model and write it."""
        batch = torch.export.Dim("batch")
        program = torch.export.export(whole_model(model), (model.images(TRACED_BATCH),), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            # The lines of code that it is from, which name folders of this machine.
            node.meta.pop("stack_trace", None)
        extra = {INSTRUCTIONS_FILE: json.dumps(instructions(model), indent=2)}
        # torch itself ends the process, with a page of text, if it cannot write a file.
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=extra)
        with written_atomically(folder / _FILE) as file:
            file.write(buffer.getbuffer())

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare each output for several batch sizes."""
        with warnings.catch_warnings():
            # torch 2.11 warns of the memory that it reads a file into.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            theirs = torch.export.load(folder / _FILE).module()
        for batch in COMPARED_BATCHES:
            images = model.images(batch)
            outputs = theirs(images)
            for name, ours in expected_outputs(model, images).items():
                yield compare(f"{name} of {batch} images", ours, outputs[name])

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of torch."""
        return (
            "import torch\n"
            f'model = torch.export.load("{folder}/{_FILE}").module()\n'
            f"outputs = model(images)  # {', '.join(output_names(model))}"
        )
