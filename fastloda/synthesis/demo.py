"""The whole method in one command: real digits as private data, fonts as public data, one table, one report."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import docstring_parser
import rich

from fastloda.errors import UserError
from fastloda.synthesis.account import read_statement
from fastloda.synthesis.arguments import Device, Floats, resolve_device
from fastloda.synthesis.budget import EPSILON_CURVE, Privacy
from fastloda.synthesis.classify import accuracy
from fastloda.synthesis.data import digits_split
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.environment import environment
from fastloda.synthesis.methods.dp_sgd import DPSGD as DPSGDTraining
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.report.demo import CHOSEN_ONLY, DPSGD, LODA, NO_PRIVACY, PUBLIC_ONLY, Outcome
from fastloda.synthesis.report.tables import result_table
from fastloda.synthesis.runs import seconds_taken
from fastloda.synthesis.settings import Adapter, Classifier, FineTuning
from fastloda.synthesis.stages import (
    CHOSEN,
    GRID,
    check_sampling,
    choose,
    evaluate,
    finetune,
    pretrain,
    sample,
    train_classifier_privately,
)
from fastloda.training.schedules import Schedule

logger = logging.getLogger("fastloda")

T = TypeVar("T")

STRICT = 3.0  # the epsilon below which the strict settings are used
PRIVATE_RECORDS = 1437  # the number published with the data set


@dataclass(frozen=True)
class DemoSettings:
    """Every number that the demo's results depend on, and how each was chosen: the report prints these lines.

    "On the stand-in" means by trials on public data: font digits bent and slanted like another hand, 1,437 to train and
    1,000 to test; "on MNIST" the same with 5,000 of its digits (scripts/tune_demo.py; the trials are listed in
    docs/results/demo-tuning.md).

    Attributes:
        public_images: enough for the public model not to memorise them; they are drawn in seconds.
        public_steps: as many as two cores train in two to four minutes.
        public_batch_size: as large as a CPU core computes in half a second.
        public_learning_rate: the first value tried on the font digits.
        public_ema_decay: an average over the last quarter of the public steps, by rule of thumb.
        choice_images: as many public digits to choose from as are drawn in ten seconds.
        choice_noise: chosen on the stand-in at epsilon 10; with 4 the choice alone costs epsilon 0.93.
        strict_choice_noise: used below epsilon 3; on MNIST at epsilon 1, 4.2 did a little better than 5.3.
        choice_tolerance: on the stand-in, 2 gave classifiers as good as 1 and 4, from more different digits than 1.
        strict_choice_tolerance: used below epsilon 3, where chosen digits are moved; on MNIST, 4 did better than 2, 8 and 20.
        choice_reach: on MNIST at epsilon 5 and 10, moved digits did no better than unmoved ones.
        strict_choice_reach: used below epsilon 3; between 0.25 and 0.5, which did best on MNIST and on its most typical
            digits.
        choice_steps: set beforehand, about a third of the public steps.
        choice_learning_rate: set beforehand, half of the public learning rate.
        choice_ema_decay: set beforehand.
        delta: two orders of magnitude below 1 / 1,437; the usual value for sets of up to 10^5 records.
        batch_size: set beforehand, about a sixth of the records.
        steps: on the stand-in at epsilon 10, 400 did better than 250.
        strict_steps: used below epsilon 3; on the stand-in at epsilon 1, 100 did as well as 250.
        views: on the stand-in at epsilon 10, 2 did as well as 4.
        strict_views: used below epsilon 3; on the stand-in at epsilon 1, 4 did better than 2, and as well as 8.
        max_grad_norm: below the norms of all gradients, as is usual for diffusion, so that each counts alike; no private norm
            was looked at.
        learning_rate: chosen on the stand-in at epsilon 10, between 0.0015 and 0.02.
        strict_learning_rate: used below epsilon 3; chosen on the stand-in at epsilon 1, between 0.0015 and 0.016.
        schedule: on the stand-in, the cosine schedule did a little better than a constant rate.
        timesteps: on the stand-in at epsilon 10, 100 to 800 did as well as or better than all, 200 to 800 and 100 to 700.
        strict_timesteps: used below epsilon 3; on the stand-in at epsilon 1, better than all, 300 to 700 and 300 to 900.
        ema_decay: set beforehand.
        label_dropout: the paper's value.
        rank: the paper's value.
        synthetic_images: on the stand-in at epsilon 10, 12,000 did a little better than 4,000; about eight for each private
            record.
        sampler_steps: on the stand-in at epsilon 10, 25 did as well as 50.
        guidance: on the stand-in at epsilon 10, 0 did better than 0.5, 1 and 2.
        strict_guidance: used below epsilon 3; on the stand-in at epsilon 1, 0.25 and 0.5 did a little better than 0.
        classifier_steps: set beforehand; the same for every row but DP-SGD.
        classifier_width: set beforehand, in channels of the first layer; the same for every row but DP-SGD.
        dpsgd_batch_size: the best of 16 trials of DP-SGD on 1,437 jittered font digits standing in for the private ones, at
            epsilon 10: 256, 512 or all of them.
        dpsgd_steps: chosen as dpsgd_batch_size was, among 50 to 500.
        dpsgd_strict_steps: used below epsilon 3.
        dpsgd_views: chosen as dpsgd_batch_size was, of 2 and 4.
        dpsgd_max_grad_norm: chosen as dpsgd_batch_size was, of 0.3 and 1.
        dpsgd_learning_rate: chosen as dpsgd_batch_size was, among 0.1 to 1 for SGD, which beat Adam at 1e-3 and 3e-3.
        dpsgd_strict_learning_rate: used below epsilon 3; chosen on the stand-in at epsilon 1, between 0.02 and 0.8.
        dpsgd_momentum: the usual value.
        dpsgd_ema_decay: an average over the last tenth of the steps, by rule of thumb.
        dpsgd_width: chosen as dpsgd_batch_size was, of 16 and 32; fewer parameters take less noise.
        dpsgd_strict_width: used below epsilon 3; on the stand-in at epsilon 1, 8 did better than 16 and 32.
    """

    public_images: int = 20_000
    public_steps: int = 2000
    public_batch_size: int = 256
    public_learning_rate: float = 2e-3
    public_ema_decay: float = 0.998
    choice_images: int = 100_000
    choice_noise: float = 4.0
    strict_choice_noise: float = 4.2
    choice_tolerance: float = 2.0
    strict_choice_tolerance: float = 4.0
    choice_reach: float = 0.0
    strict_choice_reach: float = 0.3
    choice_steps: int = 600
    choice_learning_rate: float = 1e-3
    choice_ema_decay: float = 0.99
    delta: float = 1e-5
    batch_size: int = 256
    steps: int = 400
    strict_steps: int = 100
    views: int = 2
    strict_views: int = 4
    max_grad_norm: float = 1e-3
    learning_rate: float = 1e-2
    strict_learning_rate: float = 1.6e-2
    schedule: Schedule = "cosine"
    timesteps: tuple[int, int] = (100, 800)
    strict_timesteps: tuple[int, int] = (200, 800)
    ema_decay: float = 0.98
    label_dropout: float = 0.1
    rank: int = 4
    synthetic_images: int = 12_000
    sampler_steps: int = 25
    guidance: float = 0.0
    strict_guidance: float = 0.25
    classifier_steps: int = 800
    classifier_width: int = 32
    dpsgd_batch_size: int = 256
    dpsgd_steps: int = 250
    dpsgd_strict_steps: int = 100
    dpsgd_views: int = 4
    dpsgd_max_grad_norm: float = 1.0
    dpsgd_learning_rate: float = 0.15
    dpsgd_strict_learning_rate: float = 0.05
    dpsgd_momentum: float = 0.9
    dpsgd_ema_decay: float = 0.97
    dpsgd_width: int = 16
    dpsgd_strict_width: int = 8

    def __post_init__(self):
        """Refuse before the first stage what the stages would refuse."""
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"settings.{name} must be at least 1, got {value}")
        Adapter(rank=self.rank)
        Classifier(steps=self.classifier_steps, width=self.classifier_width)
        self.public_training(seed=0)
        for guidance in (self.guidance, self.strict_guidance):
            check_sampling(self.synthetic_images, self.sampler_steps, guidance)

    def at(self, epsilon: float) -> "DemoSettings":
        """Take the settings for a budget: below epsilon 3 the strict ones replace their namesakes."""
        strict = {name.replace("strict_", ""): value for name, value in asdict(self).items() if "strict_" in name}
        return replace(self, **strict) if epsilon < STRICT else self

    def privacy(self, epsilon: float) -> Privacy:
        """Make the promise of the adapters' training."""
        s = self.at(epsilon)
        return s._promise(epsilon, s.batch_size, s.steps, s.max_grad_norm, s.views)

    def dpsgd_privacy(self, epsilon: float) -> Privacy:
        """Make the promise of the classifier that is trained by DP-SGD."""
        s = self.at(epsilon)
        return s._promise(epsilon, s.dpsgd_batch_size, s.dpsgd_steps, s.dpsgd_max_grad_norm, s.dpsgd_views)

    def public_training(self, seed: int) -> PublicTraining:
        return PublicTraining(
            steps=self.public_steps,
            batch_size=self.public_batch_size,
            learning_rate=self.public_learning_rate,
            warmup=min(50, self.public_steps),
            ema_decay=self.public_ema_decay,
            seed=seed,
        )

    def choice(self, epsilon: float) -> PublicChoice:
        s = self.at(epsilon)
        training = PublicTraining(
            steps=s.choice_steps,
            batch_size=s.public_batch_size,
            learning_rate=s.choice_learning_rate,
            warmup=min(50, s.choice_steps),
            ema_decay=s.choice_ema_decay,
        )
        options = {"tolerance": s.choice_tolerance, "reach": s.choice_reach}
        return PublicChoice(s.choice_noise, drawn=s.public_images, training=training, **options)

    def fine_tuning(self, epsilon: float, seed: int) -> FineTuning:
        s = self.at(epsilon)
        return FineTuning(
            learning_rate=s.learning_rate,
            ema_decay=s.ema_decay,
            schedule=s.schedule,
            label_dropout=s.label_dropout,
            timesteps=s.timesteps,
            seed=seed,
        )

    def dpsgd_training(self, epsilon: float, seed: int) -> DPSGDTraining:
        s = self.at(epsilon)
        return DPSGDTraining(
            learning_rate=s.dpsgd_learning_rate,
            momentum=s.dpsgd_momentum,
            ema_decay=s.dpsgd_ema_decay,
            width=s.dpsgd_width,
            seed=seed,
        )

    def _promise(self, epsilon: float, batch_size: int, steps: int, max_grad_norm: float, views: int) -> Privacy:
        promise = {"target_epsilon": epsilon, "delta": self.delta, "max_grad_norm": max_grad_norm, "views": views}
        return Privacy.for_steps(steps, batch_size, PRIVATE_RECORDS, **promise)

    def reasons(self) -> dict[str, str]:
        """Say how each setting was chosen: by the docstring above, or that it was set for this run."""
        texts = {param.arg_name: param.description for param in docstring_parser.parse(self.__doc__).params}
        changed = {f.name: f.default for f in fields(self) if getattr(self, f.name) != f.default}
        return {
            name: f"set for this run, instead of {changed[name]}" if name in changed else " ".join(text.split())
            for name, text in texts.items()
        }


