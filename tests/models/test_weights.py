from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.decoders import DECODERS
from mae.models.encoder import build_encoder
from mae.models.positions import resample_positions
from mae.models.settings import EncoderSettings
from mae.models.weights import (
    encoder_part,
    file_tensors,
    for_grid,
    has_decoder,
    load_all,
    load_autoencoder,
    load_encoder,
    read_weights,
    write_weights,
)

Build = Callable[..., MaskedAutoencoder]

TINY = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
SOURCE = Path("runs/one/model.safetensors")


def block_names(blocks: str) -> list[str]:
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    return [f"{blocks}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def encoder_names(depth: int) -> set[str]:
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    blocks = {name for block in range(depth) for name in block_names(f"blocks.{block}")}
    return names | blocks | {"norm.weight", "norm.bias"}


def test_a_written_file_is_read_back_and_others_may_read_it(tiny_autoencoder: Build, tmp_path: Path) -> None:
    weights = file_tensors(tiny_autoencoder())
    (tmp_path / "plain").touch()
    write_weights(tmp_path / "m.safetensors", weights, {"format": "pt"})
    found = read_weights(tmp_path / "m.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_holds_the_published_names(tiny_autoencoder: Build) -> None:
    layers = [f"{name}.{kind}" for name in ("embed", "norm", "pred") for kind in ("weight", "bias")]
    decoder = {"mask_token", "decoder_pos_embed"} | {f"decoder_{name}" for name in layers}
    blocks = set(block_names("decoder_blocks.0"))
    assert set(file_tensors(tiny_autoencoder())) == encoder_names(2) | decoder | blocks


def test_a_classifiers_file_holds_the_encoder_and_the_head() -> None:
    heads = {
        "linear": {"head.weight", "head.bias"},
        "mlp": {"head.fc1.weight", "head.fc1.bias", "head.fc2.weight", "head.fc2.bias"},
    }
    for kind, names in heads.items():
        classifier = build_classifier(TINY, (8, 8), 3, 5, kind)
        assert set(file_tensors(classifier)) == encoder_names(2) | names


def test_tensors_of_a_file_need_no_gradient_and_can_be_saved(tiny_autoencoder: Build, tmp_path: Path) -> None:
    model = tiny_autoencoder()
    tensors = file_tensors(model)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    save_file(tensors, tmp_path / "m.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())


def test_an_autoencoder_survives_the_trip_through_a_file(tiny_autoencoder: Build, tmp_path: Path) -> None:
    model, other = tiny_autoencoder(seed=0), tiny_autoencoder(seed=1)
    save_file(file_tensors(model), tmp_path / "m.safetensors")
    load_all(other, read_weights(tmp_path / "m.safetensors"), SOURCE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_classifier_survives_the_trip_through_a_file(tmp_path: Path) -> None:
    model, other = (build_classifier(TINY, (8, 8), 3, 5, "mlp") for _ in range(2))
    save_file(file_tensors(model), tmp_path / "m.safetensors")
    load_all(other, read_weights(tmp_path / "m.safetensors"), SOURCE)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(images), model(images))


def test_the_encoder_part_drops_decoder_and_head(tiny_autoencoder: Build) -> None:
    assert set(encoder_part(file_tensors(tiny_autoencoder()))) == encoder_names(2)
    for kind in ("linear", "mlp"):
        classifier = build_classifier(TINY, (8, 8), 3, 5, kind)
        assert set(encoder_part(file_tensors(classifier))) == encoder_names(2)


def test_a_classifier_takes_the_encoder_of_an_autoencoder_and_keeps_its_head(tiny_autoencoder: Build) -> None:
    autoencoder = tiny_autoencoder()
    classifier = build_classifier(TINY, (16, 16), 3, 5, "mlp")
    head = {name: tensor.clone() for name, tensor in classifier.head.state_dict().items()}
    load_encoder(classifier, file_tensors(autoencoder), SOURCE)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(classifier.forward_features(images), autoencoder.encoder.forward_features(images))
    assert all(torch.equal(classifier.head.state_dict()[name], tensor) for name, tensor in head.items())


@pytest.mark.parametrize(
    ("other", "image_size", "channels", "complaint"),
    [
        ({"depth": 1}, (16, 16), 3, r"blocks\.1\.norm1\.weight is missing; .* and 8 more"),
        ({"depth": 3}, (16, 16), 3, r"blocks\.2\.norm1\.weight is unknown; .* and 8 more"),
        ({"width": 24}, (16, 16), 3, r"cls_token is \[1, 1, 24\] instead of \[1, 1, 16\]; .* more"),
        ({}, (16, 16), 1, r": patch_embed\.proj\.weight is \[16, 1, 4, 4\] instead of \[16, 3, 4, 4\]; set"),
        ({}, (8, 8), 3, r": pos_embed is \[1, 5, 16\] instead of \[1, 17, 16\]; set model"),
        ({"patch_size": (2,)}, (8, 8), 3, r"patch_embed\.proj\.weight is \[16, 3, 2, 2\] instead of"),
    ],
)
def test_another_encoder_is_refused_by_the_names_of_its_tensors(
    tiny_autoencoder: Build,
    other: dict[str, int],
    image_size: tuple[int, int],
    channels: int,
    complaint: str,
) -> None:
    weights = file_tensors(tiny_autoencoder(image_size=image_size, channels=channels, **other))
    encoder = build_encoder(TINY, (16, 16), 3)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError, match=complaint) as error:
        load_encoder(encoder, weights, SOURCE)
    assert str(error.value).startswith(f"{SOURCE} holds another model")
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in before.items())


def test_another_decoder_is_refused_when_all_is_loaded_and_ignored_when_the_encoder_is(
    tiny_autoencoder: Build,
) -> None:
    model, wider = tiny_autoencoder(), tiny_autoencoder(seed=1, decoder_width=24)
    with pytest.raises(UserError, match=r"mask_token is \[1, 1, 24\] instead of \[1, 1, 12\]"):
        load_all(model, file_tensors(wider), SOURCE)
    load_encoder(model.encoder, file_tensors(wider), SOURCE)
    assert torch.equal(model.encoder.cls_token, wider.encoder.cls_token)


def test_a_file_without_its_decoder_is_refused_when_all_is_loaded(tiny_autoencoder: Build) -> None:
    model = tiny_autoencoder()
    with pytest.raises(UserError, match="mask_token is missing"):
        load_all(model, encoder_part(file_tensors(model)), SOURCE)


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_autoencoder_begins_with_encoder_and_decoder_of_another(tiny_autoencoder: Build, decoder: str) -> None:
    model, other = tiny_autoencoder(decoder=decoder), tiny_autoencoder(seed=1, decoder=decoder)
    assert has_decoder(file_tensors(model))
    load_autoencoder(other, file_tensors(model), SOURCE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_without_a_decoder_in_the_file_the_own_one_stays(tiny_autoencoder: Build) -> None:
    model, classifier = tiny_autoencoder(seed=1), build_classifier(TINY, (16, 16), 3, 5, "mlp")
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    assert not has_decoder(file_tensors(classifier))
    load_autoencoder(model, file_tensors(classifier), SOURCE)
    assert all(torch.equal(model.decoder.state_dict()[name], tensor) for name, tensor in before.items())
    encoder = encoder_part(classifier.state_dict())
    assert all(torch.equal(model.encoder.state_dict()[name], tensor) for name, tensor in encoder.items())


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"decoder_width": 24}, r"mask_token is \[1, 1, 24\] instead of \[1, 1, 12\]"),
        ({"decoder_depth": 2}, r"decoder_blocks\.1\.norm1\.weight is unknown"),
        ({"decoder": "cross"}, r"decoder_embed\.weight is missing"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused_and_nothing_is_loaded(
    other: dict[str, int], complaint: str, tiny_autoencoder: Build
) -> None:
    model, weights = tiny_autoencoder(), file_tensors(tiny_autoencoder(seed=1, **other))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=complaint):
        load_autoencoder(model, weights, SOURCE)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_for_another_grid_both_tables_of_positions_are_resampled_and_nothing_else(tiny_autoencoder: Build) -> None:
    model, larger = tiny_autoencoder(), tiny_autoencoder(seed=1, image_size=(24, 32))
    weights = file_tensors(model)
    load_autoencoder(larger, for_grid(weights, model.grid, larger.grid), SOURCE)
    found = file_tensors(larger)
    for name, tensor in weights.items():
        if name in ("pos_embed", "decoder_pos_embed"):
            assert torch.equal(found[name], resample_positions(tensor, (4, 4), (6, 8)))
        else:
            assert torch.equal(found[name], tensor), name


