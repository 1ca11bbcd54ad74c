"""Which runs share a place at Weights & Biases."""

import pytest

from sasa_det.checkpoint import write_checkpoint
from sasa_det.config.options import RunOptions
from sasa_det.engine import load_config
from sasa_det.engine.output_folder import claim_output
from sasa_det.engine.writers import wandb_id


def test_a_resumed_run_goes_on_and_a_fresh_one_begins(tmp_path):
    folder = tmp_path / "output"
    cfg = load_config(opts=["OUTPUT_DIR", str(folder)])

    def begin(**options):
        with claim_output(RunOptions.read(cfg), **options) as output:
            output.clear()
            return wandb_id(folder)

    first = begin()
    write_checkpoint({"model": {}, "iteration": 1}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    assert begin(resume="always") == first
    assert begin(overwrite=True) != first


def test_two_folders_of_one_name_are_two_runs(tmp_path):
    """As the default folder of two machines."""
    folders = [tmp_path / machine / "output" for machine in ("one", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert len({wandb_id(folder) for folder in folders}) == 2


@pytest.mark.slow
def test_scalars_reach_weights_and_biases(command, tmp_path, monkeypatch):
    """Offline, where the installed wandb writes what it would send."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command("WANDB_PROJECT", "sasa_det") == 0
    wandb.teardown()  # its process writes all that it has
    [written] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert wandb_id(tmp_path / "run").encode() in content
    assert b"total_loss" in content and b"gradient_norm" in content
