"""Pretrain a masked autoencoder on unlabelled image shards.

accelerate launch pipelines/pretrain.py --config configs/pretrain/vit_base.yaml --data.shards 'shards/train-*.tar'
"""

import sys
from collections.abc import Sequence

from mae.data.plan import plan_batches
from mae.evaluation.online import online_evaluation, open_sets
from mae.report.reconstructions import picture_drawer
from mae.report.refreshing import report_refresher, write_report
from mae.settings import parse
from mae.tasks.baselines import log_baselines
from mae.tasks.pretraining import Pretraining, PretrainSettings
from mae.training.context import training
from mae.training.export_at_end import export_at_end, require_exports
from mae.training.finish import finish_job
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once
from mae.training.progress import TrainingProgress
from mae.training.run_folder.ending import failed_start_recorded
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import spelled_out
from mae.training.start import start_job
from mae.training.trackers.settings import require_installed


def run(settings: PretrainSettings) -> RunFolder:
    """Train or resume training, and write the run folder."""
    with failed_start_recorded(settings):
        require_installed(settings.trackers)
        accelerator = start_accelerator(settings.precision, settings.timeout)
        progress = TrainingProgress("pretrain", accelerator.is_main_process)
        settings = RunFolder(settings.run_dir).with_its_micro_batch(settings)
        plan = plan_batches(settings.batch_size, accelerator.num_processes, settings.micro_batch_limit)
        task = Pretraining.open(settings, progress.say)
        require_exports(task, progress.say)
        sets = open_sets(task, progress.say)
        job = start_job(task, plan, accelerator, progress)
    with training(job) as steps:
        log_baselines(job, task)
        draw = picture_drawer(job, task)
        evaluate = online_evaluation(job, task, sets)
        refresh = report_refresher(job)
        for step in steps:
            if step % settings.picture_every == 0 or step == job.total:
                draw(step)
            evaluate(step)
            refresh()
        finish_job(job)
        write_report(job)
    export_at_end(job)
    progress.say(f"model {job.folder.model}, report {job.folder.report}", is_result=True)
    return job.folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae pretrain`."""
    with errors_said_once():
        run(parse(PretrainSettings, spelled_out(sys.argv[1:] if argv is None else argv), prog="mae pretrain"))


if __name__ == "__main__":
    main()
