"""Garbage collection, which costs time where many objects are made that are kept."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python from looking for garbage in a block that makes many objects and no garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not gc.get_freeze_count():
                # To the oldest generation at once, instead of looking through them in each.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
