"""Fine-tune a pretrained encoder, with a head on its cls token, on labelled shards.

accelerate launch pipelines/finetune.py --config configs/finetune/vit_base.yaml --init runs/pretrain \
    --data.shards 'shards/train-*.tar' --eval_shards 'shards/val-*.tar'
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from mae.data.batches import Batch, BatchPlan, EvalBatches, TrainBatches, labelled_subset, plan_batches
from mae.data.images.augment import AugmentSettings
from mae.data.index import ShardIndex
from mae.data.loader import normalize
from mae.data.prepare import open_shards, resolve_statistics, statistics_of
from mae.data.settings import DataSettings
from mae.errors import UserError
from mae.evaluation.classification import evaluate
from mae.models.classifier import build_classifier
from mae.models.flops import classifier_flops
from mae.models.settings import EncoderSettings
from mae.models.weights import file_tensors, load_encoder
from mae.report.run import write_finetune_report
from mae.settings import check, parse
from mae.training.loop import Job, LossOf, training
from mae.training.micro_batch import Fit, agree_on_micro_batch, fit_micro_batch
from mae.training.optimizer import OptimSettings, describe_groups, parameter_groups
from mae.training.origin import SCRATCH, find_origin, fit_data
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import AUTO, TrainSettings, spelled_out
from mae.training.start import finish_job, start_job

BEST_FILE = "best.safetensors"


@dataclass(frozen=True)
class FinetuneOptimSettings(OptimSettings):
    """AdamW with layer decay; the defaults are the paper's ViT-B fine-tuning recipe."""

    base_lr: float = 1e-3
    """Learning rate per 256 images of the global batch; the peak is base_lr * batch_size / 256."""
    warmup_epochs: float = 5.0
    """Epochs over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    layer_decay: float = 0.75
    """Each block learns at this factor of the rate of the block after it; 1 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass(frozen=True)
