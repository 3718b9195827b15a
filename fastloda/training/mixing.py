"""A check that each loss depends on its own record only, by the losses' values and the gradients that they give.

The private step's probe sees how gradients flow between samples, but not what has no gradient: a statistic of the batch under
detach(), targets scaled by the batch, views in another order than the samples'. So some records of a batch are replaced by
others, with all random generators as they were. The losses of the remaining records must stay the same, and so must their
gradients, which show what the losses hide behind a large constant, or in a surrogate whose value means nothing. If nothing is
drawn at random, the records are also put into another order, since one more record would move those after it.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node
from fastloda.per_sample.operations import LINEAR, kind_of
from fastloda.per_sample.refusals import is_power_of_two, is_scheduled
from fastloda.randomness import Secret

# Largest change relative to a loss that counts as rounding, which is nearly always zero in a batch of the same shape.
CHANGED = 1e-5
# Largest changes relative to a gradient, and to a loss at another place of the batch, where kernels add in another order.
CHANGED_GRADIENT, CHANGED_PLACE = 1e-3, 0.1
# Largest relative change between two calls with the same batch that kernels can cause by adding in a varying order.
UNSTEADY = 1e-3


class Evaluated(NamedTuple):
    """The result of one call of losses().

    Attributes:
        losses: the losses, [samples * views].
        gradients: norms of the gradients of each choice of samples, float64 [choices, parameters]; NaN if not known.
        drew: whether random numbers were drawn.
    """

    losses: Tensor
    gradients: Tensor
    drew: bool


def evaluated(
    losses: Tensor, choices: Sequence[Tensor], parameters: Collection[Tensor], drew: Callable[[], bool]
) -> Evaluated:
    """Compute gradient norms of `choices` of samples, bool [samples] each; they are not known if the losses have no graph."""
    gradients = torch.full((len(choices), len(parameters)), torch.nan, dtype=torch.float64)
    for number, chosen in enumerate(choices if losses.grad_fn is not None else ()):
        weights = chosen.to(losses.device).repeat_interleave(len(losses) // len(chosen)) & losses.detach().isfinite()
        try:
            found = torch.autograd.grad(
                losses, list(parameters), weights.to(losses.dtype), retain_graph=True, allow_unused=True
            )
            norms = [losses.new_zeros(()) if g is None else torch.linalg.vector_norm(g) for g in found]
        except RuntimeError:  # a missing backward pass, which the private step refuses by name
            break
        gradients[number] = torch.stack([norm.double() for norm in norms]).cpu()
    return Evaluated(losses.detach().clone(), gradients, drew())


def is_due(step: int, secret: Secret) -> bool:
    """Tell whether a look is due at `step`: at 1, 4, 16, 64, ..., and at a random step between each two, whatever the data."""
    power = 4 ** ((step.bit_length() - 1) // 2)
    drawn = secret.generator(f"look after {power}")
    return is_scheduled(step) or step == power + int(torch.randint(3 * power, (), generator=drawn))


def halves(samples: int, both: bool, secret: Secret, name: str) -> list[Tensor]:
    """Choose the samples to replace, bool [samples]: a random half, or, for `both`, that half and then the other."""
    chosen = torch.randperm(samples, generator=secret.generator(name)) < samples // 2
    return [chosen, ~chosen] if both else [chosen]


def places(samples: int, all_of_them: bool, secret: Secret, name: str) -> list[int]:
    """Draw a random order of the samples, or of half of them."""
    order = torch.randperm(samples, generator=secret.generator(f"order of {name}")).tolist()
    return order if all_of_them else order[samples // 2 :]


def look(
    evaluate: Callable[[list, Sequence[Tensor]], Evaluated],
    read: list,
    replaced: Sequence[tuple[Tensor, list]],
    order: Sequence[int],
    steady: bool,
    gradients: bool = True,
) -> Tensor:
    """Compute the losses [samples * views] of the records read, and refuse losses that change when other records change.

    Args:
        evaluate: function (records read, choices whose gradients are wanted) -> losses and gradients, under the same random
            states at every call.
        replaced: pairs of samples to replace and records to replace them by; one evaluation for each pair.
        order: places, of all samples or some, that make the other order if nothing is drawn at random.
        steady: whether to evaluate again after a change, to tell rounding and other causes from the records.
        gradients: whether to compare gradients too, for which each evaluation takes a backward pass.

    Raises:
        PrivacyError: the losses or gradients change with other records, or from call to call.
    """
    stay = [~chosen for chosen, _ in replaced]
    own = evaluate(read, stay if gradients else [])
    for number, (chosen, others) in enumerate(replaced):
        others, kept = iter(others), stay[number]
        mixed = evaluate(
            [next(others) if new else old for new, old in zip(chosen.tolist(), read)], [kept][: len(own.gradients)]
        )
        changes = _changes(own, mixed, kept, number)
        if not any(change > allowed for change, allowed in zip(changes, _allowed(own.losses))):
            continue
        noise = (0.0, 0.0)
        if steady:
            again = evaluate(read, [kept][: len(own.gradients)])
            check_steady(own.losses, again.losses)
            noise = _changes(own, again, torch.ones_like(kept), number)
        _refuse_changes(own.losses, changes, noise, f"{int(chosen.sum())} of {len(read)}")
    if steady and not own.drew and len(order) > 1:
        _check_places(own.losses, evaluate([read[i] for i in order], []).losses, order, len(read))
    return own.losses


def _allowed(losses: Tensor) -> tuple[float, float]:
    """Compute the allowed relative changes of the losses and of the gradients."""
    return _rounding(losses), CHANGED_GRADIENT


def _changes(a: Evaluated, b: Evaluated, kept: Tensor, number: int) -> tuple[float, float]:
    """Compute the largest relative change of a kept sample's loss, and of a parameter's finite gradient of choice `number`."""
    losses = relative_change(a.losses, b.losses).view(len(kept), -1)[kept.to(a.losses.device)]
    if not len(b.gradients):
        return float(losses.max()) if losses.numel() else 0.0, 0.0
    gradients = relative_change(a.gradients[number], b.gradients[0])
    finite = a.gradients[number].isfinite() & b.gradients[0].isfinite()
    largest = lambda t: float(t.max()) if t.numel() else 0.0  # noqa: E731
    return largest(losses), largest(gradients[finite])


def _refuse_changes(losses: Tensor, changes: Sequence[float], noise: Sequence[float], replaced: str) -> None:
    """Refuse changes larger than rounding, and than eight times the changes that come without other records (`noise`)."""
    loss, gradient = (
        change if change > max(8 * by_itself, allowed) else 0.0
        for change, by_itself, allowed in zip(changes, noise, _allowed(losses))
    )
    if loss:
        raise PrivacyError(
            "the losses of records depend on other records in the batch, without a gradient: replacing "
            f"{replaced} changed a loss of the others by {loss:.2g} of its size. Usual causes: a statistic, a scale or a "
            "quantiser's range taken over the batch; targets normalised over the batch; views that are not in order (all views "
            "of the first record first); records that are combined; a batch that is skipped or rescaled for one of its records. "
            "Compute each loss from its own record and from public constants, and draw as many random numbers whatever the "
            "records hold"
        )
    if gradient:
        raise PrivacyError(
            "the gradients of records depend on other records in the batch, though their losses hardly show it: replacing "
            f"{replaced} changed a parameter's gradient of the others by {gradient:.2g} of its size. Usual causes: a statistic "
            "of the batch that weighs a surrogate loss (f - f.detach()), scales gradients in an autograd.Function or a hook, or "
            "stands beside a large constant. Compute each loss from its own record and from public constants"
        )


def _check_places(own: Tensor, moved: Tensor, order: Sequence[int], samples: int) -> None:
    """Refuse losses that depend on a record's place in the batch or on the batch's size: one more record would move others."""
    change = float(relative_change(own.view(samples, -1)[list(order)].flatten(), moved).max())
    if change > CHANGED_PLACE:
        raise PrivacyError(
            f"the losses of records depend on their places in the batch, or on its size: in another order one changed by "
            f"{change:.2g} of its size. Another record would move those after it. Usual causes: a part of the batch that is "
            "treated in another way, weights or times spread over the batch, a division by its size. Draw such choices from the "
            "generator for each record, and divide by public constants"
        )


class Divisors:
    """The numbers that losses were divided by last, by which a division by the batch's size shows when the size changes.

    No look sees that if random numbers are drawn, for in a batch of another size a record would meet other random numbers.
    """

    def __init__(self):
        self._seen: dict[int, tuple[int, float]] = {}  # place, counted from the losses -> number of losses, and factor

    def check(self, losses: Tensor) -> None:
        """Refuse losses that are divided, in their last operations, by a number that has changed as their count has.

        Raises:
            PrivacyError: the losses are divided so; the message says what to do.
        """
        node, place = losses.grad_fn, 0
        while node is not None and kind_of(node) in LINEAR:
            inputs = [child for child, _ in node.next_functions if child is not None]
            if len(inputs) != 1:
                return
            if factor := _last_factor(node):
                count, before = self._seen.get(place, (len(losses), factor))
                if len(losses) != count and math.isclose(factor * len(losses), before * count, rel_tol=1e-6):
                    raise PrivacyError(
                        "the losses of records depend on the batch's size: they are divided by a number that follows how many "
                        f"there are, now {1 / factor:.6g}. Divide by public constants"
                    )
                self._seen[place] = len(losses), factor
            node, place = inputs[0], place + 1


def _last_factor(node: Node) -> float | None:
    """Read the one number that a product or quotient multiplies its input with; None if it is no number on the CPU."""
    if kind_of(node) not in ("Div", "Mul"):
        return None
    with _disable_current_modes():  # they would see the number as a tensor, at which PyTorch fails
        try:
            other = node._saved_other
        except Exception:  # raised by whatever packed it: checkpointing, hooks
            return None
        if not isinstance(other, Tensor) or other.dim() or other.device.type != "cpu" or not other.item():
            return None
        return 1 / other.item() if kind_of(node) == "Div" else other.item()


class Signs:
    """The signs that a batch may have been skipped or rescaled for one of its records, which shows in no other batch.

    The signs are losses that are not all finite, losses that are all the same, and a loss twice as large as any looked at
    before. The first two count when they have come 1, 2, 4, 8, ... times. Records have a say only in whether a fault is found.
    """

    def __init__(self):
        self._largest, self._times = 0.0, {"not finite": 0, "all the same": 0}

    def read(self, batches: Sequence[Tensor]) -> bool:
        """Tell whether a step's losses, one tensor a micro-batch, call for a look; they count as looked at from then on."""
        batches = [losses for losses in batches if len(losses) > 1]
        if not batches:
            return False
        finite = [losses.nan_to_num(0.0, 0.0, 0.0).abs() for losses in batches]
        largest = torch.stack([t.max().double() for t in finite]).max()
        lost = torch.stack([~losses.isfinite().all() for losses in batches]).any()
        same = torch.stack([(losses == losses[0]).all() for losses in batches]).any()
        largest, *found = torch.stack([largest, lost.double(), same.double()]).tolist()  # a GPU is waited for once
        due = largest > 2 * self._largest
        self._largest = max(largest, self._largest) if due else self._largest
        for name, here in zip(self._times, found):
            self._times[name] += bool(here)
            due |= bool(here) and is_power_of_two(self._times[name])
        return due


