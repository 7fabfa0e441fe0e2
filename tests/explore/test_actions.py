"""What the page shows for values of its controls, bad ones among them; a set, and the command itself."""

import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae import cli
from mae.errors import UserError
from mae.explore import command, looking
from mae.explore.actions import Actions
from mae.explore.address import Address
from mae.explore.command import ExploreSettings
from mae.explore.models import RunModels
from mae.explore.picture_set import Picture, PictureSet
from mae.inference.sources import open_images
from mae.settings import parse
from tests.conftest import write_shards
from tests.explore.runs import (
    autoencoder,
    image_file,
    models_of,
    noise,
    pictures_in,
    write_autoencoder,
    write_classifier,
    write_run,
)

NOISE = Picture("noise.png", image_file(noise(0)))


@pytest.fixture
def models(tmp_path: Path) -> RunModels:
    return models_of(write_run(tmp_path / "run"))


def set_of(folder: Path, models: RunModels, most: int = 100) -> PictureSet:
    settings = parse(ExploreSettings, ["run", str(folder)], "mae explore")
    images = open_images(settings.source, settings.as_seen_by(models.description), print)
    return PictureSet(images, models.description, most, workers=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, of which two are alike, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, seed in enumerate((1, 2, 3, 4, 2)):
        (folder / f"{number}.png").write_bytes(image_file(noise(seed)))
    (folder / "5.png").write_bytes(b"none")
    return folder


def test_the_nearest_neighbour_of_a_picture_is_its_copy_and_not_itself(
    folder: Path, models: RunModels, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = set_of(folder, models)
    assert (
        "warning: left out of the neighbours: 1 image that cannot be used; the first: it is not"
        in capsys.readouterr().out
    )
    assert (len(pictures), pictures.searched) == (6, 5)
    for stop in range(3):
        found = pictures.nearest(models, stop, pictures.picture(1), 3)
        assert Path(found[0].name).name == "4.png"
        assert found[0].similarity == pytest.approx(1)
        assert [each.similarity for each in found] == sorted([each.similarity for each in found], reverse=True)
        assert "1.png" not in [Path(each.name).name for each in found]
    with pytest.raises(UserError, match="there is no image 7; allowed: 1 to 6"):
        pictures.picture(6)
    assert set_of(folder, models, most=2).searched == 1  # the first and the last, which is none


def test_a_model_that_is_written_anew_is_searched_by_its_own_features(
    folder: Path, models: RunModels, tmp_path: Path
) -> None:
    """As the best model of a fine-tuning that goes on, once it has left the memory."""
    pictures, last = set_of(folder, models), len(models.stops) - 1

    def similarities(pictures: PictureSet, models: RunModels) -> list[float]:
        return [each.similarity for each in pictures.nearest(models, last, pictures.picture(0), 3)]

    before = similarities(pictures, models)
    write_autoencoder(tmp_path / "run", autoencoder(7))
    again = models_of(tmp_path / "run")
    assert similarities(pictures, again) == similarities(set_of(folder, again), again) != before


def test_labels_frame_the_neighbours(tmp_path: Path, models: RunModels) -> None:
    shards = write_shards(tmp_path / "shards", [8], classes=2, size=(8, 12), mode="RGB")
    (shards / "classes.txt").write_text("<i>a</i>\nb\n")
    actions = Actions(models, set_of(shards, models))
    picture, name = actions.choose(None, 1)
    assert picture is not None
    assert "class &lt;i&gt;a&lt;/i&gt;" in name
    shown = actions.neighbours()(picture, 1)
    assert shown.count('<figure class="same">') == 3
    assert shown.count('<figure class="other">') == 4
    assert "Sought among 8 of the 8 images" in shown
    assert "<i>" not in shown


def test_each_checkpoint_shows_its_own_model(models: RunModels) -> None:
    fill = Actions(models, None).reconstruction()
    shown = [fill(NOISE, stop, "painted", 50, 0, "010001") for stop in (1, 2, 3)]
    assert len(set(shown)) == 3
    assert fill(NOISE, 1, "painted", 50, 0, "010001") == shown[0]
    assert "there is no checkpoint 4; allowed: 1 to 3" in fill(NOISE, 4, "painted", 50, 0, "010001")


def test_a_damaged_checkpoint_is_a_sentence_at_its_stop(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoints" / "step-000000010" / "model.safetensors").write_bytes(b"cut")
    actions = Actions(models_of(run), None)
    assert '<p class="notice">' in actions.reconstruction()(NOISE, 1, "random", 50, 0, "")
    assert "step-000000010" in actions.reconstruction()(NOISE, 1, "random", 50, 0, "")
    assert len(pictures_in(actions.reconstruction()(NOISE, 2, "random", 50, 0, ""))) == 5


def turned() -> bytes:
    """The noise, stored lying on its side, with the EXIF mark that turns it upright."""
    exif = Image.Exif()
    exif[274] = 6
    return image_file(np.rot90(noise(0)).copy(), exif=exif)


def with_alpha() -> bytes:
    return image_file(np.dstack([noise(0), np.full((8, 12), 7, np.uint8)]))


@pytest.mark.parametrize("data", [turned(), with_alpha()], ids=["EXIF", "alpha"])
def test_a_picture_is_turned_and_its_alpha_dropped_as_by_predict(data: bytes, models: RunModels) -> None:
    fill = Actions(models, None).reconstruction()
    assert fill(Picture("own", data), 3, "random", 50, 0, "") == fill(NOISE, 3, "random", 50, 0, "")


def of_side(side: int) -> bytes:
    """A PNG whose header gives more pixels than are allowed."""
    data = bytearray(image_file(noise(0)))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a valid image"),
        (b"<svg onload=alert(1)>", "not a valid image"),
        (NOISE.data[:60], "picture cannot be used"),
        (of_side(10_000), "10000x10000 pixels; allowed"),
        (of_side(50_000), "2500000000 pixels"),
    ],
    ids=["empty", "SVG", "cut", "large", "huge"],
)
def test_a_bad_picture_is_a_sentence_everywhere(data: bytes, reason: str, models: RunModels, folder: Path) -> None:
    actions = Actions(models, set_of(folder, models))
    picture, _ = actions.choose(data, 1)
    for shown in (
        actions.reconstruction()(picture, 3, "random", 50, 0, ""),
        actions.looked_at(looking.attention)(picture, 3, 1),
        actions.looked_at(looking.patch_colors)(picture, 3),
        actions.neighbours()(picture, 3),
    ):
        assert shown.startswith('<p class="notice">The picture cannot be used: ')
        assert reason in shown
        assert "<svg" not in shown
    assert actions.canvas(picture) == ""


def test_without_a_picture_or_a_set_the_page_says_what_to_do(models: RunModels, folder: Path) -> None:
    actions = Actions(models, None)
    assert actions.choose(None, 1)[0] is None
    assert "mae explore RUN IMAGES" in actions.choose(None, 1)[1]
    assert actions.neighbours()(None, 3) == actions.reconstruction()(None, 3, "random", 50, 0, "") == ""
    assert "there is no set to search" in actions.neighbours()(NOISE, 3)
    assert actions.canvas(None) == ""
    assert actions.canvas(NOISE).startswith("data:image/png;base64,")
    gone = Actions(models, set_of(folder, models))
    (folder / "1.png").unlink()
    picture, said = gone.choose(None, 2)
    assert picture is None
    assert "cannot be read" in said


def test_a_picture_of_the_set_that_is_none_is_a_sentence(models: RunModels, folder: Path) -> None:
    actions = Actions(models, set_of(folder, models))
    picture, said = actions.choose(None, 6)
    assert "5.png" in said
    assert "not a valid image" in actions.reconstruction()(picture, 3, "random", 50, 0, "")


def test_a_classifier_shows_classes_and_says_why_nothing_is_filled_in(tmp_path: Path) -> None:
    actions = Actions(models_of(write_classifier(tmp_path / "tuned")), None)
    assert "has no decoder" in actions.reconstruction()(NOISE, 1, "random", 50, 0, "")
    assert "&lt;b&gt;bee&lt;/b&gt;" in actions.looked_at(looking.predictions)(NOISE, 1)
    assert "end of the run" in actions.stop(1)


def test_without_gradio_one_line_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["explore", str(write_run(tmp_path / "run"))])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: mae explore needs Gradio: pip install 'mae-pretraining[explore]'\n"


