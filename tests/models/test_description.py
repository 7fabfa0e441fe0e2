import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mae.errors import UserError
from mae.models.description import (
    DecoderDescription,
    ModelDescription,
    describe_model,
    find_model,
    read_description,
    require_same_model,
)
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings

SETTINGS = EncoderSettings(size="tiny", depth=2, patch_size=(2, 4))
DESCRIPTION = describe_model("classifier", SETTINGS, (8, 12), (0.1, 0.5), (0.25, 1 / 3), 0.875)
CROSS = MaskedAutoencoderSettings(
    size="tiny", patch_size=(4,), decoder="cross", decoder_depth=3, mask="block", mask_ratio=0.6, norm_pix_loss=False
)
AUTOENCODER = describe_model("masked autoencoder", CROSS, (16, 16), (0.5,), (0.5,), 1.0)


def write(path: Path, metadata: dict[str, str] | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    return path


def test_a_description_holds_what_the_settings_resolve_to() -> None:
    expected = ModelDescription(
        kind="classifier",
        width=192,
        depth=2,
        heads=3,
        patch_size=(2, 4),
        image_size=(8, 12),
        channels=2,
        mean=(0.1, 0.5),
        std=(0.25, 1 / 3),
        crop_pct=0.875,
        decoder=None,
    )
    assert expected == DESCRIPTION
    assert DESCRIPTION.grid == (4, 3)


def test_the_description_of_an_autoencoder_holds_its_decoder_and_task() -> None:
    assert AUTOENCODER.decoder == DecoderDescription(
        kind="cross", width=192, depth=3, heads=6, mask="block", mask_ratio=0.6, norm_pix_loss=False
    )


WARM = replace(AUTOENCODER, position_temperature=2.5e6)


@pytest.mark.parametrize("description", [DESCRIPTION, AUTOENCODER, WARM])
def test_a_description_survives_the_header_of_a_file(description: ModelDescription, tmp_path: Path) -> None:
    assert read_description(write(tmp_path / "m.safetensors", description.metadata())) == description


def test_the_temperature_of_the_positions_is_described_and_built() -> None:
    settings = replace(CROSS, position_temperature=10.0)
    description = describe_model("masked autoencoder", settings, (16, 16), (0.5,), (0.5,), 1.0)
    assert json.loads(description.metadata()["mae"])["position_temperature"] == 10.0
    assert "position_temperature" not in AUTOENCODER.metadata()["mae"]  # earlier versions read such a file
    built = description.autoencoder()
    assert built is not None
    assert (description.encoder().position_temperature, built.position_temperature) == (10.0, 10.0)
    with pytest.raises(UserError, match=r"model\.position_temperature is 10\.0, settings ask for 10000\.0"):
        require_same_model(description, AUTOENCODER, Path("m.safetensors"))


def test_a_file_from_before_decoders_were_described_is_read(tmp_path: Path) -> None:
    fields = json.loads(AUTOENCODER.metadata()["mae"])
    del fields["decoder"]
    found = read_description(write(tmp_path / "m.safetensors", {"mae": json.dumps(fields)}))
    assert found == replace(AUTOENCODER, decoder=None)


def test_the_header_says_that_the_tensors_are_torchs(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "m.safetensors", DESCRIPTION.metadata()), framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("patch_size", [(4,), (2, 4)])
def test_a_description_builds_the_encoder_it_was_made_of(patch_size: tuple[int, ...]) -> None:
    settings = MaskedAutoencoderSettings(size="small", heads=4, patch_size=patch_size)
    description = describe_model("masked autoencoder", settings, (8, 8), (0.5,), (0.5,), 1.0)
    assert description.encoder().shape == settings.shape
    assert description.encoder().patch == settings.patch


def test_missing_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        read_description(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    for damaged in (tmp_path / "cut.safetensors", tmp_path):
        with pytest.raises(UserError, match="is not an intact safetensors file"):
            read_description(damaged)
    for metadata in (None, {"format": "pt"}):
        with pytest.raises(UserError, match="not written by mae"):
            read_description(write(tmp_path / "foreign.safetensors", metadata))


@pytest.mark.parametrize("text", ["1.0", "not json", "{}", '{"width": 16}'])
def test_another_programs_use_of_the_same_field_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="in a way this version of mae does not know"):
        read_description(write(tmp_path / "m.safetensors", {"mae": text}))


@pytest.mark.parametrize("later", [{"registers": 4}, {"decoder": {"kind": "none"}}, {"decoder": "none"}])
def test_a_field_of_a_later_version_is_refused(later: dict[str, object], tmp_path: Path) -> None:
    fields = json.loads(DESCRIPTION.metadata()["mae"]) | later
    with pytest.raises(UserError, match="in a way this version of mae does not know"):
        read_description(write(tmp_path / "m.safetensors", {"mae": json.dumps(fields)}))


def test_the_model_of_a_run_a_checkpoint_or_a_file_is_found(tmp_path: Path) -> None:
    model = write(tmp_path / "run" / "model.safetensors", None)
    checkpoint = write(tmp_path / "run" / "checkpoints" / "step-000000005" / "model.safetensors", None)
    other = write(tmp_path / "other.safetensors", None)
    assert find_model(tmp_path / "run") == model
    assert find_model(checkpoint.parent) == checkpoint
    assert find_model(other) == other


def test_an_unfinished_run_is_refused_and_its_newest_checkpoint_offered(tmp_path: Path) -> None:
    for step in (5, 20, 10):
        write(tmp_path / "run" / "checkpoints" / f"step-{step:09d}" / "model.safetensors", None)
    with pytest.raises(UserError, match=r"is not finished .* newest checkpoint \S*/step-000000020$"):
        find_model(tmp_path / "run")


def test_a_folder_without_a_model_and_a_wrong_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path} holds no model\.safetensors; give "):
        find_model(tmp_path)
    with pytest.raises(UserError, match=r"^no/such/run does not exist; give "):
        find_model(Path("no/such/run"))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("kind", ["decoder", None, 1]),
        ("width", ["16", -16, 0, 16.0, True, None, 1 << 60]),
        ("depth", [-1, 1 << 40]),
        ("heads", [[], 0]),
        ("channels", [2.0, 3, 1 << 40]),
        ("patch_size", [4, [4], [4, 4, 4], ["4", "4"], "44", [0, 4], [-2, -4]]),
        ("image_size", [[8], [8, -12], [8, None], {"8": 1, "12": 2}]),
        ("mean", [["0.1", "0.5"], [0.1], [0.1, 0.5, 0.5], [float("nan"), 0.5], "ab", [[0.1], [0.5]]]),
        ("std", [[0.0, 1.0], [-1.0, 1.0], [1.0], [float("inf"), 1.0], [True, 1.0], None]),
        ("crop_pct", ["0.9", 0, -1, float("nan"), 1.5]),
        ("position_temperature", ["10", 1, 0.0, -10.0, float("nan"), float("inf"), None, True]),
        ("classes", ["ab", [1, 2], {"a": 0}, 3]),
        ("decoder", [[], 1, {}]),
        ("decoder.width", ["192", -1, 1 << 60]),
        ("decoder.heads", [0.5]),
        ("decoder.mask", ["all", 3, []]),
        ("decoder.mask_ratio", ["0.6", 0, 1, float("nan")]),
        ("decoder.norm_pix_loss", [1, "yes"]),
    ],
)
def test_a_field_of_another_type_or_without_sense_is_refused(field: str, values: list[object], tmp_path: Path) -> None:
    part, _, name = field.rpartition(".")
    for value in values:
        fields = json.loads((AUTOENCODER if part else DESCRIPTION).metadata()["mae"])
        (fields[part] if part else fields)[name] = value
        with pytest.raises(UserError, match=r"in a way this version of mae does not know; .*$"):
            read_description(write(tmp_path / "m.safetensors", {"mae": json.dumps(fields)}))
