"""Structures that kernels are started with, laid out as in their source."""

import ctypes
from typing import Any

POINTER = ctypes.c_void_p


def structure(*fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """Return a structure like one of the kernels' source.

    Args:
        fields: types of ctypes, each with the names of one or more fields between blanks, in their
            order.
    """
    typed = [(name, kind) for kind, names in fields for name in names.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": typed})


def pointers_of(arguments: type[ctypes.Structure]) -> list[str]:
    """Return the names of the pointers in a structure, in their order."""
    return [name for name, kind in arguments._fields_ if kind is POINTER]