def check_steady(before: Tensor, after: Tensor) -> float:
    """Compute the largest relative change between two calls with the same batch and the same random states.

    Raises:
        PrivacyError: the change is larger than rounding.
    """
    largest = float(relative_change(before, after).max()) if len(before) else 0.0
    if largest > max(UNSTEADY, _rounding(before)):
        raise PrivacyError(
            f"losses() gave other values for the same batch, parameters and random states (by {largest:.2g} of a loss): it draws "
            "from a source of its own, or keeps something between its calls, so that it can't be seen whether records mix. Draw "
            "from the generator that it is given, or from torch's, numpy's or Python's global one; keep nothing of a batch; a "
            "schedule may follow trainer.step, which stays the same for all calls of a step"
        )
    return largest


def relative_change(a: Tensor, b: Tensor) -> Tensor:
    """Compute |a - b| over |a|, or over the mean of |a| where that is larger; 0 where both are equal or both NaN."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    typical = a[a.isfinite()].abs().mean().nan_to_num(0.0)
    change = (a - b).abs() / a.abs().maximum(typical)
    return torch.where(same, 0.0, change.nan_to_num(torch.inf, posinf=torch.inf))


def _rounding(losses: Tensor) -> float:
    return max(CHANGED, 4 * torch.finfo(losses.dtype).eps)
