"""What is wrong with data."""

__all__ = ["DatasetError", "ImageError"]


class DatasetError(ValueError):
    """A data set that cannot be used as it is."""


class ImageError(DatasetError):
    """An image that cannot be used.

    Attributes:
        path (str or None): the image's file.
    """

    def __init__(self, message, path=None):
        # One positional argument rebuilds it, as pickle and torch's worker processes do.
        super().__init__(message)
        self.path = path
