"""The arithmetic of a LoDA layer:  z = A * x,  y = W * x + b + s B phi(z).

Triton kernels (`kernels/`) compute for CUDA tensors, PyTorch for all others.

Two ideas keep the cost of privacy low, in both implementations:

- *Shift gz, not x.*  The k^2 taps of A's gradient are read as one strided view of gz, the gradient of z, which has only
  r channels (`taps.py`); x is read in place by a plain matrix product, and never expanded (no im2col).
- *In place.*  The adapter is added to the frozen layer's output and input gradient where they lie, which saves the
  copies that autograd makes of both.

Shapes: rows N (samples x views), positions T = H W, channels C in and O out, rank r.  A *sample* owns N / samples
consecutive rows; its gradient is the sum over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloda import kernels
from fastloda.kernels.conv import Conv
from fastloda.per_sample.amx import compute_dtype, sound_dtype, without_autocast
from fastloda.per_sample.planner import split_rows
from fastloda.per_sample.products import conv_recipe
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.taps import gather_taps
from fastloda.per_sample.tensors import accumulable, lay_out_taps, on_triton, sample_rows, sum_rows


def activation(z: Tensor, slope: float) -> Tensor:
    """Compute phi(z): LeakyReLU, the identity for slope 1."""
    return z if slope == 1.0 else F.leaky_relu(z, slope)


def activation_grad(grad: Tensor, z: Tensor, slope: float) -> Tensor:
    """Compute phi'(z) . grad."""
    return grad if slope == 1.0 else torch.ops.aten.leaky_relu_backward(grad, z, slope, False)


def positions(t: Tensor) -> Tensor:
    """View t [N, C, *spatial] as [N, C, T], column-major for channels_last memory; no copy for any dense t."""
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
        return t.permute(0, 2, 3, 1).flatten(1, 2).mT
    return t.flatten(2)


