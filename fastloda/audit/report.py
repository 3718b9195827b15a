"""The result of an audit: checks judged together, shown as lines of text or as plain JSON types."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fastloda.audit.claim import Claim
from fastloda.errors import PrivacyError

Verdict = Literal["holds", "violated", "not run"]


@dataclass(frozen=True)
class Finding:
    """The result of one check before it is judged.

    Attributes:
        name: name of the check.
        statistic: the measured value, in words and numbers.
        p_value: probability of a result this bad if the claim holds; None if the check involves no chance.
        holds: verdict of a check without p_value; None if it was not run.
        meaning: explanation of a violation; for a check that was not run, the reason.
    """

    name: str
    statistic: str
    meaning: str
    p_value: float | None = None
    holds: bool | None = None


@dataclass(frozen=True)
class Check(Finding):
    """A judged finding."""

    verdict: Verdict = "not run"


@dataclass(frozen=True)
class AuditReport:
    """The checks of one audit; `print` shows one line for each.

    Attributes:
        claim: the claim that was audited.
        checks: the checks in the order in which they ran.
        epsilon_claimed: the epsilon that the accountant computes from the claim.
        epsilon_lower: lower bound on the epsilon of the whole training, from the canary: the larger of the next two.
        epsilon_lower_gaussian: lower bound if the noise is Gaussian (which other checks test).
        epsilon_lower_counts: lower bound by Clopper-Pearson, from counts of wrong guesses only.
        confidence: confidence of each of the two bounds.
        significance: largest probability of a false alarm: that any check finds a violation in a step that keeps its claim.
    """

    claim: Claim
    checks: tuple[Check, ...]
    epsilon_claimed: float
    epsilon_lower_gaussian: float | None
    epsilon_lower_counts: float | None
    confidence: float
    significance: float

    @property
    def epsilon_lower(self) -> float | None:
        bounds = [b for b in (self.epsilon_lower_gaussian, self.epsilon_lower_counts) if b is not None]
        return max(bounds) if bounds else None

    @property
    def violations(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == "violated")

    @property
    def passed(self) -> bool:
        """Whether no check that ran found a violation."""
        return not self.violations

    def raise_if_violated(self) -> "AuditReport":
        """Raise PrivacyError, naming the violations, or return the report."""
        if self.violations:
            found = "; ".join(f"{check.name}: {check.statistic}" for check in self.violations)
            raise PrivacyError(f"the step breaks its claim: {found}")
        return self

    def to_dict(self) -> dict:
        """Convert the report to plain JSON types; an infinite epsilon becomes the string "inf"."""
        content = asdict(self) | {"epsilon_lower": self.epsilon_lower, "passed": self.passed}
        content["checks"] = [asdict(check) for check in self.checks]
        return {name: "inf" if value == math.inf else value for name, value in content.items()}

    def summary(self) -> str:
        """Summarise the report in one line."""
        idle = [check.name for check in self.checks if check.verdict == "not run"]
        verdict = f"no violation found; not run: {', '.join(idle)}" if idle else "the claim holds"
        if not self.passed:
            verdict = f"{len(self.violations)} of {len(self.checks)} checks VIOLATED"
        bound = "" if self.epsilon_lower is None else f", lower bound {self.epsilon_lower:.2f} at {self.confidence:.3%}"
        return f"Claimed epsilon {self.epsilon_claimed:.2f} at delta {self.claim.delta:g}{bound}: {verdict}"

    def __str__(self) -> str:
        chance = f"probability {self.significance:g} at most"
        caption = f"A step that keeps its claim is called a violation with {chance}, by all checks."
        return "\n".join([self.summary(), "", *map(_line, self.checks), "", caption])


def _line(check: Check) -> str:
    p = "" if check.p_value is None else f"  (p {'< 1e-99' if check.p_value < 1e-99 else f'{check.p_value:.2g}'})"
    verdict = check.verdict.upper() if check.verdict == "violated" else check.verdict
    line = f"{verdict:<9} {check.name}: {check.statistic}{p}"
    return line if check.verdict == "holds" or not check.meaning else f"{line}\n{'':<9} {check.meaning}"


def judge(findings: Sequence[Finding], significance: float) -> tuple[Check, ...]:
    """Judge the findings by Bonferroni's rule: of K findings with a p-value, each is compared with significance / K."""
    limit = share(findings, significance)
    return tuple(Check(**asdict(finding), verdict=_verdict(finding, limit)) for finding in findings)


def share(findings: Sequence[Finding], significance: float) -> float:
    return significance / max(1, sum(finding.p_value is not None for finding in findings))


def _verdict(finding: Finding, limit: float) -> Verdict:
    holds = finding.holds if finding.p_value is None else finding.p_value >= limit
    return "not run" if holds is None else "holds" if holds else "violated"
