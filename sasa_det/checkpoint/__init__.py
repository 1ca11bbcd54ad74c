"""Checkpoints: read without trust, written whole, resumed from the newest that is valid."""

from ..errors import CheckpointError
from .checkpointer import Checkpointer
from .convert import convert
from .reading import read_checkpoint
from .writing import write_checkpoint

__all__ = ["CheckpointError", "Checkpointer", "convert", "read_checkpoint", "write_checkpoint"]