def add_product_(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add scale * a [M, K] @ b [N, K, T] to out [N, M, T] in place, in the memory order of out."""
    a = a.expand(out.shape[0], *a.shape)
    if out.stride(1) == 1 and out.stride(2) != 1:  # channels_last: BLAS wants the row-major transpose
        out.mT.baddbmm_(b.mT, a.mT, alpha=scale)
    else:
        out.baddbmm_(a, b, alpha=scale)


def cast_together(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cast tensors of one device to dtype, on a GPU in one launch; a tensor that has it, and None, is returned as it is."""
    others = [t for t in tensors if t is not None and t.dtype != dtype]
    if not others:
        return list(tensors)
    casts = [torch.empty_like(t, dtype=dtype) for t in others]
    torch._foreach_copy_(casts, others)
    made = iter(casts)
    return [t if t is None or t.dtype == dtype else next(made) for t in tensors]


@dataclass(frozen=True)
class ConvOp:
    """The arithmetic of LoDA on a 2-d convolution.

    Shapes: x [N, C, H, W], y [N, O, OH, OW], z [N, r, OH, OW]; A [r, C, kh, kw], B [O, r, 1, 1].
    """

    conv: Conv
    groups: int
    slope: float
    scale: float

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """Compute y by its definition, in ordinary differentiable operations."""
        h = activation(self.convolve(x, A), self.slope)
        y = self.convolve(x, weight, bias, self.groups)
        return y + self.scale * F.conv2d(h, B)

    def laid_out(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy A, in dtype, into memory ordered by tap, as the Triton kernels read it; return A itself if none reads it."""
        if self.conv.taps == 1 or not on_triton(A):
            return A
        by_tap = A.permute(2, 3, 0, 1)
        return torch.empty(by_tap.shape, dtype=dtype, device=A.device).copy_(by_tap).permute(2, 3, 0, 1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute y and z."""
        if on_triton(x):
            if kernels.pointwise.serves(x, weight, A, self.conv):
                return kernels.pointwise.forward(x, weight, bias, A, B, self.slope, self.scale)
            y = self.convolve(x, weight, None, self.groups)
            z = kernels.adapter_forward.project(x, A, self.conv)
            return kernels.adapter_forward.add_(y, z, B, bias, self.slope, self.scale), z
        y = self.convolve(x, weight, bias, self.groups)
        z = self.convolve(x, A).contiguous()  # backward's products need contiguous z
        add_product_(positions(y), B.flatten(1), activation(z, self.slope).flatten(2), self.scale)
        return y, z

    def backward(
        self, gy: Tensor, x: Tensor, z: Tensor, weight: Tensor, A: Tensor, B: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, Recipe, Recipe]:
        """Compute dx if it is needed, and make the recipes of A's and B's per-sample gradients."""
        if needs_x and on_triton(gy) and kernels.pointwise.serves_backward(x, weight, A, self.conv):
            gx, of_A, of_B = kernels.pointwise.backward(gy, x, z, weight, A, B, self.slope, self.scale)
            return gx, _sum_of_parts(of_A), _sum_of_parts(of_B)
        return _backward(self, gy, x, z, weight, A, B, needs_x)

    def backward_up(self, gy: Tensor, x: Tensor, z: Tensor, B: Tensor) -> tuple[Tensor, Recipe]:
        """Compute gz = phi'(z) . s B^T gy, the output of `_conv_of`, and make the recipe of B's per-sample gradients."""
        if on_triton(gy):  # one read of gy gives both
            compute, size = kernels.adapter_backward.adapter_backward, tuple(x.shape[2:])
            gz, parts = compute(gy, z, B, self.slope, self.scale, self.conv, size)
            return gz, _sum_of_parts(parts)
        Bt = self._scaled(B.flatten(1).t())
        gh = torch.bmm(Bt.expand(len(gy), *Bt.shape), positions(gy))
        return activation_grad(gh.view(z.shape), z, self.slope), Recipe(self.grad_B, (gy, z), lay_out=lay_out_B)

    def grad_x(self, gy: Tensor, gz: Tensor, x: Tensor, weight: Tensor, A: Tensor) -> Tensor:
        """Compute dx = W^T * gy + A^T * gz, [N, C, H, W]."""
        return self.backward_down(gy, gz, x, weight, A)[0]

    def backward_down(
        self, gy: Tensor, gz: Tensor, x: Tensor, weight: Tensor, A: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Compute dx as `grad_x` does; return with it the taps of gz for A's gradient if all were made at once, else None."""
        gx = self.grad_x_of_W(gy, x, weight)
        if on_triton(gx):
            return kernels.input_grad.add_input_grad_(gx, gz, A, self.conv), None
        flat, taps = positions(gx), None
        A_taps = A.take(_reversed_taps(A.shape, A.device))
        for rows in split_rows(len(x), self.taps_bytes(gz, x), x.device):
            taps = gather_taps(gz[rows], x.shape[2:], *self.conv)
            add_product_(flat[rows], A_taps, taps)
        return gx, taps if taps is not None and len(taps) == len(x) else None

    def grad_x_of_W(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the part of dx that comes through the frozen convolution, W^T * gy."""
        return self._convolution_backward(gy, x, weight, self.groups, self.conv, (True, False, False))[0]

    def weight_grad(self, x: Tensor, gz: Tensor, A: Tensor) -> Tensor:
        """Compute the ordinary gradient of A, summed over all rows."""
        return self._convolution_backward(gz, x, A, 1, self._conv_of(gz), (False, True, False))[1]

    def recipe_A(self, x: Tensor, gz: Tensor, taps: Tensor | None = None) -> Recipe:
        """Make the recipe of A's per-sample gradients; taps: the taps of gz, if `backward_down` returned them."""
        return self._recipe(x, gz, self._conv_of(gz), taps)

    def recipe_W(self, x: Tensor, gy: Tensor) -> Recipe:
        """Make the recipe of W's per-sample gradients, for a convolution without groups."""
        return self._recipe(x, gy, self.conv)

    def _recipe(self, x: Tensor, g: Tensor, conv: Conv, taps: Tensor | None = None) -> Recipe:
        grad = lambda x, g, samples: _grad(x, gather_taps(g, x.shape[2:], *conv), samples)  # noqa: E731
        lay_out = lambda grads: lay_out_taps(grads, conv.kernel)  # noqa: E731
        at_hand = None if taps is None else lambda samples: _grad(x, taps, samples)
        return conv_recipe(grad, lay_out, x, g, conv, self.taps_bytes(g, x), at_hand)

    def grad_B(self, gy: Tensor, z: Tensor, samples: int) -> Tensor:
        """Compute B's transposed gradient for each sample, [samples, r, O], as its operands are row-major in both layouts."""
        h = accumulable(activation(z, self.slope).flatten(2))
        return sum_rows(self._scaled(torch.bmm(h, accumulable(positions(gy)).mT)), samples)

    def _scaled(self, t: Tensor) -> Tensor:
        return t if self.scale == 1.0 else t * self.scale

    def taps_bytes(self, gz: Tensor, x: Tensor) -> int:
        """Compute the bytes of the taps of gz for all rows: r k^2 / C times those of x."""
        return prod(gz.shape[:2]) * self.conv.taps * prod(x.shape[2:]) * x.element_size()

    def _conv_of(self, gz: Tensor) -> Conv:
        """Return the convolution whose output size gz has: A's own, or with Triton kernels `conv.full()`, for gz among zeros."""
        return self.conv.full() if on_triton(gz) else self.conv

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """Compute weight * x + bias in the dtype that autocast gives, or in a wider one where PyTorch is faulty (`amx.py`)."""
        dtype = compute_dtype(x)
        computed_in = self._sound_dtype(dtype, x)
        if computed_in == dtype:
            return F.conv2d(x, weight, bias, *self.conv[1:], groups)
        with without_autocast(x.device.type):
            x, weight = x.to(computed_in), weight.to(computed_in)
            bias = None if bias is None else bias.to(computed_in)
            return F.conv2d(x, weight, bias, *self.conv[1:], groups).to(dtype)

    def _convolution_backward(
        self, g: Tensor, x: Tensor, weight: Tensor, groups: int, conv: Conv, wanted: tuple[bool, bool, bool]
    ):
        dtype, computed_in = x.dtype, self._sound_dtype(x.dtype, x)
        g, x, weight = (t.to(computed_in) for t in (g, x, weight))
        grads = torch.ops.aten.convolution_backward(g, x, weight, None, *conv[1:], False, (0, 0), groups, wanted)
        return tuple(None if grad is None else grad.to(dtype) for grad in grads)

    def _sound_dtype(self, dtype: torch.dtype, x: Tensor) -> torch.dtype:
        return sound_dtype(dtype, x.device, self.conv.stride, self.conv.dilation)


@dataclass(frozen=True)
class LinearOp:
    """The arithmetic of LoDA on y = x W^T + b: x [N, ..., C], y [N, ..., O], z [N, ..., r]; A [r, C], B [O, r]."""

    slope: float
    scale: float

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """Compute y by its definition, in ordinary differentiable operations."""
        return F.linear(x, weight, bias) + self.scale * F.linear(activation(F.linear(x, A), self.slope), B)

    def laid_out(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        """Return A itself, which is laid out as its products read it."""
        return A

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute y and z."""
        y, z = F.linear(x, weight, bias), F.linear(x, A)
        y.view(-1, y.shape[-1]).addmm_(activation(z, self.slope).reshape(-1, z.shape[-1]), B.t(), alpha=self.scale)
        return y, z

    def backward(
        self, gy: Tensor, x: Tensor, z: Tensor, weight: Tensor, A: Tensor, B: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, Recipe, Recipe]:
        """Compute dx if it is needed, and make the recipes of A's and B's per-sample gradients."""
        return _backward(self, gy, x, z, weight, A, B, needs_x)

    def backward_up(self, gy: Tensor, x: Tensor, z: Tensor, B: Tensor) -> tuple[Tensor, Recipe]:
        """Compute gz = phi'(z) . s B^T gy, [N, ..., r], and make the recipe of B's per-sample gradients."""
        return activation_grad(gy @ (B * self.scale), z, self.slope), Recipe(self.grad_B, (gy, z))

    def grad_x(self, gy: Tensor, gz: Tensor, x: Tensor, weight: Tensor, A: Tensor) -> Tensor:
        """Compute dx = W^T gy + A^T gz, [N, ..., C]."""
        gx = gy @ weight
        gx.view(-1, gx.shape[-1]).addmm_(gz.reshape(-1, gz.shape[-1]), A)
        return gx

    def backward_down(self, gy: Tensor, gz: Tensor, x: Tensor, weight: Tensor, A: Tensor) -> tuple[Tensor, None]:
        """Compute dx; return None with it, for there are no taps."""
        return self.grad_x(gy, gz, x, weight, A), None

    def weight_grad(self, x: Tensor, gz: Tensor, A: Tensor) -> Tensor:
        """Compute the ordinary gradient of A, summed over all rows."""
        return self.grad_A(x, gz, 1)[0]

    def recipe_A(self, x: Tensor, gz: Tensor, taps: Tensor | None = None) -> Recipe:
        """Make the recipe of A's per-sample gradients; taps is not read."""
        return Recipe(self.grad_A, (x, gz))

    def recipe_W(self, x: Tensor, gy: Tensor) -> Recipe:
        """Make the recipe of W's per-sample gradients."""
        return self.recipe_A(x, gy)

    def grad_A(self, x: Tensor, gz: Tensor, samples: int) -> Tensor:
        """Compute the gradient of A for each sample: [samples, r, C]."""
        return torch.bmm(sample_rows(gz, samples).mT, sample_rows(x, samples))

    def grad_B(self, gy: Tensor, z: Tensor, samples: int) -> Tensor:
        """Compute the gradient of B for each sample: [samples, O, r]."""
        h = sample_rows(activation(z, self.slope), samples)
        return torch.bmm(sample_rows(gy, samples).mT, h).mul_(self.scale)


def _backward(op: ConvOp | LinearOp, gy, x, z, weight, A, B, needs_x: bool) -> tuple[Tensor | None, Recipe, Recipe]:
    """Compute `op.backward` in two parts: from gy up to gz, and from gz down to x and A."""
    gz, recipe_B = op.backward_up(gy, x, z, B)
    gx, taps = op.backward_down(gy, gz, x, weight, A) if needs_x else (None, None)
    return gx, op.recipe_A(x, gz, taps), recipe_B


def _sum_of_parts(parts: "kernels.adapter_backward.Parts") -> Recipe:
    """Make the recipe of gradients [samples, m, n, 1, 1], of which a kernel has written the parts."""
    of = kernels.adapter_backward
    return Recipe(
        lambda sums, _, samples: of.add_parts_reference(sums, samples),
        tuple(parts),
        with_squares=lambda sums, squares, samples: of.add_parts(of.Parts(sums, squares), samples),
    )


@lru_cache
def _reversed_taps(shape: torch.Size, device: torch.device) -> Tensor:
    """Make the indices [C, r k^2] at which A [r, C, *kernel] is read, with the taps in the order of `gather_taps`."""
    return torch.arange(shape.numel(), device=device).view(shape).flip(2, 3).transpose(0, 1).flatten(1)


def _grad(x: Tensor, taps: Tensor, samples: int) -> Tensor:
    """Compute a convolution weight's gradient for each sample, as `lay_out_taps` takes it: [samples, O k^2, C]."""
    return sum_rows(torch.bmm(accumulable(taps), accumulable(positions(x)).mT), samples)


def lay_out_B(grads: Tensor) -> Tensor:
    """Bring gradients of B from [n, r, O] to its shape, [n, O, r, 1, 1]."""
    return grads.mT.unsqueeze(-1).unsqueeze(-1)
