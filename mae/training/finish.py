"""Finish of a run: its model is published, and what an earlier start has published is verified."""

from mae.errors import CheckpointError
from mae.models.description import MODEL_FILE
from mae.models.weights import holds_tensors
from mae.safetensors_file import sha256
from mae.training.checkpoints.reader import newest_checkpoint
from mae.training.job import Job
from mae.training.state import final_weights


def finish_job(job: Job) -> None:
    """Publish the model of the last step in the run folder; if an earlier start has done so, only if it is damaged.

    Raises:
        CheckpointError: on rank 0, if the last checkpoint has vanished.
    """
    if job.accelerator.is_main_process:
        last = newest_checkpoint(job.folder.checkpoints, job.progress.say)
        if last is None or last.step != job.last_step:
            raise CheckpointError(f"the checkpoint of step {job.last_step} has vanished from {job.folder.checkpoints}")
        weights, metadata = final_weights(last), job.task.description.metadata()
        is_new = not job.was_complete
        damage = None if is_new else job.folder.damage(MODEL_FILE, sha256(weights, metadata))
        if damage and not holds_tensors(job.folder.model, weights):  # else only its header is of another version
            job.progress.say(f"warning: {job.folder.model} {damage}; it is written again from {last.path.name}")
        if is_new or damage:
            job.folder.publish(weights, metadata)
    job.accelerator.wait_for_everyone()
