"""Versions of libraries, as checkpoints and reports list them."""

import torch

from mae.versions import library_versions


def test_versions_of_all_that_changes_a_number_or_a_file() -> None:
    versions = library_versions()
    assert set(versions) == {"python", "mae", "torch", "timm", "accelerate", "numpy", "safetensors"}
    assert versions["torch"] == torch.__version__
