"""The demo: `synthesize` with real digits as private and fonts as public data, compared with other methods, in one report."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import rich
import torch

from fastloda.errors import UserError
from fastloda.synthesis import stages
from fastloda.synthesis.account import read_statement
from fastloda.synthesis.arguments import Device, Floats, resolve_device
from fastloda.synthesis.budget import EPSILON_CURVE
from fastloda.synthesis.classify import accuracy
from fastloda.synthesis.data import digits_split
from fastloda.synthesis.environment import environment
from fastloda.synthesis.methods.base import Budget, ByEpsilon
from fastloda.synthesis.methods.dp_sgd import DPSGD as DPSGDTraining
from fastloda.synthesis.methods.dp_sgd import Direct
from fastloda.synthesis.presets import RELAXED, STRICT
from fastloda.synthesis.recipe import Recipe
from fastloda.synthesis.report.demo import CHOSEN_ONLY, DPSGD, LODA, NO_PRIVACY, PUBLIC_ONLY, Outcome
from fastloda.synthesis.report.tables import result_table
from fastloda.synthesis.runs import seconds_taken
from fastloda.synthesis.samples import GRID
from fastloda.synthesis.settings import Classifier
from fastloda.synthesis.stages.layout import CHOSEN, PRIVATE, PUBLIC, samples_folder

logger = logging.getLogger("fastloda")

T = TypeVar("T")

DIGITS, FONTS, NAME = "digits", "font-digits", "scikit-learn's handwritten digits, 80% of them"
PRIVATE_RECORDS, SIDE = 1437, 8  # number and side in pixels, both published with the data set
DELTA = 1e-5
DIRECT = ByEpsilon(  # settings of DP-SGD on the digits themselves, for comparison
    {
        STRICT: Direct(DPSGDTraining(learning_rate=0.05, ema_decay=0.97, width=8), steps=100),
        RELAXED: Direct(DPSGDTraining(learning_rate=0.15, ema_decay=0.97, width=16), steps=250),
    }
)


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo computes; everything else is set in `presets`, as for any images.

    Attributes:
        public_images: number of font digits on which the public model is trained.
        public_steps: number of steps of that training.
        choice_images: number of font digits to choose from.
        choice_steps: number of steps of training on the chosen digits.
        private_steps: number of private steps, of the adapters and of DP-SGD. Default: 400 and 250; 100 each below epsilon 3.
        synthetic_images: number of synthetic digits.
        sampler_steps: number of steps of the sampler.
        classifier_steps: number of steps of each classifier's training.
    """

    public_images: int = 20_000
    public_steps: int = 2000
    choice_images: int = 100_000
    choice_steps: int = 600
    private_steps: int | None = None
    synthetic_images: int = 12_000
    sampler_steps: int = 25
    classifier_steps: int = 800

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise UserError(f"settings.{name} must be at least 1, got {value}")

    def recipe(self, epsilon: float, seed: int) -> Recipe:
        """Make the recipe of `synthesize --choose` for a budget."""
        recipe = Recipe.fitting(
            epsilon,
            PRIVATE_RECORDS,
            SIDE,
            delta=DELTA,
            choose=True,
            count=self.synthetic_images,
            public_steps=self.public_steps,
            private_steps=self.private_steps,
            sampler_steps=self.sampler_steps,
            seed=seed,
        )
        further = replace(recipe.choice.training, steps=self.choice_steps, warmup=min(50, self.choice_steps))
        return replace(recipe, choice=replace(recipe.choice, training=further))

    def direct(self, epsilon: float, seed: int) -> Direct:
        """Make the settings of DP-SGD for a budget."""
        direct = DIRECT.at(epsilon)
        steps = direct.steps if self.private_steps is None else self.private_steps
        return replace(direct, steps=steps, training=replace(direct.training, seed=seed))

    def judge(self, seed: int) -> Classifier:
        return Classifier(steps=self.classifier_steps, seed=seed)

    @property
    def form(self) -> str:
        """The sentence in which the report says which form of the demo it is about."""
        return FORMS.get(self, OTHER_FORM)

    def reasons(self) -> dict[str, str]:
        """Say how each setting was chosen; settings that differ from the thorough demo's were chosen for the time they take."""
        own = {name for name, value in asdict(self).items() if value != getattr(THOROUGH, name)}
        return {name: how + "; here another, for the time it takes" * (name in own) for name, how in HOW_CHOSEN.items()}


