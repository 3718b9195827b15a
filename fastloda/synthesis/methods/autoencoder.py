"""A small autoencoder of public images, in whose latent space a diffusion model can work (Rombach et al. 2022)."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda.progress import Progress
from fastloda.randomness import seeded
from fastloda.synthesis.data import LabelledImages

from .base import Work
from .shared_weights import public_weights

LATENT_CHANNELS = 3  # as many as images have, so that latents can be handled as images


class Autoencoder(nn.Module):
    """An autoencoder from images [n, C, S, S] to latents [n, 3, S / f, S / f] in [-1, 1] and back, f = 2^halvings."""

    def __init__(self, channels: int, halvings: int, width: int):
        super().__init__()
        down = [_conv(channels, width), *(_conv(width, width, stride=2) for _ in range(halvings))]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1), nn.Tanh())
        up = [layer for _ in range(halvings) for layer in (nn.Upsample(scale_factor=2), _conv(width, width))]
        self.decoder = nn.Sequential(
            _conv(LATENT_CHANNELS, width), *up, nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images to latents on the CPU, each from its own image."""
        return self._by_parts(self.encoder, images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images on the CPU, each from its own latent."""
        return self._by_parts(self.decoder, latents)

    def _by_parts(self, network: nn.Module, images: Tensor) -> Tensor:
        device = next(self.parameters()).device
        return torch.cat([network(part.to(device)).cpu() for part in images.split(512)])


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())


@dataclass(frozen=True)
class AutoencoderTraining:
    """The settings of training: halvings of the side; width, a multiple of 8; steps, batch_size and learning_rate of Adam."""

    halvings: int = 1
    width: int = 32
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 2e-3

    def fit(self, public: LabelledImages, work: Work) -> Autoencoder:
        """Train an autoencoder on public images by mean squared error, or load it from work.public_folder if it is there."""
        network = self._network(public.images.shape[1], work)
        weights = public_weights("autoencoder", asdict(self), public, work, lambda: self._train(network, public, work))
        network.load_state_dict(weights)
        return network

    def _train(self, network: Autoencoder, public: LabelledImages, work: Work) -> Autoencoder:
        optimizer = torch.optim.Adam(network.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(work.public_seed)
        for _ in Progress("autoencoder", self.steps, shown=work.progress).over(range(self.steps)):
            index = torch.randint(len(public), (self.batch_size,), generator=generator)
            images = public.images[index].to(work.device)
            optimizer.zero_grad()
            F.mse_loss(network.decoder(network.encoder(images)), images).backward()
            optimizer.step()
            schedule.step()
        return network

    def _network(self, channels: int, work: Work) -> Autoencoder:
        with seeded(work.public_seed):
            return Autoencoder(channels, self.halvings, self.width).to(work.device)
