"""Whether each loss depends on its own record only, looked at in the losses' values.

The probe of the private step sees how gradients flow between samples. What has no gradient it can't see: a statistic of the batch
under detach(), targets scaled by the batch, views in another order than the samples'. So some records of a batch are replaced by
others, with all random generators as they were: the losses of those that stayed must stay too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.randomness import Secret

# Relative to a loss: more is not rounding, which is nearly always zero in a batch of the same shape.
CHANGED = 1e-5
# Between two calls with the same batch: more is no kernel that adds up in varying order.
UNSTEADY = 1e-3


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


def look(
    evaluate: Callable[[list], Tensor], read: list, replaced: Sequence[tuple[Tensor, list]], steady: bool
) -> Tensor:
    """The losses [samples * views] of what was read, if those of the records that stay do not change with the others.

    Args:
        evaluate: what was read of each record -> losses, under the same random states at every call.
        replaced: which samples to replace, and by what; one evaluation for each.
        steady: evaluate once more where a loss has changed, to tell rounding and other causes from the records.

    Raises:
        PrivacyError: they do; or they change without it.
    """
    own = evaluate(read)
    for chosen, others in replaced:
        others = iter(others)
        mixed = evaluate([next(others) if new else old for new, old in zip(chosen.tolist(), read)])
        stayed = ~chosen.to(own.device)
        change = relative_change(own, mixed).view(len(read), -1)[stayed]
        if not (change > _rounding(own)).any():
            continue
        noise = check_steady(own, evaluate(read)) if steady else 0.0
        largest = float(change.max())
        if largest > 8 * noise:
            raise PrivacyError(
                "the losses of records depend on other records in the batch, without a gradient: replacing "
                f"{int(chosen.sum())} of {len(read)} changed a loss of the others by {largest:.2g} of its size. Usual causes: "
                "a statistic, a scale or a quantiser's range taken over the batch; targets normalised over the batch; views "
                "that are not in order (all views of the first record first); records that are combined. Compute each loss "
                "from its own record and from public constants, and draw as many random numbers whatever the records hold"
            )
    return own


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
