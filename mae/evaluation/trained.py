"""Protocols that train: which recipe for which encoder, the choice of the learning rate, and the row of the result."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType

from mae.data.batch import BatchRecipe
from mae.data.labelled_sets import empty_classes
from mae.data.settings import DataSettings
from mae.errors import UserError, first_of
from mae.evaluation.feature_set import split_off
from mae.evaluation.judging import JudgingRules, LabelledSets, prepared_alike, selection_remarks, shape_of
from mae.evaluation.naming import distinct_names
from mae.evaluation.protocols import attentive, linear_paper, partial, resnet, tuned
from mae.evaluation.protocols.learning_rate import choose_rate
from mae.evaluation.protocols.outcome import Outcome, accuracy
from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, Samples, TrainingRules, plan_of, predict, train
from mae.evaluation.results import Row, row_of
from mae.inference.model import Model
from mae.models.description import ModelDescription
from mae.models.sizes import TEMPERATURE
from mae.training.job import total_steps

# Fewer teach nothing: the learning rate rises from 0.
_LEAST_STEPS = 5
_NEW_NORM = "its last norm starts anew"


@dataclass(frozen=True)
class Trainee:
    """Something to train and judge by one protocol."""

    name: str
    protocol: str
    recipe: Recipe
    description: ModelDescription
    """Model that decides how the images are prepared."""
    about: dict[str, Any]
    remarks: tuple[str, ...] = ()


def trainees(models: Mapping[str, Model], sets: LabelledSets, rules: JudgingRules) -> list[Trainee]:
    """Return all that is to be trained: by each protocol, each encoder, and what starts from random weights."""
    found = list[Trainee]()
    for name, model in models.items():
        about, remarks = {"model": str(model.path), "sha256": model.sha256}, selection_remarks(model, sets.test)
        for protocol, recipe in _of_encoder(Start.of(model), sets.classes, rules):
            # Of an encoder that pools by `avg`, the norm belongs to the mean of the patch tokens.
            anew = (_NEW_NORM,) if model.description.pool == "avg" and protocol != "attentive" else ()
            found.append(Trainee(name, protocol, recipe, model.description, about, (*remarks, *anew)))
    untrained = prepared_alike(model.description for model in models.values())
    shapes = distinct_names([f"untrained {shape_of(each)}" for each in untrained], list(map(vars, untrained)))
    for name, description in zip(shapes, untrained, strict=True) if "scratch" in rules.protocols else ():
        recipe = tuned.recipe(Start(description), sets.classes, rules.training)
        found.append(Trainee(name, "scratch", recipe, description, {}))
    prepared = list(dict.fromkeys(map(_without_shape, untrained)))
    networks = distinct_names([resnet.NAME] * len(prepared), list(map(vars, prepared)))
    for name, description in zip(networks, prepared, strict=True) if "resnet" in rules.protocols else ():
        recipe = resnet.recipe(description, sets.classes, rules.training)
        found.append(Trainee(name, "resnet", recipe, description, {}))
    return found


def _without_shape(description: ModelDescription) -> ModelDescription:
    """Return how the images of a model are prepared, whatever the shape of its encoder."""
    return replace(description, width=1, depth=1, heads=1, patch_size=(1, 1), position_temperature=TEMPERATURE)


def _of_encoder(start: Start, classes: int, rules: JudgingRules) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipes of an encoder with their names; there are several of partial fine-tuning."""
    for protocol, module in (("attentive", attentive), ("linear_paper", linear_paper), ("finetune", tuned)):
        if protocol in rules.protocols:
            yield protocol, module.recipe(start, classes, rules.training)
    if "partial" in rules.protocols:
        yield from partial.recipes(start, classes, rules.training).items()


