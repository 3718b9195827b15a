"""The convolutions that PyTorch computes wrongly on CPUs with AMX, and how a private step avoids them.

On such a CPU, oneDNN's convolutions in bfloat16 with a stride and a dilation above 1 read uninitialised memory (PyTorch 2.13):
the same batch gives a different gradient each time, and the memory may hold what was computed from other records. FastLoDA
computes its own convolutions of this faulty kind in a wider dtype, on every CPU. Those that PyTorch computes are refused where
the fault can occur.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node

if TYPE_CHECKING:
    from fastloda.per_sample.graph import LossGraph

NARROW = (torch.bfloat16, torch.float16, torch.float32)
NOTE = "_fastloda_computed_in"  # a watched layer's attribute: the dtype of its last call with gradients enabled
REMEDY = (
    "compute that layer with autocast disabled and in float32, give it an adapter (LoDAConv2d.from_conv), which computes it so, "
    "or train on a GPU"
)
UNSEEN = ", it seems (if not: call fastloda.cover(model) before the forward pass, to have it watched)"


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Make a context without autocast on `device`: a null context if autocast is off, as entering `torch.autocast` is slow."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Find the dtype in which a convolution of x is computed: autocast's, if that is enabled and x is not float64."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def sound_dtype(
    dtype: torch.dtype, device: torch.device, stride: Sequence[int], dilation: Sequence[int]
) -> torch.dtype:
    """Choose the dtype in which to compute a convolution: `dtype`, or a wider one if the convolution is of the faulty kind."""
    if device.type != "cpu" or max(stride) == 1 or max(dilation) == 1 or dtype not in NARROW:
        return dtype
    conv = getattr(torch.backends.mkldnn, "conv", None)  # from torch 2.9 on
    if getattr(conv, "fp32_precision", "none") == "bf16":  # float32 may be computed in bfloat16 too
        return torch.float64
    return torch.float32


def can_go_wrong(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has the AMX instructions with which convolutions in `dtype` may go wrong."""
    for_float16 = getattr(torch.cpu, "_is_amx_fp16_supported", torch.cpu._is_amx_tile_supported)
    return dtype in NARROW and (for_float16 if dtype == torch.float16 else torch.cpu._is_amx_tile_supported)()


# ---- convolutions that PyTorch computes


def watch_convolutions(layers: Iterable[nn.Module]) -> None:
    """Register hooks by which those of `layers` that are of the faulty kind note the dtype of their calls; none without AMX."""
    for layer in layers if any(map(can_go_wrong, NARROW)) else ():
        if _is_suspect(layer) and NOTE not in vars(layer):
            setattr(layer, NOTE, None)
            layer.register_forward_pre_hook(_note, with_kwargs=True)


def check_convolutions(layers: Mapping[str, nn.Module], graph: "LossGraph") -> None:
    """Refuse losses that a wrong convolution may have entered: one of `layers` (by name), or an operation of `graph`.

    A layer that was not watched is taken to have been computed in the dtypes of the operations that use trainable parameters.

    Raises:
        PrivacyError: naming the layer, or the geometry of the operation.
    """
    if not any(map(can_go_wrong, NARROW)):
        return
    shown = [dtype for dtype in map(_dtype, graph.uses) if can_go_wrong(dtype)]
    for name, layer in layers.items():
        if _is_suspect(layer):
            seen = getattr(layer, NOTE, None)
            watch_convolutions([layer])
            for dtype in [seen] if seen else shown:
                _check(f"layer {name!r} ({type(layer).__name__})", dtype, _device(layer), layer, "" if seen else UNSEEN)
    for node in graph.convolutions:
        device = node._input_metadata[0].device
        _check("a convolution", _dtype(node), device, _Geometry(node._saved_stride, node._saved_dilation))


class _Geometry(NamedTuple):
    stride: Sequence[int]
    dilation: Sequence[int]


def _check(what: str, dtype: torch.dtype, device: torch.device, geometry: "_ConvNd | _Geometry", why: str = "") -> None:
    stride, dilation = tuple(geometry.stride), tuple(geometry.dilation)
    if can_go_wrong(dtype) and sound_dtype(dtype, device, stride, dilation) != dtype:
        raise PrivacyError(
            f"{what} with stride {stride} and dilation {dilation} was computed in {dtype}{why}: on this processor (AMX) "
            f"PyTorch then reads memory that nothing wrote, perhaps another record's. Instead, {REMEDY}"
        )


def _is_suspect(layer: nn.Module) -> TypeGuard[_ConvNd]:
    """Tell whether `layer` is a convolution of the faulty kind; a LoDA layer never is, as it chooses its dtype itself."""
    if not isinstance(layer, _ConvNd) or "loda_A" in layer._parameters:
        return False
    return sound_dtype(torch.bfloat16, _device(layer), layer.stride, layer.dilation) != torch.bfloat16


def _device(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def _note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    if torch.is_grad_enabled():
        setattr(layer, NOTE, compute_dtype(next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))))


def _dtype(node: Node) -> torch.dtype:
    return node._input_metadata[0].dtype
