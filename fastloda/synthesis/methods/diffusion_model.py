"""Parts that the diffusion methods share: the public model, private training of its trainable parameters, and sampling."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastloda.randomness import seeded
from fastloda.synthesis.budget import CHECKPOINT, Privacy, fit_average, private_trainer
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import Process, UNet, UNetConfig
from fastloda.synthesis.diffusion import sample as draw_samples
from fastloda.synthesis.diffusion.pretrain import PublicTraining, pretrain
from fastloda.synthesis.models import load_unet, save_unet
from fastloda.synthesis.settings import Drawing, FineTuning
from fastloda.training.average import in_eval_mode
from fastloda.training.saliency import release_saliency

from .base import Budget, Release, Sampler, Spent, Work
from .cost import step_cost
from .layer_choice import LayerChoice, once
from .shared_weights import only_one, public_path


@dataclass(frozen=True)
class PublicModel:
    """A diffusion model's training on public images: with classes from the start, or first without labels.

    Attributes:
        unet: shape of the U-Net.
        conditional: settings of the training with labels.
        unconditional: settings of the training without labels that comes first; None leaves it out.
        everything: function that returns the images of the unconditional training, with any classes; None: those of the
            conditional training. A model that is in work.public_folder is loaded whatever images the function returns now.
    """

    unet: UNetConfig
    conditional: PublicTraining
    unconditional: PublicTraining | None = None
    everything: Callable[[], LabelledImages] | None = field(default=None, repr=False)

    def fit(self, public: LabelledImages, work: Work) -> UNet:
        """Train the model on images of the private classes, or load it from work.public_folder; resume if interrupted."""
        path = public_path("unet", self._about(), public, work)
        checkpoint = path.with_suffix(".pt")
        with only_one(path):
            if not path.exists():
                save_unet(self.train(public, work.public_seed, work.device, checkpoint, work.progress), path)
                for finished in (checkpoint, _before(checkpoint)):
                    finished.unlink(missing_ok=True)
        return load_unet(path, work.device)

    def train(
        self, public: LabelledImages, seed: int, device: torch.device, checkpoint: Path, progress: bool = True
    ) -> UNet:
        """Train the model; resume from `checkpoint` and the one beside it, both of which the caller deletes."""
        with seeded(seed):
            model = UNet(self.unet).to(device, memory_format=torch.channels_last)
        options = {"progress": progress}
        if self.unconditional is not None:
            first = _before(checkpoint)
            everything = _unlabelled(self.everything() if self.everything else public)
            without_labels = replace(self.unconditional, label_dropout=1.0, seed=seed)
            pretrain(model, everything, without_labels, checkpoint=first, **options)
        pretrain(model, public, replace(self.conditional, seed=seed), checkpoint=checkpoint, **options)
        return model

    def _about(self) -> list:
        """Describe the settings, without the images of `everything`: hashing all of ImageNet would load it."""
        return [asdict(replace(self, everything=None)), self.everything is not None]


def _before(checkpoint: Path) -> Path:
    """Return the path of the checkpoint of the unconditional training."""
    return checkpoint.with_suffix(".unconditional.pt")


def _unlabelled(data: LabelledImages) -> LabelledImages:
    """Replace all labels by 0, which any model has: training drops all labels anyway."""
    return LabelledImages(data.images, torch.zeros_like(data.labels), 1)


@dataclass(frozen=True)
class PrivateTuning:
    """The settings of one private run of a diffusion model.

    Attributes:
        steps, batch_size: number of private steps, and expected number of records in each.
        views: number of noise draws per record and step, averaged before clipping.
        max_grad_norm: the clipping bound.
        bands: number of steps over which the noise is correlated; 1: independent noise.
        training: settings of optimizer, schedule, timesteps and averaging.
        guidance, sampler_steps, stochasticity: weight of guidance, number of steps, and fresh noise of each, in sampling.
        time_weights: ranges of timesteps (first, end, share) that replace training.timesteps: a mixture of uniform distributions
            (Ghalebikesabi et al. 2023, section 3.2).
    """

    steps: int = 400
    batch_size: int = 256
    views: int = 2
    max_grad_norm: float = 1e-3
    bands: int = 1
    training: FineTuning = field(default_factory=FineTuning)
    guidance: float = 0.0
    sampler_steps: int = 50
    stochasticity: float = 0.0
    time_weights: tuple[tuple[int, int, float], ...] = ()

    @property
    def drawing(self) -> Drawing:
        return Drawing(self.sampler_steps, self.guidance, self.stochasticity)

    def privacy(self, budget: Budget) -> Privacy:
        promise = {"max_grad_norm": self.max_grad_norm, "views": self.views, "bands": self.bands}
        return budget.in_steps(self.steps, self.batch_size, **promise)

    def trained(self, process: Process) -> Process:
        """Restrict a model's process to the noise levels of private training."""
        return process.mixture(self.time_weights) if self.time_weights else process.between(*self.training.timesteps)


