"""A privacy budget: a promise (epsilon, delta), settings of a private run that keep it, and the statement of what was spent."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from torch import nn

from fastloda.accounting.compose import compose_epsilon
from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.clip import ClippingName, clipping_style
from fastloda.privacy.noise import UNRECORDED, describe_randomness, describe_together
from fastloda.privacy.styles import Automatic, PerLayer
from fastloda.synthesis.report.plots import epsilon_plot
from fastloda.synthesis.runs import CONFIG, DONE, SOURCE, digest, write_json
from fastloda.training.average import copy_into
from fastloda.training.batches import Columns
from fastloda.training.owners import OwnerIds
from fastloda.training.releases import intent_path
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer, Losses

logger = logging.getLogger("fastloda")

MECHANISM = ("sample_rate", "noise_multiplier", "steps")
STATEMENT, EPSILON_CURVE, CHECKPOINT = "privacy.json", "epsilon.png", "checkpoint.pt"
ADJACENCY, SAMPLER = "add/remove one record", "Poisson"
CYCLIC = (
    "Poisson, of the records of one of {0} random groups in turn; noise correlated over {0} steps (banded square root), which "
    "count as one"
)
OWNER_ADJACENCY = "add/remove one owner with all records"
CURVE_POINTS = 40

README = f"""\
May be released, on the terms in {STATEMENT}: the .safetensors file, {STATEMENT}, {EPSILON_CURVE}.
Must stay private: {CHECKPOINT}, from which training continues; it holds the secret from which the noise follows.
Must stay private: {SOURCE}, which says where the private images are; {CONFIG}, if a seed was given, from which the noise follows.
Must stay beside it while training may continue: {intent_path(Path(CHECKPOINT))}, which lists what was released.
Better kept: {DONE}; the time that training took depends, a little, on the records.
"""


@dataclass(frozen=True)
class Privacy:
    """A promise of privacy, with all else that determines the noise. All is public: none may be computed from private records.

    Where owners of several images are given (`fastloda finetune --owner`), each is one record here.

    Attributes:
        target_epsilon: upper bound on epsilon, which training may not exceed; 1 is strong, 10 is common in research.
        delta: probability with which the bound may fail; must be below 1 / records.
        epochs: expected number of times that a record is used.
        batch_size: expected number of records in a step; large batches need less noise per record.
        records: the public, nominal number of records; sample_rate = batch_size / records and the number of steps
            follow from it. Default: the count of the data, which is thereby made public.
        max_grad_norm: bound on the L2 norm of a record's gradient. A small bound clips all gradients, as is usual in
            diffusion, and Adam makes up for the scale. With adaptive clipping, the first bound.
        views: number of noise levels per record and step, averaged before clipping.
        bands: number of steps over which the noise is correlated, so that much of it cancels; 1: independent noise. See
            `PrivateTraining`.
        clipping: style of clipping: flat (a gradient longer than max_grad_norm is shortened to it), automatic (all are scaled
            to just below it), per_layer (each layer has an equal share of it), or adaptive (the bound follows the median of
            the norms, for a part of the same budget).
    """

    target_epsilon: float
    delta: float
    epochs: float = 50.0
    batch_size: int = 256
    records: int | None = None
    max_grad_norm: float = 1e-3
    views: int = 2
    clipping: ClippingName = "flat"
    bands: int = 1

    def __post_init__(self):
        clipping_style(self.clipping)
        for name in ("target_epsilon", "delta", "epochs", "batch_size", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"privacy.{name} must be positive and finite, got {getattr(self, name)}")
        if self.delta >= 1:
            raise UserError(f"privacy.delta must be below 1, got {self.delta}")
        if self.views < 1:
            raise UserError(f"privacy.views must be at least 1, got {self.views}")
        if self.records is not None:
            self._check_records()

    def _check_records(self):
        if self.records < 1:
            raise UserError(f"privacy.records must be at least 1, got {self.records}")
        check_delta("privacy.delta", self.delta, self.records)
        if self.batch_size > self.records:
            raise UserError(f"privacy.batch_size {self.batch_size} exceeds the {self.records} records")
        if self.steps < 1:
            raise UserError(
                f"privacy.epochs {self.epochs} over {self.records} records are less than a step of {self.batch_size}"
            )

    @classmethod
    def for_steps(cls, steps: int, batch_size: int, records: int, **promise) -> Self:
        """Make a promise that `steps` steps spend; `promise` are the other fields except epochs."""
        return cls(epochs=steps * batch_size / records, batch_size=batch_size, records=records, **promise)

    def with_records(self, count: int, counted: str = "records") -> "Privacy":
        """Set `records` to `count`, the data's own number, unless it is given; `counted` is what the records are called."""
        return replace(self, records=nominal_records(self.records, count, "--privacy.records", counted))

    @property
    def sample_rate(self) -> float:
        """The probability that a record enters a step's batch."""
        return self.batch_size / self.records

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return round(self.epochs / self.sample_rate)


