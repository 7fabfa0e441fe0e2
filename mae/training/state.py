"""State of training: weights, optimiser state and running average, as checkpoints hold them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.errors import UserError
from mae.models.weights import file_tensors, name_in_file, require_same_tensors
from mae.training.checkpoints.reader import Checkpoint
from mae.training.ema import WeightAverage
from mae.training.processes.fsdp2 import load_whole, local_value, part_of, whole

# Groups of tensors in a checkpoint, which name its files.
MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"
# AdamW counts steps for each parameter; all other state has the shape of the parameter.
STEP = "step"
_ADAMW, _MUON = ("exp_avg", "exp_avg_sq", STEP), ("momentum_buffer",)


class TrainingState:
    """All tensors of a run, whole or sharded, under their names in files."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, ema_decay: float | None, ema_warmup: bool = False
    ) -> None:
        """Hold the unwrapped model, and the optimiser as Accelerate prepared it."""
        self._model, self.optimizer = model, optimizer
        self._parameters = {name_in_file(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._average = None if ema_decay is None else WeightAverage(self._parameters, ema_decay, ema_warmup)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors by group, without copying."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        optimizer = {
            f"{moment}.{names[id(parameter)]}": value
            for parameter, values in self.optimizer.state.items()
            for moment, value in values.items()
            if isinstance(value, Tensor)  # Muon also notes here which parameters it leaves to AdamW
        }
        groups = {MODEL: file_tensors(self._model), OPTIMIZER: optimizer}
        return groups if self._average is None else groups | {AVERAGE: self._average.tensors}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load all tensors; the optimiser's settings stay as they are.

        Raises:
            UserError: if the tensors belong to another model, naming the first that differ.
        """
        weights = checkpoint.tensors(MODEL)
        named = {name: name_in_file(name) for name in self._model.state_dict()}
        require_same_tensors(file_tensors(self._model), weights, checkpoint.path)
        load_whole(self._model, {name: weights[in_file] for name, in_file in named.items()})
        if self._average is not None:
            # A checkpoint without an average starts one from its weights.
            self._average.load(checkpoint.tensors(AVERAGE) or weights)
        self._restore_optimizer(checkpoint.tensors(OPTIMIZER), checkpoint)

    def _restore_optimizer(self, saved: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        order = [(p, _moments(group)) for group in self.optimizer.param_groups for p in group["params"]]
        if saved:  # empty if no step was taken before
            _require_same_optimizer(saved, any(moments == _MUON for _, moments in order), checkpoint.path)
            _require_same_trained(saved, self._parameters, checkpoint.path)
            wanted = {f"{m}.{names[id(p)]}": p for p, moments in order for m in moments if m != STEP}
            given = {name: tensor for name, tensor in saved.items() if not name.startswith(f"{STEP}.")}
            require_same_tensors(wanted, given, checkpoint.path)
        state = {
            at: {m: _moment(saved[f"{m}.{names[id(p)]}"], p, m) for m in (moments if saved else ())}
            for at, (p, moments) in enumerate(order)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def update_average(self, step: int) -> None:
        """Update the average, if there is one, with the weights after `step` steps."""
        if self._average is not None:
            self._average.update(step)

    def are_finite(self) -> bool:
        """Return whether every weight is finite; waits for the device."""
        finite = [local_value(p.detach().isfinite().all()) for p in self._parameters.values()]
        return bool(torch.stack(finite).all())

    @contextmanager
    def evaluation_weights(self) -> Iterator[nn.Module]:
        """Yield the unwrapped model for pictures or evaluation, with averaged weights if there is an average.

        Every rank must enter; inside, each may run the model alone, any number of times.
        """
        with self._average.in_place() if self._average is not None else nullcontext(), whole(self._model):
            yield self._model


def final_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights that a run publishes: the average of the checkpoint if there is one, else its weights."""
    return checkpoint.tensors(MODEL) | checkpoint.tensors(AVERAGE)


def _moments(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the state that the optimiser keeps of each parameter of a group."""
    return _MUON if group.get("use_muon") else _ADAMW


def _require_same_optimizer(saved: Mapping[str, Tensor], is_muon: bool, source: Path) -> None:
    was_muon = any(name.startswith(f"{_MUON[0]}.") for name in saved)
    if was_muon != is_muon:
        before, now = (("adamw", "muon")[flag] for flag in (was_muon, is_muon))
        raise UserError(
            f"{source} was trained with optim.name {before}, and its optimiser state means nothing to {now}; "
            f"set --optim.name {before}"
        )


def _require_same_trained(saved: Mapping[str, Tensor], trained: Collection[str], source: Path) -> None:
    """Raise a `UserError` if the optimiser trained other parameters; the weights are known to be those of the model."""
    before = {name.partition(".")[2] for name in saved}
    if different := sorted(before.symmetric_difference(trained)):
        raise UserError(
            f"{source} was made with another freeze: {len(before)} tensors were trained, now {len(trained)}, and the "
            f"first that differs is {different[0]}; set freeze as it was"
        )


def _moment(saved: Tensor, parameter: Tensor, moment: str) -> Any:
    return saved if moment == STEP else part_of(saved, parameter)
