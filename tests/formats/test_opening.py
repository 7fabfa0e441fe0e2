"""Models of other libraries compute here what they compute there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

from formats.foreign import (
    MEAN,
    NORMALIZATION,
    SETTINGS,
    STD,
    published,
    published_file,
    shaken,
    timm_folder,
    timm_vit,
    torchvision_vit,
    transformers_folder,
    vit_classifier,
    vit_mae,
)
from mae.formats.norms import norms_measured
from mae.formats.opening import StoredModel, open_model
from mae.formats.torchvision_vit import to_torchvision
from mae.inference.model import load
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.description import DecoderDescription
from mae.models.network import build_network

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def outputs(stored: StoredModel) -> Tensor:
    network = build_network(stored.description, stored.weights, stored.path).eval()
    with torch.no_grad():
        result: Tensor = (network.encoder if isinstance(network, MaskedAutoencoder) else network)(IMAGES)
    return result


def test_a_folder_of_timm_says_all(tmp_path: Path) -> None:
    labels = ["ant", "bee", "cat", "dog", "eel"]
    theirs = timm_folder(tmp_path / "timm", labels=labels)
    stored = open_model(tmp_path / "timm")
    described = stored.description
    assert (described.kind, described.heads, described.image_size) == ("classifier", 2, (16, 16))
    assert (described.mean, described.std, described.crop_pct) == (MEAN, STD, 0.9)
    assert described.classes == tuple(labels)
    assert torch.equal(outputs(stored), theirs(IMAGES))
    assert stored.report is not None
    assert str(stored.report) == "(timm): 32 tensors loaded"


def test_a_timm_classifier_that_pools_the_mean_has_its_norm_after_it(tmp_path: Path) -> None:
    theirs = timm_folder(tmp_path / "timm", global_pool="avg")
    stored = open_model(tmp_path / "timm")
    assert stored.description.pool == "avg"
    assert torch.equal(outputs(stored), theirs(IMAGES))


def test_a_head_on_the_mean_of_normed_tokens_is_left_out(tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm", global_pool="avg", fc_norm=False)
    report = open_model(tmp_path / "timm").report
    assert report is not None
    assert set(report.left_out) == {"head.weight", "head.bias"}
    assert str(report) == ("(timm): 30 tensors loaded, 2 left out (head that reads the mean of normed patch tokens)")


@pytest.mark.parametrize("place", ["", "model", "state_dict", "state_dict_ema", "teacher"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "module.base_encoder.", "backbone."]
)
def test_bare_files_are_read_through_their_wrappers(place: str, prefix: str, tmp_path: Path) -> None:
    theirs = timm_vit()
    weights = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    if prefix.endswith("base_encoder."):
        weights["module.momentum_encoder.cls_token"] = torch.zeros(1, 1, 16)
    torch.save({place: weights, "epoch": 3} if place else weights, tmp_path / "weights.pth")
    model = load(tmp_path / "weights.pth", "cpu", **NORMALIZATION, heads=2)
    assert torch.equal(model.network(IMAGES), theirs(IMAGES))
    assert model.description.crop_pct == 0.875
    assert model.classes == tuple("01234")


def test_counts_of_a_network_that_is_left_out_do_no_harm(tmp_path: Path) -> None:
    weights = {f"module.base_encoder.{name}": tensor for name, tensor in timm_vit(num_classes=0).state_dict().items()}
    norm = {"module.base_encoder.head.1.num_batches_tracked": torch.tensor(3)}  # MoCo v3's heads have batch norms
    torch.save({"state_dict": weights | norm}, tmp_path / "moco.pth")
    stored = open_model(tmp_path / "moco.pth", heads=2)
    assert stored.report is not None
    assert stored.report.left_out == {"base_encoder.head.1.num_batches_tracked": "head of another kind"}


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    theirs = timm_vit().bfloat16()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(outputs(open_model(tmp_path / "w.safetensors", heads=2)), theirs.float()(IMAGES))


def test_a_file_of_torchvision_by_its_new_and_its_old_names(tmp_path: Path) -> None:
    theirs = torchvision_vit()
    weights = theirs.state_dict()
    old = {n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t for n, t in weights.items()}
    for name, each in (("new", weights), ("old", old)):
        torch.save(each, tmp_path / f"{name}.pth")
        torch.testing.assert_close(
            outputs(open_model(tmp_path / f"{name}.pth", heads=2)), theirs(IMAGES), rtol=0, atol=1e-6
        )


def test_a_published_encoder_needs_only_a_normalisation(tmp_path: Path) -> None:
    model = load(published_file(tmp_path / "mae_pretrain_vit_base.pth"), "cpu", **NORMALIZATION)
    assert (model.description.heads, model.description.depth, model.description.decoder) == (3, 1, None)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, published()[name]), name


@pytest.mark.parametrize(("arguments", "target"), [({}, False), ({"norm_pix_loss": True, "mask_ratio": 0.5}, True)])
def test_a_published_autoencoder_keeps_its_decoder(arguments: dict[str, object], target: bool, tmp_path: Path) -> None:
    stored = open_model(published_file(tmp_path / "whole.pth", whole=True, **arguments))
    ratio = arguments.get("mask_ratio", 0.75)
    assert stored.description.decoder == DecoderDescription("self", 192, 1, 6, "random", ratio, target)
    assert stored.weights.keys() == published().keys()
    assert all(torch.equal(tensor, published()[name]) for name, tensor in stored.weights.items())
    model = load(tmp_path / "whole.pth", "cpu", **NORMALIZATION)
    assert model.reconstruct([torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()]).rebuilt.shape == (1, 3, 16, 16)


def test_a_decoder_whose_heads_are_not_known_is_left_out(tmp_path: Path) -> None:
    torch.save({"model": published(SETTINGS)}, tmp_path / "whole.pth")
    stored = open_model(tmp_path / "whole.pth", heads=2)
    assert not stored.has_decoder
    assert stored.report is not None
    assert set(stored.report.left_out.values()) == {"decoder of which the number of heads is not known"}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}], ids=["one file", "several"])
def test_a_classifier_of_transformers(options: dict[str, str], tmp_path: Path) -> None:
    theirs = vit_classifier(id2label={0: "ant", 1: "bee"}, label2id={"ant": 0, "bee": 1})
    folder = transformers_folder(tmp_path / "vit", theirs, **options)
    stored = open_model(folder)
    assert stored.description.classes == ("ant", "bee")
    assert (stored.description.mean, stored.description.crop_pct) == (MEAN, 0.8)
    torch.testing.assert_close(outputs(stored), theirs(IMAGES).logits, rtol=0, atol=1e-6)
    again = open_model(folder)
    assert again.sha256 == stored.sha256
    if options:  # the index alone does not tell models apart
        shard = next(iter(sorted(folder.glob("model-*.safetensors"))))
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
        assert open_model(folder).sha256 != stored.sha256


def test_an_encoder_of_transformers_and_a_pickle_of_it(tmp_path: Path) -> None:
    theirs = shaken(ViTModel(ViTConfig(**vit_classifier().config.to_dict())))
    folder = transformers_folder(tmp_path / "vit", theirs)
    with torch.no_grad():
        expected = theirs(IMAGES).last_hidden_state[:, 0]
    torch.testing.assert_close(outputs(open_model(folder)), expected, rtol=0, atol=1e-6)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    stored = open_model(folder)
    torch.testing.assert_close(outputs(stored), expected, rtol=0, atol=1e-6)
    assert stored.report is not None
    assert set(stored.report.left_out) == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_of_vit_mae_is_the_same(norm_pix_loss: bool, tmp_path: Path) -> None:
    theirs = vit_mae(norm_pix_loss=norm_pix_loss)
    stored = open_model(transformers_folder(tmp_path / "mae", theirs))
    ours = build_network(stored.description, stored.weights, stored.path)
    assert isinstance(ours, MaskedAutoencoder)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = theirs(IMAGES, noise=noise).loss
        torch.testing.assert_close(ours(IMAGES, noise).loss, loss, rtol=1e-6, atol=0)


def test_what_this_program_exports_to_other_names_keeps_its_description(tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm", labels=list("abcde"))
    first = open_model(tmp_path / "timm")
    save_file(to_torchvision(first.weights), tmp_path / "w.safetensors", first.description.metadata())
    again = open_model(tmp_path / "w.safetensors")
    assert again.description == first.description
    assert again.report is not None
    torch.save({"model": first.weights, "mae": first.description.metadata()["mae"]}, tmp_path / "w.pth")
    assert open_model(tmp_path / "w.pth").description == first.description


def test_another_number_in_the_norms_is_taken_as_it_is_and_measured_for_a_run(tmp_path: Path) -> None:
    theirs = vit_classifier(layer_norm_eps=1e-3)
    folder = transformers_folder(tmp_path / "vit", theirs)
    with torch.no_grad():
        torch.testing.assert_close(load(folder, "cpu").network(IMAGES), theirs(IMAGES).logits, rtol=0, atol=1e-6)
    (said,) = norms_measured(open_model(folder))
    assert said.startswith("its norms add 0.001 to a variance, here 1e-06: features of noise differ by ")
    assert norms_measured(open_model(transformers_folder(tmp_path / "same", vit_classifier()))) == ()


def test_the_size_of_the_images_is_that_of_the_config_if_it_fits(tmp_path: Path) -> None:
    theirs = timm_vit(img_size=(8, 32))
    timm_folder(tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["model_args"]["img_size"] = [8, 32]
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    save_file(theirs.state_dict(), tmp_path / "timm" / "model.safetensors")
    assert open_model(tmp_path / "timm").description.image_size == (8, 32)
