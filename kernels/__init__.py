"""Triton kernels of the private step, one operation a file; installed as `fastloda.kernels`. They need torch and triton alone."""

from importlib import import_module
from types import ModuleType

OPERATIONS = ("adapter_backward", "adapter_forward", "clip_sum", "input_grad", "sample_grad")


def __getattr__(name: str) -> ModuleType:
    """Import an operation when it is first asked for: Triton takes half a second, and only a GPU needs it."""
    if name in OPERATIONS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
