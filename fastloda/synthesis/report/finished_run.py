"""A finished run, read from its folder and checked, for the page about it: without any path or private image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from fastloda.accounting.compose import compose_epsilon
from fastloda.accounting.membership import MembershipBound
from fastloda.errors import UserError
from fastloda.synthesis.account import counts, known_releases, read_statement, releases
from fastloda.synthesis.budget import STATEMENT
from fastloda.synthesis.data import LabelledImages, load_npz
from fastloda.synthesis.inputs import OWN_IMAGES, public_name
from fastloda.synthesis.runs import CONFIG, DONE, INPUTS, RunError, digest, read_json
from fastloda.synthesis.samples import SAMPLES
from fastloda.synthesis.stages.layout import ADAPTER, CHOSEN, EVALUATION, LABELS, LAYERS, PRIVATE

SHOWN_SETTINGS = ("privacy", "adapter", "layers", "training")  # the others may contain paths
SAMPLING_SETTINGS = ("count", "steps", "guidance", "stochasticity", "strength", "reach", "labelled")
HIDDEN_SETTINGS = ("seed",)  # anyone who knows a seed can foresee what was drawn


@dataclass(frozen=True)
class SampleSet:
    """A folder of samples drawn from the run's adapter, and the settings of the drawing."""

    folder: Path
    settings: Mapping

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def images(self) -> LabelledImages:
        return load_npz(self.folder / SAMPLES)

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes; numbers if the file has no names."""
        return self.images.class_names


@dataclass(frozen=True)
class FinishedRun:
    """A run in which fine-tuning is finished, and so is everything else that was begun.

    Attributes:
        folder: folder of the run.
        statement: contents of its privacy.json; the accountant has confirmed its epsilon.
    """

    folder: Path
    statement: Mapping

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Read and check a run.

        Raises:
            RunError: it is not finished, or its files do not belong together; the message says what to do.
        """
        _check_finished(folder)
        run = cls(folder, _confirmed(read_statement(folder / PRIVATE), folder / PRIVATE / STATEMENT))
        run._check_choices()
        return run

    @property
    def private_name(self) -> str:
        """The name of the private images, never a path."""
        return self.statement.get("name") or public_name(str(self._config(PRIVATE).get("data", "")), "private images")

    @property
    def name_of_public(self) -> str:
        return public_name(str(self._config("public").get("data", "")), OWN_IMAGES)

    @property
    def unit(self) -> str:
        """The unit of privacy: what one may add or remove."""
        return self.statement.get("unit", "one record (one image)")

    @property
    def count(self) -> int:
        """The public, nominal number of units."""
        return self.statement["owners" if self.protects_owners else "records"]

    @property
    def classes(self) -> str:
        """The names of the classes, or how many there are."""
        classes = self.statement.get("classes", "as the public model has")
        return ", ".join(classes) if isinstance(classes, list) else str(classes)

    @property
    def protects_owners(self) -> bool:
        """Whether the unit is an owner of several images."""
        return "owner" in self.unit

    @property
    def noise_is_correlated(self) -> bool:
        """Whether the noise of several steps was drawn together; the page then has no bound for several images of one person."""
        return self.statement.get("bands", 1) > 1

    @property
    def counted(self) -> str:
        """The name of the units, in the plural."""
        return "owners of images" if self.protects_owners else "images"

    @property
    def noise_is_foreseeable(self) -> bool:
        """Whether the noise of any release followed from a fixed seed, or may have followed from one."""
        each = [self.statement, *known_releases(dict(self.statement))]
        return any(release.get("seed_was_fixed") is not False for release in each)

    @property
    def choices(self) -> list[str]:
        """The folders of stages before fine-tuning that released something, which the statement must cover."""
        return [name for name in (CHOSEN, LABELS, LAYERS) if (self.folder / name / STATEMENT).is_file()]

    @cached_property
    def releases(self) -> list[tuple]:
        return releases(dict(self.statement))

    @cached_property
    def bound(self) -> MembershipBound:
        return MembershipBound.of_releases(self.releases, self.statement["delta"])

    def settings(self) -> dict[str, object]:
        """Collect the settings of fine-tuning and sampling, without any that contain paths or seeds."""
        config = self._config(PRIVATE)
        fine_tuning = {
            f"{group}.{name}": value
            for group in SHOWN_SETTINGS
            for name, value in config.get(group, {}).items()
            if name not in HIDDEN_SETTINGS and value is not None
        }
        sampling = {f"{s.name}.{name}": s.settings[name] for s in self.sample_sets for name in SAMPLING_SETTINGS}
        return fine_tuning | sampling

    @cached_property
    def sample_sets(self) -> list[SampleSet]:
        """List the folders of samples drawn from the adapter.

        Raises:
            RunError: one of them is not finished, or was drawn from another adapter.
        """
        return list(self._sample_sets())

    def _sample_sets(self) -> Iterator[SampleSet]:
        adapter = digest(self.folder / PRIVATE / ADAPTER)
        for config in sorted(self.folder.glob(f"samples*/{CONFIG}")):
            folder, settings = config.parent, _read_yaml(config)
            if settings.get("public"):
                continue
            if not (folder / DONE).is_file():
                raise RunError(f"{folder} is not finished: the same `fastloda sample` continues it; or delete it")
            if read_json(folder / INPUTS).get(ADAPTER) != adapter:
                raise RunError(
                    f"{folder} was drawn from another adapter than {PRIVATE}/{ADAPTER}: delete it, and draw again"
                )
            yield SampleSet(folder, settings)

    def evaluations(self) -> list[dict]:
        """List the results of `fastloda evaluate`: name of the training images, name of the test images, counts, and accuracy.

        Raises:
            RunError: a classifier was trained on samples that no longer exist.
        """
        record = self.folder / EVALUATION
        found = read_json(record) if record.exists() else {}
        return [self._evaluation(name, result) for name, result in found.items()]

    def _evaluation(self, name: str, result: Mapping) -> dict:
        settings = result["settings"]
        samples = self.folder / name / SAMPLES
        if "sha256" in settings and not (samples.is_file() and digest(samples) == settings["sha256"]):
            raise RunError(
                f"{EVALUATION} is about other images than {name}/{SAMPLES} holds now: `fastloda evaluate` tests these; or leave "
                "it out by --evaluation false"
            )
        train = name if "sha256" in settings else f"{public_name(name, OWN_IMAGES)}, without privacy"
        numbers = {key: result[key] for key in ("train_images", "test_images", "accuracy")}
        return {"train": train, "test": public_name(settings["test"], OWN_IMAGES), **numbers}

    def _check_choices(self) -> None:
        """Refuse a run whose statement leaves out a release of one of its choices."""
        for name in self.choices:
            if not counts(dict(self.statement), read_statement(self.folder / name)):
                raise RunError(
                    f"{PRIVATE}/{STATEMENT} does not count what {name}/ has released: `fastloda account --composition` says "
                    "what both cost together; fine-tune in another --run for a statement that covers both"
                )

    def _config(self, stage: str) -> dict:
        path = self.folder / stage / CONFIG
        return _read_yaml(path) if path.is_file() else {}


