"""Reading checkpoints without executing anything in them."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.utils.logger import log_first_n

from ..errors import CheckpointError
from .integrity import check_integrity
from .pickles import read_pickle
from .safetensors_file import read_safetensors

logger = logging.getLogger(__name__)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint into CPU memory after checking that no byte of it has changed.

    The suffix tells the format as in detectron2: ``.pkl`` is a pickle of numpy arrays (detectron2's
    and Caffe2's model zoos), ``.pyth`` is of pycls, ``.safetensors`` says it, anything else is of
    torch.save.

    Args:
        path: a file of this computer.

    Returns:
        dict: ``"model"``, a dict of tensors by name, which the file may call ``state_dict``, and
        all else that the file holds beside it.
        ``"matching_heuristics"`` is True and ``"__author__"`` names the source where names have yet
        to be matched with the model's, as in detectron2.

    Raises:
        CheckpointError: if the file is missing, damaged, no checkpoint, or holds anything but
            tensors, arrays of numbers, dicts, lists, text and numbers.
    """
    path = Path(path)
    with _explained(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError("it is not a regular file")  # a pipe would be waited for
        with open(path, "rb") as file:
            check_integrity(file)
            file.seek(0)
            return _read(file, path.suffix)


def classes_in(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes that a model was trained for, in the order of its indices.

    Args:
        checkpoint: what :func:`read_checkpoint` returned, or what remained of it after loading.

    Returns:
        list[str]: None if the checkpoint does not hold them, as one of another project.
    """
    return _list_in(checkpoint, "classes", str)


def category_ids_in(checkpoint: Mapping[str, Any]) -> list[int] | None:
    """Return the ids that the classes have in the training data, in the order of the indices.

    Args:
        checkpoint: as for :func:`classes_in`.

    Returns:
        list[int]: None if the checkpoint does not hold them.
    """
    return _list_in(checkpoint, "category_ids", int)


def config_in(checkpoint: Mapping[str, Any]) -> str:
    """Return the config that a model was trained with, as yaml; "" if there is none."""
    config = checkpoint.get("config")
    return config if isinstance(config, str) else ""


def _list_in(checkpoint: Mapping[str, Any], key: str, kind: type) -> list[Any] | None:
    """Return a list of values of a type, of the file itself or of the state of its trainer."""
    for holder in (checkpoint, checkpoint.get("trainer")):
        values = holder.get(key) if isinstance(holder, dict) else None
        if values and isinstance(values, list) and all(type(value) is kind for value in values):
            return values
    return None


def iteration_of(content: Any, path: Path) -> int:
    """Return the iteration in the content of a file, or raise a CheckpointError."""
    iteration = content.get("iteration") if isinstance(content, dict) else None
    if type(iteration) is not int or iteration < 0:
        raise CheckpointError(f"{path} holds no training state: it has no iteration.")
    return iteration


def read_iteration(path: Path) -> int:
    """Read the iteration of a training state without its tensors and without their checksum.

    Raises:
        CheckpointError: if the file is missing, no checkpoint or no training state.
    """
    with _explained(path):
        content = _load(path, mmap=True)
    return iteration_of(content, path)


def check_file(path: Path) -> None:
    """Check that no byte of a file has changed, as far as its format tells, without reading it.

    Raises:
        CheckpointError: if one has, or the file cannot be read.
    """
    with _explained(path), open(path, "rb") as file:
        check_integrity(file)


def check_finite(
    checkpoint: Mapping[str, Any], source: str | os.PathLike, states: Iterable[str] = ()
) -> None:
    """Check that all tensors of a checkpoint are numbers.

    Args:
        checkpoint: ``"model"`` and, by the names of ``states``, nested dicts, lists and tuples.
        source: what they belong to, for the sentence.
        states: what to check beside the model.

    Raises:
        CheckpointError: naming the first tensor that holds an infinity or NaN.
    """
    for part in ("model", *states):
        name = "the weight" if part == "model" else f"the state of {part}, at"
        for path, tensor in _tensors(checkpoint[part]):
            if tensor.numel() and tensor.is_floating_point():
                # Both extremes are NaN if any number is; no mask is made. Floats of one byte have
                # none.
                numbers = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
                if not torch.stack(torch.aminmax(numbers)).isfinite().all():
                    raise CheckpointError(f"{source}: {name} {path} is not finite.")


def _tensors(values: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(values, torch.Tensor):
        yield path, values
    elif isinstance(values, (dict, list, tuple)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _tensors(value, f"{path}/{key}" if path else str(key))


def _read(file: BinaryIO, suffix: str) -> dict[str, Any]:
    if suffix == ".pkl":
        content = _from_zoo(_as_dict(read_pickle(file)))
    elif suffix == ".pyth":
        content = _from_pycls(_as_dict(_load(file)))
    elif suffix == ".safetensors":
        content = read_safetensors(file)
    else:
        content = _as_dict(_load(file))
        if "model" not in content:
            if isinstance(content.get("state_dict"), dict):  # as many trainers call it
                content["model"] = content.pop("state_dict")
            else:
                content = {"model": content}
    content["model"] = _as_tensors(_as_dict(content["model"]))
    return content


def _load(file: BinaryIO | Path, **options: Any) -> Any:
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower() in ("1", "y", "yes", "true"):
        message = (
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: no code in checkpoints is executed here."
        )
        log_first_n(logging.WARNING, message)
    # Where it is asked for by name, torch lets no environment variable switch weights_only off.
    return torch.load(file, map_location="cpu", weights_only=True, **options)


def _from_zoo(content: dict[str, Any]) -> dict[str, Any]:
    if "model" in content and "__author__" in content:
        logger.info("Reading a file of %s.", content["__author__"])
        return content
    # Detectors of Caffe2 keep their weights in blobs, its ImageNet models do not.
    blobs = _as_dict(content.get("blobs", content))
    weights = {key: blob for key, blob in blobs.items() if not str(key).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(content: dict[str, Any]) -> dict[str, Any]:
    if "model_state" not in content:
        raise CheckpointError("it holds no model_state, as every .pyth file of pycls does")
    weights = {
        key: weight
        for key, weight in _as_dict(content["model_state"]).items()
        if not str(key).endswith("num_batches_tracked")
    }
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _as_dict(value: Any) -> dict:
    if not isinstance(value, dict):
        raise CheckpointError(f"it holds a {type(value).__name__} instead of a dict of weights")
    return value


def _as_tensors(weights: dict) -> dict[str, torch.Tensor]:
    """Check that all are tensors by name, and make those that are arrays so, in place."""
    for key, weight in weights.items():
        if isinstance(weight, np.ndarray):
            weights[key] = weight = torch.from_numpy(weight)
        if not isinstance(key, str) or not isinstance(weight, torch.Tensor):
            raise CheckpointError(f"its weight {key!r} is a {type(weight).__name__}, not a tensor")
        if weight.layout is not torch.strided or weight.is_meta:
            raise CheckpointError(f"its weight {key!r} is a tensor that is sparse or without data")
    return weights


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what a block raises into a CheckpointError that names a file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # unpicklers raise anything on arbitrary bytes
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} cannot be used: it refers to {refused[1]}, and may hold tensors, dicts, "
                "lists, text and numbers only."
            ) from error
        # What torch found comes after its advice.
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().partition("\n")[0]
        kind = ": ".join(filter(None, [type(error).__name__, reason]))
        raise CheckpointError(f"{path} is not a checkpoint ({kind}).") from error
