"""Argument types of the command line that the standard types lack."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jsonargparse.typing import register_type

from fastloda.errors import UserError

Device = Literal["auto", "cpu", "cuda"]


class Floats(tuple[float, ...]):
    """A tuple of numbers: "1,10" on the command line, a number or a list in a configuration file."""


class Names(tuple[str, ...]):
    """A tuple of strings: "a,b" on the command line, a string or a list in a configuration file."""


def resolve_device(device: Device) -> torch.device:
    """Choose the device by its name; "auto" is the GPU if there is one.

    Raises:
        ValueError: "cuda" without a GPU that PyTorch can use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no GPU here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _comma_separated(kind: type[tuple], item: Callable) -> Callable[[object], tuple]:
    def read(value: object) -> tuple:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else str(value).split(",")
        return kind(item(i) for i in items)

    return read


register_type(Floats, serializer=list, deserializer=_comma_separated(Floats, float))
register_type(Names, serializer=list, deserializer=_comma_separated(Names, str))
