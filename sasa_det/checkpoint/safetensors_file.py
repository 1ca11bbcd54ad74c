"""Safetensors files: weights, and beside them what JSON can hold, with a checksum of it all."""

import hashlib
import json
from typing import Any, BinaryIO

import safetensors.torch
import torch

from ..errors import CheckpointError

__all__ = ["read_safetensors", "safetensors_bytes"]

# A file begins with the size of its header in this many bytes; the header is JSON.
_SIZE_BYTES = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"
# Of the file with zeros in the digest's place. Only files that have one are of this project, with
# JSON in their metadata.
_DIGEST = "sasa_det_sha256"
_ZEROS = "0" * 64


def safetensors_bytes(data: dict[str, Any]) -> bytes:
    """Return the content of a safetensors file, the same for the same data.

    Args:
        data: ``"model"``, tensors by name, and facts that JSON can hold.

    Raises:
        CheckpointError: if anything but ``"model"`` cannot be written as JSON.
    """
    facts = {key: value for key, value in data.items() if key != "model"}
    try:
        metadata = {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"safetensors holds weights and JSON alone ({error})") from error
    metadata = {_DIGEST: _ZEROS, "format": "pt", **dict(sorted(metadata.items()))}
    # Copies, for the format has no tensors that share their numbers.
    copied = {"memory_format": torch.contiguous_format}
    tensors = {key: weight.detach().clone(**copied) for key, weight in data["model"].items()}
    content = safetensors.torch.save(tensors)
    size, header = _header(content)
    # In this order, which the library does not keep.
    header = {_METADATA: metadata, **{name: header[name] for name in tensors}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    content = len(text).to_bytes(_SIZE_BYTES, "little") + text + content[_SIZE_BYTES + size :]
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(_ZEROS.encode(), digest.encode(), 1)


def read_safetensors(file: BinaryIO) -> dict[str, Any]:
    """Read what :func:`safetensors_bytes` made, or the weights alone of a file from elsewhere.

    Args:
        file: a file open for reading.

    Returns:
        dict: as was written.

    Raises:
        CheckpointError: if a byte is not as it was written, without the name of the file.
        safetensors.SafetensorError: if it is no safetensors file.
    """
    content = file.read()
    weights = safetensors.torch.load(content)
    _, header = _header(content)
    metadata = header.pop(_METADATA, {})
    weights = {name: weights[name] for name in header}
    digest = metadata.get(_DIGEST)
    if digest is None:
        return {"model": weights}
    zeroed = content.replace(digest.encode(), _ZEROS.encode(), 1)
    if hashlib.sha256(zeroed).hexdigest() != digest:
        raise CheckpointError("its content does not match its checksum")
    facts = {k: json.loads(v) for k, v in metadata.items() if k not in ("format", _DIGEST)}
    return {**facts, "model": weights}


def _header(content: bytes) -> tuple[int, dict[str, Any]]:
    size = int.from_bytes(content[:_SIZE_BYTES], "little")
    return size, json.loads(content[_SIZE_BYTES : _SIZE_BYTES + size])