def test_a_table_that_is_not_of_the_grid_it_should_be_of_is_refused(tiny_autoencoder: Build) -> None:
    weights = file_tensors(tiny_autoencoder(image_size=(8, 8)))
    with pytest.raises(UserError, match=r"pos_embed is \[1, 5, 16\] instead of \[1, 17, 16\]"):
        load_autoencoder(tiny_autoencoder(), for_grid(weights, (3, 3), (4, 4)), SOURCE)


def test_a_file_that_is_removed_while_it_is_read_is_missing(
    tiny_autoencoder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_file(file_tensors(tiny_autoencoder()), path)

    def load_after_header(file: Path) -> None:
        with safe_open(file, framework="pt"):
            file.unlink()
            torch.UntypedStorage.from_file(str(file), False, 8)

    monkeypatch.setattr("mae.models.weights.load_file", load_after_header)
    with pytest.raises(UserError, match=r"m\.safetensors does not exist$"):
        read_weights(path)


def test_missing_and_damaged_files_are_refused(tiny_autoencoder: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is not an intact safetensors file"):
        read_weights(tmp_path)
    whole = tmp_path / "whole.safetensors"
    save_file(file_tensors(tiny_autoencoder()), whole)
    for length in (0, 5, 500, whole.stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:length])
        with pytest.raises(UserError, match=r"cut\.safetensors is not an intact safetensors file"):
            read_weights(tmp_path / "cut.safetensors")