# The short demo is about a fifth of the thorough one, so that it takes minutes, even on cores that also do other work.
THOROUGH, SHORT, EPSILONS = DemoSettings(), DemoSettings(20_000, 500, 25_000, 150, 100, 2000, 20, 200), Floats([10.0])
FORMS = {
    SHORT: "This is the short demo. `fastloda demo --thorough`, the form of the project's published table, takes about five "
    "times as long, for four to six times the steps and images, and clearer digits.",
    THOROUGH: "This is the thorough demo, the form of the project's published table. `fastloda demo` alone takes about a "
    "fifth of the time, for a fifth of the steps and images.",
}
OTHER_FORM = "This is neither the short demo nor the thorough one: it has settings of its own."
# "The stand-in" is public data: font digits bent and slanted like another person's, or 5,000 of MNIST's digits (the trials are
# listed in docs/results/demo-tuning.md; scripts/trials.py makes stand-ins).
HOW_CHOSEN = {
    "public_images": "enough for the public model not to memorise them; they are drawn in seconds",
    "public_steps": "as many as two cores train in two to four minutes",
    "choice_images": "as many public digits to choose from as are drawn in ten seconds",
    "choice_steps": "set beforehand, about a third of the public steps",
    "private_steps": "on the stand-in at epsilon 10, 400 did better than 250; at epsilon 1, 100 as well as 250",
    "synthetic_images": "on the stand-in at epsilon 10, 12,000 did a little better than 4,000; about eight for each record",
    "sampler_steps": "on the stand-in at epsilon 10, 25 did as well as 50",
    "classifier_steps": "set beforehand; the same for every row but DP-SGD",
    "delta": "two orders of magnitude below 1 / 1,437; the usual value for sets of up to 10^5 records",
    "pretraining": "the first learning rate tried on font digits; an average over the last quarter of the steps, by rule of "
    "thumb",
    "choice": "on the stand-in at epsilon 10, a noise of 4 (the choice alone then costs epsilon 0.93), and a tolerance of 2, as "
    "good as 1 and 4, from more different digits than 1; on MNIST at epsilon 5 and 10, moved digits did no better. Below epsilon "
    "3, on MNIST: 4.2 did a little better than 5.3, a tolerance of 4 than 2, 8 and 20, a reach between 0.25 and 0.5 best",
    "tuning": "on the stand-in at epsilon 10: a learning rate between 0.0015 and 0.02, 2 views as well as 4, a cosine schedule a "
    "little better, timesteps 100 to 800 as well as or better than others, no guidance better than some. At epsilon 1: a rate "
    "between 0.0015 and 0.016, 4 views better than 2, timesteps 200 to 800, guidance 0.25 and 0.5 a little better than 0. A "
    "sixth of the records a step, and the average, were set beforehand; the clipping bound is below the norms of all gradients, "
    "as is usual for diffusion, so that each counts alike: no private norm was looked at",
    "adapter": "the paper's rank",
    "direct": "DP-SGD: the best of 16 trials on 1,437 jittered font digits standing in for the private ones, at epsilon 10, of "
    "rates, steps, views, widths and batches; SGD beat Adam. Below epsilon 3 a rate between 0.02 and 0.8, and the smaller width, "
    "which did better than 16 and 32",
}