@dataclass(frozen=True)
class Coder:
    """Two public maps, applied to each image separately, between images and the space in which the diffusion model works."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


IDENTITY = Coder(lambda images: images, lambda images: images)
ALL_LAYERS = LayerChoice()


def tune(
    model: UNet,
    private: LabelledImages,
    budget: Budget,
    tuning: PrivateTuning,
    work: Work,
    coder: Coder = IDENTITY,
    earlier: tuple[Release, ...] = (),
    layers: LayerChoice = ALL_LAYERS,
) -> Sampler:
    """Train the trainable parameters of `model` by DP-SGD on the diffusion loss; the sampler uses their average.

    `earlier` are releases about the same records. The budget covers them too, and that of a choice of `layers` to adapt.
    """
    options = replace(tuning.training, seed=work.seed).optimization()
    losses = tuning.training.losses(tuning.trained(model.process), tuning.views)
    records = (coder.encode(private.images)[:], private.labels)
    work.folder.mkdir(parents=True, exist_ok=True)
    release = partial(
        release_saliency,
        *(model, records, losses),
        records=budget.records,
        noise_multiplier=layers.noise_multiplier,
        views=tuning.views,
        micro_batch_size=tuning.training.micro_batch_size,
        seed=work.seed,
    )
    layers.keep_best(model, lambda: once(work.folder / "saliency.json", release), work.seed)
    earlier = (*earlier, *layers.releases)
    before = [each[1:] for each in earlier]
    where = {"checkpoint": work.folder / CHECKPOINT, "earlier": before, "progress": work.progress}
    trainer = private_trainer(model, records, losses, tuning.privacy(budget), options, **where)
    fit_average(trainer)
    spent = Spent(budget.delta, (*earlier, Release.of(trainer)))
    found = sampler(model, tuning, private.num_classes, spent, work, coder)
    return replace(found, cost=step_cost(trainer, records))


def sampler(
    model: UNet, tuning: PrivateTuning, num_classes: int, spent: Spent, work: Work, coder: Coder = IDENTITY
) -> Sampler:
    """Make a sampler from the model as it is now. Its draw() takes the arguments `varied` and `strength` of `sample` too."""

    def draw(labels: Tensor, seed: int, **start) -> Tensor:
        options = {"seed": seed, "progress": work.progress}
        return coder.decode(draw_samples(model, labels, **asdict(tuning.drawing), **options, **start))

    return Sampler(draw, num_classes, spent, loss=partial(mean_loss, model) if coder is IDENTITY else None)


@torch.no_grad()
def mean_loss(model: UNet, data: LabelledImages, views: int = 8, batch_size: int = 250) -> float:
    """Compute the mean diffusion loss on images with their labels, of which a tenth are dropped, as in training.

    Noise levels, noise and dropped labels are the same for all models.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    losses = []
    with in_eval_mode(model):
        for part in torch.arange(len(data)).split(batch_size):
            batch = data.images[part].to(device), data.labels[part].to(device)
            losses.append(model.process.losses(model, *batch, views=views, generator=generator))
    return torch.cat(losses).mean().item()
