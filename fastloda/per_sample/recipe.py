"""What one call of a layer left in backward, and how per-sample gradients are made of it.

Recipes are small where gradients are large: they are kept instead, and gradients made again when they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastloda.per_sample.planner import rows_at_a_time, split_rows


class Fused(NamedTuple):
    """Ways that store no per-sample gradient: kernels that accumulate each alike, or a norm that is an upper bound.

    squares(*tensors, samples) -> float64 [samples, k], whose rows sum to the squared norms;
    weighted_sum(*tensors, factors) -> [*parameter.shape], where a sample whose factor is 0 may be NaN.
    """

    squares: Callable[..., Tensor]
    weighted_sum: Callable[..., Tensor]


def as_it_is(grads: Tensor) -> Tensor:
    return grads


@dataclass(frozen=True)
class Recipe:
    """`lay_out(grad(*tensors, samples)) -> [samples, *parameter.shape]`; each tensor has samples x k rows, sample-major.

    lay_out: only moves each sample's numbers. Norms are taken before it, and a sum over samples is laid out instead of each.
    with_squares: laid out, and also returns the squares of `Fused`, from the same kernel.
    at_hand: samples -> as `grad` for all of them, from temporaries that the call still has and that are not kept.
    ghost: the Gram's way, which the planner may choose in place of `grad`.
    product: einsum's equation and shapes of the gradients' one large product, over all rows; None: element by element.
    """

    grad: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    scratch_bytes: int = 0  # temporaries of `grad` for all samples at once
    with_squares: Callable[..., tuple[Tensor, Tensor]] | None = None
    fused: Fused | None = None
    at_hand: Callable[[int], Tensor] | None = None
    ghost: Fused | None = None
    product: tuple[str, tuple] | None = None
    lay_out: Callable[[Tensor], Tensor] = as_it_is

    def compute(self, samples: int, chosen: slice) -> Tensor:
        """The gradients of the chosen of all `samples`: [chosen, *parameter.shape]."""
        return self.lay_out(self.compute_raw(samples, chosen))

    def compute_raw(self, samples: int, chosen: slice) -> Tensor:
        """The same as `grad` gives them, a few at a time if the temporaries are large."""
        per_sample = [t.shape[0] // samples for t in self.tensors]  # `len` of a tensor is slow
        count = chosen.stop - chosen.start
        parts = []
        for part in split_rows(count, self.scratch_bytes * count // samples, self.tensors[0].device):
            start, stop = chosen.start + part.start, chosen.start + part.stop
            parts.append(self.grad(*(t[start * k : stop * k] for t, k in zip(self.tensors, per_sample)), stop - start))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def raw_of_all(self, samples: int) -> Tensor:
        """As `compute_raw`, of all samples, from what is at hand."""
        if self.at_hand:
            return self.at_hand(samples)
        if rows_at_a_time(samples, self.scratch_bytes, self.tensors[0].device) >= samples:
            return self.grad(*self.tensors, samples)
        return self.compute_raw(samples, slice(0, samples))

    def through(self, back: Callable[[Tensor], Tensor], keeps_norm: bool, scratch_bytes: int = 0) -> "Recipe":
        """The same for a parameter of which this one is made; back: [samples, *shape here] -> [samples, *shape there].

        scratch_bytes: temporaries of `back` for all samples at once.
        """

        def of(fused: Fused | None) -> Fused | None:
            if fused is None or not keeps_norm:
                return None
            summed = fused.weighted_sum
            return Fused(fused.squares, lambda *arguments: back(summed(*arguments)[None])[0])

        grad, lay_out = self.grad, lambda grads: back(self.lay_out(grads))
        if not keeps_norm:
            grad, lay_out = (lambda *arguments: back(self.lay_out(self.grad(*arguments)))), as_it_is
        changed = {
            "scratch_bytes": self.scratch_bytes + scratch_bytes,
            "grad": grad,
            "lay_out": lay_out,
            "fused": of(self.fused),
            "ghost": of(self.ghost),
        }
        return replace(self, **changed, with_squares=None, at_hand=None)

    def batch_first(self, move: Callable[[Tensor], Tensor]) -> "Recipe":
        """The same from tensors whose batch `move` brings first."""
        return replace(self, tensors=tuple(map(move, self.tensors)), at_hand=None)

    def total(self) -> Tensor:
        """The ordinary gradient: summed over all rows."""
        return self.lay_out(self.grad(*self.tensors, 1))[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)
