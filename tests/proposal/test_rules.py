"""The rules from facts to settings: a pure function, whose results are loaded by the parser of each command."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae.data.images.levels import WideValues
from mae.data.statistics import PixelStatistics
from mae.errors import UserError
from mae.proposal.choice import Choice, Proposal, checkpoints_of, in_words, power_of_two, rounded_down, times_in_words
from mae.proposal.commands import next_commands
from mae.proposal.facts import Facts, ImageFacts, MachineFacts, SplitFacts
from mae.proposal.rules import batch_of, propose
from mae.proposal.shapes import common_aspect, shapes
from mae.proposal.yaml_text import finetune_yaml, pretrain_yaml
from mae.settings import flatten, parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings

LAPTOP = MachineFacts(cores=2, memory=16_000_000_000, flops=100e9)
GPU = MachineFacts(cores=16, memory=128_000_000_000, flops=150e12, gpu="NVIDIA H100 80GB HBM3", gpus=1, has_bf16=True)
CONFIGS = Path(__file__).parents[2] / "configs"


def images_of(height: int, width: int, channels: int = 3, **other: Any) -> ImageFacts:
    found = ImageFacts(
        sampled=100,
        sizes=((height, width),) * 100,
        planes={channels: 100},
        statistics=PixelStatistics((0.5,) * channels, (0.25,) * channels),
        measured=100,
        decode_seconds=height * width * 12e-9,
        view_seconds=3e-4,
    )
    return replace(found, **other)


def facts_of(
    count: int, images: ImageFacts, machine: MachineFacts = LAPTOP, classes: int = 0, held_out: int = 0, **other: Any
) -> Facts:
    def split(name: str, size: int) -> SplitFacts:
        counts = {label: size // classes + (label < size % classes) for label in range(classes)}
        return SplitFacts(name, size, counts, folder=f"photos/{name}")

    splits = (split("train", count), *([split("val", held_out)] if held_out else []))
    return Facts(source="photos", name="photos", splits=splits, images=images, machine=machine, **other)


def values(choices: tuple[Choice, ...]) -> dict[str, Any]:
    found = {choice.name: choice.value for choice in choices}
    assert len(found) == len(choices)
    assert all(choice.reason for choice in choices)
    return found


def test_photos_on_a_laptop_end_within_two_hours_and_it_says_what_is_given_up() -> None:
    facts = facts_of(2000, images_of(3000, 4000), classes=3, held_out=200)
    proposal = propose(facts)
    chosen, tuned = values(proposal.pretrain), values(proposal.finetune)
    assert 1800 < proposal.seconds <= 3600
    assert chosen["epochs"] >= 100
    assert (chosen["data.image_size"], chosen["model.size"], chosen["data.workers"]) == ([160], "tiny", 1)
    assert "--short_side 320" in " ".join(proposal.pack)
    assert chosen["data.keep_decoded"] is True
    (given_up,) = [remark for remark in proposal.remarks if "less than the best" in remark]
    assert "images of 160 pixels instead of 224" in given_up
    assert f"{chosen['epochs']} epochs instead of 800" in given_up
    (hours,) = re.findall(r"--hours (\d+) allows that", given_up)
    assert values(propose(replace(facts, hours=float(hours))).pretrain)["epochs"] == 800
    assert times_in_words(proposal) == "Pretraining takes about 58 minutes, and fine-tuning about 60 minutes."
    assert tuned["eval_shards"] == ["shards/photos/val-*.tar"]


def test_imagenet_on_a_gpu_gets_the_papers_recipe() -> None:
    facts = facts_of(1_281_167, images_of(375, 500), GPU, classes=1000, held_out=50_000)
    proposal = propose(facts)
    chosen = values(proposal.pretrain)
    published = flatten(yaml.safe_load((CONFIGS / "pretrain" / "vit_base.yaml").read_text()))
    for name in ("epochs", "batch_size", "optim.base_lr", "optim.warmup_epochs", "optim.weight_decay", "model.size"):
        assert chosen[name] == published[name], name
    for name in ("model.patch_size", "model.mask_ratio", "augment.crop_scale", "data.workers"):
        assert chosen[name] == published[name], name
    for name in ("width", "depth", "heads"):
        assert chosen[f"model.decoder_{name}"] == published[f"model.decoder_{name}"]
    assert chosen["data.image_size"] == [224]
    assert chosen["micro_batch_size"] == "auto"
    assert proposal.pack == ()
    assert proposal.seconds > 3600 * 24
    tuned = values(proposal.finetune)
    recipe = flatten(yaml.safe_load((CONFIGS / "finetune" / "vit_base.yaml").read_text()))
    for name in ("epochs", "batch_size", "optim.base_lr", "optim.layer_decay", "augment.rand_augment", "augment.erase"):
        assert tuned[name] == recipe[name], name


def test_hours_bound_the_run_on_a_gpu_too() -> None:
    facts = facts_of(1_281_167, images_of(375, 500), GPU, hours=10.0)
    proposal = propose(facts)
    assert proposal.seconds <= 36_000
    assert values(proposal.pretrain)["epochs"] < 800


@pytest.mark.parametrize(
    ("images", "epochs", "batch"),
    [
        (8, 800, 8),
        (31, 800, 16),
        (2000, 10, 64),
        (60_000, 1, 256),
        (100_000, 10, 512),  # with 1,024, it would be 977 steps
        (100_000, 11, 1024),
        (150_000, 1, 256),
        (1_281_167, 3, 2048),
        (1_281_167, 800, 4096),
    ],
)
def test_few_epochs_or_images_get_smaller_batches(images: int, epochs: int, batch: int) -> None:
    assert batch_of(images, epochs) == batch


@pytest.mark.parametrize("images", [2, 8, 31])
def test_no_batch_is_larger_than_the_set(images: int) -> None:
    proposal = propose(facts_of(images, images_of(64, 64), classes=2))
    assert values(proposal.pretrain)["batch_size"] <= images
    assert values(proposal.finetune)["batch_size"] <= images


def test_a_set_that_is_too_large_for_a_laptop_is_proposed_with_a_warning() -> None:
    proposal = propose(facts_of(1_281_167, images_of(375, 500)))
    assert values(proposal.pretrain)["epochs"] < 20
    assert any("seen only" in remark for remark in proposal.remarks)


@pytest.mark.parametrize(
    ("height", "width", "size", "patch"),
    [(8, 8, [8], 2), (28, 28, [28], 4), (32, 32, [32], 4), (64, 64, [64], 8), (100, 100, [96], 16), (2, 2, [2], 1)],
)
def test_small_images_keep_their_size_and_get_small_patches(
    height: int, width: int, size: list[int], patch: int
) -> None:
    chosen = values(propose(facts_of(60_000, images_of(height, width), GPU)).pretrain)
    assert (chosen["data.image_size"], chosen["model.patch_size"]) == (size, patch)
    # The digits of the demo have 4x4 patches.
    is_few = (height // patch) * (width // patch) <= 16
    assert (chosen["model.mask_ratio"], chosen.get("model.position_temperature")) == (
        (0.5, 10.0) if is_few else (0.75, None)
    )


def test_a_faster_machine_never_gets_a_smaller_model_or_fewer_epochs() -> None:
    costs = list[int]()
    for flops in (1e9, 1e10, 1e11, 1e12, 1e13):
        facts = facts_of(20_000, images_of(375, 500), replace(LAPTOP, flops=flops, cores=8))
        proposal = propose(facts)
        assert proposal.seconds <= 3600 or values(proposal.pretrain)["epochs"] == 1
        rung = next(n for n, shape in enumerate(shapes(facts)) if shape.settings == proposal.model)
        costs.append(-rung)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_long_images_of_one_shape_stay_long() -> None:
    images = images_of(360, 720)
    chosen = values(propose(facts_of(2000, images, GPU)).pretrain)
    assert chosen["data.image_size"] == [224, 448]
    assert chosen["augment.crop_ratio"] == [1.5, 2.667]
    assert common_aspect(images_of(2, 3000)) == 1
    assert common_aspect(replace(images, sizes=((360, 720), (720, 360)) * 20)) == 1


@pytest.mark.parametrize(
    ("other", "channels"),
    [
        ({"planes": {1: 100}}, 1),
        ({"planes": {1: 40, 3: 60}}, 3),
        ({"planes": {3: 100}, "transparent": 100}, 4),
        ({"planes": {3: 100}, "transparent": 10}, 3),
        ({"planes": {7: 100}, "arrays": 100}, 7),
        ({"planes": {4: 50, 3: 50}, "arrays": 50}, 4),
    ],
)
def test_channels(other: dict[str, Any], channels: int) -> None:
    chosen = values(propose(facts_of(2000, images_of(64, 64, **other))).pretrain)
    assert chosen["data.channels"] == channels


@pytest.mark.parametrize("planes", [{3: 50, 5: 50}, {1: 10, 7: 90}])
def test_arrays_of_different_channels_are_refused(planes: dict[int, int]) -> None:
    with pytest.raises(UserError, match=r"differ in their channels \(.* with"):
        propose(facts_of(2000, images_of(64, 64, planes=planes, arrays=100)))


@pytest.mark.parametrize(
    ("wide", "value_range"),
    [
        (WideValues(100, 0.0, 4095.0), [0.0, 4096.0]),
        (WideValues(100, 0.0, 65535.0), [0.0, 65536.0]),
        (WideValues(100, 0.0, 0.9, is_float=True, fits_sixteen_bits=False), [0.0, 1.0]),
    ],
)
def test_images_of_more_than_8_bits_get_a_range(wide: WideValues, value_range: list[float]) -> None:
    chosen = values(propose(facts_of(2000, images_of(64, 64, 1, wide=wide, statistics=None))).pretrain)
    assert chosen["data.value_range"] == value_range


@pytest.mark.parametrize(
    ("steps", "seconds", "between", "why"),
    [(3094, 72.0, 300, "a tenth of the run"), (10_000, 1e5, 60, "ten minutes"), (5, 1.0, 1, "a tenth of the run")],
)
def test_a_checkpoint_is_saved_long_before_the_end(steps: int, seconds: float, between: int, why: str) -> None:
    choice = checkpoints_of(steps, seconds)
    assert (choice.name, choice.value) == ("checkpoint_every", between)
    assert why in choice.reason


def test_what_is_missing_or_wrong_is_said() -> None:
    def said(facts: Facts) -> str:
        return " ".join(propose(facts).remarks)

    assert "no labels" in said(facts_of(2000, images_of(64, 64)))
    assert "of one class" in said(facts_of(2000, images_of(64, 64), classes=1))
    assert "No split is held out" in said(facts_of(2000, images_of(64, 64), classes=3))
    assert "are few" in said(facts_of(20, images_of(64, 64)))
    assert "1 of 100 sampled images cannot be read" in said(facts_of(2000, images_of(64, 64, bad=("a.jpg (cut)",))))
    busy = replace(LAPTOP, load=9.0)
    assert "Other programs" in said(facts_of(2000, images_of(64, 64), busy))
    lopsided = SplitFacts("train", 2000, {0: 1990, 1: 10}, folder="photos")
    assert "from 10 to 1,990" in said(replace(facts_of(2000, images_of(64, 64)), splits=(lopsided,)))
    some = SplitFacts("train", 2000, {0: 10, 1: 10}, folder="photos")
    assert "Only 20 of 2,000" in said(replace(facts_of(2000, images_of(64, 64)), splits=(some,)))


def test_impossible_sets_are_refused() -> None:
    with pytest.raises(UserError, match="contains 1 image"):
        propose(facts_of(1, images_of(64, 64)))
    with pytest.raises(UserError, match="side of 1 pixel"):
        propose(facts_of(2000, images_of(1, 1)))
    with pytest.raises(UserError, match=r"can be decoded; the first: a.jpg \(cut\)"):
        propose(facts_of(2000, images_of(64, 64, sizes=(), bad=("a.jpg (cut)",))))


CASES = {
    "photos": facts_of(2000, images_of(3000, 4000), classes=3, held_out=200, class_names=("a: b", "#c", "d")),
    "imagenet": facts_of(1_281_167, images_of(375, 500), GPU, classes=1000, held_out=50_000),
    "digits": facts_of(1097, images_of(8, 8, 1), classes=10, held_out=200),
    "cifar": facts_of(50_000, images_of(32, 32), GPU, classes=10),
    "unlabelled": facts_of(300, images_of(500, 333)),
    "arrays": facts_of(300, images_of(64, 96, planes={7: 100}, arrays=100)),
    "panoramas": facts_of(300, images_of(360, 720, bad=("x\n.jpg (cut)",)), replace(LAPTOP, load=5.0, cores=1)),
    "shards": Facts(
        "s: #x", "s", (SplitFacts("train", 900, shards=("s: #x/a b-*.tar",)),), images_of(64, 64, bad=("b",)), LAPTOP
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_read_back_to_the_proposed_settings(name: str, tmp_path: Path) -> None:
    facts = CASES[name]
    proposal = propose(facts)
    (config := tmp_path / "config.yaml").write_text(pretrain_yaml(facts, proposal, "mae pretrain --config x.yaml"))
    read: Any = parse(PretrainSettings, ["--config", str(config)], prog="test")
    _require_equal(read, proposal.pretrain)
    assert read.model == proposal.model
    if facts.classes > 1:
        config.write_text(finetune_yaml(proposal, "mae finetune --config x.yaml"))
        _require_equal(parse(FinetuneSettings, ["--config", str(config)], prog="test"), proposal.finetune)
    for line in config.read_text().splitlines():
        assert line.startswith("#") or line.endswith(":") or "  # " in line


@pytest.mark.parametrize("name", CASES)
def test_the_warm_up_is_shorter_than_the_run(name: str) -> None:
    proposal = propose(CASES[name])
    for chosen in (values(proposal.pretrain), values(proposal.finetune)):
        assert not chosen or 0 < chosen["optim.warmup_epochs"] < chosen["epochs"]


def _require_equal(settings: Any, choices: tuple[Choice, ...]) -> None:
    for choice in choices:
        value = settings
        for part in choice.name.split("."):
            value = getattr(value, part)
        wanted = tuple(choice.value) if isinstance(choice.value, list) else choice.value
        if choice.name == "model.patch_size":
            wanted = (wanted,)
        assert (str(value) if choice.name == "run_dir" else value) == wanted, choice.name


def test_the_commands_follow_each_other() -> None:
    def commands(facts: Facts) -> list[str]:
        proposal: Proposal = propose(facts)
        return next_commands(facts, proposal, Path("my config.yaml"), Path("my config-finetune.yaml"))

    assert commands(CASES["photos"]) == [
        "mae pack photos --out shards/photos --short_side 320",
        "mae pretrain --config 'my config.yaml'",
        "mae finetune --config 'my config-finetune.yaml' --init runs/photos",
        "mae evaluate runs/photos runs/photos-finetuned --data.shards 'shards/photos/train-*.tar' "
        "--eval_shards 'shards/photos/val-*.tar'",
        "mae predict runs/photos-finetuned photos/val --out predictions.csv",
    ]
    assert commands(CASES["shards"]) == [
        "mae pretrain --config 'my config.yaml'",
        "mae embed runs/s 's: #x/a b-*.tar' --out features.parquet",
    ]
    several = replace(CASES["imagenet"], machine=replace(GPU, gpus=8))
    assert commands(several)[1] == "accelerate launch -m mae.pipelines.pretrain --config 'my config.yaml'"


def test_numbers_as_a_person_writes_them() -> None:
    assert [in_words(n) for n in (0.2, 40.0, 1500.0, 12_600.0, 36_000.0, 864_000.0)] == [
        "1 seconds", "40 seconds", "25 minutes", "3.5 hours", "10 hours", "10 days",
    ]  # fmt: skip
    assert [rounded_down(n) for n in (0.4, 7.9, 178.0, 2345.0)] == [1, 7, 170, 2300]
    assert [power_of_two(n, 16, 256) for n in (0.1, 16.0, 100.0, 1000.0)] == [16, 16, 64, 256]
