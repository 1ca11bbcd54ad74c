"""Pickles of one numpy array, read as data: no unpickler runs, so that nothing can be executed."""

import gzip
import os
import pickletools
import zlib
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from ..errors import DatasetError

# What is in a pickle besides the content of its array: a few hundred bytes.
_LARGEST_FRAME = 4096

# Opcodes that push a value of a kind; they differ in the length that they give to it.
_KINDS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2"), "integer"),
    **dict.fromkeys(("SHORT_BINUNICODE",), "text"),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), "bytes"),
}
_REFERENCES = ("BINGET", "LONG_BINGET")

# A kind and a value, or the name of another opcode and its argument.
_Token = tuple[str, Any]

# Stands for the content of an array, which is not known before.
_CONTENT: _Token = ("bytes", None)


def read_pickled_array(
    path: str | os.PathLike, dtype: np.dtype | str, shape: tuple[int, ...]
) -> np.ndarray:
    """Read a file compressed by gzip that holds the pickle of one numpy array.

    The opcodes of the pickle must be those that ``pickle.dumps(array, protocol=4)`` writes for such
    an array in C order. They are compared with what they must be, and never followed.

    Args:
        path: of the file.
        dtype: that the array must have, of numbers.
        shape: that it must have, of 1 to 3 dimensions.

    Returns:
        numpy.ndarray: the array, which cannot be written to.

    Raises:
        DatasetError: if the file cannot be read, or is anything else.
    """
    dtype = np.dtype(dtype)
    largest = prod(shape) * dtype.itemsize + _LARGEST_FRAME
    try:
        with gzip.open(path) as file:
            data = file.read(largest)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read as a file of gzip: {error}") from error
    try:
        content = _content(data, dtype, shape)
    except ValueError as error:
        raise DatasetError(
            f"{path} must hold the pickle, of protocol 4, of one numpy array of {dtype} of the "
            f"shape {shape} in C order, but {error}"
        ) from error
    return np.frombuffer(content, dtype).reshape(shape)


def _content(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return the bytes of the array in a pickle, or raise ValueError where it is anything else."""
    content = b""
    # Both end with STOP: what has it earlier or later differs there.
    pairs = zip(_expected(dtype, shape), _tokens(data), strict=False)
    for (expected, what), (position, token) in pairs:
        if expected == _CONTENT and token[0] == "bytes":
            content = token[1]
        elif token != expected:
            raise ValueError(f"at byte {position} it has another {what}")
    if len(content) != prod(shape) * dtype.itemsize:
        raise ValueError(f"its content has {len(content)} bytes")
    if position + 1 != len(data):
        raise ValueError(f"it goes on after the end of the pickle at byte {position}")
    return content


def _tokens(data: bytes) -> Iterator[tuple[int, _Token]]:
    """Yield the opcodes of a pickle with their positions, references to texts as these texts."""
    memo: list[_Token] = []
    token: _Token = ("", None)
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name == "FRAME":
            continue
        if opcode.name == "MEMOIZE":
            memo.append(token)
            continue
        token = (_KINDS.get(opcode.name, opcode.name), argument)
        if opcode.name in _REFERENCES and argument < len(memo) and memo[argument][0] == "text":
            token = memo[argument]
        if token == ("text", "numpy._core.multiarray"):  # its name in numpy 2
            token = ("text", "numpy.core.multiarray")
        yield position, token


def _expected(dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[tuple[_Token, str]]:
    """Yield the tokens of the pickle of an array, each with what it says about the array."""

    def called(module: str, name: str) -> list[_Token]:
        return [("text", module), ("text", name), ("STACK_GLOBAL", None)]

    order, name = dtype.str[0], dtype.str[1:]
    parts: list[tuple[str, list[_Token]]] = [
        ("protocol", [("PROTO", 4)]),
        ("type", called("numpy.core.multiarray", "_reconstruct")),
        ("type", called("numpy", "ndarray")),
        ("type", [("integer", 0), ("TUPLE1", None), ("bytes", b"b"), ("TUPLE3", None)]),
        ("type", [("REDUCE", None), ("MARK", None), ("integer", 1)]),
        ("shape", [*(("integer", side) for side in shape), (f"TUPLE{len(shape)}", None)]),
        ("dtype", [*called("numpy", "dtype"), ("text", name)]),
        ("dtype", [("NEWFALSE", None), ("NEWTRUE", None), ("TUPLE3", None), ("REDUCE", None)]),
        ("dtype", [("MARK", None), ("integer", 3)]),
        ("byte order", [("text", order)]),
        ("dtype", [("NONE", None)] * 3),
        ("dtype", [("integer", -1), ("integer", -1), ("integer", 0)]),
        ("dtype", [("TUPLE", None), ("BUILD", None)]),
        ("order in memory", [("NEWFALSE", None)]),
        ("content", [_CONTENT]),
        ("end", [("TUPLE", None), ("BUILD", None), ("STOP", None)]),
    ]
    for what, tokens in parts:
        for token in tokens:
            yield token, what
