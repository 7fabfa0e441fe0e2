"""Fine-tuning as a task: its unit, classes, subset, arithmetic, groups and loss."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_fork
from models.test_devices import fake_gpu, require_gpu, to_gpu
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup
from torch import Tensor, nn

from mae.data.batch import empty_batch
from mae.data.images.erasing import erase
from mae.data.loader import normalize
from mae.data.plan import plan_batches
from mae.data.settings import DataSettings
from mae.data.source import statistics_of
from mae.errors import UserError
from mae.models.flops import classifier_flops
from mae.models.settings import EncoderSettings
from mae.tasks.classification_loss import ClassificationLoss, RegularizationSettings
from mae.tasks.finetune_settings import FinetuneAugmentSettings, FinetuneOptimSettings, FinetuneSettings
from mae.tasks.finetuning import Finetuning

MODEL = EncoderSettings(width=16, depth=2, heads=2, patch_size=(2,))
UNMIXED = RegularizationSettings(drop_path=0.0, label_smoothing=0.2, mixup=0.0, cutmix=0.0)


def augment(**changes: Any) -> FinetuneAugmentSettings:
    plain = {"crop_scale": (0.2, 1.0), "rand_augment": "none", "erase": 0.0}
    return FinetuneAugmentSettings(**(plain | changes))


@pytest.fixture
def task(make_shards: Callable[..., Path]) -> Callable[..., Finetuning]:
    """A function that opens a fine-tuning on 25 gray images of 8x8 pixels in four classes."""
    return partial(open_task, make_shards([13, 12]))


def open_task(
    shards: Path, data: dict[str, Any] | None = None, say: Callable[[str], None] = lambda text: None, **changes: Any
) -> Finetuning:
    given = {"shards": (str(shards),), "channels": 1, "image_size": (8,), "workers": 0} | (data or {})
    plain = {"augment": augment(), "model": MODEL, "regularization": UNMIXED, "eval_overlap": 1.0}
    settings = FinetuneSettings(shards.parent / "run", data=DataSettings(**given), **(plain | changes))
    return Finetuning.open(settings, say)


@pytest.mark.parametrize(
    ("views", "mixup", "cutmix", "unit"), [(1, 0.0, 0.0, 1), (3, 0.0, 0.0, 3), (1, 0.8, 0.0, 2), (3, 0.0, 1.0, 6)]
)
def test_views_stay_together_and_mixing_pairs_images(
    task: Callable[..., Finetuning], views: int, mixup: float, cutmix: float, unit: int
) -> None:
    made = task({"views_per_image": views}, regularization=RegularizationSettings(mixup=mixup, cutmix=cutmix))
    assert made.unit == unit


def test_it_needs_no_random_numbers(task: Callable[..., Finetuning]) -> None:
    made = task()
    assert made.noise_columns == 0
    assert made.batches(plan_batches(4, 1, None), 0).starting_at(0)[0].noise.shape == (4, 0)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_its_arithmetic_is_that_of_training_encoder_and_head(task: Callable[..., Finetuning], head: Any) -> None:
    assert task(head=head).flops_per_image == classifier_flops(MODEL, (8, 8), 1, 4, head).training


@pytest.fixture
def named(make_shards: Callable[..., Path]) -> Callable[[str, str], Path]:
    """A function that makes shards of four classes with these names."""

    def make(name: str, classes: str) -> Path:
        folder = make_shards([8], name=name)
        if classes:
            (folder / "classes.txt").write_text("\n".join(classes.split()) + "\n")
        return folder

    return make


def test_training_and_evaluation_of_other_class_lists_are_refused(named: Callable[[str, str], Path]) -> None:
    trained, held_out = named("train", "cat dog emu fox"), named("val", "dog emu fox gnu")
    with pytest.raises(UserError, match=r"data.shards and eval_shards have different class lists.*label 0 is 'cat'"):
        open_task(trained, eval_shards=(str(held_out),))


def test_class_names_reach_the_description_and_what_has_none_is_reported(
    named: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    trained, held_out = named("train", "cat dog emu fox"), named("val", "")
    made = open_task(trained, eval_shards=(str(held_out),), say=print)
    assert made.description.classes == ("cat", "dog", "emu", "fox")
    assert "eval_shards have no classes.txt: their labels are taken by number" in capsys.readouterr().out
    assert open_task(named("plain", "")).description.classes is None


def test_a_class_without_samples_stays_a_class_and_a_label_without_a_class_is_refused(
    named: Callable[[str, str], Path],
) -> None:
    made = open_task(named("five", "cat dog emu fox gnu"), labels_per_class=1)
    assert made.classes == 5
    assert made.subset is not None
    assert len(made.subset) == 4
    with pytest.raises(UserError, match=r"label 3 has no name: there are 3 class names"):
        open_task(named("three", "cat dog emu"))


def test_training_on_samples_of_the_evaluation_is_refused_or_counted_and_named(
    make_shards: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    trained, held_out = make_shards([4]), make_shards([20], name="held-out")
    shared = r"evaluation samples are also training samples: \S+held-out/train-000000.tar: 000000.png is \S+"
    with pytest.raises(UserError, match=rf"4 or more of 20 {shared}.*and 2 more; allowed: 19\.0% \(eval_overlap\)"):
        open_task(trained, eval_shards=(str(held_out),), eval_overlap=0.19)
    open_task(trained, eval_shards=(str(held_out),), eval_overlap=0.2, say=print)
    assert "warning: 4 of 20 evaluation samples are also training samples" in capsys.readouterr().out


def test_it_describes_a_classifier(task: Callable[..., Finetuning]) -> None:
    made = task()
    description, statistics = made.description, statistics_of(made.settings.data)
    assert (description.kind, description.grid, description.decoder) == ("classifier", (4, 4), None)
    assert (description.mean, description.std) == (statistics.mean, statistics.std)
    assert made.build_model()(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_the_groups_hold_every_parameter_once_at_the_rate_of_its_layer(task: Callable[..., Finetuning]) -> None:
    made = task(optim=FinetuneOptimSettings(layer_decay=0.5))
    model = made.build_model()
    groups = made.parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(scales) == len(names)
    expected = {"cls_token": 0.125, "blocks.0.attn.qkv.weight": 0.25, "blocks.1.attn.qkv.weight": 0.5, "norm.bias": 1}
    assert {name: scales[name] for name in expected} == expected


def test_few_labels_are_chosen_by_the_seed(task: Callable[..., Finetuning]) -> None:
    assert task().subset is None
    first, again, other = (task(labels_per_class=2, seed=seed) for seed in (1, 1, 2))
    assert first.subset is not None
    assert np.bincount(first.source.index.label[first.subset]).tolist() == [2, 2, 2, 2]
    assert np.array_equal(first.subset, again.subset)
    assert not np.array_equal(first.subset, other.subset)
    epoch = first.batches(plan_batches(8, 1, None), 0).starting_at(0)[0]
    assert sorted(epoch.ids.tolist()) == first.subset.tolist()


def test_labels_that_training_never_sees_are_refused(
    task: Callable[..., Finetuning], make_shards: Callable[..., Path]
) -> None:
    more = make_shards([12], name="more", classes=6)
    with pytest.raises(UserError, match=r"eval_shards have labels up to 5, data\.shards only up to 3"):
        task(eval_shards=(str(more),))
    held_out = task(eval_shards=(str(make_shards([7], name="held-out")),)).held_out
    assert held_out is not None
    assert len(held_out) == 7


def test_its_loss_is_the_smoothed_cross_entropy(task: Callable[..., Finetuning]) -> None:
    made = task()
    batch = made.batches(plan_batches(3, 1, None), 0).starting_at(0)[0]
    model = made.build_model().eval()
    found = made.loss_of(3)(model, batch)
    assert (found.shape, found.dtype) == ((), torch.float32)
    logits = model(normalize(batch.images, statistics_of(made.settings.data))).log_softmax(1)
    target = torch.full((3, 4), 0.2 / 4)
    target[torch.arange(3), batch.labels] += 0.8
    torch.testing.assert_close(found, -(target * logits).sum(1).mean())


def test_its_images_are_erased_after_they_are_normalised(task: Callable[..., Finetuning]) -> None:
    made = task(augment=augment(erase=0.5))
    batch = made.batches(plan_batches(8, 1, None), 0).starting_at(0)[0]
    seen = []

    class Classifier(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return torch.zeros(len(images), 4)

    made.loss_of(8)(Classifier(), batch)
    plain = normalize(batch.images, statistics_of(made.settings.data))
    assert torch.equal(seen[0], erase(plain.clone(), batch.words, 0.5))
    assert 1 <= (seen[0] != plain).flatten(1).any(dim=1).sum() <= 7


def test_an_odd_number_of_images_cannot_be_mixed(task: Callable[..., Finetuning]) -> None:
    made = task(regularization=RegularizationSettings())
    with pytest.raises(UserError, match=r"mixup and cutmix pair .* takes 3 at a time; .* even number"):
        made.loss_of(3)
    batch = made.batches(plan_batches(4, 1, None), 0).starting_at(0)[0]
    assert made.loss_of(4)(made.build_model(), batch).isfinite()


@in_fork
def test_its_loss_on_a_gpu_is_float32_and_needs_no_value_on_the_host(make_shards: Callable[..., Path]) -> None:
    shards = make_shards([13, 12])
    mixing = RegularizationSettings(drop_path=0.3)
    for head, regularization in product(("mlp", "linear"), (UNMIXED, mixing)):
        made = open_task(shards, head=head, regularization=regularization)
        model, loss_of, batch = made.build_model(), made.loss_of(4), empty_batch(4, made.settings.data, 0)
        with fake_gpu():
            to_gpu(model)
            images = torch.empty(batch.images.shape, dtype=torch.uint8, device="cuda")
            labels = torch.empty(4, dtype=torch.int64, device="cuda")
            loss = loss_of(model, batch._replace(images=images, labels=labels))
        require_gpu(torch.float32, loss)


def test_class_weights_are_those_of_scikit_learn(make_shards: Callable[..., Path]) -> None:
    made = open_task(make_shards([10]), class_weights="balanced")
    labels = made.source.index.label
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert len({*np.bincount(labels).tolist()}) > 1
    assert made.class_weights is not None
    np.testing.assert_allclose(made.class_weights.numpy(), expected, rtol=1e-6)


class Fixed(nn.Module):
    """A model that returns the same logits for all images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_the_weighted_loss_is_the_sum_of_its_definition(mixup: float) -> None:
    rules = RegularizationSettings(label_smoothing=0.2, mixup=mixup, cutmix=0.0)
    weights = torch.tensor([0.5, 1.0, 1.5, 2.0])
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    np.random.seed(0)
    found = ClassificationLoss(rules, 4, weights)(Fixed(logits), torch.rand(6, 1, 8, 8), labels)
    np.random.seed(0)
    if mixup:
        _, targets = Mixup(mixup, 0.0, label_smoothing=0.2, num_classes=4)(torch.rand(6, 1, 8, 8), labels)
    else:
        targets = 0.8 * torch.eye(4)[labels] + 0.05
    expected = sum(-weights[c] * targets[n, c] * logits[n].log_softmax(0)[c] for n in range(6) for c in range(4)) / 6
    torch.testing.assert_close(found, torch.as_tensor(expected))


