"""Calls of modules whose batch is the second dimension, [positions, records, ...], from code that expects it first."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastloda.engine.nested import map_tensors, tensors_in
from fastloda.errors import PrivacyError


def with_batch_second(batch_first: Callable, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Call `batch_first` with `function` and its arguments, all converted so that inputs and outputs have the batch first.

    `function` has the batch second in inputs of two dimensions or more. Its outputs may have it anywhere (a classifier's logits
    have it first): it is the dimension that grows when one made-up record becomes two, which is tried at each call.

    Raises:
        PrivacyError: an output with a gradient has no such dimension.
    """
    dims: list[int | None] = []

    def turned(*args, **kwargs) -> Any:
        args, kwargs = swapped(args, kwargs)
        dims[:] = batch_dims(function, args, kwargs)
        return to_front(function(*args, **kwargs), dims)

    args, kwargs = swapped(args, kwargs)
    return from_front(batch_first(turned, args, kwargs), dims)


def swapped(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Swap the first two dimensions of all tensors in the arguments that have at least two."""
    return tree_map(_swap, (args, kwargs))


def batch_dims(function: Callable, args: tuple, kwargs: dict) -> list[int | None]:
    """Find the dimension of the records in each output of `function`, by a trial with one made-up record and with two."""
    return list(map(_grown, _shapes(function, args, kwargs, 1), _shapes(function, args, kwargs, 2)))


def to_front(outputs: Any, dims: list[int | None]) -> Any:
    """Move each output's dimension of records to the front, from its place in `dims`.

    Raises:
        PrivacyError: an output with a gradient has no such dimension.
    """
    for t, dim in zip(tensors_in(outputs), dims, strict=True):
        if dim is None and t.requires_grad:
            shape = tuple(t.shape)
            raise PrivacyError(
                f"an output of shape {shape} has no dimension that grows with the records: return one row each"
            )
    return _moved(outputs, dims, lambda t, dim: t.movedim(dim, 0))


def from_front(outputs: Any, dims: list[int | None]) -> Any:
    """Move each output's dimension of records from the front back to its place in `dims`."""
    return _moved(outputs, dims, lambda t, dim: t.movedim(0, dim))


def _swap(t: Any) -> Any:
    return t.transpose(0, 1) if isinstance(t, Tensor) and t.dim() > 1 else t


def _shapes(function: Callable, args: tuple, kwargs: dict, records: int) -> list[torch.Size]:
    def made_up(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.dim():
            return t
        return t.new_zeros(*t.shape[:1], records, *t.shape[2:]) if t.dim() > 1 else t.new_zeros(records)

    with torch.no_grad():
        args, kwargs = tree_map(made_up, (args, kwargs))
        return [t.shape for t in tensors_in(function(*args, **kwargs))]


def _grown(one: torch.Size, two: torch.Size) -> int | None:
    grown = [dim for dim, (a, b) in enumerate(zip(one, two)) if a != b]
    return grown[0] if len(one) == len(two) and len(grown) == 1 else None


def _moved(outputs: Any, dims: list[int | None], move: Callable[[Tensor, int], Tensor]) -> Any:
    places = iter(dims)
    return map_tensors(outputs, lambda t: t if (dim := next(places)) is None else move(t, dim))
