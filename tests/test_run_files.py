"""Places of results beside a model."""

from pathlib import Path

from mae.run_files import beside


def test_results_are_beside_a_model_but_never_in_a_checkpoint(tmp_path: Path) -> None:
    run, copied = tmp_path / "run", tmp_path / "copied"
    checkpoint = run / "checkpoints" / "step-000000001"
    for folder in (checkpoint, copied):
        folder.mkdir(parents=True)
        for name in ("manifest.json", "model.safetensors"):
            (folder / name).touch()
    assert beside(run / "model.safetensors", "evaluation") == run / "evaluation"
    assert beside(checkpoint / "model.safetensors", "evaluation") == run / "evaluation-step-000000001"
    assert beside(copied / "model.safetensors", "evaluation") == tmp_path / "evaluation-copied"
