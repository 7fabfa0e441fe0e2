"""Evaluation during training, which keeps the best model."""

import math
import os
from collections.abc import Mapping

from torch import Tensor

from mae.data.eval_batches import EvalBatches
from mae.data.index import ShardIndex
from mae.data.source import statistics_of
from mae.errors import CheckpointError, what_to_do
from mae.evaluation.classification import evaluate
from mae.files import unused_name
from mae.models.description import BEST_FILE
from mae.models.selection import Selection
from mae.models.weights import file_tensors
from mae.output import warn
from mae.safetensors_file import sha256
from mae.training.checkpoints.manifest import step_folder
from mae.training.checkpoints.reader import verify_checkpoint
from mae.training.job import EARLY_END, Job
from mae.training.state import final_weights

_WITHOUT_BETTER = "evaluations_without_better"


def evaluation_due(job: Job, step: int, every: float) -> bool:
    """Return True if `step` is the last, or the first after another `every` epochs."""
    per_period = max(1.0, job.samples * every / job.plan.global_batch)  # [steps]
    return step == job.total or math.floor(step / per_period) > math.floor((step - 1) / per_period)


def evaluate_and_keep_best(job: Job, held_out: ShardIndex, step: int) -> None:
    """Evaluate the model after `step` steps, log the result, and save the model if it is the best so far.

    The best model is `best.safetensors` in the run folder. Collective: every process has to call it.
    """
    accelerator, data = job.accelerator, job.settings.data
    batches = EvalBatches(held_out, job.plan.per_process, data, accelerator.process_index, accelerator.num_processes)
    epoch = job.epoch_after(step)
    with job.state.evaluation_weights() as model:
        result = evaluate(accelerator, model, batches, statistics_of(data), data.workers)
        _forget_other_samples(job, held_out)
        is_finite = math.isfinite(result.loss)
        is_best = is_finite and result.accuracy > job.notes.get("best", {}).get("accuracy", -1.0)
        job.notes[_WITHOUT_BETTER] = 0 if is_best else job.notes.get(_WITHOUT_BETTER, 0) + 1
        if is_best:
            job.notes["best"] = {"step": step, "accuracy": result.accuracy, "fingerprint": held_out.fingerprint}
        if accelerator.is_main_process:
            measured = result._asdict() | ({} if is_finite else {"loss": None})
            job.log({"kind": "eval", "step": step, "epoch": epoch, **measured})
            if is_best:
                # Copies, because FSDP2 frees the weights that it has gathered.
                _keep(job, {name: tensor.clone() for name, tensor in file_tensors(model).items()})
    job.progress.say(
        f"epoch {epoch:.1f}: accuracy {result.accuracy:.2%}, loss {result.loss:.4f} on {result.samples:,} samples"
        + (", the best so far" if is_best else "")
    )


def _forget_other_samples(job: Job, held_out: ShardIndex) -> None:
    """Forget the best model if it was chosen on other samples, whose accuracies cannot be compared with new ones."""
    if job.notes.get("best", {}).get("fingerprint", held_out.fingerprint) != held_out.fingerprint:
        job.progress.say("eval_shards are others than before: the best model is chosen anew")
        del job.notes["best"]
        job.notes.pop(_WITHOUT_BETTER, None)


def _keep(job: Job, weights: Mapping[str, Tensor]) -> None:
    """Write the best model, and note its hash; if that fails, `verify_best` tries again from the checkpoint."""
    metadata = _metadata(job)
    try:
        job.notes["best"]["sha256"] = job.folder.publish(weights, metadata, BEST_FILE)
    except OSError as error:
        job.notes["best"]["sha256"] = sha256(weights, metadata)
        warn(f"the best model of step {job.notes['best']['step']:,} is not written: {what_to_do(error)}")


def end_without_progress(job: Job, step: int, patience: int | None) -> None:
    """End the run at `step` if the last `patience` evaluations were no better than the best before.

    All ranks decide alike: accuracy is a sum over them, and the count is among the notes of each checkpoint.
    """
    count = job.notes.get(_WITHOUT_BETTER, 0)
    if patience is None or count < patience or step == job.total:
        return
    best = job.notes.get("best")
    without = "no finite loss"
    if best is not None:
        without = f"no accuracy above {best['accuracy']:.2%}, that of step {best['step']:,}"
    job.end_early(step, f"patience {patience}, {without}")
    job.progress.say(f"ended early at step {step:,} of {job.total:,}: {job.notes[EARLY_END]['why']}")


def verify_best(job: Job) -> None:
    """Compare the best model with the hash in the notes; if it differs, write it again from the checkpoint of its step.

    Without that checkpoint, a damaged file is renamed, so that nobody takes it for the best model.
    """
    best, path = job.notes.get("best", {}), job.folder.path / BEST_FILE
    if not job.accelerator.is_main_process or "sha256" not in best:  # earlier versions took no hash
        return
    damage = job.folder.damage(BEST_FILE, best["sha256"])
    if damage is None:
        return
    try:
        weights = final_weights(verify_checkpoint(step_folder(job.folder.checkpoints, best["step"])))
    except CheckpointError:
        kept = f"; it is kept as {path.rename(unused_name(path, '.damaged')).name}" if os.path.lexists(path) else ""
        job.progress.say(f"warning: {path} {damage}, and there is no checkpoint of step {best['step']:,}{kept}")
    else:
        job.folder.publish(weights, _metadata(job), BEST_FILE)
        job.progress.say(f"warning: {path} {damage}; it is written again from step {best['step']:,}")


def _metadata(job: Job) -> dict[str, str]:
    """Return the metadata of the best model; runs of earlier versions did not note on which samples it was chosen."""
    best, described = job.notes["best"], job.task.description.metadata()
    if "fingerprint" not in best:
        return described
    return described | Selection(best["fingerprint"], best["step"], best["accuracy"]).metadata()
