"""Export to ONNX: one file with weights and computation, for onnxruntime and the many programs that read the format.

`onnx` takes normalised images; `onnx_uint8` takes the pixels of an image and normalises them itself, so that nobody can
do it wrongly. Both take batches of any size.
"""

import io
import json
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae.data.loader import normalize
from mae.data.statistics import PixelStatistics
from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.export.whole_model import (
    COMPARED_BATCHES,
    TRACED_BATCH,
    FromPixels,
    expected_outputs,
    instructions,
    output_names,
    whole_model,
)

_FILE = "model.onnx"
# The version that torch's exporter is written for: it converts its operators to any other. Runtimes read it since 2023.
_OPSET = 18
# A file of this format is smaller than 2 GiB: the weights of larger models are a second file, model.onnx.data.
_MOST_BYTES_IN_ONE_FILE = 1_500_000_000


class Onnx(Target):
    """ONNX file whose input is normalised images."""

    name = "onnx"
    library = "onnxruntime"
    tolerance = 1e-4
    requires = ("onnx>=1.18", "onnxscript>=0.6", "onnxruntime>=1.20")
    extra = "onnx"

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Trace the model and write it."""
        _write(whole_model(model), model.images(TRACED_BATCH), output_names(model), instructions(model), folder / _FILE)

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare each output for several batch sizes."""
        session = _session(folder / _FILE)
        for batch in COMPARED_BATCHES:
            images = model.images(batch)
            yield from _compare(model, images, images, session)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of onnxruntime."""
        return (
            "import numpy, onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{folder}/{_FILE}")\n'
            f'{", ".join(output_names(model))} = session.run(None, {{"images": numpy.asarray(images, "float32")}})'
        )


class OnnxFromPixels(Onnx):
    """ONNX file whose input is pixels."""

    name = "onnx_uint8"
    takes_pixels = True
    inputs = "random pixels, seed 0"

    def refusal(self, model: TrainedModel) -> str | None:
        """Refuse a model of images of more than 8 bits."""
        if model.description.value_range is None:
            return None
        return "its images have values of more than 8 bits; --to onnx takes them normalised"

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Trace the model behind the normalisation, and write it."""
        module = FromPixels(whole_model(model), model.description).eval()
        content = instructions(model, takes_pixels=True)
        _write(module, _pixels(model, TRACED_BATCH), output_names(model), content, folder / _FILE)

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare each output for several batch sizes with those of images that training would have normalised."""
        statistics = PixelStatistics(model.description.mean, model.description.std)
        session = _session(folder / _FILE)
        for batch in COMPARED_BATCHES:
            pixels = _pixels(model, batch)
            yield from _compare(model, normalize(pixels.permute(0, 3, 1, 2), statistics), pixels, session)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of onnxruntime, with an image that is black."""
        shape = (1, *model.description.image_size, model.description.channels)
        return (
            "import numpy, onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{folder}/{_FILE}")\n'
            f'pixels = numpy.zeros({shape}, "uint8")  # batch, height, width, channels\n'
            f'{", ".join(output_names(model))} = session.run(None, {{"images": pixels}})'
        )


def _pixels(model: TrainedModel, batch: int) -> Tensor:
    """Return random pixels, uint8 [batch height width channels], the same in each call."""
    shape = (batch, *model.description.image_size, model.description.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _write(module: nn.Module, images: Tensor, outputs: list[str], metadata: dict[str, Any], path: Path) -> None:
    """Trace a module on a batch of images, and write it with its metadata."""
    # onnxscript 0.6 prints how many nodes it has simplified, and torch 2.11 warns of what it does itself.
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            module,
            (images,),
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        _remove_traces(program.model)
        program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        program.save(path, external_data=needs_second_file(module))


def _remove_traces(model: Any) -> None:
    """Remove the lines of code that each node is from, which name folders of this machine."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for each in (graph, *graph, *values):
        each.metadata_props.clear()
        each.doc_string = None


def needs_second_file(module: nn.Module) -> bool:
    """Return whether the weights of a module go into a file of their own."""
    size: int = sum(tensor.nbytes for tensor in module.state_dict().values())
    return size > _MOST_BYTES_IN_ONE_FILE


def _session(path: Path) -> Any:
    # Not at the top: onnxruntime is not in every installation.
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _compare(model: TrainedModel, images: Tensor, given: Tensor, session: Any) -> Iterable[Difference]:
    """Compare the model's outputs for normalised images with those of a session that is given `given`."""
    expected = expected_outputs(model, images)
    found = session.run(list(expected), {"images": given.numpy()})
    for (name, ours), theirs in zip(expected.items(), found, strict=True):
        yield compare(f"{name} of {len(images)} images", ours, torch.from_numpy(theirs))
