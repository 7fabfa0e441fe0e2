"""A loaded model gives what its network gives, for images of every kind, and refuses what it cannot do."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import png
from PIL import Image
from safetensors.torch import load_file
from timm.utils import AttentionExtract

import mae
from inference.conftest import ENCODER, NAMES, SIZE
from mae.data.images.augment import eval_view
from mae.data.images.decode import decode
from mae.data.loader import normalize
from mae.data.statistics import PixelStatistics
from mae.errors import UserError
from mae.inference.inputs import Picture, encoded
from mae.inference.model import BATCH, Model
from mae.models.classifier import build_classifier
from mae.models.description import describe_model, find_best_model, read_description
from mae.models.patches import patchify
from mae.models.selection import Selection
from mae.models.weights import file_tensors, write_weights
from mae.pipelines.export import ExportSettings, run


def pixels(number: int, height: int = 9, width: int = 13) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalized(model: Model, images: list[bytes]) -> torch.Tensor:
    """The images as evaluation gives them to a model, written a second time."""
    views = [eval_view(decode(image, 3), SIZE, 0.9) for image in images]
    return normalize(torch.stack(views), PixelStatistics(model.description.mean, model.description.std))


def test_features_are_those_of_the_encoder(pretrained: Path) -> None:
    model = mae.load(pretrained, "cpu")
    images = [png(n, (9, 13), "RGB") for n in range(BATCH + 3)]
    inputs = normalized(model, images)
    with torch.no_grad():
        tokens = model.encoder.forward_features(inputs)
        model.encoder.norm, norm = torch.nn.Identity(), model.encoder.norm
        raw = model.encoder.forward_features(inputs)
        model.encoder.norm = norm
    for kind, found in (("normed", tokens), ("raw", raw)):
        cls, avg = found[:, 0], found[:, 1:].mean(1)
        expected = {"cls": cls, "avg": avg, "cls+avg": torch.cat([cls, avg], 1)}
        for name, features in expected.items():
            torch.testing.assert_close(model.embed(images, name, kind), features, rtol=1e-5, atol=1e-5)
    assert model.embed(images[0]).shape == (1, 16)


def test_a_tuned_run_predicts_with_its_best_model(tuned: Path) -> None:
    model = mae.load(tuned, "cpu")
    assert model.path.name == "best.safetensors"
    assert model.selection == Selection("abc", 7, 0.5)
    images = [png(n, (9, 13), "RGB") for n in range(5)]
    with torch.no_grad():
        expected = model.network(normalized(model, images))
    torch.testing.assert_close(model.logits(images), expected, rtol=1e-5, atol=1e-5)
    for row, found in zip(expected.softmax(1), model.predict(images, top=2), strict=True):
        probabilities, labels = row.sort(descending=True)
        assert found.labels == tuple(labels[:2].tolist())
        assert found.names == tuple(NAMES[label] for label in found.labels)
        assert found.probabilities == pytest.approx(tuple(probabilities[:2].tolist()), rel=1e-4)
    assert len(model.predict(images, top=9)[0].labels) == len(NAMES)
    last = mae.load(tuned / "model.safetensors", "cpu")
    assert last.selection is None
    assert not torch.equal(last.logits(images), model.logits(images))


def test_a_linear_head_without_names(tmp_path: Path) -> None:
    classifier = build_classifier(ENCODER, SIZE, 3, 4, "linear")
    description = describe_model("classifier", ENCODER, SIZE, (0.4,) * 3, (0.3,) * 3, 0.9)
    write_weights(tmp_path / "a.safetensors", file_tensors(classifier), description.metadata())
    (found,) = mae.load(tmp_path / "a.safetensors", "cpu").predict(pixels(0))
    assert sorted(found.names) == ["0", "1", "2", "3"]


def test_every_kind_of_image_gives_the_same_feature(pretrained: Path, tmp_path: Path) -> None:
    model = mae.load(pretrained, "cpu")
    array = pixels(0)
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds: list[Picture] = [
        str(file), file, file.read_bytes(), Image.fromarray(array), array, tensor, tensor / 255, array / 255,
        Image.fromarray(array).convert("RGBA"), np.float32(array / 255),
    ]  # fmt: skip
    expected = model.embed(file)
    for kind in kinds:
        assert torch.equal(model.embed(kind), expected)
    several = torch.stack([tensor, tensor])
    for batch in (several, several.permute(0, 2, 3, 1).numpy(), [file, array]):
        assert torch.equal(model.embed(batch)[1:], expected)

    coarse = torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16)
    assert torch.equal(model.embed(coarse), model.embed(coarse.float()))

    gray = array[:, :, 0]
    for image in (gray, gray[:, :, None], torch.from_numpy(gray), torch.from_numpy(gray)[None]):
        assert torch.equal(model.embed(image), model.embed(Image.fromarray(gray)))


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "a.png"
    Image.fromarray(pixels(0)).save(file, exif=exif)
    with Image.open(file) as image:
        assert np.array_equal(decode(encoded(image), 3), decode(encoded(file), 3))
        assert decode(encoded(image), 3).shape == (3, 13, 9)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_pil_images_of_all_modes_are_read_as_their_files(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(pixels(0)).convert("L" if mode == "I;16" else mode).convert(mode)
    # Pillow before 12 writes TIFFs of YCbCr that it cannot read.
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (image.convert("RGB") if mode == "YCbCr" else image).save(file)
    assert torch.equal(decode(encoded(image), 3), decode(file.read_bytes(), 3))


def test_what_a_pil_image_cannot_show_of_its_file_is_kept(tmp_path: Path) -> None:
    """A transparent colour, alpha in a palette, and the compression of a file that is not to be repeated."""
    array = pixels(0, 40, 48)
    image, alpha = Image.fromarray(array), np.dstack([array, pixels(1, 40, 48)[:, :, :1]])
    image.quantize(16).save(tmp_path / "a.png", transparency=bytes([0, 128] + [255] * 14))
    image.save(tmp_path / "b.png", transparency=tuple(array[4, 4].tolist()))
    image.convert("L").save(tmp_path / "c.png", transparency=100)
    image.convert("1").save(tmp_path / "d.png", transparency=0)
    Image.fromarray(alpha).quantize(16).save(tmp_path / "e.png")
    image.save(tmp_path / "f.tif", compression="jpeg")
    image.convert("1").save(tmp_path / "g.tif", compression="group4")
    for file in sorted(tmp_path.iterdir()):
        for channels in (1, 3, 4):
            with Image.open(file) as opened:
                assert torch.equal(decode(encoded(opened), channels), decode(file.read_bytes(), channels)), file
    with Image.open(tmp_path / "g.tif") as opened:
        assert decode(encoded(opened.convert("RGB")), 3).shape == (3, 40, 48)
    for usual, mode in (("LA", "La"), ("RGBA", "RGBa"), ("RGBA", "PA")):
        shown = Image.fromarray(alpha).convert(usual).convert(mode)
        assert decode(encoded(shown), 4)[3].tolist() == np.asarray(shown)[:, :, -1].tolist()


def test_images_that_cannot_be_read_are_told_in_one_line(pretrained: Path, tmp_path: Path) -> None:
    model = mae.load(pretrained, "cpu")
    Image.fromarray(pixels(0, 64, 64)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    refusal = pytest.raises(
        UserError, match=r"image 0 is not usable: the pixels of a PIL image of mode RGB .*truncated"
    )
    with Image.open(tmp_path / "cut.jpg") as cut, refusal:
        model.embed(cut)
    with Image.open(tmp_path / "a.jpg") as closed:
        pass
    images: list[tuple[Any, str]] = [
        (closed, "image 0 is not usable: .*closed"),
        (pixels(0) > 5, "pixels of type bool"),
        (pixels(0).astype(np.uint16), "type uint16, whose greatest value is not known; allowed: uint8"),
        (torch.eye(8).to_sparse(), "a tensor that cannot be read"),
        (torch.empty(3, 8, 8, device="meta"), "a tensor that cannot be read"),
    ]
    for image, words in images:
        with pytest.raises(UserError, match=words) as caught:
            model.embed([image])
        assert "\n" not in str(caught.value)


def test_reconstruction(pretrained: Path) -> None:
    model = mae.load(pretrained, "cpu")
    images = np.stack([pixels(n, *SIZE) for n in range(3)])
    found = model.reconstruct(images, mask_ratio=0.5, seed=3)
    assert found.hidden.shape == (3, 2, 3)
    assert found.hidden.sum((1, 2)).tolist() == [3, 3, 3]
    assert torch.equal(found.hidden[:2], model.reconstruct(images[:2], mask_ratio=0.5, seed=3).hidden)
    assert not torch.equal(found.hidden, model.reconstruct(images, mask_ratio=0.5, seed=4).hidden)
    assert model.reconstruct(images).hidden.sum((1, 2)).tolist() == [5, 5, 5]  # 3/4 of 6 patches, rounded up

    own = torch.zeros(3, 2, 3, dtype=torch.bool)
    own[:, 0, 1] = True
    masked = model.reconstruct(images, hidden=own)
    assert torch.equal(masked.hidden, own)
    assert torch.equal(model.reconstruct(images, hidden=own.numpy()).rebuilt, masked.rebuilt)
    shown = own.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(masked.original)
    assert torch.equal(masked.pasted[~shown], masked.original[~shown])
    assert torch.equal(masked.pasted[shown], masked.rebuilt[shown])
    # The loss is that of training, computed from the pixels themselves.
    inputs = normalized(model, [encoded(image) for image in images])
    network = model.network
    with torch.no_grad():
        noise = torch.rand(3, 6)
        from mae.models.masking import mask_of

        mask = mask_of(own.flatten(1), noise)
        loss = network(inputs, mask).loss
    assert patchify(inputs, (4, 4)).shape == (3, 6, 48)
    torch.testing.assert_close(masked.loss.mean(), loss, rtol=1e-4, atol=1e-5)


def test_attention_equals_that_of_timm(pretrained: Path) -> None:
    model = mae.load(pretrained, "cpu")
    images = np.stack([pixels(n) for n in range(2)])
    timm.layers.set_fused_attn(False)
    try:
        plain = mae.load(pretrained, "cpu")
    finally:
        timm.layers.set_fused_attn(True)
    extract = AttentionExtract(plain.encoder, method="hook")
    inputs = normalized(plain, [encoded(image) for image in images])
    with torch.no_grad():
        maps = list(extract(inputs).values())
    for block in (0, 1, -1):
        found = model.attention(images, block)
        assert found.shape == (2, 2, 2, 3)
        torch.testing.assert_close(found.flatten(2), maps[block][:, :, 0, 1:], rtol=1e-4, atol=1e-6)


def test_an_export_for_timm_and_a_model_file_can_be_loaded(pretrained: Path, tmp_path: Path) -> None:
    file = pretrained / "model.safetensors"
    run(ExportSettings(file, out=tmp_path / "out"))
    expected = mae.load(pretrained, "cpu").embed(pixels(0))
    for source in (tmp_path / "out", file, str(file)):
        assert torch.equal(mae.load(source, "cpu").embed(pixels(0)), expected)


def test_weights_that_are_not_finite_are_refused(tuned: Path, tmp_path: Path) -> None:
    file = find_best_model(tuned)
    weights = load_file(file)
    weights["blocks.0.mlp.fc1.weight"][3, 2] = float("nan")
    write_weights(tmp_path / "damaged.safetensors", weights, read_description(file).metadata())
    with pytest.raises(UserError, match=r"holds values that are not finite, in blocks.0.mlp.fc1.weight; give an earl"):
        mae.load(tmp_path / "damaged.safetensors")


def test_what_a_model_cannot_do_is_refused(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    encoder, classifier = mae.load(pretrained, "cpu"), mae.load(tuned, "cpu")
    with pytest.raises(UserError, match=r"is an encoder, which knows no classes: .*mae embed.*mae finetune"):
        encoder.predict(pixels(0))
    with pytest.raises(UserError, match="has no decoder"):
        classifier.reconstruct(pixels(0))
    with pytest.raises(UserError, match=r"no block 2; allowed: -2 to 1"):
        encoder.attention(pixels(0), 2)
    for ratio in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match=f"mask_ratio {ratio}"):
            encoder.reconstruct(pixels(0), ratio)
    with pytest.raises(UserError, match=r"masks are \[1, 3, 2\]; allowed: .* \[1, 2, 3\]"):
        encoder.reconstruct(pixels(0), hidden=torch.ones(1, 3, 2, dtype=torch.bool))
    with pytest.raises(UserError, match="there are 2 masks for 1 images; give one mask for each"):
        encoder.reconstruct(pixels(0), hidden=torch.eye(2, 3, dtype=torch.bool).repeat(2, 1, 1))
    with pytest.raises(UserError, match="pixels of type object; allowed: whole or floating-point numbers"):
        encoder.embed(np.full((4, 4, 3), None))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png is not usable: it is not a valid image"):
        encoder.embed([tmp_path / "bad.png"])
    with pytest.raises(UserError, match=r"none\.png cannot be read: No such file"):
        encoder.embed(tmp_path / "none.png")
    with pytest.raises(UserError, match="no images"):
        encoder.embed([])
    with pytest.raises(UserError, match=r"from -1 to 1; allowed: 0 to 1, not normalised"):
        encoder.embed(torch.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4))
    with pytest.raises(UserError, match=r"shape \[2, 3, 4, 5, 6\]"):
        encoder.embed([np.zeros((2, 3, 4, 5, 6), np.uint8)])
    with pytest.raises(UserError, match="does not exist"):
        mae.load(tmp_path / "nothing")


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import mae, sys; assert 'torch' not in sys.modules; assert 'load' in dir(mae); mae.load; sys.modules['torch']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mae.lod  # noqa: B018
