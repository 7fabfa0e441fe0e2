"""What a run has learned: weights, optimiser state and running average, on their way to checkpoints and back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.models.weights import file_tensors, name_in_file, require_same_tensors
from mae.training.checkpoints.reader import Checkpoint
from mae.training.ema import WeightAverage
from mae.training.processes.fsdp2 import load_whole, local_value, part_of, whole

# Groups of tensors in a checkpoint, which name its files.
MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"
# AdamW counts its steps for each parameter; all else that it remembers has the parameter's shape.
STEP = "step"


class TrainingState:
    """All tensors of a run, whole or sharded, under the names that they have in files."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, ema_decay: float | None) -> None:
        """Take the bare model and its optimiser as Accelerate prepared them."""
        self._model, self.optimizer = model, optimizer
        self._parameters = {name_in_file(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._average = None if ema_decay is None else WeightAverage(self._parameters, ema_decay)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything, where it is: no copies."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        optimizer = {
            f"{moment}.{names[id(parameter)]}": value
            for parameter, values in self.optimizer.state.items()
            for moment, value in values.items()
        }
        groups = {MODEL: file_tensors(self._model), OPTIMIZER: optimizer}
        return groups if self._average is None else groups | {AVERAGE: self._average.tensors}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take everything up again; the optimiser's settings stay as they are.

        Raises:
            UserError: if the tensors are not those of this model, naming the first that differ.
        """
        weights = checkpoint.tensors(MODEL)
        named = {name: name_in_file(name) for name in self._model.state_dict()}
        require_same_tensors(file_tensors(self._model), weights, checkpoint.path)
        load_whole(self._model, {name: weights[in_file] for name, in_file in named.items()})
        if self._average is not None:
            # A run that began from a checkpoint without an average begins its own.
            self._average.load(checkpoint.tensors(AVERAGE) or weights)
        self._restore_optimizer(checkpoint.tensors(OPTIMIZER), checkpoint)

    def _restore_optimizer(self, saved: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
        moments = sorted({name.partition(".")[0] for name in saved})
        shaped = [moment for moment in moments if moment != STEP]
        wanted = {f"{moment}.{name}": p for moment in shaped for name, p in self._parameters.items()}
        given = {name: tensor for name, tensor in saved.items() if not name.startswith(f"{STEP}.")}
        require_same_tensors(wanted, given, checkpoint.path)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        groups = self.optimizer.param_groups
        order = [parameter for group in groups for parameter in group["params"]]
        state = {
            at: {m: _moment(saved[f"{m}.{names[id(parameter)]}"], parameter, m) for m in moments}
            for at, parameter in enumerate(order)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def update_average(self) -> None:
        """Take the weights of this step into the average, if there is one."""
        if self._average is not None:
            self._average.update()

    def are_finite(self) -> bool:
        """Whether every weight is; waits for the device."""
        finite = [local_value(p.detach().isfinite().all()) for p in self._parameters.values()]
        return bool(torch.stack(finite).all())

    @contextmanager
    def evaluation_weights(self) -> Iterator[nn.Module]:
        """The plain model for a picture or an evaluation, with averaged weights where there is an average.

        Every rank must enter; inside each may run the model alone, as often as it likes.
        """
        with self._averaged(), whole(self._model):
            yield self._model

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self._average is None:
            yield
            return
        with self._average.in_place():
            yield


def final_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that a run leaves behind: those of the checkpoint, averaged ones where there are any."""
    return checkpoint.tensors(MODEL) | checkpoint.tensors(AVERAGE)


def _moment(saved: Tensor, parameter: Tensor, moment: str) -> Any:
    return saved if moment == STEP else part_of(saved, parameter)
