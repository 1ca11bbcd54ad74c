"""What is wrong with a checkpoint."""

__all__ = ["CheckpointError"]


class CheckpointError(Exception):
    """A checkpoint that cannot be read, written or used, told in one sentence."""
