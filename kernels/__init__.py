"""Triton kernels of the private step, installed as `fastloda.kernels`: one operation a file, needing only torch and triton."""

from importlib import import_module
from types import ModuleType

OPERATIONS = ("adapter_backward", "adapter_forward", "clip_sum", "input_grad", "pointwise", "sample_grad")


def __getattr__(name: str) -> ModuleType:
    """Import an operation when it is first asked for: Triton takes half a second, and only a GPU needs it."""
    if name in OPERATIONS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
