"""Safetensors files: weights, and beside them what JSON can hold, with a checksum of it all."""

import hashlib
import json
from typing import Any, BinaryIO

import safetensors.torch
import torch

from ..errors import CheckpointError

# The one key of our metadata, since the library writes several in no fixed order. It holds JSON:
# the facts, the order of the weights, and the SHA-256 of the file with zeros in the digest's place.
_KEY = "sasa_det"
_ZEROS = "0" * 64
# Earlier versions kept the digest and each fact under a key of its own.
_EARLIER_DIGEST = "sasa_det_sha256"


def safetensors_bytes(data: dict[str, Any]) -> bytes:
    """Return the content of a safetensors file, the same for the same data.

    Args:
        data: ``"model"``, tensors by name, and facts that JSON can hold.

    Raises:
        CheckpointError: if anything but ``"model"`` cannot be written as JSON.
    """
    facts = {key: value for key, value in data.items() if key != "model"}
    try:
        # The digest comes first, where nothing else can be taken for its place.
        metadata = json.dumps({"sha256": _ZEROS, "weights": list(data["model"]), "facts": facts})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"safetensors holds only weights and JSON ({error})") from error
    # Copies, for the format has no tensors that share their numbers.
    copied = {"memory_format": torch.contiguous_format}
    tensors = {key: weight.detach().clone(**copied) for key, weight in data["model"].items()}
    content = safetensors.torch.save(tensors, {_KEY: metadata})
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(_ZEROS.encode(), digest.encode(), 1)


def read_safetensors(file: BinaryIO) -> dict[str, Any]:
    """Read what :func:`safetensors_bytes` made, or the weights alone of a file from elsewhere.

    Args:
        file: a file open for reading.

    Returns:
        dict: ``"model"``, tensors by name, and the facts.

    Raises:
        CheckpointError: if a byte is not as it was written, without the name of the file.
        safetensors.SafetensorError: if it is not a safetensors file.
    """
    content = file.read()
    weights = safetensors.torch.load(content)
    # A file begins with the size of its header in eight bytes; the header is JSON.
    size = int.from_bytes(content[:8], "little")
    names = json.loads(content[8 : 8 + size])
    metadata = names.pop("__metadata__", {})
    digest, facts = None, {}
    if _KEY in metadata:
        ours = json.loads(metadata[_KEY])
        digest, names, facts = ours["sha256"], ours["weights"], ours["facts"]
    elif _EARLIER_DIGEST in metadata:
        digest = metadata.pop(_EARLIER_DIGEST)
        facts = {key: json.loads(text) for key, text in metadata.items() if key != "format"}
    if digest is not None:
        zeroed = content.replace(digest.encode(), _ZEROS.encode(), 1)
        if hashlib.sha256(zeroed).hexdigest() != digest:
            raise CheckpointError("its content does not match its checksum")
    return {"model": {name: weights[name] for name in names}, **facts}
