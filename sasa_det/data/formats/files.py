"""Files of data sets, found by their names and gone through."""

import os
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")


def files_in(
    folder: str, suffixes: Collection[str], *, follow_links: bool = False
) -> Iterator[str]:
    """Yield the files in a folder at any depth that have one of the suffixes, in any capitals.

    Hidden files and folders are left out.

    Args:
        folder: to look in.
        suffixes: in lower case, as ".png".
        follow_links: whether folders that are links are looked into.
    """
    for place, folders, files in os.walk(folder, followlinks=follow_links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(place, name)


def progress(items: Iterable[_T], description: str, unit: str) -> Iterable[_T]:
    """Show how far a loop over items is, once it takes more than two seconds."""
    return tqdm(items, desc=description, unit=unit, delay=2)
