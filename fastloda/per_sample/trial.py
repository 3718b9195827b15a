"""The trial of an operation of a kind that is not known: its own backward is run, and must keep any two samples apart."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastloda.per_sample.refusals import parting
from fastloda.per_sample.regions import COMPILED, may_run_again
from fastloda.per_sample.states import Operation, Rows


def try_out(op: Operation[Rows], samples: int) -> Rows:
    """Find the state of an operation's output by backward passes from some samples' numbers alone.

    Raises:
        PrivacyError: samples mix, or the operation can't be tried.
    """
    layouts = _layouts(op)
    if not layouts:
        op.refuse_unseen(
            "is not known (it comes from torch.jit.script, torch.compile, an autograd.Function, or a part of PyTorch that "
            "FastLoDA does not know), and does not give each sample numbers of its own"
        )
    try:
        found = _parting_layout(op, layouts, samples)
    except (RuntimeError, NotImplementedError) as error:
        op.refuse_unseen(f"has a backward pass that does not run twice ({error})")
    if found is None:
        op.refuse("takes outputs of different samples together")
    return found


def _layouts(op: Operation[Rows]) -> list[Rows]:
    """List where the samples may lie in the output: in the dimension that they have in an input, counted from either end."""
    if len({given.state.owners for given in op.inputs}) > 1:
        return []
    count = len(op.shape)
    found = []
    for given in op.inputs:
        for shift in {0, count - len(given.shape)}:
            places = {d: d + shift for d in range(len(given.shape)) if 0 <= d + shift < count}
            found.append(given.state.move(given.shape, op.shape, places))
    state = op.inputs[0].state
    if op.shape and op.shape[0] == state.entries:
        found.insert(0, replace(state, outer=1))
    return [rows for rows in dict.fromkeys(found) if rows is not None]


def _parting_layout(op: Operation[Rows], layouts: Sequence[Rows], samples: int) -> Rows | None:
    """Find the first layout by which backward keeps samples apart, also for huge and tiny gradients, which it may clip."""
    metadata = op.node._input_metadata[op.number]
    gy = torch.randn(op.shape, generator=torch.Generator().manual_seed(0)).to(metadata.device, metadata.dtype)
    extreme = 2.0 ** (math.log2(torch.finfo(gy.dtype).max) // 4)
    choices = list(parting(torch.ones(samples, dtype=torch.bool)))
    whole = {scale: _gradients(op, scale * gy) for scale in (1.0, 1 / extreme, extreme)}

    def parts(rows: Rows, chosen: Tensor, scale: float) -> bool:
        grads = _gradients(op, scale * gy * rows.belong(op.shape, chosen).to(gy.device))
        own = (given.state.belong(given.shape, chosen) for given in op.inputs)
        return all(map(_is_apart, grads, whole[scale], own))

    looks = [(chosen, 1.0) for chosen in choices] + [(choices[0], 1 / extreme), (choices[0], extreme)]
    return next((rows for rows in layouts if all(parts(rows, *look) for look in looks)), None)


def _gradients(op: Operation[Rows], gy: Tensor) -> Sequence[Tensor | None]:
    edges = [GradientEdge(*given.source) for given in op.inputs]
    with may_run_again([op.node] if op.node.name() == COMPILED else []):
        return torch.autograd.grad(
            [GradientEdge(op.node, op.number)], edges, [gy], retain_graph=True, allow_unused=True
        )


def _is_apart(alone: Tensor | None, beside: Tensor | None, chosen: Tensor) -> bool:
    """Tell whether `alone`, the chosen samples' gradient, is zero elsewhere and on them equal to `beside`, that of all."""
    if alone is None or beside is None:
        return alone is beside
    chosen = chosen.to(alone.device)
    others, own, there = alone[~chosen].nan_to_num(), alone[chosen].nan_to_num(), beside[chosen].nan_to_num()
    allowed = 64 * torch.finfo(own.dtype).eps * float(there.abs().amax()) if there.numel() else 0.0
    return not others.any() and torch.allclose(own, there, rtol=1e-3, atol=allowed)
