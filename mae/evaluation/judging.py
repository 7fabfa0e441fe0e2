"""What is judged (encoders, their heads, untrained encoders, pixels) and by which protocols."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray

from mae.data.index import ShardIndex
from mae.errors import UserError
from mae.evaluation.feature_set import PIXELS, FeatureSet
from mae.evaluation.features import Extraction, encoder_features, head_logits, pixels, untrained_features
from mae.evaluation.naming import distinct_names
from mae.evaluation.protocols import few_shot, knn, linear, svm
from mae.evaluation.protocols.outcome import Outcome
from mae.evaluation.protocols.training import TrainingRules
from mae.evaluation.results import Row, row_of
from mae.formats.opening import StoredModel
from mae.inference.model import Model, load_stored
from mae.models.description import ModelDescription

Protocol = Literal[
    "knn", "linear", "few_shot", "pixels", "untrained",
    "attentive", "linear_paper", "partial", "finetune", "scratch", "resnet",
]  # fmt: skip
"""Ways to judge an encoder. `pixels` and `untrained` show what knn, linear and few_shot give without pretraining; the
names in the second line train, see `mae.evaluation.trained`."""
HEAD, SVM = "head", "svm"


class LabelledSets(NamedTuple):
    """Shards to fit on and shards to measure on, with the classes that they agree on."""

    train: ShardIndex
    test: ShardIndex
    classes: int
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class JudgingRules:
    """Rules of all protocols."""

    protocols: tuple[Protocol, ...]
    kinds: tuple[str, ...]
    """Kinds of features of an encoder to choose from."""
    seeds: int
    """Number of times that each protocol is repeated, with other held-out samples and other random weights."""
    shots: int
    """Samples of each class for few_shot."""
    splits: int
    """Number of choices of these samples for each seed."""
    device: torch.device
    training: TrainingRules


@dataclass(frozen=True)
class Subject:
    """Something to judge."""

    name: str
    extractions: tuple[Extraction, ...]
    """Its features: one for all seeds, or one per seed."""
    protocols: tuple[str, ...]
    about: dict[str, Any]
    remarks: tuple[str, ...] = ()


def load_models(opened: Sequence[StoredModel], device: torch.device) -> dict[str, Model]:
    """Return the models by their names, which are their sources.

    Raises:
        UserError: if a model cannot be loaded, or is named twice.
    """
    models = {stored.source: load_stored(stored, device) for stored in opened}
    if len({model.path.resolve() for model in models.values()}) < len(opened):
        raise UserError(f"a model is named twice: {' '.join(stored.source for stored in opened)}; name each once")
    return models


def subjects(models: Mapping[str, Model], sets: LabelledSets, rules: JudgingRules) -> list[Subject]:
    """Return all that is to be judged without training: each encoder and its head, and what shows no pretraining."""
    asked = tuple(name for name in ("knn", "linear", "few_shot") if name in rules.protocols)
    found = [subject for name, model in models.items() for subject in _of_model(name, model, sets, asked)]
    plain = list[Subject]()
    for description in prepared_alike(model.description for model in models.values()):
        if "untrained" in rules.protocols:
            random = tuple(untrained_features(description, seed, rules.device) for seed in range(rules.seeds))
            plain.append(Subject(f"untrained {shape_of(description)}", random, asked, {}))
        if "pixels" in rules.protocols:
            reduced = pixels(description)
            rows, columns = reduced.identity["pixels"]
            plain.append(Subject(f"pixels {rows}x{columns}", (reduced,), (*asked, SVM), {}))
    return [subject for subject in (*found, *_told_apart(plain)) if subject.protocols]


def _told_apart(plain: Sequence[Subject]) -> list[Subject]:
    """Return each subject once, those of one name with what differs between them."""
    facts = [subject.extractions[0].facts for subject in plain]
    once = [number for number, each in enumerate(facts) if each not in facts[:number]]
    names = distinct_names([plain[number].name for number in once], [facts[number] for number in once])
    return [replace(plain[number], name=name) for number, name in zip(once, names, strict=True)]


def judge(
    subject: Subject,
    read: Callable[[Extraction, ShardIndex], NDArray[Any]],
    sets: LabelledSets,
    rules: JudgingRules,
) -> Iterator[Row]:
    """Yield the result of a subject under each of its protocols; `read` returns what an extraction has computed."""
    outcomes: dict[str, list[tuple[int, Outcome]]] = {protocol: [] for protocol in subject.protocols}
    for seed in range(rules.seeds):
        if seed < len(subject.extractions):
            values = [read(subject.extractions[seed], index) for index in (sets.train, sets.test)]
        train, test = FeatureSet(values[0], sets.train.label), FeatureSet(values[1], sets.test.label)
        for protocol, found in outcomes.items():
            if protocol != HEAD or seed == 0:  # nothing in it depends on the seed
                found += [(seed, outcome) for outcome in _judge_once(protocol, train, test, sets.classes, seed, rules)]
    for protocol, found in outcomes.items():
        yield row_of(subject.name, protocol, found, sets.test.label, subject.remarks, subject.about)


def _judge_once(
    protocol: str, train: FeatureSet, test: FeatureSet, classes: int, seed: int, rules: JudgingRules
) -> list[Outcome]:
    kinds = (PIXELS,) if train.is_pixels else rules.kinds
    if protocol == "knn":
        return [knn.judge(train, test, classes, seed, kinds, rules.device)]
    if protocol == "linear":
        return [linear.judge(train, test, classes, seed, kinds, rules.device)]
    if protocol == "few_shot":
        return few_shot.judge(train, test, classes, seed, kinds, rules.device, rules.shots, rules.splits)
    if protocol == SVM:
        return [svm.judge(train, test, classes, seed)]
    scores = torch.from_numpy(test.values).double().softmax(dim=1).numpy()
    return [Outcome(scores, True, 0, {})]


def _of_model(name: str, model: Model, sets: LabelledSets, asked: tuple[str, ...]) -> Iterator[Subject]:
    about = {"model": str(model.path), "sha256": model.sha256}
    remarks = selection_remarks(model, sets.test)
    yield Subject(name, (encoder_features(model),), asked, about, remarks)
    if model.has_head and _knows(model, sets):
        yield Subject(name, (head_logits(model),), (HEAD,), about, remarks)


def selection_remarks(model: Model, test: ShardIndex) -> tuple[str, ...]:
    """Return a remark if the model was selected on the test samples."""
    is_selected = model.selection is not None and model.selection.fingerprint == test.fingerprint
    return ("selected on this set",) if is_selected else ()


def _knows(model: Model, sets: LabelledSets) -> bool:
    """Return whether the classes of a fine-tuned model are those of the sets."""
    named = model.description.classes is not None and sets.names is not None
    return model.classes == sets.names if named else len(model.classes) == sets.classes


def shape_of(description: ModelDescription) -> str:
    """Return the shape of an encoder in short: width x depth / patch size."""
    patch = "x".join(map(str, dict.fromkeys(description.patch_size)))
    return f"{description.width}x{description.depth}/{patch}"


def prepared_alike(descriptions: Iterable[ModelDescription]) -> list[ModelDescription]:
    """Return each encoder once, with the preparation of its images, whatever its decoder or head."""
    plain = [replace(each, kind="classifier", decoder=None, classes=None, pool="cls") for each in descriptions]
    return list(dict.fromkeys(plain))
