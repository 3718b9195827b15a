"""Privacy accounting without a model: epsilon for given noise, noise for a given epsilon, or several runs together."""

from collections.abc import Sequence
from pathlib import Path

from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.calibrate import calibrate_noise
from fastloda.accounting.compose import compose_epsilon
from fastloda.errors import UserError
from fastloda.privacy.noise import describe_together
from fastloda.synthesis.arguments import NO_NAMES, Names
from fastloda.synthesis.budget import (
    ADJACENCY,
    CYCLIC,
    MECHANISM,
    OWNER_ADJACENCY,
    SAMPLER,
    STATEMENT,
    unrecorded_release,
)
from fastloda.synthesis.runs import read_json


def account(
    delta: float,
    *,
    sample_rate: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    target_epsilon: float | None = None,
    composition: Names = NO_NAMES,
) -> dict:
    """Compute epsilon for given noise, the noise for a given epsilon, or the epsilon of several runs together.

    Epsilon is an upper bound for Poisson-sampled DP-SGD and add/remove adjacency (`fastloda.accounting.accountant`); the bound
    by Renyi DP is shown too.

    Args:
        delta: probability with which the bound may fail.
        sample_rate: probability that a record enters a step's batch: batch size / number of records.
        noise_multiplier: standard deviation of the noise divided by the clipping bound.
        steps: number of optimizer steps.
        target_epsilon: epsilon for which to compute the noise; give it instead of noise_multiplier.
        composition: several runs on the same records, in place of all these options: their folders or privacy.json files,
            separated by commas. What `choose` released before a run is counted with the run, and once if several runs have it.
    """
    one = {"sample_rate": sample_rate, "steps": steps}
    if composition:
        if any(value is not None for value in (*one.values(), noise_multiplier, target_epsilon)):
            raise UserError("--composition takes everything but --delta from the runs: give nothing else")
        return _compose([read_statement(Path(path)) for path in composition], delta)
    if missing := [f"--{name}" for name, value in one.items() if value is None]:
        raise UserError(f"{' and '.join(missing)} missing; or give --composition")
    if (noise_multiplier is None) == (target_epsilon is None):
        raise UserError("give either --noise_multiplier, to get epsilon, or --target_epsilon, to get the noise")
    if noise_multiplier is None:
        noise_multiplier = calibrate_noise(target_epsilon, delta, sample_rate, steps)
    accountant = PrivacyAccountant(sample_rate, noise_multiplier)
    epsilons = {"epsilon": accountant.epsilon(delta, steps), "epsilon_rdp": accountant.epsilon_rdp(delta, steps)}
    return epsilons | {"delta": delta, "noise_multiplier": noise_multiplier, **one}


def read_statement(path: Path) -> dict:
    """Read privacy.json from `path`: the file itself, a run's folder, or that folder's private/.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no privacy statement of FastLoDA.
    """
    found = [p for p in (path, path / STATEMENT, path / "private" / STATEMENT) if p.is_file()]
    if not found:
        raise FileNotFoundError(f"no {STATEMENT} at {path}: fine-tuning writes it when it has finished")
    statement = read_json(found[0])
    samplers = SAMPLER, CYCLIC.format(statement.get("bands"))
    if statement.get("adjacency") not in (ADJACENCY, OWNER_ADJACENCY) or statement.get("sampler") not in samplers:
        raise UserError(f"{found[0]} is no privacy statement of FastLoDA")
    return statement


def releases(statement: dict) -> list[tuple]:
    """List all releases that a statement's epsilon covers, as `compose_epsilon` takes them."""
    own = tuple(statement[name] for name in MECHANISM)
    return [*map(tuple, statement.get("earlier", ())), own]


def known_releases(statement: dict) -> list[dict]:
    """List all releases that a statement covers, each with how its noise was drawn, as far as this is known."""
    if "releases" in statement:
        return statement["releases"]
    *earlier, own = map(unrecorded_release, releases(statement))
    return [*earlier, own | {name: statement[name] for name in ("seed_was_fixed", "randomness") if name in statement}]


def united(statements: Sequence[dict]) -> list[dict]:
    """List the releases of all statements, each once, though several may count it."""
    found = {release.get("id") or object(): release for each in statements for release in known_releases(each)}
    return list(found.values())


def counts(statement: dict, other: dict) -> bool:
    """Tell whether a statement counts all releases of another."""
    return _identified(other) <= _identified(statement)


def _identified(statement: dict) -> set[tuple]:
    """Collect the releases of a statement, as (id, sample_rate, noise_multiplier, steps)."""
    return {
        (one.get("id"), *numbers) for one, numbers in zip(known_releases(statement), releases(statement), strict=True)
    }


def _compose(statements: list[dict], delta: float) -> dict:
    if len(units := sorted({statement["adjacency"] for statement in statements})) > 1:
        raise UserError(f"the statements have other units of privacy, {' and '.join(units)}: they do not compose")
    known = united(statements)
    return {
        "epsilon": compose_epsilon([tuple(release[name] for name in MECHANISM) for release in known], delta),
        "delta": delta,
        "each": [s["epsilon"] for s in statements],
        "randomness": describe_together(release["randomness"] for release in known),
    }
