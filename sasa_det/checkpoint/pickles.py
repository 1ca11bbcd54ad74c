"""Pickles of numpy arrays, as in detectron2's and Caffe2's model zoos, read without trust.

An unpickler calls what a file names. This one calls only the functions below, which make plain
values: numpy's own accept a file's description of object arrays, that is, pointers.
"""

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError

# Booleans, integers, floating-point and complex numbers.
_NUMERIC = "biufc"


def read_pickle(file: BinaryIO) -> Any:
    """Read dicts, lists, tuples, text, numbers and numpy arrays of numbers.

    Text of Python 2 is read as Latin-1, as detectron2 reads it.

    Args:
        file: a file open for reading.

    Returns:
        The content, with arrays in memory of their own.

    Raises:
        CheckpointError: if the file names anything else, without the name of the file.
    """
    return _Unpickler(file, encoding="latin1").load()


# A pickle can set no attributes of what has a __setstate__, nor of a bound method.


class _Dtype:
    """Stands for a numpy.dtype, whose own __setstate__ would make objects of bytes."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        self.value = np.dtype(name) if isinstance(name, str) else np.dtype(object)
        if self.value.kind not in _NUMERIC:
            raise CheckpointError(f"it holds an array of {name!r}, and may hold numbers only")

    def __setstate__(self, state: tuple) -> None:
        _, order, *_ = state  # the rest describes records
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)

    def array(self, data: bytes | str, shape: tuple[int, ...], order: str) -> np.ndarray:
        if isinstance(data, str):
            data = data.encode("latin1")
        array = np.frombuffer(data, self.value).reshape(shape, order=order)
        return array.astype(self.value.newbyteorder("="), order="C")


class _Array(np.ndarray):
    """A numpy.ndarray that is empty until its content is read."""

    def __new__(cls, *args: Any) -> "_Array":
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        array = dtype.array(data, shape, "F" if is_fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, False, array.tobytes()))


class _Dict(dict):
    """Stands for an OrderedDict, without the attributes that a pickle may give one."""

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable | str:
        allowed = {
            "__builtin__.bytes": self._bytes,
            "_codecs.encode": self._bytes,
            "collections.OrderedDict": _Dict,
            "numpy.core.multiarray._reconstruct": _Array,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._from_buffer,
            "numpy.dtype": _Dtype,
            "numpy.ndarray": "numpy.ndarray",  # only an argument of _reconstruct
        }
        full_name = f"{module}.{name}"
        # numpy 2 has renamed numpy.core.
        known_name = full_name.replace("numpy._core.", "numpy.core.")
        if known_name not in allowed:
            raise CheckpointError(
                f"it refers to {full_name}, and may hold dicts, lists, text, numbers and numpy "
                "arrays of numbers only"
            )
        return allowed[known_name]

    def _bytes(self, text: str = "", encoding: str = "latin1") -> bytes:
        return text.encode("latin1")

    def _scalar(self, dtype: _Dtype, data: bytes | str) -> bool | int | float | complex:
        return dtype.array(data, (), "C").item()

    def _from_buffer(
        self, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str
    ) -> np.ndarray:
        return dtype.array(data, shape, order)