def test_equal_weights_leave_the_loss_as_it_is() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    plain, weighted = (
        ClassificationLoss(UNMIXED, 4, weights)(Fixed(logits), torch.rand(6, 1, 8, 8), labels)
        for weights in (None, torch.ones(4))
    )
    torch.testing.assert_close(plain, weighted)


def test_classes_without_samples_are_reported_and_cannot_be_balanced(
    named: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = named("six", "cat dog emu fox gnu hen")
    open_task(shards, say=print)
    expected = "warning: 2 of 6 classes have no training sample, so they are not learned: gnu; hen"
    assert expected in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"2 of 6 have none: gnu; hen; add samples, remove .* or set class_weights none"
    ):
        open_task(shards, class_weights="balanced")


@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_layer_decay_is_the_formula_for_each_pool(task: Callable[..., Finetuning], pool: Any) -> None:
    """Of L = 2 blocks: the stem has decay**3, block i decay**(2 - i), everything after the blocks 1."""
    made = task(pool=pool, optim=FinetuneOptimSettings(layer_decay=0.5))
    model = made.build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr_scale"] for group in made.parameter_groups(model) for p in group["params"]}
    scales = {"cls_token": 0.125, "pos_embed": 0.125, "patch_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5}
    expected = {name: next((s for start, s in scales.items() if name.startswith(start)), 1.0) for name in found}
    assert found == expected
    assert found.keys() == set(names.values())
    assert ("fc_norm.weight" in found) == (pool == "avg")