def nominal_records(given: int | None, count: int, option: str, counted: str = "records") -> int:
    """Return the public number of records: `given`, or else the data's own `count`, which is thereby made public."""
    if given is None:
        logger.info("note: the number of %s, %d, is treated as public; or give %s", counted, count, option)
        return count
    return given


def check_delta(name: str, delta: float, records: int) -> None:
    """Refuse a delta outside 0 < delta < 1 / records with a ValueError; the message calls it `name`."""
    if records < 1 or not 0 < delta < 1 / records:
        raise UserError(
            f"{name} must be below 1 / records = {1 / max(1, records):.3g} and positive, got {delta}: with a larger one, "
            "publishing a random record would count as private"
        )


def private_training(privacy: Privacy, earlier: Sequence[Sequence] = (), **optimization) -> PrivateTraining:
    """Make the trainer's settings with the least noise that keeps the promise; takes 1 to 20 s, less if asked before.

    `earlier` are releases about the same records, as `compose_epsilon` takes them, which the promise covers too;
    `optimization` are the other fields of `PrivateTraining`.
    """
    logger.info("calibrating the noise for epsilon %g over %d steps", privacy.target_epsilon, privacy.steps)
    settings = PrivateTraining(
        sample_rate=privacy.sample_rate,
        expected_batch_size=privacy.batch_size,
        steps=privacy.steps,
        delta=privacy.delta,
        target_epsilon=privacy.target_epsilon,
        max_grad_norm=privacy.max_grad_norm,
        views=privacy.views,
        clipping=privacy.clipping,
        bands=privacy.bands,
        earlier=tuple(tuple(release) for release in earlier),
        **optimization,
    )
    logger.info("noise multiplier %.3f at sample rate %.3g", settings.noise_multiplier, privacy.sample_rate)
    return settings


def private_trainer(
    model: nn.Module,
    records: Columns,
    losses: Losses,
    privacy: Privacy,
    optimization: Mapping[str, Any],
    *,
    owners: OwnerIds | None = None,
    checkpoint: Path | None = None,
    earlier: Sequence[Sequence] = (),
    progress: bool = True,
) -> DPTrainer:
    """Make the trainer of a private run with the least noise that keeps the promise; see `private_training`.

    `owners` are the owners of the records, as `DPTrainer` takes them, if owners are the unit of privacy.
    """
    fixed_shape = next(model.parameters()).device.type != "cpu"
    settings = private_training(privacy, earlier, fixed_shape=fixed_shape, **optimization)
    return DPTrainer(model, records, losses, settings, owners=owners, checkpoint=checkpoint, progress=progress)


def fit_average(trainer: DPTrainer) -> None:
    """Train to the end, and copy the average of the parameters into the model: the average is what is released."""
    trainer.fit()
    copy_into(trainer.parameters, trainer.average.values)


