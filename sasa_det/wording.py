"""Words of messages."""

from collections.abc import Sequence

__all__ = ["first_of"]


def first_of(names: Sequence[object], most: int) -> str:
    """List names, the first ones of many and how many there are beside them.

    Args:
        names: what to list.
        most: how many to name.

    Returns:
        str: as "a, b and 3 more".
    """
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "")
