"""The recipe of a parameter's per-sample gradients in one layer call: tensors from backward, and the function to apply.

Where the recipe is much smaller than its gradients, only the recipe is stored, and the gradients are made again when needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastloda.per_sample.planner import rows_at_a_time, split_rows


class Fused(NamedTuple):
    """The pair of functions that compute norms and the clipped sum without storing a per-sample gradient.

    squares(*tensors, samples) -> float64 [samples, k], whose rows sum to the squared norms of the very terms that
        `weighted_sum` adds, or to upper bounds of these;
    weighted_sum(*tensors, factors) -> [*parameter.shape]; the gradient of a sample whose factor is 0 may be NaN.
    """

    squares: Callable[..., Tensor]
    weighted_sum: Callable[..., Tensor]


def as_it_is(grads: Tensor) -> Tensor:
    """Return grads unchanged: the `lay_out` of a recipe whose `grad` needs no rearrangement."""
    return grads


@dataclass(frozen=True)
class Recipe:
    """The recipe of per-sample gradients [samples, *parameter.shape]: `lay_out(grad(*tensors, samples))`.

    Attributes:
        grad: a function (*tensors, samples) -> gradients in the order that is fastest to compute, [samples, ...].
        tensors: the tensors of the call, each with samples x k rows, sample-major.
        scratch_bytes: the bytes of temporaries of `grad` for all samples at once.
        with_squares: a function like `grad` that also returns `Fused.squares`.
        fused: kernels for norms and sums without `grad`.
        at_hand: samples -> what `grad` returns for all of them, computed from temporaries of backward that are not stored.
        ghost: norms and sums by Gram matrices, which the planner may choose in place of `grad`.
        product: the einsum equation and shapes of the one large product, over all rows, that makes the gradients; None if
            they are made element by element.
        lay_out: a function that only moves each sample's numbers, or adds zeros. So norms are taken without it, and it is
            applied once, to the sum.
    """

    grad: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    scratch_bytes: int = 0
    with_squares: Callable[..., tuple[Tensor, Tensor]] | None = None
    fused: Fused | None = None
    at_hand: Callable[[int], Tensor] | None = None
    ghost: Fused | None = None
    product: tuple[str, tuple] | None = None
    lay_out: Callable[[Tensor], Tensor] = as_it_is

    def compute(self, samples: int, chosen: slice) -> Tensor:
        """Compute the gradients of those of all `samples` that are in the slice `chosen`: [chosen, *parameter.shape]."""
        return self.lay_out(self.compute_raw(samples, chosen))

    def compute_raw(self, samples: int, chosen: slice) -> Tensor:
        """Compute the gradients of the chosen samples without `lay_out`, a few at a time if the temporaries are large."""
        per_sample = [t.shape[0] // samples for t in self.tensors]  # `len` of a tensor is slow
        count = chosen.stop - chosen.start
        parts = []
        for part in split_rows(count, self.scratch_bytes * count // samples, self.tensors[0].device):
            start, stop = chosen.start + part.start, chosen.start + part.stop
            parts.append(self.grad(*(t[start * k : stop * k] for t, k in zip(self.tensors, per_sample)), stop - start))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def raw_of_all(self, samples: int) -> Tensor:
        """Compute the gradients of all samples without `lay_out`, by `at_hand` if there is one."""
        if self.at_hand:
            return self.at_hand(samples)
        if rows_at_a_time(samples, self.scratch_bytes, self.tensors[0].device) >= samples:
            return self.grad(*self.tensors, samples)
        return self.compute_raw(samples, slice(0, samples))

    def through(self, back: Callable[[Tensor], Tensor], keeps_norm: bool, scratch_bytes: int = 0) -> "Recipe":
        """Make the recipe of a parameter from this recipe of a tensor that was computed from the parameter.

        Args:
            back: a function from gradients of the tensor, [samples, *its shape], to those of the parameter, [samples, *shape].
            keeps_norm: whether `back` only moves numbers.
            scratch_bytes: the temporaries of `back` for all samples at once.
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
        """Make the same recipe with `move`, which brings the batch to the front, applied to its tensors."""
        return replace(self, tensors=tuple(map(move, self.tensors)), at_hand=None)

    def total(self) -> Tensor:
        """Compute the ordinary gradient, summed over all rows."""
        return self.lay_out(self.grad(*self.tensors, 1))[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)