SETTINGS, EPSILONS, DEFAULT_RUN = DemoSettings(), Floats([10.0]), Path("runs/demo")
# These settings take about a minute: they show that all stages work, but the images do not resemble digits yet.
QUICK = {
    "public_images": 1000,
    "public_steps": 30,
    "public_ema_decay": 0.9,
    "choice_images": 1000,
    "choice_steps": 10,
    "steps": 10,
    "strict_steps": 10,
    "views": 1,
    "strict_views": 1,
    "synthetic_images": 200,
    "sampler_steps": 10,
    "classifier_steps": 100,
    "dpsgd_steps": 20,
    "dpsgd_strict_steps": 20,
    "dpsgd_views": 1,
}


def demo(
    run: Path = DEFAULT_RUN,
    *,
    epsilon: Floats = EPSILONS,
    seeds: int = 1,
    quick: bool = False,
    settings: DemoSettings = SETTINGS,
    device: Device = "auto",
    progress: bool = True,
) -> None:
    """Pre-train on fonts, fine-tune privately on real digits, generate images, test them: one table and report.html.

    1,437 handwritten digits stand for private data; digits drawn from fonts are the public data. A noisy statistic says
    which public digits are like the private ones, and the public model is trained further on them before adapters are trained
    privately; the budget covers both. A classifier is trained on synthetic digits alone and tested on 360 real ones;
    it is compared with classifiers of both public models' digits, DP-SGD on the private digits, and training without privacy.
    Writes report.html, results.json and results.md. Interrupted, it continues when it is called again. Its seeds are
    fixed, so that it can be repeated: an experiment, not a private release.

    Args:
        run: folder for all results.
        epsilon: privacy budgets, separated by commas.
        seeds: number of repetitions of all stages; the table has their mean and standard deviation.
        quick: whether to take about a minute on two cores instead of several, with too few steps and images for good results.
        settings: all hyper-parameters, and how each was chosen.
        device: device to compute on.
        progress: whether to show progress bars.
    """
    if quick:
        settings = replace(settings, **QUICK)
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if len(set(epsilon)) < max(1, len(epsilon)):
        raise UserError(f"epsilon must be one number or several different ones, got {list(epsilon)}")
    for budget in epsilon:  # checked before the work begins
        settings.privacy(budget), settings.dpsgd_privacy(budget), settings.choice(budget)
        settings.fine_tuning(budget, seed=0), settings.dpsgd_training(budget, seed=0)
    run = Path(run)
    experiment = _Experiment(run, settings, device, progress, stages=seeds * (4 + 7 * len(epsilon)))
    for seed in range(seeds):
        experiment.public_part(seed)
        for budget in epsilon:
            experiment.private_part(seed, budget)
    outcome = experiment.outcome()
    outcome.write(run)
    title = f"Accuracy on 360 real digits, {seeds} seed{'s' * (seeds > 1)}"
    rich.print(result_table(outcome.results, title).for_terminal())
    logger.info("report: %s", run / "report.html")


