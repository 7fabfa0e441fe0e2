"""Reconstruction pictures during pretraining: always the same images with the same masks."""

from collections.abc import Callable

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from mae import keyed
from mae.data.loader import normalize
from mae.data.source import statistics_of
from mae.errors import what_to_do
from mae.files import write_atomically
from mae.inference.reconstruction import reconstructed
from mae.keyed import Purpose
from mae.models.autoencoder import MaskedAutoencoder
from mae.output import warn
from mae.report.pictures import draw_reconstructions
from mae.tasks.pretraining import Pretraining
from mae.training.job import Job


def picture_drawer(job: Job, task: Pretraining) -> Callable[[int], None]:
    """Return a function that draws the reconstructions of a step into the run folder.

    The function is collective: rank 0 draws, and the other ranks give it their parts of the model.
    """
    if not job.accelerator.is_main_process:
        return lambda step: _lend_model(job)
    settings, data, device = task.settings, task.settings.data, job.accelerator.device
    fixed, statistics = task.source.fixed_images(settings.picture_images, data), statistics_of(data)
    images = normalize(fixed.pixels.to(device), statistics)
    key = keyed.key(Purpose.PICTURE, settings.seed)
    noise = torch.from_numpy(keyed.uniform_float32(key, fixed.ids, task.noise_columns)).to(device)
    # Without this, FSDP2 would assign work of the blocks outside a forward pass to the next step, on this rank only.
    register_fsdp_forward_method(job.accelerator.unwrap_model(job.model), "predict_all")

    def draw(step: int) -> None:
        with job.state.evaluation_weights() as model, job.accelerator.autocast():
            assert isinstance(model, MaskedAutoencoder)
            panels = reconstructed(model, images, noise, statistics).panels
        title = f"step {step:,} of {job.total:,}, {settings.model.mask_ratio:.0%} of the patches hidden"
        picture = draw_reconstructions(panels, title, settings.model.norm_pix_loss)
        path = job.folder.pictures / f"step-{step:09d}.png"
        try:
            write_atomically(path, picture)
        except OSError as error:  # a picture is not worth the run
            warn(f"{path} is not written: {what_to_do(error)}")

    return draw


def _lend_model(job: Job) -> None:
    with job.state.evaluation_weights():
        pass
