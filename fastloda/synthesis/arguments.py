"""Argument types for the command line that the standard types lack."""

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jsonargparse.typing import register_type, restricted_string_type

from fastloda.errors import UserError

# The help texts show the types' names.
Device = restricted_string_type("auto|cpu|cuda|cuda:N|mps", r"^(auto|cpu|cuda(:\d+)?|mps)$", "Name of a device.")


class Floats(tuple[float, ...]):
    """A tuple of numbers: "1,10" on the command line, a number or a list in a configuration file."""


class Names(tuple[str, ...]):
    """A tuple of strings: "a,b" on the command line, a string or a list in a configuration file."""


NO_NAMES = Names()


def resolve_device(device: str) -> torch.device:
    """Choose a device by its name, and make a numbered GPU the current device, on which kernels run.

    "auto" is the GPU if there is one. Where a process group is initialised, each rank gets the GPU of its LOCAL_RANK.

    Raises:
        UserError: there is no such device here, or "cuda:N" would give several ranks the same GPU.
    """
    kind, _, number = device.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        kind = "cuda" if gpus else "cpu"
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if kind == "cuda" and not gpus:
        raise UserError(f"device {device}: PyTorch finds no GPU here; use --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    return _numbered(device, number, gpus) if number or dist.is_initialized() else torch.device(kind)


def _numbered(device: str, number: str, gpus: int) -> torch.device:
    if dist.is_initialized():
        if number and dist.get_world_size() > 1:
            raise UserError(f"device {device} is one GPU, and each rank needs its own: use --device cuda")
        number = number or os.environ.get("LOCAL_RANK", "0")
    if int(number) >= gpus:
        raise UserError(
            f"there is no GPU {number} for --device {device}: the {gpus} that PyTorch finds here count from 0"
            + (f"; start at most {gpus} ranks on this machine (--nproc_per_node)" if dist.is_initialized() else "")
        )
    torch.cuda.set_device(int(number))
    return torch.device("cuda", int(number))


def _comma_separated(kind: type[tuple], item: Callable) -> Callable[[object], tuple]:
    def read(value: object) -> tuple:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else str(value).split(",")
        return kind(item(i) for i in items)

    return read


register_type(Floats, serializer=list, deserializer=_comma_separated(Floats, float))
register_type(Names, serializer=list, deserializer=_comma_separated(Names, str))
