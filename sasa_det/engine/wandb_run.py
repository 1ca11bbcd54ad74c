"""A run's place at Weights & Biases."""

import uuid
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter

from ..files import write_text

__all__ = ["WANDB_ID", "WandbRun", "wandb_id"]

# File of the output folder; a run that writes over another one removes it.
WANDB_ID = "wandb_id"


class WandbRun(EventWriter):
    """Lets TensorBoard's scalars go to Weights & Biases as well, until it is closed.

    To be made before TensorBoard's writer. A resumed run goes on in the same place.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the config of the run; ``WANDB_PROJECT`` names the project.

        Raises:
            ImportError: if wandb is not installed.
        """
        import wandb

        folder = Path(cfg.OUTPUT_DIR)
        self._run = wandb.init(
            project=cfg.WANDB_PROJECT,
            name=folder.resolve().name,
            id=wandb_id(folder),
            resume="allow",
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            sync_tensorboard=True,
        )

    def write(self) -> None:
        """Write nothing: TensorBoard's writer does."""

    def close(self) -> None:
        self._run.finish()


def wandb_id(folder: Path) -> str:
    """Return the id of the run of an output folder, which is drawn once and kept in the folder.

    Args:
        folder: an output folder, which exists.
    """
    path = folder / WANDB_ID
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