def publish(
    trainer: DPTrainer,
    privacy: Privacy,
    weights: Path,
    earlier: Sequence[dict] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write, beside the trained weights: privacy.json, epsilon.png, and README.txt on which files may leave the folder.

    `earlier` is as in `privacy_statement`; `about` are public facts of the private images, with which the statement begins.
    """
    folder = weights.parent
    write_atomically(folder / "README.txt", README.encode())
    write_atomically(folder / EPSILON_CURVE, _epsilon_curve(trainer))
    statement = with_ids(privacy_statement(trainer, privacy, earlier), digest(weights))
    write_json(folder / STATEMENT, dict(about or {}) | statement)


def privacy_statement(trainer: DPTrainer, privacy: Privacy, earlier: Sequence[dict] = ()) -> dict:
    """Make the statement of what a run spent, and under which assumptions: JSON values, all of them public.

    `earlier` describes the releases in the settings' `earlier`, as a statement's own "releases" do.
    """
    settings, accountant = trainer.settings, trainer.accountant
    own = accountant.mechanism(trainer.step)
    before = earlier or [unrecorded_release(release) for release in settings.earlier]
    text = describe_randomness(settings.seed, settings.secure_noise)
    all_releases = [*before, _release(own, settings.seed is not None, text)]
    by_owner = trainer.unit == "owner"
    at_most = f"at most {settings.per_owner} of which are used in a step"
    return (
        {
            "unit": f"one owner of images, {at_most}" if by_owner else "one image",
            "epsilon": trainer.epsilon(),
            "epsilon_rdp": accountant.epsilon_rdp(settings.delta),
            "delta": settings.delta,
            "target_epsilon": settings.target_epsilon,
            "adjacency": OWNER_ADJACENCY if by_owner else ADJACENCY,
            "mechanism": f"Gaussian noise on the sum of clipped per-{trainer.unit} gradients, divided by the expected batch size",
            "sampler": SAMPLER if settings.bands == 1 else CYCLIC.format(settings.bands),
            "bands": settings.bands,
            "sample_rate": own.sample_rate,
            "noise_multiplier": own.noise_multiplier,
            "steps": own.steps,
            "earlier": [list(release) for release in settings.earlier],
            "max_grad_norm": settings.max_grad_norm,
            "views": settings.views,
            f"{trainer.unit}s": privacy.records,
            "expected_batch_size": settings.expected_batch_size,
            "accountant": _accountant(),
            "secure_noise": settings.secure_noise,
        }
        | _randomness(all_releases)
        | _clipping(settings, trainer.unit)
    )


def _clipping(settings: PrivateTraining, unit: str) -> dict:
    noise_multiplier, expected_batch_size = settings.noise_multiplier, settings.expected_batch_size
    match style := clipping_style(settings.clipping):
        case AdaptiveClipping():
            return {
                "mechanism": f"Gaussian noise on the sum of clipped per-{unit} gradients, and on the count of the gradients "
                "within the bound; both divided by the expected batch size",
                "clipping": style.name,
                "quantile": style.quantile,
                "count_noise": style.count_std(expected_batch_size),
                "gradient_noise_multiplier": style.gradient_noise(noise_multiplier, expected_batch_size),
                "share_spent_on_count": style.share(noise_multiplier, expected_batch_size),
            }
        case Automatic():
            return {"clipping": style.name, "gamma": style.gamma}
        case PerLayer():
            return {"clipping": style.name, "bounds": "equal" if style.bounds is None else dict(style.bounds)}
    return {"clipping": style.name}


def release_statement(
    described: Sequence[tuple[str, float, float, int]],
    delta: float,
    records: int,
    seed: int | None,
    *,
    secure_noise: bool = False,
    by_owner: bool = False,
    before: Sequence[dict] = (),
) -> dict:
    """Make the statement of sums over the records, or over owners, that were released together, and of all releases before.

    Each sum is (what was summed, sample_rate, noise_multiplier, steps). As in the statement of a run, the last one fills the
    fields of the statement itself, and the others are in its `earlier`, after those `before`.

    Raises:
        UserError: there is no finite epsilon, or delta is too small.
    """
    summed, own = [what for what, *_ in described], [mechanism for _, *mechanism in described]
    mechanisms = [*([release[name] for name in MECHANISM] for release in before), *own]
    *earlier, (sample_rate, noise_multiplier, steps) = mechanisms
    if not math.isfinite(epsilon := compose_epsilon(mechanisms, delta)):
        raise UserError(f"so little noise gives no finite epsilon at delta {delta:g}: take more")
    randomness = describe_randomness(seed, secure_noise)
    return {
        "epsilon": epsilon,
        "delta": delta,
        "adjacency": OWNER_ADJACENCY if by_owner else ADJACENCY,
        "mechanism": f"Gaussian noise on the {', and on the '.join(summed)}, of sensitivity 1"
        + " each" * (len(summed) > 1),
        "sampler": SAMPLER,
        "sample_rate": sample_rate,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "earlier": earlier,
        "owners" if by_owner else "records": records,
        "accountant": _accountant(),
    } | _randomness([*before, *(_release(mechanism, seed is not None, randomness) for mechanism in own)])


def unrecorded_release(mechanism: Sequence) -> dict:
    """Describe a release for which nobody recorded how its noise was drawn."""
    return _release(mechanism, None, UNRECORDED) | {"id": None}


def _release(mechanism: Sequence, seed_was_fixed: bool | None, randomness: str) -> dict:
    numbers = dict(zip(MECHANISM, mechanism, strict=True))
    return {**numbers, "seed_was_fixed": seed_was_fixed, "randomness": randomness}


def with_ids(statement: dict, released: str) -> dict:
    """Add to a statement's own releases the hash of what was `released`, so that others can count each release once."""
    each = [{"id": f"{released[:16]}-{i}"} | release for i, release in enumerate(statement["releases"])]
    return statement | {"releases": each}


def _randomness(all_releases: Sequence[dict]) -> dict:
    """Describe how the noise of each release, and of all together, was drawn: all can be foreseen if one can, or may be."""
    return {
        "seed_was_fixed": any(release["seed_was_fixed"] is not False for release in all_releases),
        "randomness": describe_together(release["randomness"] for release in all_releases),
        "releases": list(all_releases),
    }


def _accountant() -> str:
    names = [f"{name} {version(name)}" for name in ("dp-accounting", "prv-accountant")]
    return f"the smallest of the upper bounds by {' and '.join(names)}, and of RDP's"


def _epsilon_curve(trainer: DPTrainer) -> bytes:
    """Plot the epsilon spent by each step, as PNG."""
    settings, spent = trainer.settings, trainer.epsilon()
    # Epsilon rises fastest at the start, where the points are densest.
    counts = sorted({0, 1} | {round(trainer.step * (i / CURVE_POINTS) ** 2) for i in range(CURVE_POINTS + 1)})
    # The curve's bounds are looser than the final epsilon, which also bounds epsilon at all earlier steps.
    epsilons = [min(bound, spent) for bound in trainer.accountant.epsilon_curve(settings.delta, counts)]
    return epsilon_plot(counts, epsilons, target=settings.target_epsilon, delta=settings.delta)
