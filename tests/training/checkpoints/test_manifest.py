"""The manifest is held against itself."""

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.training.checkpoints.manifest import FileIdentity, Manifest, is_set_aside, step_folder, step_of
from training.checkpoints.samples import run_position

MANIFEST = Manifest(
    run_position(5, best=0.5, pending=True, losses=[1.0, 2e-300]),
    {"torch": "2.15.0"},
    {"model.safetensors": FileIdentity(120, "ab" * 32)},
)


def test_what_was_written_comes_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_numbers_that_json_does_not_know_come_back() -> None:
    text = Manifest(run_position(5, loss=math.nan, best=-math.inf), {}, {}).to_json()
    notes = Manifest.from_json(text).run_position.notes
    assert math.isnan(notes["loss"])
    assert notes["best"] == -math.inf


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(MANIFEST.to_json()) * 8 - 1))
def test_one_flipped_bit_is_found_wherever_it_is_c06(bit: int) -> None:
    text = bytearray(MANIFEST.to_json())
    text[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError):  # noqa: PT011  what it says depends on the place
        Manifest.from_json(bytes(text))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(MANIFEST.to_json()) - 1))
def test_a_cut_is_found_wherever_it_is_c06(length: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Manifest.from_json(MANIFEST.to_json()[:length])


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b'{"format_version": 2}', b"[" * 100_000, b"\xff"])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("", "step", "5"),
        ("", "step", -1),
        ("", "notes", ["a"]),
        ("position", "samples", 1.5),
        ("position", "global_batch", True),
    ],
)
def test_a_value_of_another_type_is_refused_even_if_the_hash_is_right(place: str, name: str, value: object) -> None:
    content = json.loads(MANIFEST.to_json())
    del content["sha256"]
    (content[place] if place else content)[name] = value
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with pytest.raises(ValueError, match=rf"^{name} is "):
        Manifest.from_json(json.dumps(content | {"sha256": digest}).encode())


def test_the_step_is_read_from_the_name_of_a_folder() -> None:
    place = step_folder(Path("run"), 123)
    assert place == Path("run/step-000000123")
    assert step_of(place) == 123
    aside = Path("run/step-000000123.old")
    assert step_of(aside) == 123
    assert (is_set_aside(place), is_set_aside(aside)) == (False, True)
    for name in ("step-", "step-last", ".tmp-000000123", "step-1.part", "xstep-1"):
        assert step_of(Path(name)) is None
