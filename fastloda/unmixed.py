"""Whether each loss depends on its own record only, looked at in the losses' values and in the gradients that they give.

The probe of the private step sees how gradients flow between samples. What has no gradient it can't see: a statistic of the batch
under detach(), targets scaled by the batch, views in another order than the samples'. So some records of a batch are replaced by
others, with all random generators as they were: the losses of those that stayed must stay too, and so must the parameters'
gradients of them, which show what the losses hide behind a large constant, or in a surrogate whose value says nothing. Where
nothing is drawn at random, the records are also put into another order, since one more record would move those after it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.randomness import Secret

# Relative to a loss: more is not rounding, which is nearly always zero in a batch of the same shape.
CHANGED = 1e-5
# Relative to a gradient, or to a loss at another place of the batch, where kernels add up in another order.
CHANGED_GRADIENT, CHANGED_PLACE = 1e-3, 0.1
# Between two calls with the same batch: more is no kernel that adds up in varying order.
UNSTEADY = 1e-3


class Evaluated(NamedTuple):
    """What a call of losses() gave.

    Attributes:
        losses: [samples * views]
        gradients: float64 [choices, parameters], the norms of the gradients of each choice of samples; NaN: not known.
        drew: whether random numbers were drawn.
    """

    losses: Tensor
    gradients: Tensor
    drew: bool


def evaluated(
    losses: Tensor, choices: Sequence[Tensor], parameters: Collection[Tensor], drew: Callable[[], bool]
) -> Evaluated:
    """choices: of samples, bool [samples] each; without a graph of the losses their gradients are not known."""
    gradients = torch.full((len(choices), len(parameters)), torch.nan, dtype=torch.float64)
    for number, chosen in enumerate(choices if losses.grad_fn is not None else ()):
        weights = chosen.to(losses.device).repeat_interleave(len(losses) // len(chosen)) & losses.detach().isfinite()
        try:
            found = torch.autograd.grad(
                losses, list(parameters), weights.to(losses.dtype), retain_graph=True, allow_unused=True
            )
            norms = [losses.new_zeros(()) if g is None else torch.linalg.vector_norm(g) for g in found]
        except RuntimeError:  # the private step tells by name what has no backward pass
            break
        gradients[number] = torch.stack([norm.double() for norm in norms]).cpu()
    return Evaluated(losses.detach().clone(), gradients, drew())


def is_power_of_two(step: int) -> bool:
    return step & (step - 1) == 0


def is_due(step: int, secret: Secret) -> bool:
    """Whether to look at a step: at 1, 2, 4, 8, ..., and at a random one between any two of them. Independent of the data."""
    power = 1 << (step.bit_length() - 1)
    drawn = secret.generator(f"look after {power}")
    return is_power_of_two(step) or step == power + int(torch.randint(power, (), generator=drawn))


def halves(samples: int, both: bool, secret: Secret, name: str) -> list[Tensor]:
    """Which samples to replace, bool [samples]: a random half; or that and then the other."""
    chosen = torch.randperm(samples, generator=secret.generator(name)) < samples // 2
    return [chosen, ~chosen] if both else [chosen]


def places(samples: int, all_of_them: bool, secret: Secret, name: str) -> list[int]:
    """A random order of the samples, or of half of them."""
    order = torch.randperm(samples, generator=secret.generator(f"order of {name}")).tolist()
    return order if all_of_them else order[samples // 2 :]


def look(
    evaluate: Callable[[list, Sequence[Tensor]], Evaluated],
    read: list,
    replaced: Sequence[tuple[Tensor, list]],
    order: Sequence[int],
    steady: bool,
) -> Tensor:
    """The losses [samples * views] of what was read, if those of the records that stay do not change with the others.

    Args:
        evaluate: what was read of each record, and the choices whose gradients are wanted -> losses and gradients, under the
            same random states at every call.
        replaced: which samples to replace, and by what; one evaluation for each.
        order: places of samples, all or some, in which they are put as well if nothing is drawn at random.
        steady: evaluate once more where something has changed, to tell rounding and other causes from the records.

    Raises:
        PrivacyError: they do; or they change without it.
    """
    stay = [~chosen for chosen, _ in replaced]
    own = evaluate(read, stay)
    for number, (chosen, others) in enumerate(replaced):
        others, kept = iter(others), stay[number]
        mixed = evaluate([next(others) if new else old for new, old in zip(chosen.tolist(), read)], [kept])
        changes = _changes(own, mixed, kept, number)
        if not any(change > allowed for change, allowed in zip(changes, _allowed(own.losses))):
            continue
        noise = (0.0, 0.0)
        if steady:
            again = evaluate(read, [kept])
            check_steady(own.losses, again.losses)
            noise = _changes(own, again, torch.ones_like(kept), number)
        _refuse_changes(own.losses, changes, noise, f"{int(chosen.sum())} of {len(read)}")
    if steady and not own.drew and len(order) > 1:
        _check_places(own.losses, evaluate([read[i] for i in order], []).losses, order, len(read))
    return own.losses


def _allowed(losses: Tensor) -> tuple[float, float]:
    """Of the losses' and the gradients' changes."""
    return _rounding(losses), CHANGED_GRADIENT


def _changes(a: Evaluated, b: Evaluated, kept: Tensor, number: int) -> tuple[float, float]:
    """The largest of a loss of those kept, and of a parameter's gradient of choice `number` where both are finite."""
    losses = relative_change(a.losses, b.losses).view(len(kept), -1)[kept.to(a.losses.device)]
    gradients = relative_change(a.gradients[number], b.gradients[0])
    finite = a.gradients[number].isfinite() & b.gradients[0].isfinite()
    return tuple(float(t.max()) if t.numel() else 0.0 for t in (losses, gradients[finite]))


def _refuse_changes(losses: Tensor, changes: Sequence[float], noise: Sequence[float], replaced: str) -> None:
    """Raise PrivacyError for what is larger than rounding, and than eight times what changes without any record."""
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
    """Refuse losses that follow a record's place in the batch, or how many records there are: one more would move others."""
    change = float(relative_change(own.view(samples, -1)[list(order)].flatten(), moved).max())
    if change > CHANGED_PLACE:
        raise PrivacyError(
            f"the losses of records depend on their places in the batch, or on its size: in another order one changed by "
            f"{change:.2g} of its size. Another record would move those after it. Usual causes: a part of the batch that is "
            "treated in another way, weights or times spread over the batch, a division by its size. Draw such choices from the "
            "generator for each record, and divide by public constants"
        )


class Signs:
    """What tells that a batch may have been skipped or rescaled for one of its records, which shows in no other batch.

    Losses of which some are not finite, losses that are all the same, or a loss twice as large as any that was looked at. The
    first two are looked at when they have come 1, 2, 4, 8, ... times. Records decide only whether a fault is found.
    """

    def __init__(self):
        self._largest, self._times = 0.0, {"not finite": 0, "all the same": 0}

    def read(self, batches: Sequence[Tensor]) -> bool:
        """Whether to look at a step's losses, by micro-batch; they count as looked at from then on."""
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
    """The largest relative change between two calls with the same batch and the same random states.

    Raises:
        PrivacyError: it is none of rounding.
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
    """|a - b| over |a|, or over the mean of |a| where that is larger; 0 where both are equal or both NaN."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    typical = a[a.isfinite()].abs().mean().nan_to_num(0.0)
    change = (a - b).abs() / a.abs().maximum(typical)
    return torch.where(same, 0.0, change.nan_to_num(torch.inf, posinf=torch.inf))


def _rounding(losses: Tensor) -> float:
    return max(CHANGED, 4 * torch.finfo(losses.dtype).eps)
