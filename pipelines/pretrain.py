"""Pretrain a masked autoencoder on unlabelled image shards.

accelerate launch pipelines/pretrain.py --config configs/pretrain/vit_base.yaml --data.shards 'shards/train-*.tar'
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from mae import keyed
from mae.data.batches import Batch, BatchPlan, EvalBatches, TrainBatches, plan_batches
from mae.data.images.augment import AugmentSettings
from mae.data.index import ShardIndex
from mae.data.loader import normalize
from mae.data.prepare import open_shards, resolve_statistics, statistics_of, stored_for_stream
from mae.data.settings import DataSettings
from mae.data.store.shards import Shard, expand
from mae.data.stream import PROMISES, StreamBatches, first_images
from mae.errors import UserError
from mae.files import write_atomically
from mae.keyed import Purpose
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.flops import autoencoder_flops
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.weights import load_autoencoder
from mae.report.pictures import draw_reconstructions, reconstruction_panels
from mae.report.run import write_pretrain_report
from mae.settings import check, parse
from mae.training.loop import Job, LossOf, training
from mae.training.micro_batch import Fit, agree_on_micro_batch, fit_micro_batch
from mae.training.optimizer import OptimSettings, parameter_groups
from mae.training.origin import SCRATCH, find_origin, fit_data
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import AUTO, TrainSettings, spelled_out
from mae.training.start import finish_job, start_job


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """Pretrain a masked autoencoder; the defaults are the paper's ViT-B/16 recipe."""

    init: str = SCRATCH
    """Folder of a finished run, or a .safetensors file of one, whose weights this run begins with, on a schedule of its
    own; its images may have had another size. none: train from scratch. To go on with a run, start it again."""
    epochs: float = 800.0
    """How often each sample is seen; the last batch is completed from the next epoch."""
    batch_size: int = 4096
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    picture_every: int = 5000
    """Steps between reconstruction pictures; one more is drawn at the end."""
    picture_images: int = 8
    """Images in a reconstruction picture, always the same ones under the same masks."""
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: MaskedAutoencoderSettings = field(default_factory=MaskedAutoencoderSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.picture_every >= 1, "picture_every", self.picture_every, "1 or more")
        check(self.picture_images >= 1, "picture_images", self.picture_images, "1 or more")
        self.model.check_image_size(self.data.size)

    @property
    def unit(self) -> int:
        """Images of which a micro-batch holds a multiple: the views of one stay together."""
        return self.data.views_per_image


def run(settings: PretrainSettings) -> RunFolder:
    """Train, or go on training, and write the run folder."""
    accelerator = start_accelerator(settings.precision, settings.timeout)
    progress = TrainingProgress("pretrain", accelerator.is_main_process)

    folder = RunFolder(settings.run_dir)
    settings = folder.with_its_micro_batch(replace(settings, data=folder.with_its_statistics(settings.data)))
    plan = plan_batches(settings.batch_size, accelerator.num_processes, settings.micro_batch_limit)
    source: ShardIndex | list[Shard]
    if settings.data.reader == "stream":
        source = expand(settings.data.shards)
        progress.say(PROMISES)
    else:
        source = open_shards(settings.data.shards, settings.data, progress.say)
    settings = replace(settings, data=resolve_data(settings, source, progress.say))
    if settings.micro_batch_size == AUTO:
        plan = agree_on_micro_batch(accelerator, plan, partial(find_micro_batch, settings, accelerator), progress.say)
        settings = replace(settings, micro_batch_size=plan.per_process)

    model = build_model(settings)
    batches = build_batches(settings, source, plan, accelerator.process_index)
    job = start_job(
        accelerator=accelerator,
        settings=settings,
        model=model,
        kind="masked autoencoder",
        encoder=settings.model,
        optim=settings.optim,
        groups=parameter_groups(model, settings.optim.weight_decay),
        batches=batches,
        loss_of=loss_function(settings),
        flops_per_image=autoencoder_flops(settings.model, settings.data.size, settings.data.channels).training,
        progress=progress,
    )
    with training(job) as steps:
        draw = picture_drawer(job, settings, source)
        for step in steps:
            if step % settings.picture_every == 0 or step == job.total:
                draw(step)
        finish_job(job)
    if accelerator.is_main_process:
        write_pretrain_report(job.folder, settings, accelerator.device)
    progress.say(f"model {job.folder.model}, report {job.folder.report}")
    return job.folder


