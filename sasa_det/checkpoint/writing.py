"""Writing checkpoints whole, with a checksum, and only what can be read again."""

import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..utils.files import whole_file
from .integrity import append_sha256
from .safetensors_file import safetensors_bytes

# Disk space that must remain beside a checkpoint, in bytes.
_MARGIN = 16 * 2**20
# What a tensor takes in a file beside its numbers, at most, in bytes.
_TENSOR_OVERHEAD = 1024
# What a number takes at most, in bytes.
_NUMBER_SIZE = 16

# Exact types: of a subclass, as numpy.float64 is of float, the file would name the class.
_NUMBERS = (bool, int, float, type(None), torch.dtype, torch.device)
_SEQUENCES = (list, tuple, torch.Size)
_DICTS = (dict, OrderedDict)
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def write_checkpoint(data: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint whole or not at all.

    The same data gives the same bytes. The file is on the disk when this returns, and carries a
    checksum of itself; an older file of this name is there until then.

    Args:
        data: nested dicts, lists and tuples of tensors, text and numbers. In a safetensors file,
            ``"model"``, tensors by name, and what JSON can hold.
        path: the file to write; its folder is made if it is not there. The suffix
            ``.safetensors`` asks for that format, any other for torch.save's.

    Raises:
        CheckpointError: if ``data`` holds anything else, the disk has no room for it, or writing
            fails; nothing is left of the file then.
    """
    path = Path(path)
    size = _measure(data) + _MARGIN
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise CheckpointError(
                f"{path} needs {size / 2**20:.0f} MiB but the disk has {free / 2**20:.0f} MiB left."
            )
        with whole_file(path) as part:
            if path.suffix == ".safetensors":
                part.write_bytes(safetensors_bytes(data))
            else:
                # A file object, since torch.save writes the name of a path into the file.
                with open(part, "wb") as file:
                    torch.save(data, file)
                append_sha256(part)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({_reason(error)}).") from error


def _measure(data: dict[str, Any]) -> int:
    """Estimate the size of a file in bytes from above, and refuse what could not be read again."""
    size = 0
    storages = {}
    values = [("data", data)]
    while values:
        name, value = values.pop()
        kind = type(value)
        if kind in _TENSORS and value.layout is torch.strided:
            storage = value.untyped_storage()
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
            size += _TENSOR_OVERHEAD
        elif kind in _DICTS:
            values += [(f"a key of {name}", key) for key in value]
            values += [(f"{name}[{key!r}]", item) for key, item in value.items()]
        elif kind in _SEQUENCES:
            values += [(f"{name}[{index}]", item) for index, item in enumerate(value)]
        elif kind is str:
            size += len(value.encode("utf-8", "surrogatepass")) + _NUMBER_SIZE
        elif kind in _NUMBERS:
            size += _NUMBER_SIZE
        else:
            raise CheckpointError(
                f"a checkpoint cannot hold {name}, a {kind.__module__}.{kind.__qualname__}: it "
                "holds tensors, dicts, lists, tuples, text and numbers."
            )
    return size + sum(storages.values())


def _reason(error: BaseException) -> str:
    # torch.save meets a full disk twice: the second time, closing the file, it says less.
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return getattr(cause, "strerror", None) or str(error).partition("\n")[0]
