"""Keys of this project that something in this process reads for a training."""

from fnmatch import fnmatchcase

_read: set[str] = set()


def mark_read(*patterns: str) -> None:
    """Say that a training in this process reads the keys that match shell patterns."""
    _read.update(patterns)


def is_read(key: str) -> bool:
    """Return whether anything has said that it reads a key."""
    return any(fnmatchcase(key, pattern) for pattern in _read)