class RegularizationSettings:
    """What keeps a classifier from learning its training images by heart."""

    drop_path: float = 0.1
    """Rate of stochastic depth at the last block; it rises linearly from 0 at the first."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.8
    """Alpha of mixup's beta distribution; 0 turns it off."""
    cutmix: float = 1.0
    """Alpha of cutmix's beta distribution; 0 turns it off. With both on, each batch takes one by chance."""

    def __post_init__(self) -> None:
        check(0 <= self.drop_path < 1, "regularization.drop_path", self.drop_path, "from 0, below 1")
        check(
            0 <= self.label_smoothing < 1,
            "regularization.label_smoothing",
            self.label_smoothing,
            "from 0, below 1",
        )
        check(0 <= self.mixup < math.inf, "regularization.mixup", self.mixup, "0 or more")
        check(0 <= self.cutmix < math.inf, "regularization.cutmix", self.cutmix, "0 or more")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """Fine-tune an encoder with a head on its cls token; the defaults are the paper's ViT-B/16 recipe."""

    init: str = SCRATCH
    """Folder of a finished run, or a .safetensors file of one, whose images may have had another size; none: train from
    scratch."""
    head: Literal["mlp", "linear"] = "mlp"
    """On the normed cls token: one hidden layer of the encoder's width with GELU, or a single linear layer."""
    epochs: float = 100.0
    """How often each sample is seen; the last batch is completed from the next epoch."""
    batch_size: int = 1024
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    eval_shards: tuple[str, ...] = ()
    """Labelled tar shards to measure accuracy on after each `eval_every` epochs and at the end."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    labels_per_class: int | None = None
    """Train on this many samples of each class, chosen by the seed; None: on all."""
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=lambda: AugmentSettings(crop_scale=(0.08, 1.0), rand_augment=9))
    model: EncoderSettings = field(default_factory=EncoderSettings)
    regularization: RegularizationSettings = field(default_factory=RegularizationSettings)
    optim: FinetuneOptimSettings = field(default_factory=FinetuneOptimSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = self.labels_per_class
        check(labels is None or labels >= 1, "labels_per_class", labels, "1 or more, or None")
        check(0 < self.eval_every < math.inf, "eval_every", self.eval_every, "above 0")
        self.model.grid(self.data.size)
        check(self.data.reader == "indexed", "data.reader", self.data.reader, "indexed, which knows all labels")

    @property
    def unit(self) -> int:
        """Images of which a micro-batch holds a multiple: the views of one stay together, mixup pairs images."""
        return math.lcm(self.data.views_per_image, 2 if self.regularization.mixes else 1)


def run(settings: FinetuneSettings) -> RunFolder:
    """Train, or go on training, evaluate, and write the run folder."""
    accelerator = start_accelerator(settings.precision, settings.timeout)
    progress = TrainingProgress("finetune", accelerator.is_main_process)

    folder = RunFolder(settings.run_dir)
    settings = folder.with_its_micro_batch(replace(settings, data=folder.with_its_statistics(settings.data)))
    plan = plan_batches(settings.batch_size, accelerator.num_processes, settings.micro_batch_limit)
    index = open_shards(settings.data.shards, settings.data, progress.say)
    held_out = None
    if settings.eval_shards:
        # The index that data.index names is that of the training shards.
        held_out = open_shards(settings.eval_shards, replace(settings.data, index=None), progress.say)
    classes = class_count(index, held_out)
    settings = replace(settings, data=resolve_data(settings, index, progress))
    if settings.micro_batch_size == AUTO:
        find = partial(find_micro_batch, settings, accelerator, classes)
        plan = agree_on_micro_batch(accelerator, plan, find, progress.say)
        settings = replace(settings, micro_batch_size=plan.per_process)

    model = build_model(settings, classes)
    subset = None
    if settings.labels_per_class is not None:
        subset = labelled_subset(index, settings.labels_per_class, settings.seed)
    batches = TrainBatches(
        index, plan, accelerator.process_index, settings.seed, settings.data, settings.augment, subset=subset
    )
    groups = parameter_groups(model, settings.optim.weight_decay, settings.optim.layer_decay)
    flops = classifier_flops(settings.model, settings.data.size, settings.data.channels, classes, settings.head)
    job = start_job(
        accelerator=accelerator,
        settings=settings,
        model=model,
        kind="classifier",
        encoder=settings.model,
        optim=settings.optim,
        groups=groups,
        batches=batches,
        loss_of=loss_function(settings, classes, plan.per_process),
        flops_per_image=flops.training,
        progress=progress,
    )
    for line in describe_groups(groups, job.schedule.peak):
        progress.say(line)
    with training(job) as steps:
        for step in steps:
            if held_out is not None and evaluation_due(step, job, settings.eval_every):
                measure(job, settings, held_out, step)
        finish_job(job)
    if accelerator.is_main_process:
        write_finetune_report(job.folder, settings, accelerator.device)
    progress.say(f"model {job.folder.model}, report {job.folder.report}")
    return job.folder


def class_count(index: ShardIndex, held_out: ShardIndex | None) -> int:
    """Number of classes of the training shards; the evaluation shards may hold no other.

    Raises:
        UserError: if samples have no label, or the evaluation shards a label that training never sees.
    """
    classes = index.class_count()
    if held_out is not None and held_out.class_count() > classes:
        raise UserError(
            f"eval_shards hold labels up to {held_out.class_count() - 1}, data.shards only up to {classes - 1}; "
            "pack both with the same class list"
        )
    return classes


def resolve_data(settings: FinetuneSettings, index: ShardIndex, progress: TrainingProgress) -> DataSettings:
    """Mean and std as set, else those the encoder was pretrained with, else those of the shards.

    Raises:
        UserError: if the settings ask for another encoder or other channels than `init` holds.
    """
    origin = find_origin(settings.init, RunFolder(settings.run_dir))
    if origin is None:
        return resolve_statistics(index, settings.data, progress.say)
    return fit_data(origin, settings.model, settings.data, progress.say)


def build_model(settings: FinetuneSettings, classes: int) -> nn.Module:
    """The encoder, with its pretrained weights if there are any, and a new head."""
    torch.manual_seed(settings.seed)
    size, drop_path = settings.data.size, settings.regularization.drop_path
    model: nn.Module = build_classifier(settings.model, size, settings.data.channels, classes, settings.head, drop_path)
    origin = find_origin(settings.init, RunFolder(settings.run_dir))
    if origin is not None:
        load_encoder(model, origin.weights(settings.model.grid(size)), origin.path)
    return model


def find_micro_batch(
    settings: FinetuneSettings, accelerator: Accelerator, classes: int, plan: BatchPlan, here: int, running: int
) -> Fit:
    """By `fit_micro_batch`, which says what the numbers are."""
    return fit_micro_batch(
        accelerator,
        partial(build_model, settings, classes),
        loss_function(settings, classes, settings.unit),
        settings,
        settings.optim,
        settings.data,
        plan,
        settings.unit,
        here=here,
        running=running,
    )


class Mix:
    """Images and labels, mixed by timm's mixup and cutmix where either is on."""

    def __init__(self, regularization: RegularizationSettings, classes: int) -> None:
        self.active = regularization.mixes
        self._mixup = Mixup(
            mixup_alpha=regularization.mixup,
            cutmix_alpha=regularization.cutmix,
            label_smoothing=regularization.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets, or both as they were."""
        if not self.active:
            return images, labels
        mixed, targets = self._mixup(images, labels)
        return mixed, targets


def loss_function(settings: FinetuneSettings, classes: int, per_process: int) -> LossOf:
    """Of a batch of `per_process` images on the device: cross-entropy, with mixed images where that is on.

    Raises:
        UserError: if mixup or cutmix would have to pair an odd number of images.
    """
    statistics = statistics_of(settings.data)
    mix, criterion = build_criterion(settings.regularization, classes, per_process)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        images, targets = mix(normalize(batch.images, statistics), batch.labels)
        loss: Tensor = criterion(model(images).float(), targets)
        return loss

    return loss_of


def build_criterion(regularization: RegularizationSettings, classes: int, per_process: int) -> tuple[Mix, nn.Module]:
    """How targets are made and held against logits; raises as `loss_function`."""
    mix = Mix(regularization, classes)
    if not regularization.mixes:
        return mix, nn.CrossEntropyLoss(label_smoothing=regularization.label_smoothing)
    if per_process % 2:
        raise UserError(
            f"mixup and cutmix pair the images of a batch, which are {per_process} per process; "
            "choose a batch_size that leaves an even number, or set regularization.mixup and .cutmix to 0"
        )
    return mix, SoftTargetCrossEntropy()


def evaluation_due(step: int, job: Job, every: float) -> bool:
    """Whether `step` is the first to complete another `every` epochs, or the last of all."""
    per_period = job.samples * every / job.plan.global_batch
    return step == job.total or math.floor(step / per_period) > math.floor((step - 1) / per_period)


def measure(job: Job, settings: FinetuneSettings, held_out: ShardIndex, step: int) -> None:
    """Evaluate the model as it is after `step` steps, log it, and keep it in `best.safetensors` if it is the best."""
    accelerator, data = job.accelerator, settings.data
    batches = EvalBatches(held_out, job.plan.per_process, data, accelerator.process_index, accelerator.num_processes)
    epoch = step * job.plan.global_batch / job.samples
    with job.state.shown() as model:
        result = evaluate(accelerator, model, batches, statistics_of(data), data.workers)
        best = result.accuracy > job.notes.get("best", {}).get("accuracy", -1.0)
        if best:
            job.notes["best"] = {"step": step, "accuracy": result.accuracy}
        if accelerator.is_main_process:
            job.folder.log({"kind": "eval", "step": step, "epoch": epoch, **result._asdict()})
            if best:
                job.folder.publish(file_tensors(model), job.description.metadata(), BEST_FILE)
    job.progress.say(
        f"epoch {epoch:.1f}: accuracy {result.accuracy:.2%}, loss {result.loss:.4f} on {result.samples:,} samples"
        + (", the best so far" if best else "")
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`mae finetune`."""
    with errors_said_once():
        run(parse(FinetuneSettings, spelled_out(sys.argv[1:] if argv is None else argv), prog="mae finetune"))


if __name__ == "__main__":
    main()
