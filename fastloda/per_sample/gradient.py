"""The gradient of one parameter for each sample, kept or made again, as the planner chooses.

Its norm and its clipped sum are both taken from the very same numbers: from `chunks()`, or from kernels that accumulate in the
same order. (The ghost norm is an upper bound instead.) So a norm can't underestimate what is summed, however much the positions
of a sample cancel.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastloda import kernels
from fastloda.errors import PrivacyError
from fastloda.per_sample.planner import Sizes, Way, choose, rows_at_a_time
from fastloda.per_sample.recipe import Fused, Recipe, as_it_is
from fastloda.per_sample.reductions import row_squares, weighted_row_sum
from fastloda.per_sample.tensors import on_triton, waits


@dataclass
class PerSampleGrad:
    """The gradient of one parameter for each of `samples` samples, summed over the layer calls that use it.

    Attributes:
        shape: the parameter's shape.
        kept: the sum of the gradients that are kept, [samples, ...].
        lay_out: a function from `kept` to [samples, *shape], as in `Recipe`.
        again: the recipes of the calls whose gradients are made again.
        squares: float64 [samples, parts], whose rows sum to the squared norms of `kept`; None if several calls share it.
    """

    shape: torch.Size
    samples: int
    kept: Tensor | None = None
    lay_out: Callable[[Tensor], Tensor] = as_it_is
    again: list[Recipe] = field(default_factory=list)
    squares: Tensor | None = None

    def add(self, recipe: Recipe) -> None:
        """Add the recipe of one layer call; its gradients are kept now, or made again later, as the planner chooses.

        Raises:
            PrivacyError: the recipe's rows are no multiple of the samples.
        """
        rows = {t.shape[0] for t in recipe.tensors}
        if any(count % self.samples for count in rows):
            raise PrivacyError(
                f"an operation saw {sorted(rows)} rows, no multiple of the {self.samples} samples in losses: the batch must come "
                "first"
            )
        way = choose(self.sizes(recipe))
        if way is not Way.KEPT:
            self.again.append(replace(recipe, at_hand=None, fused=recipe.ghost if way is Way.GHOST else recipe.fused))
        elif self.kept is None and recipe.with_squares is not None:
            self.kept, self.squares = recipe.with_squares(*recipe.tensors, self.samples)
            self.lay_out = recipe.lay_out
        else:
            self._keep(recipe)

    def _keep(self, recipe: Recipe) -> None:
        grads = recipe.raw_of_all(self.samples)
        if self.kept is None:
            self.kept, self.lay_out = grads, recipe.lay_out
            self.squares = row_squares(grads)[:, None]  # now, while the gradients are in the cache
        else:  # a further call may lay its numbers out in another order
            self.kept, self.lay_out = self.lay_out(self.kept).add_(recipe.lay_out(grads)), as_it_is
            self.squares = None

    def sizes(self, recipe: Recipe) -> Sizes:
        """Collect the sizes by which the planner chooses the recipe's way."""
        fused, ghost = recipe.fused is not None, recipe.ghost is not None
        return Sizes(self.samples, self.shape.numel(), recipe.nbytes, recipe.product, fused, ghost)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of samples, their gradients as `order` takes them), a few at a time and the same numbers each time."""
        if not self.again:
            if self.kept is not None:
                yield slice(0, self.samples), self.kept
            return
        # So many samples at a time that the gradients and their temporaries stay in the cache.
        sources = [(recipe.scratch_bytes, recipe.tensors[0].device) for recipe in self.again]
        made = 4 * self.samples * self.shape.numel()
        size = min(rows_at_a_time(self.samples, made + scratch, device) for scratch, device in sources)
        laid_out = self._sources > 1
        for start in range(0, self.samples, size):
            chosen = slice(start, min(start + size, self.samples))
            parts = [(recipe.compute_raw(self.samples, chosen), recipe.lay_out) for recipe in self.again]
            if self.kept is not None:
                parts.append((self.kept[chosen], self.lay_out))
            grads = [lay_out(part) if laid_out else part for part, lay_out in parts]
            yield chosen, sum(grads[1:], grads[0])

    @property
    def _sources(self) -> int:
        return len(self.again) + (self.kept is not None)

    @property
    def order(self) -> Callable[[Tensor], Tensor]:
        """The function from the gradients of `chunks` to [samples, *shape]: the identity, unless one source made them all."""
        if self._sources != 1:
            return as_it_is
        return self.again[0].lay_out if self.again else self.lay_out

    @property
    def _lone(self) -> tuple[Fused, tuple[Tensor, ...]] | None:
        """The kernels and tensors of the only recipe, if they need no per-sample gradient; else None."""
        if self.kept is not None or len(self.again) != 1:
            return None
        (recipe,) = self.again
        return (recipe.fused, recipe.tensors) if recipe.fused is not None else None

    def squared_norms(self) -> Tensor | None:
        """Compute float64 [samples, parts], whose rows sum to |g_n|^2; no square of a float32 number over- or underflows.

        Returns None if no layer call used the parameter.
        """
        if self.squares is not None and not self.again:
            return self.squares
        if lone := self._lone:
            fused, tensors = lone
            return fused.squares(*tensors, self.samples)
        parts = [row_squares(grads) for _, grads in self.chunks()]
        return torch.cat(parts)[:, None] if parts else None

    def weighted_sum(self, factors: Tensor, some_are_zero: bool = True) -> Tensor | None:
        """Compute sum_n factors[n] g_n, of `shape`; None if no layer call used the parameter.

        some_are_zero: whether factors may hold zeros, whose gradients may be NaN.

        Raises:
            PrivacyError: the parameter entered an operation in another shape.
        """
        if lone := self._lone:
            fused, tensors = lone
            accumulated_in = torch.promote_types(tensors[0].dtype, torch.float32)
            return self._check_shape(fused.weighted_sum(*tensors, factors.to(accumulated_in)))
        total = None
        if self.again:
            for chosen, grads in self.chunks():
                total = weighted_row_sum(grads, factors[chosen], some_are_zero, total)
        elif self.kept is not None:
            total = weighted_row_sum(self.kept, factors, some_are_zero)
        return None if total is None else self.in_shape(total)

    def in_shape(self, total: Tensor) -> Tensor:
        """Bring a sum of gradients that are all kept, or all made again, to the parameter's shape.

        Raises:
            PrivacyError: the parameter entered an operation in another shape.
        """
        if self.kept is not None and not self.again:
            total = total.view(self.kept.shape[1:])
        return self._check_shape(self.order(total.unsqueeze(0)).squeeze(0))

    def _check_shape(self, total: Tensor) -> Tensor:
        if total.shape != self.shape:
            raise PrivacyError(
                f"a parameter of shape {tuple(self.shape)} entered an operation as {tuple(total.shape)}: no exact rule"
            )
        return total


def squared_norms(grads: Collection[PerSampleGrad], samples: int, device: torch.device) -> Tensor:
    """Compute |g_n|^2 over all parameters: float64 [samples]."""
    parts = [squares for grad in grads if (squares := grad.squared_norms()) is not None]
    return torch.cat(parts, dim=1).sum(1) if parts else torch.zeros(samples, dtype=torch.float64, device=device)


def weighted_sums(grads: Mapping[str, PerSampleGrad], factors: Tensor) -> dict[str, Tensor | None]:
    """Compute sum_n factors[n] g_n of each parameter (None: unused).

    Kept gradients that are adjacent in memory are summed at once; on a GPU all kept ones are, in one launch.
    """
    all_kept = {name: grad.kept for name, grad in grads.items() if grad.kept is not None and not grad.again}
    kept = {name: tensor.unsqueeze(-1).flatten(1) for name, tensor in all_kept.items()}  # a single number too
    some_are_zero = waits(factors) or not factors.all()
    sums = {name: grad.weighted_sum(factors, some_are_zero) for name, grad in grads.items() if name not in kept}
    for names, rows in _lines(kept):
        if on_triton(rows):
            total = kernels.clip_sum.clip_sum(rows, factors.float()).double()
        else:
            total = weighted_row_sum(rows, factors, some_are_zero)
        for name, part in zip(names, total.split([kept[name].shape[1] for name in names])):
            sums[name] = grads[name].in_shape(part)
    return sums


def _lines(kept: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """Yield (names, rows [n, numbers]) of gradients that lie side by side in one tensor; on a GPU all are concatenated."""
    lines: list[list[str]] = []
    for name, rows in kept.items():
        if not lines or not _continues(kept[lines[-1][-1]], rows):
            lines.append([])
        lines[-1].append(name)
    whole = [_side_by_side([kept[name] for name in names]) for names in lines]
    on_gpu = [on_triton(rows) for rows in whole]
    yield from ((names, rows) for names, rows, apart in zip(lines, whole, on_gpu) if not apart)
    if any(on_gpu):
        together = [rows for rows, apart in zip(whole, on_gpu) if apart]
        names = [name for of_line, apart in zip(lines, on_gpu) if apart for name in of_line]
        yield names, together[0] if len(together) == 1 else torch.cat(together, dim=1)


def _continues(rows: Tensor, more: Tensor) -> bool:
    """Tell whether the numbers of each row of `more` follow those of `rows` in one tensor."""
    apart = rows.untyped_storage()._cdata != more.untyped_storage()._cdata  # addresses, which fake tensors have too
    end = rows.storage_offset() + rows.shape[1]
    alike = (rows.dtype, rows.stride(), 1) == (more.dtype, more.stride(), more.stride(1))
    return not apart and alike and more.storage_offset() == end


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """View parts [n, numbers], each of which continues the one before, as one."""
    width = sum(part.shape[1] for part in parts)
    return parts[0].as_strided((len(parts[0]), width), parts[0].stride())