@pytest.mark.parametrize(
    ("host", "is_local"), [("127.0.0.1", True), ("localhost", True), ("127.0.0.9", True), ("0.0.0.0", False)]
)
def test_only_this_machine_is_served_unless_told_otherwise(host: str, is_local: bool) -> None:
    assert parse(ExploreSettings, ["run", "--host", host], "mae explore").address.is_local is is_local
    assert parse(ExploreSettings, ["run"], "mae explore").address.is_local


def test_a_port_that_is_taken_is_an_error_and_without_one_the_next_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1 cannot be served at port {port}: .*; give another --port"):
            Address("127.0.0.1", port).free_port()
    assert Address("127.0.0.1", port).free_port() == port
    with pytest.raises(UserError, match=r"192\.0\.2\.1 cannot be served at port 7860 to 7959"):
        Address("192.0.2.1", None).free_port()
    with socket.create_server(("127.0.0.1", first := Address("127.0.0.1", None).free_port())):
        assert Address("127.0.0.1", None).free_port() > first


@pytest.mark.parametrize(
    "words", [["--port", "0"], ["--most", "0"], ["--most_megabytes", "0"], ["--workers", "-1"], ["--host", "::1"]]
)
def test_wrong_settings_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="allowed"):
        parse(ExploreSettings, ["run", *words], "mae explore")
