"""Settings of all training pipelines: the micro-batch that is to be found, and what may change on resume."""

from pathlib import Path

import pytest

from mae.errors import UserError
from mae.schema import settings_of
from mae.settings import dump, parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.settings import TrainSettings, spelled_out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--batch_size", "auto"], ["--micro_batch_size", "auto"]),
        (["--batch-size=auto"], ["--micro_batch_size=auto"]),
        (
            ["--batch_size", "64", "--batch_size", "auto", "--seed", "1"],
            ["--batch_size", "64", "--micro_batch_size", "auto", "--seed", "1"],
        ),
        (["--run_dir", "auto", "--batch_size"], ["--run_dir", "auto", "--batch_size"]),
        (["--micro_batch_size", "auto"], ["--micro_batch_size", "auto"]),
    ],
)
def test_an_automatic_batch_size_is_that_of_the_micro_batch(words: list[str], expected: list[str]) -> None:
    assert spelled_out(words) == expected


@pytest.mark.parametrize(
    ("value", "parsed", "limit"), [("auto", "auto", None), ("None", None, None), ("8", 8, 8)], ids=str
)
def test_a_micro_batch_is_a_number_or_none_or_to_be_found_in_flags_and_file(
    tmp_path: Path, value: str, parsed: int | str | None, limit: int | None
) -> None:
    settings = parse(TrainSettings, ["--run_dir", "run", "--micro_batch_size", value], prog="train")
    assert settings.micro_batch_size == parsed
    assert settings.micro_batch_limit == limit
    (tmp_path / "settings.yaml").write_text(dump(settings))
    assert parse(TrainSettings, ["--config", str(tmp_path / "settings.yaml")], prog="train") == settings


@pytest.mark.parametrize("value", ["0", "automatic", "1.5"])
def test_any_other_micro_batch_is_refused_k02(value: str) -> None:
    with pytest.raises(UserError, match="micro_batch_size"):
        parse(TrainSettings, ["--run_dir", "run", "--micro_batch_size", value], prog="train")


def test_a_warm_up_of_no_average_is_refused() -> None:
    with pytest.raises(UserError, match="ema_warmup is True; allowed: False, or set ema_decay"):
        TrainSettings(Path("run"), ema_warmup=True)


# A new setting has to be added to one of these lists: may it change when a run is resumed (speed, places, what is shown
# or evaluated), or does it decide the weights?
MAY_CHANGE = (
    "run_dir activation_checkpointing log_every checkpoint_every keep_checkpoints keep_every resume skip_at_most "
    "timeout restart_data_order trackers tracker_project record_samples data.shards data.workers data.threads "
    "data.keep_decoded data.cache_dir data.cache_bytes data.index data.max_bad_samples data.skip_without_image "
    "export.targets"
)
DECIDING = (
    "init seed epochs batch_size micro_batch_size precision compile ema_decay ema_warmup data.image_size data.channels "
    "data.mean data.std data.crop_pct data.image_extension data.value_range data.decode_on "
    "data.reader data.stream_samples data.views_per_image data.chunk_samples "
    "data.window_chunks data.lanes augment.crop_scale augment.crop_ratio augment.flip augment.rand_augment "
    "augment.erase model.size model.width model.depth model.heads model.patch_size model.position_temperature "
    "optim.name optim.base_lr optim.min_lr optim.warmup_epochs optim.weight_decay optim.betas optim.clip_grad"
)
OWN: dict[type[TrainSettings], tuple[str, str]] = {
    PretrainSettings: (
        "picture_every picture_images evaluation.eval_shards evaluation.train_shards evaluation.every "
        "evaluation.images evaluation.shots",
        "model.mask model.mask_ratio model.mask_version model.decoder model.decoder_width model.decoder_depth "
        "model.decoder_heads model.predict_ratio model.norm_pix_loss",
    ),
    FinetuneSettings: (
        "eval_shards eval_every eval_overlap",
        "head pool freeze class_weights patience labels_per_class regularization.drop_path "
        "regularization.label_smoothing regularization.mixup regularization.cutmix optim.layer_decay",
    ),
}


@pytest.mark.parametrize("schema", OWN)
def test_each_setting_decides_or_may_change_on_resume(schema: type[TrainSettings]) -> None:
    may_change, decides = OWN[schema]
    found = {setting.name: setting.may_change for setting in settings_of(schema)}
    expected = dict.fromkeys(f"{MAY_CHANGE} {may_change}".split(), True)
    assert found == expected | dict.fromkeys(f"{DECIDING} {decides}".split(), False)


@pytest.mark.parametrize("schema", OWN)
def test_a_removed_setting_is_no_longer_one(schema: type[TrainSettings]) -> None:
    assert not schema.REMOVED.keys() & {setting.name for setting in settings_of(schema)}
