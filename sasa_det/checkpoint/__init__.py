"""Checkpoints: read without trust, written whole, resumed from the newest that is valid."""

from ..errors import CheckpointError
from .checkpointer import Checkpointer
from .convert import convert_checkpoint
from .reading import read_checkpoint
from .writing import write_checkpoint

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "convert_checkpoint",
    "read_checkpoint",
    "write_checkpoint",
]
