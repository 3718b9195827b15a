"""The recipe of a run from public and private images to synthetic ones: the settings of all stages, and methods to run them."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from fastloda.synthesis import stages
from fastloda.synthesis.budget import Privacy, private_training
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods.diffusion_model import PrivateTuning
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.presets import (
    batch_size,
    default_delta,
    private_tuning,
    public_batch_size,
    public_choice,
    public_training,
)
from fastloda.synthesis.settings import Adapter
from fastloda.synthesis.stages.sampling import check_sampling


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, computed from public facts only.

    Attributes:
        pretraining: settings of public training.
        choice: settings of the private choice of public images; None leaves it out.
        privacy: promise that all releases about the private images keep in total.
        tuning: settings of private training and of sampling.
        adapter: settings of the adapters.
        count: number of synthetic images.
        seed: seed of everything; with None, the private randomness comes from the operating system.
    """

    pretraining: PublicTraining
    choice: PublicChoice | None
    privacy: Privacy
    tuning: PrivateTuning
    adapter: Adapter
    count: int
    seed: int | None

    @classmethod
    def fitting(
        cls,
        epsilon: float,
        records: int,
        size: int,
        *,
        delta: float | None = None,
        choose: bool = False,
        count: int,
        public_steps: int,
        public_batch: int | None = None,
        private_steps: int | None = None,
        sampler_steps: int,
        rank: int = 4,
        seed: int | None = None,
    ) -> Self:
        """Make the recipe for a budget, a nominal number of records, and images of `size` pixels; the rest is as in `synthesize`.

        Raises:
            UserError: an argument is impossible.
        """
        tuning = private_tuning(epsilon, size, seed)
        steps = tuning.steps if private_steps is None else private_steps
        tuning = replace(tuning, steps=steps, batch_size=batch_size(records), sampler_steps=sampler_steps)
        check_sampling(count, sampler_steps, tuning.guidance)
        promise = {"target_epsilon": epsilon, "delta": default_delta(records) if delta is None else delta}
        promise |= {"max_grad_norm": tuning.max_grad_norm, "views": tuning.views}
        privacy = Privacy.for_steps(steps, tuning.batch_size, records, **promise)
        pretraining = public_training(public_steps, public_batch or public_batch_size(size), seed or 0)
        choice = public_choice(epsilon, pretraining) if choose else None
        return cls(pretraining, choice, privacy, tuning, Adapter(rank), count, seed)

    def noise_multiplier(self) -> float:
        """Compute the noise of private training that keeps the promise; a choice of public images is counted too."""
        earlier = [] if self.choice is None else [release[1:] for release in self.choice.releases]
        return private_training(self.privacy, earlier, **self.tuning.training.optimization()).noise_multiplier

    def pretrain(self, run: Path, **options) -> dict:
        """Run `stages.pretrain`; like the methods below, it passes further options on to its stage."""
        return stages.pretrain(run, training=self.pretraining, **options)

    def choose(self, run: Path, **options) -> dict:
        privacy = {"delta": self.privacy.delta, "records": self.privacy.records}
        return stages.choose(run, choice=self.choice, seed=self.seed, **privacy, **options)

    def finetune(self, run: Path, **options) -> dict:
        return stages.finetune(run, self.privacy, adapter=self.adapter, training=self.tuning.training, **options)

    def sample(self, run: Path, **options) -> dict:
        tuning = self.tuning
        sampling = asdict(tuning.drawing) | {"seed": self.seed or 0}
        at_once = min(256, tuning.training.micro_batch_size)
        return stages.sample(run, count=self.count, batch_size=at_once, **sampling, **options)
