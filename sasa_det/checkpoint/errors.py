"""What is wrong with a checkpoint."""

__all__ = ["CheckpointError", "TransferError"]


class CheckpointError(Exception):
    """A checkpoint that cannot be read, written or used, told in one sentence."""


class TransferError(CheckpointError):
    """Weights that a backbone needs and a checkpoint does not have.

    Attributes:
        report (Report): what became of every weight.
    """

    def __init__(self, message: str, report: object):
        super().__init__(message)
        self.report = report
