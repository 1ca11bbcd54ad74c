"""The checkpoints of a run: saved whole, resumed from the newest that is valid."""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import CheckpointError
from ..modeling import Classifier
from ..utils.files import write_text
from .matching import align_names, check_filled, named_by_ends
from .reading import check_file, check_finite, iteration_of, read_checkpoint, read_iteration
from .sharding import full_state, is_sharded
from .sources import WEIGHTS_KEYS, locate
from .writing import write_checkpoint

logger = logging.getLogger(__name__)


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Any], Path]:
    """Read weights from wherever they are, and check that all of them are finite.

    Args:
        path: what :func:`~sasa_det.checkpoint.sources.locate` accepts.

    Returns:
        tuple: what :func:`~sasa_det.checkpoint.read_checkpoint` returns, and the file.

    Raises:
        CheckpointError: if the file cannot be used.
    """
    source = locate(path)
    checkpoint = read_checkpoint(source.path)
    check_finite(checkpoint, source.path)
    if source.matching_heuristics:
        checkpoint["matching_heuristics"] = True
    return checkpoint, source.path


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer for files that may be damaged, hostile or of another model."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        allow: Sequence[str] = (),
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model whose weights are saved and loaded.
            save_dir: folder of the run's checkpoints; "" to save none.
            strict: whether weights must be given and fill the whole model, as for evaluation.
                Otherwise they must fill its backbone, or all of it if they are a detector's.
            allow: shell patterns of the model's weights that ``load`` may leave as they are, if
                not ``strict``.
            save_to_disk: whether this process saves; by default, if it is the main process.
            checkpointables: what else belongs to a training state, by name.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.strict = strict
        self.allow = tuple(allow)

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Save model and checkpointables to a file; all processes do if the model is sharded.

        Weights of a classifier are named as :func:`~sasa_det.checkpoint.matching.named_by_ends`
        does, and the file says so, so that detectron2 fills a detector's backbone with them.

        Args:
            name: name of the file in ``save_dir``, without its suffix.
            tag: whether a resumed run goes on from it.
            kwargs: what else to save, by name; ``iteration`` makes it a training state.

        Raises:
            CheckpointError: if nothing was saved, because a weight is not finite or writing failed.
        """
        sharded = is_sharded(self.model)
        if not self.save_dir or not (self.save_to_disk or sharded):
            return
        path = Path(self.save_dir, f"{name}.pth")
        if path.name != f"{name}.pth":
            raise CheckpointError(f"the name {name!r} of a checkpoint must not contain a folder.")
        parts = {"model": self.model, **self.checkpointables}
        data = {key: part.state_dict() for key, part in parts.items()}
        if sharded:
            data = full_state(data, keep=self.save_to_disk)
        if not self.save_to_disk:
            return
        check_finite(data, f"{path} is not saved", self.checkpointables)
        if isinstance(self.model, Classifier):
            data["model"] = named_by_ends(data["model"])
            data["matching_heuristics"] = True
        data.update(kwargs)
        logger.info("Saving checkpoint to %s", path)
        write_checkpoint(data, path)
        if tag:
            self.tag_last_checkpoint(path.name)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and checkpointables where the file has them.

        Args:
            path: what :func:`~sasa_det.checkpoint.sources.locate` accepts; "" to load nothing.
            checkpointables: names of those to load; all if None.

        Returns:
            dict: what else the file holds.

        Raises:
            CheckpointError: if the file cannot be used or does not fill what it has to, or, if
                ``strict``, there is none. The model is not to be used then.
        """
        if not path:
            if self.strict:
                raise CheckpointError(f"no weights are given: name a checkpoint {WEIGHTS_KEYS}.")
            logger.info("No weights are given: the model starts from its initialization.")
            return {}
        return self._apply(*read_weights(path), checkpointables, strict=self.strict)

    def load_read(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """Load the weights that :func:`read_weights` returned; as :meth:`load`."""
        return self._apply(checkpoint, path, [], strict=self.strict)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest valid training state of ``save_dir``, or else weights alone.

        Args:
            path: weights to load if ``resume`` is False or there is no checkpoint.
            resume: whether to continue the run of ``save_dir``.

        Returns:
            dict: what else the file holds, such as ``iteration``.

        Raises:
            CheckpointError: as of :meth:`load`, or if no training state is valid, naming what was
                tried.
        """
        if resume and self.has_checkpoint():
            file, checkpoint = self._newest_valid()
            return self._apply(checkpoint, file, None, strict=True)
        return self.load(path, checkpointables=[])

    def remove_old(self, prefix: str, keep: int) -> None:
        """Remove the oldest periodic checkpoints, those named by their iteration.

        The one that ``last_checkpoint`` names stays, and all stay unless one of those that would is
        valid.

        Args:
            prefix: what comes before the iteration in their names, such as ``model_``.
            keep: how many to keep, at least 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        if not self.save_dir or not self.save_to_disk:
            return
        name = re.compile(rf"{re.escape(prefix)}\d+\.pth")
        files = [path for path in Path(self.save_dir).iterdir() if name.fullmatch(path.name)]
        files.sort(key=lambda path: int(path.stem.removeprefix(prefix)))
        last = None
        with suppress(CheckpointError):
            last = self._last_checkpoint()
        old = [path for path in files[:-keep] if path != last]
        kept = [path for path in (last, *reversed(files)) if path and path not in old]
        if old and self._has_valid(kept):
            for path in old:
                logger.info("Removing %s, the %d newest stay.", path, keep)
                path.unlink(missing_ok=True)

    def has_checkpoint(self) -> bool:
        """Return whether ``save_dir`` has something to resume, valid or not."""
        tag = Path(self.save_dir, "last_checkpoint")
        return bool(self.save_dir) and (tag.exists() or bool(self._training_files()))

    def get_checkpoint_file(self) -> str:
        """Return the file that ``last_checkpoint`` names, "" if there is none in the folder."""
        try:
            return str(self._last_checkpoint())
        except CheckpointError as error:
            logger.warning("There is no last checkpoint: %s", error)
            return ""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file to resume from in ``last_checkpoint``."""
        tag = Path(self.save_dir, "last_checkpoint")
        try:
            write_text(tag, last_filename_basename)
        except OSError as error:
            raise CheckpointError(f"{tag} could not be written ({error.strerror}).") from error

    def _last_checkpoint(self) -> Path:
        """Return the file of the folder that ``last_checkpoint`` names, and nothing outside."""
        tag = Path(self.save_dir, "last_checkpoint")
        try:
            if tag.exists() and not tag.is_file():
                raise CheckpointError(f"{tag} is not a regular file.")  # a pipe would be waited for
            with tag.open("rb") as file:
                name = file.read(4096).decode(errors="replace").strip()
        except OSError as error:
            raise CheckpointError(f"{tag} cannot be read ({error.strerror}).") from error
        if not name:
            raise CheckpointError(f"{tag} is empty.")
        path = Path(self.save_dir, name)
        if path.name != name or not self._is_inside(path):
            raise CheckpointError(f"{tag} names {name[:200]!r}, which is not a file of its folder.")
        return path

    def _newest_valid(self) -> tuple[Path, dict[str, Any]]:
        """Read the file that ``last_checkpoint`` names, even if there are newer ones.

        If it cannot be used, a warning says so, and it is the valid one of the highest iteration.
        """
        last, tried = None, {}
        try:
            last = self._last_checkpoint()
            return last, self._read_training_state(last)
        except CheckpointError as error:
            tried["last_checkpoint"] = str(error)
        iterations = {}
        for path in self._training_files():
            try:
                if path != last:
                    iterations[path] = read_iteration(path)
            except CheckpointError as error:
                tried[path.name] = str(error)
        for path in sorted(iterations, key=iterations.get, reverse=True):
            try:
                checkpoint = self._read_training_state(path)
            except CheckpointError as error:
                tried[path.name] = str(error)
            else:
                logger.warning("%s Resuming from %s instead.", tried["last_checkpoint"], path)
                return path, checkpoint
        reasons = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in tried.items())
        raise CheckpointError(f"{self.save_dir} holds no valid training state ({reasons}).")

    def _training_files(self) -> list[Path]:
        return sorted(
            path for path in Path(self.save_dir).glob("model_*.pth") if self._is_inside(path)
        )

    def _is_inside(self, path: Path) -> bool:
        """Tell whether a path is a file of ``save_dir`` after following symbolic links."""
        try:
            return path.is_file() and path.resolve().parent == Path(self.save_dir).resolve()
        except (OSError, ValueError):  # no name that a file could have
            return False

    def _read_training_state(self, path: Path) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        iteration_of(checkpoint, path)
        for key in self.checkpointables:
            if key not in checkpoint:
                raise CheckpointError(f"{path} holds no state of {key}.")
        check_finite(checkpoint, path, self.checkpointables)
        return checkpoint

    def _has_valid(self, paths: Sequence[Path]) -> bool:
        for path in paths:
            try:
                check_file(path)
            except CheckpointError as error:
                logger.warning("No old checkpoint is removed in favour of this one: %s", error)
            else:
                return True
        return False

    def _apply(
        self,
        checkpoint: dict[str, Any],
        path: Path,
        checkpointables: Sequence[str] | None,
        *,
        strict: bool,
    ) -> dict[str, Any]:
        """Load the content of a file and return what remains of it."""
        logger.info("Loading weights of %s", path)
        model = self.model.state_dict()
        try:
            align_names(model, checkpoint)
            weights = checkpoint["model"]
            incompatible = self._load_model(checkpoint)  # takes those of another shape out
            check_filled(model, weights, incompatible, strict=strict, allow=self.allow)
        except CheckpointError as error:
            raise CheckpointError(f"{path} does not fit the model: {error}.") from error
        self._log_incompatible_keys(incompatible)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                logger.info("Loading %s of %s", key, path)
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint
