"""DP-LDM (Lyu et al. 2023, https://arxiv.org/abs/2305.15759): a latent diffusion model with privately tuned attention.

Autoencoder and latent U-Net are trained on public images. Then only the attention blocks and the class embedding train, on the
latents of the private images. With adapters instead, it is LoDA on a latent diffusion model: the paper's future work.
"""

from dataclasses import dataclass, replace

from fastloda.randomness import seeded
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion.unet import Attention, UNet
from fastloda.synthesis.settings import Adapter

from .autoencoder import Autoencoder, AutoencoderTraining
from .base import Budget, ByEpsilon, Sampler, Work
from .diffusion_model import Coder, PrivateTuning, PublicModel, tune


@dataclass(frozen=True)
class DPLDM:
    """The method DP-LDM.

    `autoencoder` and `public` are the settings of training both models on public images; `public` is a model of latents.
    `tunings` are the settings of private training for each budget. `adapter`, if given, is LoDA's, which trains in place of
    attention and class embedding.
    """

    autoencoder: AutoencoderTraining
    public: PublicModel
    tunings: ByEpsilon[PrivateTuning]
    adapter: Adapter | None = None
    name: str = "DP-LDM"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        coder = self.autoencoder.fit(public, work)
        model = self._latent_model(coder).fit(_encoded(public, coder), work)
        if self.adapter is None:
            tune_attention_alone(model)
        else:
            with seeded(work.seed):
                self.adapter.attach(model)
        tuning = self.tunings.at(budget.epsilon)
        return tune(model, private, budget, tuning, work, Coder(coder.encode, coder.decode))

    def _latent_model(self, coder: Autoencoder) -> PublicModel:
        """Make the settings of the public model, whose unconditional training learns latents too."""
        everything = self.public.everything
        return replace(self.public, everything=everything and (lambda: _encoded(everything(), coder)))


def _encoded(data: LabelledImages, coder: Autoencoder) -> LabelledImages:
    return LabelledImages(coder.encode(data.images), data.labels, data.num_classes)


def tune_attention_alone(model: UNet) -> None:
    """Freeze all parameters except those of the attention blocks and the class embedding."""
    model.requires_grad_(False)
    model.cemb_layer.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, Attention):
            module.requires_grad_(True)
