"""Checks of Poisson sampling: every record must enter every step independently, with the claimed probability.

The accountant's amplification holds for no other sampler (Chua et al. 2403.17673, Lebeda et al. 2405.20769). Each statistic
has a known distribution under independent coin flips.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import binom, binomtest, norm, pearson3
from torch import Generator

from fastloda.audit.report import Finding
from fastloda.audit.step import Sampler
from fastloda.errors import UserError

MOST_PAIRED = 500  # largest number of records whose pairs are counted

MEANING = {
    "rate": "Records enter more or less often than the accountant was told",
    "each record": "Some records enter more often than others, or each just once an epoch (shuffled batches)",
    "batch sizes": "Batches are of a fixed size, or records enter together: no Poisson sampling, no amplification as claimed",
    "pairs": "Some records enter together, or never together",
    "successive steps": "A record's next turn depends on its last (shuffled batches, or a batch used again)",
}


def audit_sampler(
    sampler: Sampler, rate: float, draws: int, generator: Generator, tick: Callable[[], None]
) -> list[Finding]:
    """Test `draws` successive batches of the sampler, each property by a two-sided binomial or normal test."""
    inclusion, twice = _inclusions(sampler, draws, generator, tick)
    once = Finding(
        "sampler: each record once",
        f"{twice} of {draws} batches hold a record twice",
        "Sampling with replacement: a record in a batch twice may contribute 2 C",
        holds=not twice,
    )
    if rate == 1:
        whole = Finding("sampler", f"{inclusion.mean():.2%} of the records enter", MEANING["rate"], holds=True)
        return [once, whole]  # fewer records than claimed cost nothing: no step can hold more
    v, n = rate * (1 - rate), sampler.population
    tests = {
        "rate": _rate(inclusion, rate),
        "each record": _both(_dispersion(inclusion.sum(0), draws, rate), _most(inclusion.sum(0), draws, rate)),
        "batch sizes": _dispersion(inclusion.sum(1), n, rate),
        "pairs": _pairs(inclusion, rate),
        "successive steps": _successive(inclusion, rate, v),
    }
    return [once, *(Finding(f"sampler: {name}", text, MEANING[name], p) for name, (text, p) in tests.items() if text)]


def _inclusions(sampler: Sampler, draws: int, generator: Generator, tick: Callable) -> tuple[np.ndarray, int]:
    """Draw batches; return inclusion, bool [draws, population], and the number of draws that held a record twice."""
    inclusion, twice = np.zeros((draws, sampler.population), dtype=bool), 0
    for step in inclusion:
        indices = np.asarray(sampler.draw(generator)).reshape(-1)
        if indices.size and not (0 <= indices.min() and indices.max() < sampler.population):
            raise UserError(
                f"the sampler gave an index outside 0 .. {sampler.population - 1}: {indices.min()} .. {indices.max()}"
            )
        step[indices.astype(int)] = True
        twice += step.sum() < indices.size
        tick()
    return inclusion, int(twice)


def _rate(inclusion: np.ndarray, rate: float) -> tuple[str, float]:
    p = binomtest(int(inclusion.sum()), inclusion.size, rate).pvalue
    return f"{inclusion.mean():.5g}, claimed {rate:.5g}", float(p)


def _dispersion(counts: np.ndarray, trials: int, rate: float) -> tuple[str, float]:
    """Test the mean squared deviation of binomial counts by a law with its three moments, since small counts are skewed."""
    k = np.arange(trials + 1)
    weights, variance = binom.pmf(k, trials, rate), trials * rate * (1 - rate)
    square = (k - trials * rate) ** 2 / variance - 1
    std, third = math.sqrt(weights @ square**2), weights @ square**3
    ratio, size = float(((counts - trials * rate) ** 2).mean() / variance), math.sqrt(len(counts))
    law = pearson3(third / std**3 / size, scale=std / size)
    return f"variance {ratio:.3g} times a binomial's", 2 * float(min(law.cdf(ratio - 1), law.sf(ratio - 1)))


def _most(counts: np.ndarray, draws: int, rate: float) -> tuple[str, float]:
    most, least = int(counts.max()), int(counts.min())
    p = 2 * len(counts) * min(binom.sf(most - 1, draws, rate), binom.cdf(least, draws, rate))
    return f"each entered {least} to {most} of {draws} steps", min(1.0, float(p))


def _both(one: tuple[str, float], other: tuple[str, float]) -> tuple[str, float]:
    return f"{one[0]}; {other[0]}", min(1.0, 2 * min(one[1], other[1]))


def _pairs(inclusion: np.ndarray, rate: float) -> tuple[str, float]:
    """Test how often the most and the least frequent pair of records were in one batch."""
    x = inclusion[:, :MOST_PAIRED].astype(np.float32)
    if x.shape[1] < 2:
        return "", 1.0
    together = (x.T @ x)[np.triu_indices(x.shape[1], 1)]
    most, least = int(together.max()), int(together.min())
    p = 2 * len(together) * min(binom.sf(most - 1, len(x), rate**2), binom.cdf(least, len(x), rate**2))
    return f"two records met {least} to {most} times, {len(x) * rate**2:.3g} expected", min(1.0, float(p))


def _successive(inclusion: np.ndarray, rate: float, v: float) -> tuple[str, float]:
    """Test how many records of a step are in the next step too.

    The centred terms are uncorrelated with variance v^2 (v = rate (1 - rate)). Their sum is normal if the expected count is
    large; if it is small, the count is binomial. Outside its own range each p-value can only be too small, so the larger one is
    used.
    """
    centred, again = inclusion - rate, int((inclusion[1:] & inclusion[:-1]).sum())
    trials = centred[1:].size
    normal = float((centred[1:] * centred[:-1]).sum()) / v / math.sqrt(trials)
    counted = 2 * min(binom.sf(again - 1, trials, rate**2), binom.cdf(again, trials, rate**2))
    p = max(float(2 * norm.sf(abs(normal))), min(1.0, float(counted)))
    return f"{again / trials / rate:.3g} of a batch is in the next one, {rate:.3g} expected", p
