"""Fine-tune a pretrained encoder, with a head on its cls token, on labelled shards.

accelerate launch pipelines/finetune.py --config configs/finetune/vit_base.yaml --init runs/pretrain \
    --data.shards 'shards/train-*.tar' --eval_shards 'shards/val-*.tar'
"""

import sys
from collections.abc import Sequence

from mae.data.plan import plan_batches
from mae.evaluation.best import end_without_progress, evaluate_and_keep_best, evaluation_due, verify_best
from mae.report.refreshing import report_refresher, write_report
from mae.settings import parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.finetuning import Finetuning
from mae.training.context import training
from mae.training.export_at_end import export_at_end, require_exports
from mae.training.finish import finish_job
from mae.training.optimizer import describe_groups
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once
from mae.training.progress import TrainingProgress
from mae.training.run_folder.ending import failed_start_recorded
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import spelled_out
from mae.training.start import start_job
from mae.training.trackers.settings import require_installed


def run(settings: FinetuneSettings) -> RunFolder:
    """Train or resume training, evaluate, and write the run folder."""
    with failed_start_recorded(settings):
        require_installed(settings.trackers)
        accelerator = start_accelerator(settings.precision, settings.timeout)
        progress = TrainingProgress("finetune", accelerator.is_main_process)
        settings = RunFolder(settings.run_dir).with_its_micro_batch(settings)
        plan = plan_batches(settings.batch_size, accelerator.num_processes, settings.micro_batch_limit)
        task = Finetuning.open(settings, progress.say)
        require_exports(task, progress.say)
        job = start_job(task, plan, accelerator, progress)
        for line in describe_groups(job.optimizer.param_groups, job.schedule.peak):
            progress.say(line)
        if task.held_out is None:
            progress.say("eval_shards is empty: no accuracy is measured")
    refresh = report_refresher(job)
    with training(job) as steps:
        for step in steps:
            if task.held_out is not None and evaluation_due(job, step, settings.eval_every):
                evaluate_and_keep_best(job, task.held_out, step)
                end_without_progress(job, step, settings.patience)
            refresh()
        finish_job(job)
        verify_best(job)
        write_report(job)
    export_at_end(job)
    progress.say(f"model {job.folder.model}, report {job.folder.report}", is_result=True)
    return job.folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae finetune`."""
    with errors_said_once():
        run(parse(FinetuneSettings, spelled_out(sys.argv[1:] if argv is None else argv), prog="mae finetune"))


if __name__ == "__main__":
    main()