def demo(
    run: Path | None = None,
    *,
    epsilon: Floats = EPSILONS,
    seeds: int = 1,
    thorough: bool = False,
    settings: DemoSettings = SHORT,
    device: Device = "auto",
    progress: bool = True,
) -> None:
    """Pre-train on fonts, fine-tune privately on real digits, generate images, test them: one table and report.html.

    1,437 handwritten digits stand for private data; digits drawn from fonts are the public data. A noisy statistic says
    which public digits are like the private ones, and the public model is trained further on them before adapters are trained
    privately; the budget covers both: it is `fastloda synthesize --choose`. A classifier is trained on synthetic digits alone
    and tested on 360 real ones; it is compared with classifiers of both public models' digits, DP-SGD on the private digits, and
    training without privacy. Writes report.html, results.json and results.md. Interrupted, it continues when it is called again.
    Its seeds are fixed, so that it can be repeated: it is an experiment, not a private release.

    Args:
        run: folder for all results. Default: runs/demo, or runs/demo-thorough.
        epsilon: privacy budgets, separated by commas.
        seeds: number of repetitions of all stages; the table has their mean and standard deviation.
        thorough: whether to take about five times as long, with the settings of the project's published table.
        settings: how much is computed. Default: that of the short demo, a few minutes on two cores.
        device: device to compute on.
        progress: whether to show progress: bars on a terminal, elsewhere a line now and then.
    """
    if thorough and settings not in (SHORT, THOROUGH):
        raise UserError("--thorough has settings of its own: leave out --settings, or --thorough")
    settings = THOROUGH if thorough else settings
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if len(set(epsilon)) < max(1, len(epsilon)):
        raise UserError(f"epsilon must be one number or several different ones, got {list(epsilon)}")
    for budget in epsilon:  # before the work begins
        settings.recipe(budget, seed=0)
    run = Path(run or f"runs/demo{'-thorough' * thorough}")
    logger.info("%s", settings.form)
    experiment = _Experiment(run, settings, device, progress, stages=seeds * (4 + 7 * len(epsilon)))
    with _on_one_thread():
        for seed in range(seeds):
            experiment.public_part(seed, epsilon[0])
            for budget in epsilon:
                experiment.private_part(seed, budget)
        outcome = experiment.outcome()
    outcome.write(run)
    title = f"Accuracy on 360 real digits, {seeds} seed{'s' * (seeds > 1)}"
    rich.print(result_table(outcome.results, title).for_terminal())
    logger.info("report: %s", run / "report.html")


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: on images this small a second one gains little, and where the cores do other work as
    well, the two wait for each other for most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Experiment:
    """An experiment that runs the stages and collects their results for an `Outcome`."""

    run: Path
    settings: DemoSettings
    device: Device
    progress: bool
    stages: int
    accuracies: dict[tuple[str, float], list[float]] = field(default_factory=lambda: defaultdict(list))
    statements: dict[tuple[str, float, int], dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def public_part(self, seed: int, epsilon: float) -> None:
        """Make the public model, which is the same for all budgets, its samples, and the classifier without privacy."""
        s, folder, name = self.settings, self._folder(seed), f"seed {seed}"
        recipe = s.recipe(epsilon, seed)
        self._stage(
            f"{name}: pre-train on {s.public_images} font digits",
            lambda: recipe.pretrain(folder, data=FONTS, count=s.public_images, **self._common),
            folder / PUBLIC,
        )
        unguided = replace(recipe, tuning=replace(recipe.tuning, guidance=0.0))
        self._generate(f"{name}: public model", folder, unguided, public=True)
        self._judge(f"{name}: public model", folder, seed, (PUBLIC_ONLY, 0.0), public=True)
        self._judge(f"{name}: no privacy", folder, seed, (NO_PRIVACY, float("inf")), train=DIGITS)

    def private_part(self, seed: int, epsilon: float) -> None:
        """Make the chosen public model, the adapters, their samples, and DP-SGD's classifier, for one budget."""
        s, folder, name = self.settings, self._folder(seed, epsilon), f"seed {seed}, epsilon {epsilon:g}"
        recipe, private = s.recipe(epsilon, seed), {"data": DIGITS, "name": NAME}
        options = {"public": FONTS, "count": s.choice_images, "model": self._folder(seed) / PUBLIC}
        self._stage(
            f"{name}: choose among {s.choice_images} font digits, {s.choice_steps} public steps",
            lambda: recipe.choose(folder, **private, **options, **self._common),
            folder / CHOSEN,
        )
        self.statements[CHOSEN_ONLY, epsilon, seed] = read_statement(folder / CHOSEN)
        self._generate(f"{name}: chosen public model", folder, recipe, public=True)
        self._judge(f"{name}: chosen public model", folder, seed, (CHOSEN_ONLY, epsilon), public=True)
        self.statements[LODA, epsilon, seed] = self._stage(
            f"{name}: fine-tune, {recipe.privacy.steps} private steps",
            lambda: recipe.finetune(folder, **private, **self._common),
            folder / PRIVATE,
        )
        self._generate(f"{name}: private model", folder, recipe)
        self._judge(f"{name}: private model", folder, seed, (LODA, epsilon))
        direct, (train, test) = s.direct(epsilon, seed), digits_split()
        promise = direct.privacy(Budget(epsilon, DELTA, PRIVATE_RECORDS))
        classifier = self._stage(
            f"{name}: DP-SGD, {promise.steps} private steps",
            lambda: stages.train_classifier_privately(folder, promise, train, direct.training, **self._common),
            folder / "dpsgd",
        )
        self.statements[DPSGD, epsilon, seed] = read_statement(folder / "dpsgd")
        self.accuracies[DPSGD, epsilon].append(accuracy(classifier, test))

    def outcome(self) -> Outcome:
        """Collect all results, with the figures of seed 0."""
        epsilons = sorted({epsilon for _, epsilon, _ in self.statements})
        grids = {"Before: samples of the public model": self._folder(0) / "samples-public" / GRID}
        curves = {}
        for epsilon in epsilons:
            folder = self._folder(0, epsilon)
            grids[f"Of the public model trained on digits chosen for epsilon {epsilon:g}"] = (
                folder / "samples-public" / GRID
            )
            grids[f"After private fine-tuning: samples at epsilon {epsilon:g}"] = folder / "samples" / GRID
            for method, name in ((LODA, PRIVATE), (DPSGD, "dpsgd")):
                curves[f"{method}, epsilon {epsilon:g}: what was spent, by step"] = folder / name / EPSILON_CURVE
        return Outcome(
            self.accuracies,
            self.statements,
            self.seconds,
            self._all_settings(epsilons),
            self.settings.reasons(),
            environment(resolve_device(self.device)),
            grids,
            curves,
            self.settings.form,
        )

    def _all_settings(self, epsilons: list[float]) -> dict[str, object]:
        """Collect every setting that the results depend on; settings that depend on the budget are listed for each."""
        recipes = {f"{epsilon:g}": self.settings.recipe(epsilon, seed=0) for epsilon in epsilons}
        parts = {
            part: {epsilon: asdict(getattr(recipe, part)) for epsilon, recipe in recipes.items()}
            for part in ("pretraining", "choice", "tuning", "adapter")
        }
        direct = {f"{epsilon:g}": asdict(self.settings.direct(epsilon, seed=0)) for epsilon in epsilons}
        return asdict(self.settings) | {"delta": DELTA} | parts | {"direct": direct}

    def _generate(self, name: str, folder: Path, recipe: Recipe, public: bool = False) -> None:
        self._stage(
            f"{name}: draw {recipe.count} synthetic digits",
            lambda: recipe.sample(folder, public=public, **self._common),
            folder / samples_folder(public, None),
        )

    def _judge(self, name: str, folder: Path, seed: int, key: tuple[str, float], **source) -> None:
        options = {"test": f"{DIGITS}-test", "classifier": self.settings.judge(seed), **source, **self._common}
        found = self._stage(f"{name}: train and test a classifier", lambda: stages.evaluate(folder, **options))
        self.accuracies[key].append(found["accuracy"])

    def _stage(self, name: str, work: Callable[[], T], folder: Path | None = None) -> T:
        """Run one stage: log a line, and record the time that its work took, now or in an earlier call."""
        logger.info("[%d/%d] %s", len(self.seconds) + 1, self.stages, name)
        began = time.monotonic()
        found = work()
        self.seconds[name] = seconds_taken(folder) if folder else found["seconds"]
        logger.info("%s done in %.0f s", " " * 6, time.monotonic() - began)
        return found

    def _folder(self, seed: int, epsilon: float | None = None) -> Path:
        folder = self.run / f"seed-{seed}"
        return folder if epsilon is None else folder / f"epsilon-{epsilon:g}"

    @property
    def _common(self) -> dict:
        return {"device": self.device, "progress": self.progress}
