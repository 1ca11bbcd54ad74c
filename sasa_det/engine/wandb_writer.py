"""Metrics for Weights & Biases."""

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["WandbWriter"]


class WandbWriter(EventWriter):
    """Writes every scalar of a run to Weights & Biases; a resumed run goes on in the same place."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the config of the run; ``WANDB_PROJECT`` names the project.

        Raises:
            ImportError: if wandb is not installed.
        """
        import wandb

        # The id follows from the folder: that is where a run is resumed.
        name = cfg.OUTPUT_DIR.strip("./").replace("/", "-")
        self._run = wandb.init(
            project=cfg.WANDB_PROJECT,
            name=name,
            id=name,
            resume="allow",
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
        )
        self._written = -1

    def write(self) -> None:
        storage = get_event_storage()
        scalars: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest().items():
            if iteration > self._written:
                scalars.setdefault(iteration, {})[name] = value
        for iteration in sorted(scalars):
            self._run.log(scalars[iteration], step=iteration)
            self._written = iteration

    def close(self) -> None:
        self._run.finish()