@dataclass
class _Experiment:
    """An experiment that runs the stages and keeps their results in the form that `Outcome` has."""

    run: Path
    settings: DemoSettings
    device: Device
    progress: bool
    stages: int
    accuracies: dict[tuple[str, float], list[float]] = field(default_factory=lambda: defaultdict(list))
    statements: dict[tuple[str, float, int], dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def public_part(self, seed: int) -> None:
        """Make the public model and its samples, and the classifier without privacy."""
        s, folder, name = self.settings, self._folder(seed), f"seed {seed}"
        self._stage(
            f"{name}: pre-train on {s.public_images} font digits",
            lambda: pretrain(folder, count=s.public_images, training=s.public_training(seed), **self._common),
            folder / "public",
        )
        self._generate(f"{name}: public model", folder, seed, s.guidance, public=True)
        self._judge(f"{name}: public model", folder, seed, (PUBLIC_ONLY, 0.0), public=True)
        self._judge(f"{name}: no privacy", folder, seed, (NO_PRIVACY, float("inf")), train="digits")

    def private_part(self, seed: int, epsilon: float) -> None:
        """Make the chosen public model, the adapters and their samples, and DP-SGD's classifier, at one budget."""
        s, folder, name = self.settings, self._folder(seed, epsilon), f"seed {seed}, epsilon {epsilon:g}"
        model, guidance = {"model": folder / CHOSEN}, s.at(epsilon).guidance
        options = {
            "choice": s.choice(epsilon),
            "count": s.choice_images,
            "model": self._folder(seed) / "public",
            "seed": seed,
        }
        self._stage(
            f"{name}: choose among {s.choice_images} font digits, {s.choice_steps} public steps",
            lambda: choose(folder, delta=s.delta, records=PRIVATE_RECORDS, **options, **self._common),
            folder / CHOSEN,
        )
        self.statements[CHOSEN_ONLY, epsilon, seed] = read_statement(folder / CHOSEN)
        self._generate(f"{name}: chosen public model", folder, seed, guidance, public=True, **model)
        self._judge(f"{name}: chosen public model", folder, seed, (CHOSEN_ONLY, epsilon), public=True)
        options = {"adapter": Adapter(rank=s.rank), "training": s.fine_tuning(epsilon, seed), **model, **self._common}
        self.statements[LODA, epsilon, seed] = self._stage(
            f"{name}: fine-tune, {s.privacy(epsilon).steps} private steps",
            lambda: finetune(folder, s.privacy(epsilon), **options),
            folder / "private",
        )
        self._generate(f"{name}: private model", folder, seed, guidance, **model)
        self._judge(f"{name}: private model", folder, seed, (LODA, epsilon))
        train, test = digits_split()
        classifier = self._stage(
            f"{name}: DP-SGD, {s.dpsgd_privacy(epsilon).steps} private steps",
            lambda: train_classifier_privately(
                folder, s.dpsgd_privacy(epsilon), train, s.dpsgd_training(epsilon, seed), **self._common
            ),
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
            for method, name in ((LODA, "private"), (DPSGD, "dpsgd")):
                curves[f"{method}, epsilon {epsilon:g}: what was spent, by step"] = folder / name / EPSILON_CURVE
        return Outcome(
            self.accuracies,
            self.statements,
            self.seconds,
            asdict(self.settings),
            self.settings.reasons(),
            environment(resolve_device(self.device)),
            grids,
            curves,
        )

    def _generate(self, name: str, folder: Path, seed: int, guidance: float, **source) -> None:
        s = self.settings
        options = {"count": s.synthetic_images, "steps": s.sampler_steps, "guidance": guidance, "seed": seed}
        self._stage(
            f"{name}: draw {s.synthetic_images} synthetic digits",
            lambda: sample(folder, **options, **source, **self._common),
            folder / ("samples-public" if source.get("public") else "samples"),
        )

    def _judge(self, name: str, folder: Path, seed: int, key: tuple[str, float], **source) -> None:
        classifier = Classifier(steps=self.settings.classifier_steps, width=self.settings.classifier_width, seed=seed)
        options = {"classifier": classifier, **source, **self._common}
        found = self._stage(f"{name}: train and test a classifier", lambda: evaluate(folder, **options))
        self.accuracies[key].append(found["accuracy"])

    def _stage(self, name: str, work: Callable[[], T], folder: Path | None = None) -> T:
        """Do one stage: log a line, and note the time that its work took, whenever that was."""
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
