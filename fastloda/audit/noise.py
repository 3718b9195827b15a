"""Checks of the noise alone: two steps on the same records differ by noise only, so each pair gives d values of it.

D = (release - release') / (sqrt(2) noise_std) is N(0, I) under the claim, and independent of other pairs.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi2, f, kurtosistest, norm
from scipy.stats import t as student
from torch import Tensor

from fastloda.audit.claim import Claim
from fastloda.audit.report import Finding
from fastloda.audit.step import Released

WATCHED = 64  # coordinates whose values are kept for each pair, for statistics that running sums do not give
LAGS = 4
LAGGED = [(lag, parity) for lag in range(LAGS) for parity in (0, 1)]


@dataclass(frozen=True)
class Scale:
    """A sum of squares of values that are N(0, 1) under the claim."""

    squares: float
    values: int

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.values)

    @property
    def p_too_small(self) -> float:
        """The p-value of the claim by a chi-square test against too little noise; more noise than claimed is no violation."""
        return float(chi2.cdf(self.squares, self.values))


class NoiseRecord:
    """The running statistics of D over the pairs of one audit."""

    def __init__(self, first: Released, claim: Claim):
        self.claim = claim
        self.names = {name: g.numel() for name, g in first.gradient.items() if g.numel()}
        self.size, self.pairs = sum(self.names.values()), 0
        self._squares = torch.zeros(self.size, dtype=torch.float64)
        self._watched = _watch(list(self.names.values()))
        self._samples, self._lengths, self._largest = [], [], 0.0
        self._before: deque[Tensor] = deque(maxlen=LAGS)
        self._lagged = np.zeros((LAGS, 2))  # by parity: where two batches alternate, correlations may alternate too
        self._seen: set[tuple[str, bytes]] = set()

    def add(self, batch: str, one: Tensor, other: Tensor) -> None:
        """Add the releases [d] of two steps on the same records, which are called `batch`."""
        self._seen |= {(batch, release[self._watched].numpy().tobytes()) for release in (one, other)}
        d = (one - other) / (math.sqrt(2) * self.claim.noise_std)
        self.pairs += 1
        self._squares += d.square()
        self._samples.append(d[self._watched].numpy())
        self._lengths.append(d.square().sum().item())
        self._largest = max(self._largest, d.abs().max().item())
        for lag, earlier in enumerate(self._before):
            self._lagged[lag, self.pairs % 2] += (d @ earlier).item()
        self._before.appendleft(d)

    @property
    def scale(self) -> Scale:
        return Scale(self._squares.sum().item(), self.size * self.pairs)

    def findings(self) -> list[Finding]:
        if not 0 < self.scale.squares < math.inf:
            nothing = "There is no noise: nothing to test" if not self.scale.squares else "The noise is not finite"
            return [self._total(), *(Finding(name, "", nothing) for name in ("noise in each tensor", *SHAPE))]
        return [self._total(), self._each_tensor(), self._tails(), self._dispersion(), self._alike(), self._steps()]

    def _total(self) -> Finding:
        scale = self.scale
        seen = norm.isf(1e-4) / math.sqrt(2 * scale.values)
        more = " (more than claimed: it costs accuracy only)" if scale.std > 1 + seen else ""
        return Finding(
            "noise scale",
            f"{scale.std:.5g} of the claimed std{more}; {scale.values:,} values show a lack of {seen:.2%}",
            "Less noise than was accounted for, or the divisor is not the expected batch size",
            _smallness(scale),
        )

    def _each_tensor(self) -> Finding:
        """Test the scale of the noise in the tensor and in the single coordinate that have the least."""
        parts = list(zip(self.names, self._squares.split(list(self.names.values()))))
        tensors = {name: Scale(part.sum().item(), part.numel() * self.pairs) for name, part in parts}
        single = {name: Scale(part.min().item(), self.pairs) for name, part in parts}
        p = {("", name): s.p_too_small for name, s in tensors.items()}
        p |= {("a coordinate of ", name): s.p_too_small for name, s in single.items()}
        of, name = min(p, key=p.__getitem__)
        std = (single if of else tensors)[name].std
        return Finding(
            "noise in each tensor",
            f"least in {of}{name}: {std:.4g} of the claimed std",
            "Part of the gradient is released with less noise, or with none",
            min(1.0, (len(parts) + self.size) * p[of, name]),
        )

    def _tails(self) -> Finding:
        """Test the kurtosis of the watched values and the largest of all values."""
        values = np.concatenate(self._samples)
        largest = self._largest / self.scale.std
        below = math.exp(self.scale.values * math.log1p(-2 * norm.sf(largest)))  # P(largest value <= largest)
        kurtosis = kurtosistest(values) if len(values) > 20 and values.std() > 0 else None
        p = [2 * min(below, 1 - below), 1.0 if kurtosis is None else kurtosis.pvalue]
        excess = float((values**4).mean() / (values**2).mean() ** 2 - 3) if values.any() else math.nan
        return Finding(
            SHAPE[0],
            f"excess kurtosis {excess:.3g}; largest of {self.scale.values:,} values {largest:.2f} std",
            "The noise is not Gaussian (truncated, coarse, of another law, or missing in some steps): the accountant's epsilon "
            "does not hold for it",
            min(1.0, 2 * min(p)),
        )

    def _dispersion(self) -> Finding:
        """Test that |D|^2 varies like chi-square with d degrees of freedom; it varies more if coordinates repeat each other."""
        lengths = np.array(self._lengths) / self.scale.std**2
        z = np.where(
            lengths > self.size, -norm.ppf(chi2.sf(lengths, self.size)), norm.ppf(chi2.cdf(lengths, self.size))
        )
        z = np.clip(z, -37, 37)
        freedom = len(z) - 1
        spread = float(((z - z.mean()) ** 2).sum())
        return Finding(
            SHAPE[1],
            f"noise lengths vary {math.sqrt(spread / freedom):.3g} times as they should",
            "Coordinates share noise, or its size depends on the step: an observer can subtract or foresee it",
            min(1.0, 2 * float(min(chi2.cdf(spread, freedom), chi2.sf(spread, freedom)))),
        )

    def _alike(self) -> Finding:
        """Test the two most correlated of the watched coordinates."""
        x = np.stack(self._samples)
        x = x[:, x.std(0) > 0]
        k = x.shape[1]
        if k < 2 or len(x) < 10:
            return Finding(SHAPE[2], "", "There are fewer than two coordinates with noise, or too few steps")
        r = np.abs(np.corrcoef(x.T)[np.triu_indices(k, 1)]).max()
        freedom = len(x) - 2
        t = r * math.sqrt(freedom / max(1 - r * r, 1e-300))
        return Finding(
            SHAPE[2],
            f"largest correlation of {k} coordinates {r:.3g}",
            "The same noise is added to several coordinates, tensors or ranks: their difference is released without any",
            min(1.0, k * (k - 1) * float(student.sf(t, freedom))),
        )

    def _steps(self) -> Finding:
        """Test the correlation of successive steps' noise, and whether the same noise came twice, however far apart."""
        terms = {(lag, parity): sum(i % 2 == parity for i in range(lag + 2, self.pairs + 1)) for lag, parity in LAGGED}
        z = [self._lagged[k] / self.scale.std**2 / math.sqrt(self.size * n) for k, n in terms.items() if n]
        worst = max(z, key=abs, default=0.0)
        repeated = 2 * self.pairs - len(self._seen) if len(self._watched) > 3 else 0
        p = 0.0 if repeated else min(1.0, max(1, len(z)) * 2 * float(norm.sf(abs(worst))))
        twice = f"; {repeated} of {2 * self.pairs} steps repeat an earlier one's" if repeated else ""
        return Finding(
            SHAPE[3],
            f"largest correlation {worst:.2g} standard errors{twice}",
            "Noise is used again: the difference of two steps is released without it",
            p,
        )


