"""A reader of pickles of plain data, which runs no code in them.

A pickle is a program that may call any function of any module. The batches of CIFAR-10 and ImageNet32 need dicts, lists,
numbers, bytes and NumPy arrays. For these a few names are enough, and even these names are bound to functions of this file,
which only make arrays of numbers; every other name is refused before it is looked up.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastloda.errors import UserError

_NUMBERS = "biuf"  # kinds of dtypes of numbers: no objects, no structures
# Errors that Python and NumPy raise for a damaged pickle (found by damaging one).
_DAMAGED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


def load_plain_pickle(path: str | Path) -> object:
    """Read a pickle of dicts, lists, numbers, texts, bytes and arrays of numbers; texts of Python 2 become bytes.

    Raises:
        ValueError: the pickle needs anything else, which the message names, or is damaged; the message begins with the path.
    """
    with Path(path).open("rb") as file:
        try:
            return _Unpickler(file, encoding="bytes").load()
        except _DAMAGED as error:
            raise UserError(f"{path}: {str(error) or type(error).__name__}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> "_Allowed | str":
        try:
            return _ALLOWED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            message = f"refused, for unpickling it would run {module}.{name}: only plain data and arrays are read"
            raise pickle.UnpicklingError(message) from None


class _Allowed:
    """A function that a pickle may call, but not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("refused, for it would change a function")


class _DType:
    """A dtype as a pickle describes it. NumPy's own class accepts a state that makes it read an array's numbers as pointers."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.dtype = np.dtype(_text(code))
        if self.dtype.kind not in _NUMBERS:
            raise UserError(f"only arrays of numbers are read, not of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(_text(state[1]))


class _Array(np.ndarray):
    """An array whose state a pickle sets, with a dtype from `_DType`."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, content = state
        super().__setstate__((version, shape, dtype.dtype, fortran, content))


def _reconstruct(*_: object) -> np.ndarray:
    return np.empty(0, np.uint8).view(_Array)


def _frombuffer(buffer: bytes, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype.dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Encode text to bytes, for pickles that Python 3 wrote in Python 2's protocol."""
    if encoding != "latin1":
        raise UserError(f"bytes written in {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _text(value: str | bytes) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else value


_ALLOWED = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only passed to _reconstruct; a text can't be called
    ("numpy", "dtype"): _Allowed(_DType),
    ("numpy.core.multiarray", "_reconstruct"): _Allowed(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _Allowed(_frombuffer),
    ("_codecs", "encode"): _Allowed(_encode),
    ("__builtin__", "bytes"): _Allowed(_no_bytes),
    ("builtins", "bytes"): _Allowed(_no_bytes),
}