def _check_finished(folder: Path) -> None:
    private = folder / PRIVATE
    if not folder.is_dir():
        raise RunError(f"no run {folder}: --run takes the folder that the other commands were given")
    if not (private / DONE).is_file():
        begun = (private / CONFIG).exists()
        todo = "the same `fastloda finetune` continues it" if begun else "`fastloda finetune` makes its adapter"
        raise RunError(f"the run {folder} is not {'finished' if begun else 'fine-tuned'}: {todo}, then report again")
    for command, earlier in (("choose", folder / CHOSEN), ("label", folder / LABELS)):
        if (earlier / CONFIG).exists() and not (earlier / DONE).is_file():
            raise RunError(f"{earlier} is not finished: the same `fastloda {command}` continues it, then report again")


def _confirmed(statement: Mapping, path: Path) -> Mapping:
    """Compute the statement's epsilon again from its releases, and refuse a statement whose epsilon is too low."""
    epsilon, delta = compose_epsilon(releases(dict(statement)), statement["delta"]), statement["delta"]
    if epsilon > statement["epsilon"] * 1.001:  # other versions of the libraries may differ a little
        raise UserError(
            f"{path} states epsilon {statement['epsilon']:.4g}, but what it lists costs {epsilon:.4g} at delta {delta:g}: it was "
            "changed after training; restore the file that `fastloda finetune` wrote"
        )
    return {**statement, "epsilon": max(epsilon, statement["epsilon"])}


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no settings")
    return content
