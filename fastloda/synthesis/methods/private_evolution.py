"""Private Evolution (Lin et al. 2024, https://arxiv.org/abs/2305.15560): public samples that private images vote for.

Nothing is trained on the private images. In each round every private image votes for the nearest sample of its own class, by
the features of a classifier of public images; the votes are released with noise. Then samples are drawn according to their votes,
and the public model varies them, image to image: noise is added up to some level and removed again. The level is usually lower
in each round.

The votes of all classes form one histogram, in which a record changes one count by 1: a round is a Gaussian mechanism of
sensitivity 1, and the rounds compose. A record that is not finite has no vote.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastloda.accounting.calibrate import calibrate_noise
from fastloda.errors import UserError
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNet
from fastloda.synthesis.diffusion import sample as draw_samples

from .base import Budget, ByEpsilon, Release, Sampler, Spent, Work
from .diffusion_model import PublicModel
from .gaussian_release import alone, noise_stream, release_class_sums
from .public_classifier import public_classifier

WHAT = "votes for samples"


@dataclass(frozen=True)
class Evolution:
    """The settings of one evolution.

    Attributes:
        samples: number of samples in the population, equally many of each class. With fewer samples, each has more votes, which
            stand out from stronger noise.
        strengths: share of the sampler's steps by which the winners of each round are varied; there are as many rounds.
        threshold: number of standard deviations of the noise that is taken off each sample's votes; fewer than these are none.
        sampler_steps: number of steps of the sampler.
        encoder_steps: number of training steps of the classifier whose features define what is near.
    """

    samples: int = 2000
    strengths: tuple[float, ...] = (0.6, 0.5, 0.4, 0.3, 0.2)
    threshold: float = 1.0
    sampler_steps: int = 25
    encoder_steps: int = 800

    def __post_init__(self):
        if min(self.samples, self.sampler_steps, self.encoder_steps) < 1 or not self.threshold >= 0:
            raise UserError(
                f"an evolution needs samples, sampler_steps, encoder_steps >= 1 and threshold >= 0, got {self}"
            )
        if not self.strengths or not all(0 < strength <= 1 for strength in self.strengths):
            raise UserError(f"an evolution's strengths must lie in (0, 1], one a round, got {self.strengths}")


@dataclass(frozen=True)
class PrivateEvolution:
    """The method Private Evolution, with the public model as the generator, and its settings for each budget."""

    public: PublicModel
    evolutions: ByEpsilon[Evolution]
    name: str = "Private Evolution"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        settings, classes = self.evolutions.at(budget.epsilon), private.num_classes
        rounds = len(settings.strengths)
        noise, stream = calibrate_noise(budget.epsilon, budget.delta, 1.0, rounds), noise_stream(work.seed)
        generator = _Generator(self.public.fit(public, work), settings.sampler_steps, work.progress)
        embed = _embedding(public, settings.encoder_steps, work)
        records = alone(embed, private.images)

        labels = torch.arange(classes).repeat_interleave(-(-settings.samples // classes))

        def vote(samples: Tensor) -> Population:
            candidates = torch.cat([embed(part) for part in samples.split(512)]).unflatten(0, (classes, -1))
            votes = nearest(records, private.labels, candidates)
            noisy, _ = release_class_sums(WHAT, votes, private.labels, classes, noise, stream)
            return Population(samples.unflatten(0, (classes, -1)), winners(noisy, settings.threshold * noise))

        population = vote(generator.draw(labels, work.seed))
        for number, strength in enumerate(settings.strengths[:-1], start=1):
            population = vote(generator.offspring(population, labels, strength, work.seed + number))

        def draw(labels: Tensor, seed: int) -> Tensor:
            return generator.offspring(population, labels, settings.strengths[-1], seed)

        return Sampler(draw, classes, Spent(budget.delta, (Release(WHAT, 1.0, noise, rounds),)))


class Population(NamedTuple):
    """Samples of each class, [classes, each, C, H, W], and the weights by which parents are drawn, [classes, each]."""

    samples: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Generator:
    """The public model, which draws samples and varies them."""

    model: UNet
    steps: int
    progress: bool

    def draw(self, labels: Tensor, seed: int, **varied) -> Tensor:
        options = {"steps": self.steps, "seed": seed, "progress": self.progress, **varied}
        return draw_samples(self.model, labels, **options).clamp(-1, 1)

    def offspring(self, population: Population, labels: Tensor, strength: float, seed: int) -> Tensor:
        """Draw a parent for each label, and vary it."""
        chance = torch.Generator().manual_seed(seed)
        parents = torch.multinomial(population.weights[labels], 1, generator=chance)[:, 0]
        return self.draw(labels, seed, varied=population.samples[labels, parents], strength=strength)


def _embedding(public: LabelledImages, steps: int, work: Work) -> Callable[[Tensor], Tensor]:
    """Return the function from images to the input of a classifier's last layer, [n, d]."""
    features = public_classifier(public, steps, work).features

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        return features(images.to(work.device)).flatten(1).cpu()

    return embed


def nearest(records: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """Let each record [n, d] vote for the nearest candidate [classes, each, d] of its class: [n, each], with one 1 in each row.

    Each record's distances are computed separately (see `alone`). A record that is not finite has no vote.
    """
    votes = torch.zeros(len(records), candidates.shape[1])
    for record, label, vote in zip(records, labels.tolist(), votes):
        if record.isfinite().all():
            vote[(candidates[label] - record).square().sum(1).argmin()] = 1.0
    return votes


def winners(noisy: Tensor, threshold: float) -> Tensor:
    """Turn noisy votes [classes, each] into weights: what exceeds the threshold; equal ones if nothing does in a class."""
    weights = (noisy - threshold).clamp(min=0.0)
    return weights.where(weights.sum(1, keepdim=True) > 0, 1.0)
