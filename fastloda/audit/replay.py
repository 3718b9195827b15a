"""Neighbour replay: one step under the same seed with and without one record. The noise cancels; the record's share remains.

The norm of this difference must be at most max_grad_norm / expected_batch_size, for any record beside any others (Cebere et al.
2602.17454). Where the unit of privacy is an owner, all records of one owner are added at once (`PrivateStep.owned`).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloda.audit.claim import Claim
from fastloda.audit.report import Finding
from fastloda.audit.step import (
    PrivateStep,
    Records,
    Released,
    count,
    count_units,
    each,
    join,
    rows,
    same,
    seed_for,
    units,
)

SLACK = 1e-5  # relative tolerance of the bound, for DP-SGD's own rounding
COARSE = 0.01  # fraction of max_grad_norm up to which the releases' rounding still allows a verdict
FINER = "The released numbers are rounded too much: let the step release its gradient, in float32 or float64"
ORDINARY = 8  # the most units in the usual batch, and the most that are added unchanged


@dataclass(frozen=True)
class Neighbours:
    """Two batches that differ by one record, and how that record changed the release.

    Attributes:
        company: name of the batch that the record was added to.
        record: name of the record added.
        without: the batch without the record.
        added: the record, in a batch of one.
        share: [d], the difference of the releases times expected_batch_size; None if the step failed.
        tolerance: error of the share's norm due to the rounding of both releases.
        error: the reason why the step failed, or "".
        unnoised: names of what else differs between the two models after the step.
    """

    company: str
    record: str
    without: Records
    added: Records
    share: Tensor | None
    tolerance: float
    error: str = ""
    unnoised: tuple[str, ...] = ()

    @property
    def contribution(self) -> float:
        """The norm of the record's share; infinite where it is not finite or the step failed."""
        norm = math.inf if self.share is None else self.share.norm().item()
        return norm if math.isfinite(norm) else math.inf

    def __str__(self) -> str:
        return f"{self.record} beside {self.company}" + (f": {self.error}" if self.error else "")


# ---- what is replayed


def _spoil(value: float) -> Callable[[Tensor], Tensor]:
    """Make a function that replaces the first number of each record by `value`."""

    def spoil(t: Tensor) -> Tensor:
        t = t.clone().flatten(1) if t.dim() > 1 else t.clone()[:, None]
        t[:, 0] = value
        return t

    return lambda t: spoil(t).view(t.shape)


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "a record x 1e4": lambda t: 1e4 * t,
    "a record x -1e4": lambda t: -1e4 * t,
    "a record x 1e30": lambda t: 1e30 * t,
    "a record x 1e-6": lambda t: 1e-6 * t,
    "a record negated": torch.neg,
    "a zero record": torch.zeros_like,
    "a record with one NaN": _spoil(math.nan),
    "a record with one Inf": _spoil(math.inf),
    "a record of NaN": lambda t: torch.full_like(t, math.nan),
}


def hostile(record: Records, name: str) -> Records:
    """Apply the change called `name` in HOSTILE to the record's floating-point tensors; labels and tokens stay."""
    return each(lambda t: HOSTILE[name](t) if t.is_floating_point() and t.numel() else t, record)


def candidates(records: Records, owned: bool) -> dict[str, Records]:
    """Choose the units of privacy that are added to batches, one at a time: ordinary ones and hostile ones, by name."""
    n, word = count_units(records, owned), "owner" if owned else "record"
    ordinary = {
        f"{word} {i}": units(records, slice(i, i + 1), owned) for i in range(n - 1, max(-1, n - 1 - ORDINARY), -1)
    }
    last = units(records, slice(n - 1, n), owned)
    return ordinary | {name: hostile(last, name) for name in HOSTILE}


def companies(records: Records, owned: bool) -> dict[str, Records]:
    """Make the batches that units are added to, by name; the first is the usual one."""
    usual = usual_batch(records, owned)
    first = units(usual, slice(0, 1), owned)
    large = hostile(first, "a record x 1e4")
    return {
        f"{count(usual)} records": usual,
        "none": rows(usual, slice(0, 0)),
        "one owner" if owned else "one record": first,
        "one large record": large,
        "large and ordinary records": join(usual, large),
    }