def require_trainable(
    trainees: Sequence[Trainee],
    sets: LabelledSets,
    rules: JudgingRules,
    prepared: Callable[[ModelDescription], DataSettings],
    accelerator: Accelerator,
) -> None:
    """Refuse what cannot be trained before anything is computed.

    Raises:
        UserError: if the batch is too large or cannot be divided, there are too few steps, images cannot be augmented
            as asked, a class has no training sample, or FSDP2 is on.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError("protocols that train do not shard their models; start the processes without FSDP2")
    for trainee in trainees:
        plan_of(trainee.recipe, rules.training, accelerator.num_processes)
        BatchRecipe(0, prepared(trainee.description), trainee.recipe.augment)
    if empty := empty_classes(np.bincount(sets.train.label, minlength=sets.classes), sets.names):
        raise UserError(
            f"{len(empty)} of {sets.classes} classes have no sample in data.shards, which protocols that train cannot "
            f"learn: {first_of(empty)}; add samples, or leave these protocols out"
        )
    smallest = min(len(split_off(sets.train.label, seed)[0]) for seed in range(rules.seeds))
    if smallest < rules.training.batch_size:
        raise UserError(
            f"batch_size is {rules.training.batch_size}, but data.shards have only {smallest} samples that are not "
            f"held out; allowed: 1 to {smallest}"
        )
    steps = total_steps(smallest, rules.training.epochs, rules.training.batch_size)
    if steps < _LEAST_STEPS:
        raise UserError(
            f"{smallest} samples for {rules.training.epochs:g} epochs in batches of {rules.training.batch_size} are "
            f"only {steps} steps; allowed: {_LEAST_STEPS} or more. Raise epochs or lower batch_size"
        )


def judge_trained(
    trainees: list[Trainee],
    sets: LabelledSets,
    rules: JudgingRules,
    prepared: Callable[[ModelDescription], DataSettings],
    accelerator: Accelerator,
) -> Iterator[Row]:
    """Train and judge each trainee; yield its row on every process. Collective.

    Raises:
        UserError: on every process, if images are bad or a training does not stay finite.
    """
    for trainee in trainees:
        data = prepared(trainee.description)
        outcomes = [
            (seed, _judge(trainee, sets, rules.training, seed, data, accelerator)) for seed in range(rules.seeds)
        ]
        remarks = dict.fromkeys(remark for _, outcome in outcomes for remark in outcome.remarks)
        yield row_of(
            trainee.name,
            trainee.protocol,
            outcomes,
            sets.test.label,
            (*trainee.remarks, *remarks),
            trainee.about,
        )


def _judge(
    trainee: Trainee,
    sets: LabelledSets,
    rules: TrainingRules,
    seed: int,
    data: DataSettings,
    accelerator: Accelerator,
) -> Outcome:
    """Choose the learning rate on held-out training samples, train on all, and predict the test samples once."""
    began, recipe = time.monotonic(), trainee.recipe
    every = Samples(sets.train, np.arange(len(sets.train)), data, sets.classes)
    test = Samples(sets.test, np.arange(len(sets.test)), data, sets.classes)
    fit, held_out = (every.take(ids) for ids in split_off(sets.train.label, seed))

    def probabilities(rate: float, known: Samples, queries: Samples, title: str) -> Any:
        title = f"{trainee.name}, {trainee.protocol}, seed {seed}, {title}"
        return predict(train(recipe, rate, known, rules, seed, accelerator, title), queries, accelerator)

    def held_out_accuracy(rate: float) -> float:
        found = probabilities(rate, fit, held_out, f"choice of rate {rate:g}")
        return accuracy(found, held_out.labels) if np.isfinite(found).all() else 0.0

    choice = choose_rate(recipe.rates, held_out_accuracy)
    scores = probabilities(choice.rate, every, test, f"rate {choice.rate:g}")
    if not np.isfinite(scores).all():
        raise UserError(
            f"{trainee.name}, {trainee.protocol}: training with learning rate {choice.rate:g} did not stay finite"
        )
    steps = total_steps(len(every.ids), rules.epochs, rules.batch_size)
    chosen = {
        "lr": choice.rate,
        "held_out_top1": choice.accuracy,
        "held_out_top1_of_rates": {f"{rate:g}": found for rate, found in choice.tried.items()},
        "epochs": rules.epochs,
        "steps": steps,
        "batch_size": rules.batch_size,
        "seconds": round(time.monotonic() - began, 1),
    }
    remarks = (choice.remark,) if choice.remark else ()
    return Outcome(scores, True, len(every.ids), chosen | dict(recipe.about), remarks)
