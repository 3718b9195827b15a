"""The accountant of a training run: how much privacy its steps have spent."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from fastloda.accounting.compose import least_epsilon, warn_of_loose_bound
from fastloda.accounting.ledger import Counts, Ledger, new_id
from fastloda.accounting.mechanism import Mechanism, check_delta, check_noise, check_rate, check_steps, merged
from fastloda.accounting.rdp import rdp_epsilon
from fastloda.errors import UserError

METHODS = ("prv", "rdp")
VERSION = 1  # the version of the state in checkpoints
STEPS = "steps"  # the only key that a PrivacyAccountant's ledger counts
REQUIRED = {"version", "sample_rate", "noise_multiplier", "steps", "method"}  # the keys that every saved state has
CURVE_POINTS = 64


class PrivacyAccountant:
    """The accountant that counts a run's private steps and bounds the epsilon they have cost.

    Every epsilon returned is an upper bound for add/remove adjacency. With "prv" it is at most 0.5% loose for
    epsilon >= 1 where a tight bound can be computed; where it can't, the RDP bound is returned and one
    `PrivacyAccountingWarning` per accountant says why.

    Args:
        sample_rate: the probability in (0, 1] with which each record enters a batch, independently (Poisson sampling).
        noise_multiplier: the noise's standard deviation on the sum of clipped gradients, in units of `max_grad_norm`. 0 is
            allowed and costs an infinite epsilon.
        method: "prv" (tight) or "rdp".
        earlier: releases about the same records, as `compose_epsilon` takes them: every epsilon covers them too.
        bands: number of consecutive steps that count as one, because a record may enter one of them only, with probability
            `sample_rate`, and their noise is correlated accordingly (`privacy/correlated.py`).
    """

    def __init__(
        self,
        sample_rate: float,
        noise_multiplier: float,
        method: str = "prv",
        earlier: Sequence[Sequence] = (),
        bands: int = 1,
    ):
        self.sample_rate = check_rate(sample_rate)
        self.noise_multiplier = check_noise(noise_multiplier)
        self.method = _check_method(method)
        self.earlier, self.bands = merged(earlier), check_steps(bands, "bands", least=1)
        self._ledger: Ledger[str] = Ledger()
        self._warned = False

    @property
    def steps(self) -> int:
        """The number of steps taken so far."""
        return self._ledger.total.get(STEPS, 0)

    def step(self, count: int = 1) -> None:
        """Count `count` more steps.

        Raises:
            TypeError, ValueError: count is no integer >= 1, or there would be more than 10^12 steps.
        """
        check_steps(self.steps + check_steps(count, "count", least=1))
        self._ledger.count(STEPS, int(count))

    def epsilon(self, delta: float, steps: int | None = None) -> float:
        """Compute an upper bound on epsilon after `steps` steps (default: those taken).

        Each new number of steps takes 0.05 to 5 s.
        """
        delta, spent = check_delta(delta), self._spent(steps)
        if self.method == "rdp":
            return rdp_epsilon(spent, delta)
        epsilon, trouble = least_epsilon(spent, delta)
        self._warn(trouble)
        return epsilon

    def epsilon_rdp(self, delta: float, steps: int | None = None) -> float:
        """Compute the RDP bound on epsilon (exact Gaussian at `sample_rate` 1): instant, typically 5 to 15% looser."""
        return rdp_epsilon(self._spent(steps), check_delta(delta))

    def epsilon_curve(self, delta: float, step_counts: Iterable[int]) -> list[float]:
        """Compute upper bounds on epsilon at `step_counts`, in their order, for plots and progress bars.

        They never decrease with the count, and the one at the largest count agrees with `epsilon`. Of more than 64 distinct
        counts, 64 are computed (denser where epsilon rises fast), and each of the others gets the value of the next larger one.
        This takes some seconds: call it once, for the whole range.
        """
        delta, counts = check_delta(delta), [check_steps(count) for count in step_counts]
        distinct = sorted({count for count in counts if count > 0})
        start = self.epsilon(delta, 0)
        if not distinct:
            return [start] * len(counts)
        final = self.epsilon(delta, distinct[-1])
        knots = [distinct[i] for i in _spread(len(distinct))]
        runs = [self._spent(count) for count in knots[:-1]]
        if self.method == "rdp":
            bounds = [rdp_epsilon(run, delta) for run in runs]
        else:
            bounds = [least_epsilon(run, delta, compare=False)[0] for run in runs]
        bounds = list(accumulate([*(min(bound, final) for bound in bounds), final], max))
        return [bounds[bisect_left(knots, count)] if count else start for count in counts]

    def state_dict(self) -> dict[str, int | float | str | dict | list]:
        """Make the state that belongs in a checkpoint, of plain JSON types.

        `steps` counts all steps taken; `loaded` says, by the accountants' ids, how many of them other accountants have counted.
        """
        own = self._ledger.id
        return {
            "version": VERSION,
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "method": self.method,
            "earlier": [list(mechanism) for mechanism in self.earlier],
            "bands": self.bands,
            "id": own,
            "loaded": {id: counts[STEPS] for id, counts in self._ledger.entries.items() if id != own},
        }

    def load_state_dict(self, state: dict) -> None:
        """Add a saved state's steps to those taken, so that none is forgotten and none is counted twice.

        Steps are identified by the accountant that counted them. So those of a state loaded twice, of an earlier state of this
        accountant, or that two accountants have in common count once. A state without an `id` is added whole. Its `method` may
        differ: this accountant keeps its own.

        Raises:
            ValueError: the state is malformed or of another mechanism, or steps count by rounds (`bands`) and those of two runs
                would meet, whose rounds are not each other's; nothing has changed then.
        """
        if not isinstance(state, dict) or not REQUIRED <= set(state) <= set(self.state_dict()):
            keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise UserError(f"a privacy record holds {sorted(self.state_dict())}, got {keys}")
        if type(state["version"]) is not int or state["version"] != VERSION:
            raise UserError(f"privacy record of version {state['version']!r}, this is version {VERSION}")
        try:
            rate, noise = check_rate(state["sample_rate"]), check_noise(state["noise_multiplier"])
            _check_method(state["method"])
            earlier, entries = merged(state.get("earlier", ())), _entries(state)
            bands = check_steps(state.get("bands", 1), "bands", least=1)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"malformed privacy record: {error}") from error
        if (rate, noise, earlier, bands) != (self.sample_rate, self.noise_multiplier, self.earlier, self.bands):
            raise UserError(
                f"the record is of sample_rate={rate}, noise_multiplier={noise}, earlier={[*earlier]}, bands={bands}; this run "
                f"has sample_rate={self.sample_rate}, noise_multiplier={self.noise_multiplier}, earlier={[*self.earlier]}, "
                f"bands={self.bands}"
            )
        self._check_one_run(entries)
        self._ledger.merge(entries)

    def _check_one_run(self, entries: Mapping[str, Counts]) -> None:
        """Refuse to add up the steps of two runs where `bands` of one run's steps count as one."""
        other, together = Ledger[str](), Ledger[str]()
        for ledger, counts in ((other, entries), (together, entries), (together, self._ledger.entries)):
            ledger.merge(counts)
        theirs, both = (ledger.total.get(STEPS, 0) for ledger in (other, together))
        if self.bands > 1 and both > max(self.steps, theirs):
            raise UserError(
                f"with bands={self.bands} an account holds one run, and these are two: give what the other spent as `earlier`"
            )

    def __repr__(self) -> str:
        return (
            f"PrivacyAccountant(sample_rate={self.sample_rate}, noise_multiplier={self.noise_multiplier}, "
            f"method={self.method!r}, steps={self.steps})"
        )

    def _spent(self, steps: int | None) -> tuple[Mechanism, ...]:
        steps = self.steps if steps is None else check_steps(steps)
        return merged([*self.earlier, self.mechanism(steps)])

    def mechanism(self, steps: int) -> Mechanism:
        """Describe `steps` steps as one mechanism, in which `bands` of them are one step with independent noise."""
        return Mechanism(self.sample_rate, self.noise_multiplier, -(-steps // self.bands))

    def _warn(self, trouble: str | None) -> None:
        if trouble and not self._warned:
            self._warned = True
            warn_of_loose_bound(trouble, stacklevel=4)


def _entries(state: dict) -> dict[str, dict[str, int]]:
    """Read from a saved state how many of its steps each accountant has counted, by the accountants' ids."""
    own, loaded = _check_id(state.get("id", new_id())), state.get("loaded", {})
    counts = {_check_id(id): check_steps(steps) for id, steps in loaded.items() if id != own}
    counts[own] = check_steps(check_steps(state["steps"]) - sum(counts.values()), "steps beyond those of `loaded`")
    return {id: {STEPS: steps} for id, steps in counts.items()}


def _spread(count: int) -> list[int]:
    """Choose at most CURVE_POINTS indices into `count` sorted items, quadratically spaced, the last one included."""
    if count <= CURVE_POINTS:
        return list(range(count))
    return sorted({round((i / (CURVE_POINTS - 1)) ** 2 * (count - 1)) for i in range(CURVE_POINTS)})


def _check_id(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"id must be a string, got {value!r}")
    return value


def _check_method(value: str) -> str:
    if value not in METHODS:
        raise UserError(f"method must be one of {METHODS}, got {value!r}")
    return value