SHAPE = ("noise tails", "noise lengths", "noise between coordinates", "noise between steps")


def _smallness(scale: Scale) -> float:
    """Compute the p-value against too little noise; 0 where the noise is not finite."""
    return scale.p_too_small if math.isfinite(scale.squares) else 0.0


def _watch(sizes: list[int]) -> Tensor:
    """Choose coordinates to watch: the first two of each tensor, which show equal noise in two tensors, and random ones."""
    starts = np.cumsum([0, *sizes[:-1]])
    firsts = [start + i for start, size in zip(starts, sizes) for i in range(min(2, size))][: WATCHED // 2]
    others = np.setdiff1d(np.random.default_rng(0).permutation(sum(sizes))[:WATCHED], firsts)
    return torch.tensor([*firsts, *others[: WATCHED - len(firsts)]])


# ---- noise at other batches


@dataclass(frozen=True)
class Spread:
    """The noise of a few steps on one batch; `scale` is None where the step failed with `error`."""

    batch: str
    scale: Scale | None
    error: str = ""

    def p_value(self, usual: Scale) -> float:
        """Compute the p-value of the claim that the noise is as large as at the usual batch, by a two-sided F test."""
        if self.scale is None or not (math.isfinite(self.scale.squares) and math.isfinite(usual.squares)):
            return 0.0
        if not usual.squares:
            return self.scale.p_too_small
        ratio, freedom = (self.scale.std / usual.std) ** 2, (self.scale.values, usual.values)
        return 2 * float(min(f.cdf(ratio, *freedom), f.sf(ratio, *freedom), 0.5))

    def __str__(self) -> str:
        return (
            f"{self.batch}: {self.error}"
            if self.scale is None
            else f"{self.batch}: {self.scale.std:.4g} of the claimed std"
        )


def at_other_batches(spreads: list[Spread], usual: Scale) -> Finding:
    worst = min(spreads, key=lambda s: s.p_value(usual))
    return Finding(
        "noise at other batches",
        f"farthest from {usual.std:.4g} at {worst}; {len(spreads)} batches",
        "The noise depends on the records: on their count, on how they are split, or on their size",
        min(1.0, len(spreads) * worst.p_value(usual)),
    )


def at_empty_batch(releases: list[Tensor], claim: Claim, error: str, usual: Scale) -> Finding:
    """Test that steps on the empty batch release the usual noise around zero, and nothing else."""
    meaning = "A Poisson batch may be empty: that step must be noised, taken and counted like any other"
    if error:
        return Finding("empty batch", error, meaning, holds=False)
    z = torch.stack(releases) / claim.noise_std
    scale, mean = Scale(z.square().sum().item(), z.numel()), z.mean(0)
    at_zero = len(z) * mean.square().sum().item() / (usual.std**2 or 1.0)
    p_mean = float(chi2.sf(at_zero, z.shape[1])) if math.isfinite(at_zero) else 0.0
    p = min(1.0, 2 * min(Spread("none", scale).p_value(usual), p_mean))
    return Finding("empty batch", f"{scale.std:.4g} of the claimed std, mean {mean.mean():.2g}", meaning, p)
