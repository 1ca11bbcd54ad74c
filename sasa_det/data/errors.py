"""What is wrong with data."""

__all__ = ["DatasetError"]


class DatasetError(ValueError):
    """A data set that cannot be used as it is."""
