"""Per-sample gradients that are kept or computed again, whichever is smaller.

A `Piece` is the recipe: the tensors that one call of a layer left in backward, and the rule that makes per-sample
gradients of them. `PerSampleGrad` holds all pieces of one parameter. Its norm and its clipped sum are both taken
from `chunks()`, hence from the very same numbers, so that a norm can't underestimate what is summed, however much
the positions of a sample cancel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.plan import chunk_samples, keep_gradients, split_rows


@dataclass(frozen=True)
class Piece:
    """`grad(*tensors, samples) -> [samples, *parameter.shape]`; each tensor has samples x k rows, sample-major."""

    grad: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    scratch_bytes: int = 0  # temporaries of `grad` for all samples at once

    def compute(self, samples: int, chosen: slice) -> Tensor:
        """The gradients of the chosen of all `samples`, a few at a time if the temporaries are large."""
        per_sample = [len(t) // samples for t in self.tensors]
        count = chosen.stop - chosen.start
        parts = []
        for part in split_rows(count, self.scratch_bytes * count // samples, self.tensors[0].device):
            start, stop = chosen.start + part.start, chosen.start + part.stop
            parts.append(self.grad(*(t[start * k : stop * k] for t, k in zip(self.tensors, per_sample)), stop - start))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass
class PerSampleGrad:
    """The gradient of one parameter for each of `samples` samples, summed over the layer calls that use it."""

    shape: torch.Size
    samples: int
    kept: Tensor | None = None
    again: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take in one layer call: as gradients if they are small, else as the recipe."""
        if any(len(t) % self.samples for t in piece.tensors):
            rows = sorted({len(t) for t in piece.tensors})
            raise PrivacyError(
                f"an operation saw {rows} rows, no multiple of the {self.samples} samples in losses: the batch must come first"
            )
        if not keep_gradients(self.samples * self.shape.numel(), piece.nbytes):
            self.again.append(piece)
            return
        grads = self._compute(piece, slice(0, self.samples))
        self.kept = grads if self.kept is None else self.kept.add_(grads)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(samples, their gradients [chunk, *shape]) piece by piece, the same numbers each time."""
        size = chunk_samples(self.shape.numel()) if self.again else self.samples
        for start in range(0, self.samples, size):
            chosen = slice(start, min(start + size, self.samples))
            parts = [self._compute(piece, chosen) for piece in self.again]
            if self.kept is not None:
                parts.append(self.kept[chosen])
            if parts:
                yield chosen, sum(parts[1:], parts[0])

    def _compute(self, piece: Piece, chosen: slice) -> Tensor:
        grads = piece.compute(self.samples, chosen)
        if grads.shape[1:] != self.shape:
            raise PrivacyError(
                f"a parameter of shape {tuple(self.shape)} entered an operation as {tuple(grads.shape[1:])}: no exact rule"
            )
        return grads

    def squared_norms(self, out: Tensor) -> None:
        """out [samples] += |g_n|^2, in float64: no float32 gradient overflows or vanishes in it."""
        for chosen, grads in self.chunks():
            out[chosen] += torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=torch.float64).square_()

    def weighted_sum(self, factors: Tensor) -> Tensor | None:
        """sum_n factors[n] g_n, of `shape`; None if no layer call used the parameter."""
        total = None
        for chosen, grads in self.chunks():
            finite = grads.nan_to_num(0.0, 0.0, 0.0)  # a refused sample has factor 0, and 0 * inf is no zero
            weights = factors[chosen].to(grads.dtype).view(-1, *[1] * len(self.shape))
            part = finite.mul_(weights).sum(0)  # no matrix product: tf32 would round here what the norm did not
            total = part if total is None else total.add_(part)
        return total