def usual_batch(records: Records, owned: bool) -> Records:
    """Take the first half of the units, at most `ORDINARY`, as the batch that a step usually gets."""
    return units(records, slice(0, min(ORDINARY, count_units(records, owned) // 2)), owned)


# ---- replaying


def replay(step: PrivateStep, records: Records, claim: Claim, seed: int, tick: Callable) -> list[Neighbours]:
    """Replay the step with every candidate added to every company, at the end or the start of it; then in micro-batches."""
    found, added = [], candidates(records, step.owned)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*had a gradient that is not finite")  # expected of hostile records
        for name, company in companies(records, step.owned).items():
            found += _replay_beside(step, name, company, added, claim, seed, tick)
        if step.release_in_parts is not None:
            usual = usual_batch(records, step.owned)
            some = dict(list(added.items())[-len(HOSTILE) - 1 :])
            for parts in (2, 4):
                name = f"{count(usual)} records in {parts} micro-batches"
                found += _replay_beside(step, name, usual, some, claim, seed, tick, parts)
    return found


def _replay_beside(
    step: PrivateStep, name: str, company: Records, added: dict[str, Records], claim: Claim, seed: int, tick, parts=1
) -> Iterator[Neighbours]:
    seed = seed_for(seed, name)
    without, error = _attempt(step, company, seed, parts)
    tick()
    for i, (what, record) in enumerate(added.items()):
        both = (company, record) if i % 2 == 0 else (record, company)
        if without is None:
            yield Neighbours(name, what, company, record, None, 0.0, error)
            return
        together, error = _attempt(step, join(*both), seed, parts)
        tick()
        if together is None:
            yield Neighbours(name, what, company, record, None, 0.0, error)
            continue
        before, after = without.flat(), together.flat()
        if before.shape != after.shape:
            error = f"it released {len(after)} numbers instead of {len(before)}"
            yield Neighbours(name, what, company, record, None, 0.0, error)
            continue
        share = (after - before) * claim.expected_batch_size
        rounding = 2 * (without.rounding() + together.rounding()) * claim.expected_batch_size
        tolerance = rounding if share.isfinite().all() else 0.0
        yield Neighbours(name, what, company, record, share, tolerance, "", _different(without, together))


def _attempt(step: PrivateStep, records: Records, seed: int, parts: int) -> tuple[Released | None, str]:
    """Take one step, or return its error: a step that fails on some records reveals them, which is a finding."""
    try:
        return step.replay(records, seed, parts), ""
    except Exception as error:  # whatever a user's step may raise
        return None, f"{type(error).__name__}: {error}"[:200]


def _different(a: Released, b: Released) -> tuple[str, ...]:
    """List the names of what differs after the two steps although no noise covers it."""
    names = dict.fromkeys([*a.unnoised, *b.unnoised])
    return tuple(
        n for n in names if n not in a.unnoised or n not in b.unnoised or not same(a.unnoised[n], b.unnoised[n])
    )


# ---- what it shows


def sensitivity(neighbours: list[Neighbours], claim: Claim) -> Finding:
    """Compare the largest share of any record with the bound; no verdict where rounding may hide a violation."""
    bound = claim.max_grad_norm * (1 + SLACK)

    def excess(n: Neighbours) -> float:
        return n.contribution - n.tolerance - bound

    def hidden(n: Neighbours) -> bool:
        return n.tolerance > COARSE * claim.max_grad_norm and n.contribution + n.tolerance > bound

    worst = max(neighbours, key=excess)
    bad = sum(excess(n) > 0 for n in neighbours)
    over = f"; {bad} pairs over the bound" if bad else ""
    measured = (
        f"largest share {worst.contribution / claim.max_grad_norm:.6g} C ({worst}), {len(neighbours)} pairs{over}"
    )
    doubtful = max((n.tolerance for n in neighbours if hidden(n)), default=0.0) / claim.max_grad_norm
    if doubtful and not bad:
        return Finding("neighbour replay", measured, f"Too coarse: shares are known to {doubtful:.3g} C only. {FINER}")
    return Finding(
        "neighbour replay",
        measured,
        "One record, added under the same seed, moves the noiseless sum by more than C: no or wrong clipping, views clipped "
        "apart, a divisor that counts the batch, samples that mix, or a record that shifts the random stream",
        holds=not bad,
    )


def coverage(step: PrivateStep, neighbours: list[Neighbours]) -> Finding:
    """Check that nothing but the private gradient depends on a record."""
    if not step.shows_state:
        why = "A plain callable shows its gradient only: audit the loop (of_loop) to see what else it changes"
        return Finding("nothing unnoised", "", why)
    leaked = list(dict.fromkeys(name for n in neighbours for name in n.unnoised))
    statistic = f"{', '.join(leaked[:4])} depend on a record" if leaked else "nothing else depends on a record"
    meaning = (
        "A buffer or parameter outside the private gradient changes with the records: it is released without noise"
    )
    return Finding("nothing unnoised", statistic, meaning, holds=not leaked)


def choose_canary(neighbours: list[Neighbours], records: Records, owned: bool) -> Neighbours | None:
    """Choose the record with the largest finite share beside the usual batch that exceeds its rounding error, or None."""
    usual = next(iter(companies(records, owned)))
    able = [n for n in neighbours if n.company == usual and n.tolerance < n.contribution < math.inf]
    return max(able, key=lambda n: n.contribution, default=None)
