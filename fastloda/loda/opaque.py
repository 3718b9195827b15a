"""The arithmetic of a LoDA layer as two operations that a compiler does not look into, so that Triton's kernels compute them."""

import torch
from torch import Tensor

from fastloda.kernels.conv import Conv
from fastloda.loda.arithmetic import ConvOp, LinearOp
from fastloda.per_sample.tensors import accumulable, on_triton

_SETTINGS = "int[] geometry, float slope, float scale"
_FORWARD = f"(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, {_SETTINGS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor gy, Tensor x, Tensor z, Tensor weight, Tensor A, Tensor B, bool needs_x, SymInt samples, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)


def forward(
    op: ConvOp | LinearOp, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute y and z."""
    return _adapter(x, weight, bias, A, B, *_settings(op))


def backward(
    op: ConvOp | LinearOp,
    gy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    needs_x: bool,
    samples: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dx if it is needed, and the gradients of A and B for each sample: [samples, *shape]."""
    gx, grad_A, grad_B = _adapter_backward(gy, x, z, weight, A, B, needs_x, samples, *_settings(op))
    return gx if needs_x else None, grad_A, grad_B


def lay_out(grads: Tensor, shape: torch.Size) -> Tensor:
    """Bring gradients [n, numbers] of a parameter, as `backward` gives them, to [n, *shape]."""
    return grads.view(len(grads), *shape)


def _settings(op: ConvOp | LinearOp) -> tuple[list[int], float, float]:
    """Express op in the types that an operation's schema allows: geometry, slope, scale."""
    if isinstance(op, LinearOp):
        return [], op.slope, op.scale
    kernel, stride, padding, dilation = op.conv
    return [*kernel, *stride, *padding, *dilation, op.groups], op.slope, op.scale


def _op(geometry: list[int], slope: float, scale: float) -> ConvOp | LinearOp:
    if not geometry:
        return LinearOp(slope, scale)
    *pairs, groups = geometry
    return ConvOp(Conv(*zip(pairs[::2], pairs[1::2])), groups, slope, scale)


# ---- memory layouts of the outputs, which the compiler must know before the operation runs


def _as_x(x: Tensor, geometry: list[int]) -> torch.memory_format:
    channels_last = geometry and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _as_z(x: Tensor, geometry: list[int]) -> torch.memory_format:
    """Choose the layout in which backward reads z fastest."""
    return torch.channels_last if geometry and on_triton(x) else torch.contiguous_format


@torch.library.custom_op("fastloda::adapter", mutates_args=(), schema=_FORWARD)
def _adapter(x, weight, bias, A, B, geometry, slope, scale):
    with torch.autocast(x.device.type, enabled=False):
        y, z = _op(geometry, slope, scale).forward(x, weight, bias, A, B)
    return y.contiguous(memory_format=_as_x(x, geometry)), z.contiguous(memory_format=_as_z(x, geometry))


@_adapter.register_fake
def _(x, weight, bias, A, B, geometry, slope, scale):
    y, rank = _op(geometry, slope, scale).reference(x, weight, bias, A, B), A.shape[0]
    z_shape = (y.shape[0], rank, *y.shape[2:]) if geometry else (*y.shape[:-1], rank)
    return torch.empty_like(y, memory_format=_as_x(x, geometry)), torch.empty(
        z_shape, dtype=x.dtype, device=x.device, memory_format=_as_z(x, geometry)
    )


@torch.library.custom_op("fastloda::adapter_backward", mutates_args=(), schema=_BACKWARD)
def _adapter_backward(gy, x, z, weight, A, B, needs_x, samples, geometry, slope, scale):
    with torch.autocast(x.device.type, enabled=False):
        gx, *recipes = _op(geometry, slope, scale).backward(gy, x, z, weight, A, B, needs_x)
        grads = (recipe.lay_out(recipe.raw_of_all(samples)).contiguous() for recipe in recipes)
    gx = x.new_empty(0) if gx is None else gx.contiguous(memory_format=_as_x(x, geometry))
    return gx, *grads


@_adapter_backward.register_fake
def _(gy, x, z, weight, A, B, needs_x, samples, geometry, slope, scale):
    gx = torch.empty_like(x, memory_format=_as_x(x, geometry)) if needs_x else x.new_empty(0)
    return gx, *(accumulable(p.new_empty(samples, *p.shape)) for p in (A, B))
