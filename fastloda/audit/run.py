"""The audit itself: neighbour replay, canary, noise and sampler checks on one step, judged together."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from fastloda.audit.canary import GaussianMu, findings, guess
from fastloda.audit.claim import Claim
from fastloda.audit.noise import NoiseRecord, Scale, Spread, at_empty_batch, at_other_batches
from fastloda.audit.replay import FINER, Neighbours, choose_canary, coverage, hostile, replay, sensitivity, usual_batch
from fastloda.audit.report import AuditReport, Finding, judge, share
from fastloda.audit.sampler import audit_sampler
from fastloda.audit.step import (
    PrivateStep,
    Records,
    Release,
    Sampler,
    check_records,
    count,
    join,
    own_randomness,
    rows,
    seed_for,
)
from fastloda.errors import UserError
from fastloda.progress import Progress

CHECKS = ("replay", "canary", "noise", "sampler")
NO_SAMPLER = "No sampler was given: the claim's sample_rate is taken on trust"


def audit_step(
    step: PrivateStep | Release,
    records: Records,
    claim: Claim,
    *,
    observations: int = 1000,
    sampler: Sampler | None = None,
    draws: int = 2000,
    checks: Sequence[str] = CHECKS,
    significance: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """Audit a private step against its claim: how much one record can move the release, and how much noise is added.

    >>> step = of_ghost_step(model, losses, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=64)
    >>> print(audit_step(step, (images, labels), Claim(1.0, 1.0, 64, sample_rate=0.01, steps=1000)))

    There are four kinds of check, each of which sees what the others miss:

    - replay: under the same seed, one more record, ordinary or hostile (huge, NaN, Inf), changes the release by at most
      max_grad_norm / expected_batch_size, beside any batch and in micro-batches; nothing else that changes depends on it.
    - canary: an observer of `observations` noisy releases with the record of the largest share, and of as many without it,
      guesses which is which; the lower bound on epsilon that follows is composed over the claim's steps and sampling.
    - noise: its scale, law and independence, over coordinates, tensors, steps, micro-batches, batch sizes, the empty batch.
    - sampler: records enter independently, with the claimed probability.

    An audit finds faults and proves nothing; a lower bound far below the claim does not mean more privacy. The bound on epsilon
    composes a mechanism of the measured mu as the accountant does, hence as if it were Gaussian (Nasr et al. 2302.07956).

    Args:
        step: a PrivateStep (of_ghost_step, of_loop, of_trainer), or a function (records, generator) -> private gradient.
        records: at least 2 records, one a row, in one tensor or several; half of them, at most 8, form the batch. Where the unit
            is an owner (`of_trainer(owned=True)`), the last tensor has each record's owner, and these numbers count owners.
        claim: the claim about the step.
        observations: number of steps with the canary, and of steps without; in all about 2.5 x observations + 150 steps.
        sampler: the sampler by which training chooses records; default: the step's own, if it has one.
        draws: number of batches drawn from the sampler.
        checks: the checks to run, of CHECKS; "canary" needs the replay, and runs it too.
        significance: largest probability of a false alarm in the whole audit (Bonferroni over all checks with a p-value).
        seed: seed of all random numbers; the same audit gives the same report.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.

    Raises:
        ValueError, TypeError: a bad argument; or the step does not repeat itself under a seed, so that nothing can be replayed.
    """
    step = step if isinstance(step, PrivateStep) else PrivateStep(_callable(step))
    _check(step, records, claim, observations, draws, checks, significance)
    _check_repeats(step, records, seed)
    sampler = sampler or step.sampler
    total = 2 * observations + 12 * _few(observations) + 150 + (draws if sampler else 0)
    with (
        Progress("audit", total, shown=progress) as bar,
        own_randomness(seed_for(seed, "global")),
    ):
        generator = Generator().manual_seed(seed_for(seed, "observations"))
        found, canary = [], None
        if "replay" in checks or "canary" in checks:
            neighbours = replay(step, records, claim, seed, bar.update)
            found += [sensitivity(neighbours, claim), coverage(step, neighbours)]
            canary = choose_canary(neighbours, records, step.owned)
        mus = None
        if "canary" in checks or "noise" in checks:
            noise, gaussian, counted = _observe(step, records, claim, canary, observations, generator, bar.update)
            if "canary" in checks:
                mus = gaussian, counted
                found += _canary(gaussian, counted, claim, canary, observations)
            if "noise" in checks:
                found += noise.findings()
                found += _other_batches(step, records, claim, noise.scale, _few(observations), generator, bar.update)
        if "sampler" in checks:
            if sampler is None:
                found.append(Finding("sampler", "", NO_SAMPLER))
            else:
                found += audit_sampler(sampler, claim.sample_rate, draws, generator, bar.update)
        bar.update(total - bar.done)
    return _report(claim, found, mus if canary else None, significance)


def _report(claim: Claim, found: list[Finding], mus, significance: float) -> AuditReport:
    each = share(found, significance)
    lower = [mu.lower(each) for mu in mus] if mus else []
    claimed, *bounds = claim.epsilons([claim.mu, *lower])
    # The accountant's error is up to half a percent: a mu below the claimed one must not get a larger epsilon.
    bounds = [min(b, claimed) if mu <= claim.mu else b for b, mu in zip(bounds, lower)]
    gaussian, counted = bounds or (None, None)
    return AuditReport(claim, judge(found, significance), claimed, gaussian, counted, 1 - each, significance)


# ---- observing


def _observe(step, records, claim, canary: Neighbours | None, observations, generator, tick):
    """Observe successive steps of one random stream, with and without the canary; return the noise and both estimates of mu."""
    outside = usual_batch(records, step.owned)
    inside = outside if canary is None else join(outside, canary.added)
    batches = {"out": outside, "in": inside}
    share = None if canary is None else canary.share
    direction = None if share is None else share / share.norm()
    projections, waiting, noise = {"out": [], "in": []}, {}, None
    for _ in range(observations):
        for name, batch in batches.items():
            released = step(batch, generator)
            release = released.flat()
            noise = noise or NoiseRecord(released, claim)
            if direction is not None:
                projections[name].append((release @ direction).item())
            if name in waiting:
                noise.add(name, waiting.pop(name), release)
            else:
                waiting[name] = release
            tick()
    if canary is None:
        return noise, None, None
    x, y = np.array(projections["in"]), np.array(projections["out"])
    return noise, GaussianMu(x, y), guess(x, y, canary.contribution / claim.expected_batch_size)


def _canary(gaussian, counted, claim: Claim, canary: Neighbours | None, observations: int) -> list[Finding]:
    if canary is None:
        nothing = f"No record has a finite share in the release that is more than its rounding: nothing to tell apart. {FINER}"
        return [Finding("canary", "", nothing)]
    share = canary.contribution / claim.max_grad_norm
    return findings(gaussian, counted, claim, f"{canary.record} of share {share:.3g} C", observations)


def _other_batches(step: PrivateStep, records: Records, claim, scale: Scale, few, generator, tick) -> Iterable[Finding]:
    usual = usual_batch(records, step.owned)
    n, one, nobody = count(usual), rows(usual, slice(0, 1)), rows(usual, slice(0, 0))
    batches = {"1 record": (one, 1), f"{count(records)} records": (records, 1)}
    batches[f"{n} large records"] = hostile(usual, "a record x 1e4"), 1
    batches[f"{n} faint records"] = hostile(usual, "a record x 1e-6"), 1
    if step.release_in_parts is not None:
        batches |= {f"{n} records in {parts} micro-batches": (usual, parts) for parts in (2, 4)}
    spreads = [
        _spread(step, name, batch, parts, claim, few, generator, tick) for name, (batch, parts) in batches.items()
    ]
    releases, error = _releases(step, nobody, 1, 2 * few, generator, tick)
    return at_other_batches(spreads, scale), at_empty_batch(releases, claim, error, scale)


def _spread(step, name, batch, parts, claim, few, generator, tick) -> Spread:
    releases, error = _releases(step, batch, parts, 2 * few, generator, tick)
    if error:
        return Spread(name, None, error)
    pairs = torch.stack(releases).view(few, 2, -1)
    d = (pairs[:, 0] - pairs[:, 1]) / (math.sqrt(2) * claim.noise_std)
    return Spread(name, Scale(d.square().sum().item(), d.numel()))


def _releases(step, batch, parts, times, generator, tick) -> tuple[list[Tensor], str]:
    releases = []
    for _ in range(times):
        try:
            releases.append(step(batch, generator, parts).flat())
        except Exception as error:  # whatever a user's step may raise on such records
            return [], f"{type(error).__name__}: {error}"[:200]
        tick()
    return releases, ""


def _few(observations: int) -> int:
    """Compute the number of pairs of steps on each of the other batches."""
    return min(100, max(10, observations // 40))


# ---- checks of the arguments


def _callable(step: Release) -> Release:
    if not callable(step):
        raise TypeError(f"step must be a PrivateStep or a function (records, generator) -> gradient, got {step!r}")
    return step


def _check(step, records, claim, observations, draws, checks, significance) -> None:
    check_records(records, step.owned)
    if not isinstance(claim, Claim):
        raise TypeError(f"claim must be a Claim, got {claim!r}")
    for name, value, least in (("observations", observations, 100), ("draws", draws, 100)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be an integer >= {least}, got {value!r}")
    if isinstance(checks, str) or not checks or not set(checks) <= set(CHECKS):
        raise UserError(f"checks must be some of {CHECKS}, got {checks!r}")
    if not 0 < significance < 0.5:
        raise UserError(f"significance must be in (0, 0.5), got {significance!r}")


def _check_repeats(step: PrivateStep, records: Records, seed: int) -> None:
    """Refuse a step that fails on an ordinary batch, or that does not repeat itself under a seed."""
    again = partial(step.replay, usual_batch(records, step.owned), seed_for(seed, "repeats"))
    first, second = again().flat(), again().flat()
    if not first.isfinite().all():
        raise UserError("the step releases NaN or Inf on ordinary records: there is nothing to audit")
    if not torch.equal(first, second):
        raise UserError(
            "the step gives two different gradients under the same seed: take all its randomness from the generator that it "
            "is called with, or from torch's global one, and leave the model as it was"
        )