def resolve_data(
    settings: PretrainSettings, source: ShardIndex | list[Shard], say: Callable[[str], None]
) -> DataSettings:
    """Mean and std as set, else those that the model of `init` was trained with, else those of the shards.

    Raises:
        UserError: if the settings ask for another model than `init` holds, or mean and std cannot be known.
    """
    origin = find_origin(settings.init, RunFolder(settings.run_dir))
    data = settings.data if origin is None else fit_data(origin, settings.model, settings.data, say)
    return stored_for_stream(source, data) if isinstance(source, list) else resolve_statistics(source, data, say)


def build_model(settings: PretrainSettings) -> MaskedAutoencoder:
    """Encoder and decoder as the run begins with them."""
    torch.manual_seed(settings.seed)
    model = MaskedAutoencoder(settings.model, settings.data.size, settings.data.channels)
    origin = find_origin(settings.init, RunFolder(settings.run_dir))
    if origin is not None:
        load_autoencoder(model, origin.weights(model.grid), origin.path)
    return model


def build_batches(
    settings: PretrainSettings, source: ShardIndex | list[Shard], plan: BatchPlan, rank: int
) -> TrainBatches | StreamBatches:
    """Images, and the noise of their masks, that a rank trains on; a list of shards is read as a stream."""
    patches = math.prod(settings.model.grid(settings.data.size))
    rest = (plan, rank, settings.seed, settings.data, settings.augment, patches)
    return StreamBatches(source, *rest) if isinstance(source, list) else TrainBatches(source, *rest)


def loss_function(settings: PretrainSettings) -> LossOf:
    """Of a batch on the device: that of the hidden patches."""
    statistics = statistics_of(settings.data)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(normalize(batch.images, statistics), batch.noise).loss
        return loss

    return loss_of


def find_micro_batch(
    settings: PretrainSettings, accelerator: Accelerator, plan: BatchPlan, here: int, running: int
) -> Fit:
    """By `fit_micro_batch`, which says what the numbers are."""
    return fit_micro_batch(
        accelerator,
        partial(build_model, settings),
        loss_function(settings),
        settings,
        settings.optim,
        settings.data,
        plan,
        settings.unit,
        patches=math.prod(settings.model.grid(settings.data.size)),
        here=here,
        running=running,
    )


def picture_drawer(job: Job, settings: PretrainSettings, source: ShardIndex | list[Shard]) -> Callable[[int], None]:
    """A function that draws the reconstructions of fixed images under fixed masks into the run folder.

    The images are spread evenly over the data, or are the first of a stream; rank 0 draws, and all ranks lend it their
    part of the model.
    """
    if not job.accelerator.is_main_process:
        return lambda step: _lend_model(job)
    if isinstance(source, list):
        pixels = first_images(source[0], settings.picture_images, settings.data)
        ids = np.arange(len(pixels))
    else:
        ids = np.linspace(0, len(source) - 1, min(settings.picture_images, len(source))).astype(np.int64)
        batch = EvalBatches(source, len(ids), settings.data, ids=ids)[0]
        if batch.bad and not settings.data.max_bad_samples:
            raise UserError(f"bad image {batch.bad[0]}; pack the shards again without it")
        pixels = batch.images
    device, statistics = job.accelerator.device, statistics_of(settings.data)
    images = normalize(pixels.to(device), statistics)
    key = keyed.key(Purpose.PICTURE, settings.seed)
    patches = math.prod(settings.model.grid(settings.data.size))
    noise = torch.from_numpy(keyed.uniform_float32(key, ids, patches)).to(device)
    # FSDP2 would take what the blocks do outside a forward pass for a part of the next step, on this rank alone.
    register_fsdp_forward_method(job.accelerator.unwrap_model(job.model), "predict_all")

    def draw(step: int) -> None:
        with job.state.shown() as model, job.accelerator.autocast():
            assert isinstance(model, MaskedAutoencoder)
            panels = reconstruction_panels(model, images, noise, statistics)
        title = f"step {step:,} of {job.total:,}, {settings.model.mask_ratio:.0%} of the patches hidden"
        picture = draw_reconstructions(panels, title, settings.model.norm_pix_loss)
        write_atomically(job.folder.pictures / f"step-{step:09d}.png", picture)

    return draw


def _lend_model(job: Job) -> None:
    with job.state.shown():
        pass


def main(argv: Sequence[str] | None = None) -> None:
    """`mae pretrain`."""
    with errors_said_once():
        run(parse(PretrainSettings, spelled_out(sys.argv[1:] if argv is None else argv), prog="mae pretrain"))


if __name__ == "__main__":
    main()
