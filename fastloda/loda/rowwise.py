"""A LoDA layer in a compiled model, with a gradient of its adapter for each row of the batch.

A compiled model is a single node of the autograd graph, so that no rule sees the operations inside. All that it gives is
gradients of its inputs. So the adapters enter it as one matrix with one line for each row of the batch. All lines are equal: each
holds all adapters. The gradient of a line is that of its row, accumulated in float32 (float64 for float64) as in eager mode.
One node outside receives all these gradients: the norms come from one pass over them, and the clipped sum from another.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.autograd.function import once_differentiable

from fastloda.loda import opaque, visible
from fastloda.loda.arithmetic import ConvOp, LinearOp
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.reductions import RUN, run_squares
from fastloda.per_sample.rules import FUNCTION_RULES, Rule
from fastloda.per_sample.tensors import accumulable, sum_rows


class ByRow(NamedTuple):
    """The parts [rows, numbers] of the lines that hold a layer's A and B, each padded with zeros."""

    A: Tensor
    B: Tensor


class Lines(torch.autograd.Function):
    """The operation that writes adapters, each padded with zeros to a multiple of RUN, into one line that all rows share."""

    keeps_rows = True

    @staticmethod
    def forward(ctx, rows, *adapters):
        ctx.shapes, ctx.dtypes, ctx.receiver = [p.shape for p in adapters], [p.dtype for p in adapters], None
        ctx.widths = widths(ctx.shapes)
        zeros = accumulable(adapters[0].new_zeros(RUN))
        parts = [part for p in adapters for part in (accumulable(p).flatten(), zeros[: -p.numel() % RUN])]
        return torch.cat(parts).expand(rows, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grads):
        if ctx.receiver is not None:
            ctx.receiver(grads, lambda: _recipes(grads, ctx.shapes))
            return None, *[None] * len(ctx.shapes)
        parts = grads.sum(0, keepdim=True).split(ctx.widths, 1)
        totals = [_lay_out(part, shape)[0] for part, shape in zip(parts, ctx.shapes)]
        return None, *(total.to(dtype) for total, dtype in zip(totals, ctx.dtypes))


FUNCTION_RULES[Lines] = Rule(None, range(1 << 16))


def widths(shapes: Sequence[Size]) -> list[int]:
    """Compute how many numbers of a line each adapter takes."""
    return [-(-shape.numel() // RUN) * RUN for shape in shapes]


def _recipes(grads: Tensor, shapes: Sequence[Size]) -> dict[int, Recipe]:
    """Make the recipes of all adapters' gradients, which share the sums over a sample's lines and the sums' `run_squares`."""

    @cache
    def parts(grads: Tensor, samples: int) -> list[tuple[Tensor, Tensor]]:
        of_samples, sizes = sum_rows(grads, samples), widths(shapes)
        squares = run_squares(of_samples).split([size // RUN for size in sizes], 1)
        return list(zip(of_samples.split(sizes, 1), squares))

    def recipe(i: int) -> Recipe:
        return Recipe(
            lambda grads, samples: parts(grads, samples)[i][0],
            (grads,),
            with_squares=lambda grads, samples: parts(grads, samples)[i],
            lay_out=partial(_lay_out, shape=shapes[i]),
        )

    return {i: recipe(i) for i in range(len(shapes))}


def _lay_out(part: Tensor, shape: Size) -> Tensor:
    return _way(part).lay_out(part[:, : shape.numel()], shape)


def _way(t: Tensor):
    """Choose the module that computes: `opaque`, with Triton's kernels, on a GPU; else `visible`, which a compiler fuses."""
    return opaque if t.is_cuda else visible


class RowwiseAdapter(torch.autograd.Function):
    """The operation y = W * x + b + s B phi(A * x), which gives the lines their gradients."""

    keeps_rows = True

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, rows_A, _rows_B, op):
        ctx.op = op
        with torch.autocast(x.device.type, enabled=False):
            y, z = _way(x).forward(op, x, weight, bias, A, B)
        ctx.save_for_backward(x, z, weight, A, B, rows_A)
        return y

    @staticmethod
    def backward(ctx, *grad_outputs):
        (gy,) = grad_outputs
        x, z, weight, A, B, rows_A = ctx.saved_tensors
        rows, needs_x = len(rows_A), ctx.needs_input_grad[0]
        with torch.autocast(x.device.type, enabled=False):
            gx, grad_A, grad_B = _way(x).backward(ctx.op, gy, x, z, weight, A, B, needs_x, min(len(x), rows))
        return gx, None, None, None, None, _into_lines(grad_A, rows), _into_lines(grad_B, rows), None


def _into_lines(grads: Tensor, rows: int) -> Tensor:
    """Pad gradients to the width of their part of a line; one for k rows goes to the first of these, with zeros for the rest."""
    grads = grads.flatten(1)
    grads = F.pad(grads, (0, -grads.shape[1] % RUN))
    if len(grads) == rows:
        return grads
    spread = grads.new_zeros(rows, grads.shape[1])
    spread[:: rows // len(grads)] = grads
    return spread


def fits(x: Tensor, by_row: ByRow) -> bool:
    """Tell whether x has a whole number of rows for each row of the batch, or the reverse."""
    rows = len(by_row.A)
    return not (len(x) % rows and rows % len(x))


def rowwise_adapter(
    op: ConvOp | LinearOp, x: Tensor, weight: Tensor, bias: Tensor | None, shapes: Sequence[Size], by_row: ByRow
) -> Tensor:
    """Compute y = W * x + b + s B phi(A * x) in x's dtype; shapes: those of A and B."""
    A, B = [lines.detach()[0, : shape.numel()].view(shape).to(x.dtype) for lines, shape in zip(by_row, shapes)]
    return RowwiseAdapter.apply(x, weight, bias, A, B, *by_row, op)
