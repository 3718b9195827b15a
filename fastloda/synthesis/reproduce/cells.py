"""The cells of a table: each fits a method at a budget with a seed, and tests it. The result is a file, computed once."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fastloda.files import write_atomically
from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.methods import Budget, Method, Sampler, Work
from fastloda.synthesis.methods.base import at_budget
from fastloda.synthesis.metrics import Extractor, scores
from fastloda.synthesis.report.plots import sample_grid
from fastloda.synthesis.runs import Stage, plain, read_json, write_json
from fastloda.synthesis.settings import Classifier

RESULT, GRID = "result.json", "grid.png"


@dataclass(frozen=True)
class Problem:
    """The data of a table's methods, and how the methods are tested.

    Attributes:
        private, public: images to train on.
        test: real images that nothing is trained on.
        delta: delta of every budget.
        classifiers: name -> settings; each classifier is trained on the synthetic images.
        synthetic_images: number of images drawn.
        public_seed: seed of the public models, if all seeds share them.
        extractor: function that returns the extractor of features for FID and the other scores, taken against `test`.
    """

    private: LabelledImages
    public: LabelledImages
    test: LabelledImages
    delta: float
    classifiers: dict[str, Classifier]
    synthetic_images: int
    public_seed: int | None
    extractor: Callable[[], Extractor]


def _described(data: LabelledImages) -> str:
    """Describe public images by what differs between sets, but not by the rounding with which another machine draws them."""
    some = data.images[:1000]
    return f"{len(data)} images of {data.num_classes} classes, mean {some.mean():.3f}, deviation {some.std():.3f}"


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell: a method at a budget with a seed. Epsilon is None if the method has no budget."""

    method: Method
    epsilon: float | None
    seed: int

    @property
    def name(self) -> str:
        budget = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{self.method.name}{budget}, seed {self.seed}"

    @property
    def caption(self) -> str:
        return f"Samples of {self.name}"

    def folder(self, run: Path) -> Path:
        parts = [
            self.method.name.lower().replace(" ", "-"),
            "all" if self.epsilon is None else f"epsilon-{self.epsilon:g}",
        ]
        return run.joinpath("cells", *parts, f"seed-{self.seed}")

    def stage(self, run: Path, problem: Problem, device: torch.device) -> Stage:
        """Describe the stage of this cell: the folder of its result, and all settings that the result depends on."""
        method = self.method if self.epsilon is None else at_budget(self.method, self.epsilon)
        settings = {"method": repr(method), "epsilon": self.epsilon, "seed": self.seed, "device": device.type}
        settings |= {"classifiers": repr(problem.classifiers), "synthetic_images": problem.synthetic_images}
        settings |= {"records": len(problem.private), "public": _described(problem.public), "delta": problem.delta}
        if pool := getattr(method, "pool", None):
            settings["pool"] = _described(pool())
        return Stage(self.folder(run), settings, outputs=(RESULT,), private=True)

    def result(self, run: Path, problem: Problem, device: torch.device) -> dict:
        """Return the cell's result as JSON values; if it is not there, compute it, continuing an interrupted fit where possible.

        `settings_digest` in it tells whether another run's cell was made with the same settings.

        Raises:
            RunError: the folder contains a cell with other settings.
        """
        stage = self.stage(run, problem, device)
        if not stage.is_done():
            with stage.work():
                where = stage.folder / "fit", run / "public"
                work = Work(*where, self.seed, device, progress=False, public_seed=problem.public_seed)
                write_json(stage.folder / RESULT, self._compute(problem, work))
        return read_json(stage.folder / RESULT) | {"settings_digest": settings_digest(stage)}

    def _compute(self, problem: Problem, work: Work) -> dict:
        clock = _Laps()
        budget = Budget(self.epsilon or 1.0, problem.delta, len(problem.private))
        fitted = self.method.fit(problem.private, problem.public, budget, work)
        seconds = {"fit": clock.lap()}
        if isinstance(fitted, Sampler):
            images = fitted.images(problem.synthetic_images, self.seed)
            seconds["sample"] = clock.lap()
            write_atomically(work.folder.parent / GRID, sample_grid(images.images, images.labels))
            accuracies = judge(images, problem, self.seed, work.device)
            image_scores = asdict(scores(problem.test.images, images.images, problem.extractor()))
            loss = fitted.loss and fitted.loss(problem.test)
        else:
            accuracies, image_scores, loss = {"itself": accuracy(fitted.network, problem.test)}, None, None
        seconds["judge"] = clock.lap()
        return {
            "accuracy": accuracies,
            "scores": image_scores,
            "loss": loss,
            "spent": fitted.spent.to_dict(),
            "step": None if fitted.cost is None else fitted.cost._asdict(),
            "seconds": seconds,
        }


def judge(images: LabelledImages, problem: Problem, seed: int, device: torch.device) -> dict[str, float]:
    """Compute the test accuracy, 0 to 1, of each classifier when it is trained on the images only."""
    found = {}
    for name, classifier in problem.classifiers.items():
        settings = asdict(replace(classifier, seed=seed))
        found[name] = accuracy(train_classifier(images, **settings, device=device, progress=False), problem.test)
    return found


def all_cells(methods: Sequence[Method], epsilons: Sequence[float], seeds: int) -> list[Cell]:
    """List all cells in the table's order: for each method, all seeds at each budget, or one per seed if it has no budget."""
    budgets = {method.name: epsilons if method.has_budget else (None,) for method in methods}
    return [Cell(m, epsilon, seed) for m in methods for epsilon in budgets[m.name] for seed in range(seeds)]


def settings_digest(stage: Stage) -> str:
    """Compute a short hash of all settings of a cell's stage."""
    return hashlib.sha256(json.dumps(plain(stage.settings), sort_keys=True).encode()).hexdigest()[:16]


def picture_file(table: str, caption: str) -> str:
    """Name the file beside a table's results that has the picture of this caption."""
    return f"{table}-{re.sub('[^a-z0-9]+', '-', caption.lower())}.png"


class _Laps:
    """A clock that measures the seconds since the last lap."""

    def __init__(self):
        self._last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return round(seconds, 2)
