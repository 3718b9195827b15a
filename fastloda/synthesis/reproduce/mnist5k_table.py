"""The table of 5,000 digits of MNIST, at the paper's resolution, for two cores."""

from dataclasses import replace
from functools import cache, partial

from fastloda.synthesis.data import LabelledImages, stratified_subset
from fastloda.synthesis.data.mnist5k import font_digits_as_mnist, mnist5k_split
from fastloda.synthesis.diffusion import UNetConfig
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import (
    DPLDM,
    DPMEPF,
    DPMERF,
    AutoencoderTraining,
    ChosenLoDA,
    Direct,
    DirectDPSGD,
    DPDiffusion,
    DPLoDA,
    NoDP,
    PrivateTuning,
    PublicChoice,
    PublicModel,
    PublicOnly,
)
from fastloda.synthesis.methods.autoencoder import LATENT_CHANNELS
from fastloda.synthesis.methods.dp_sgd import DPSGD
from fastloda.synthesis.settings import Classifier, FineTuning

from .recipe import BEFOREHAND, Recipe, Variant, by_epsilon

SHAPE = {"in_channels": 1, "norm_groups": 8, "blocks_per_level": 1, "process": "edm"}
UNET = UNetConfig(image_size=28, width=16, multipliers=(1, 2, 2), attention=(2,), **SHAPE)
LATENT_UNET = UNetConfig(
    image_size=7, width=32, multipliers=(1,), attention=True, **SHAPE | {"in_channels": LATENT_CHANNELS}
)
IMAGES, PUBLIC_IMAGES = 4000, 40_000
CHOICE_NOISE = {1.0: 4.2, 5.0: 1.3, 10.0: 1.0}
AS_FOR_DIGITS = "as for the small digits, and beforehand where they say nothing; no trial was made at this size"


def mnist5k(variant: Variant) -> Recipe:
    """Make the recipe: the private images, the U-Net and its settings at 28 x 28 pixels, for some hours on two cores."""
    quick = variant.quick
    model = PublicModel(variant.shape(UNET), _public(2 if quick else 3000))
    loda = DPLoDA(model, by_epsilon(lambda epsilon: _tuning(epsilon, quick)))
    all_weights = by_epsilon(lambda epsilon: _of_all_weights(_tuning(epsilon, quick)))
    latent_model = replace(model, unet=variant.shape(LATENT_UNET))
    judge = Classifier(steps=10 if quick else 1000)
    moments = {"steps": 10, "encoder_steps": 10} if quick else {"steps": 2000, "encoder_steps": 800}
    direct = Direct(
        DPSGD(learning_rate=0.15, ema_decay=0.97, width=16), steps=5 if quick else 250, batch_size=50 if quick else 512
    )
    return Recipe(
        name="mnist5k",
        title="Private MNIST digits, public font digits, at 28 x 28 pixels",
        lead="4,000 of MNIST's digits are private, digits drawn from fonts public; tested on 1,000 others of MNIST's.",
        private=lambda: _some(0, quick),
        test=lambda: _some(1, quick),
        public=cache(partial(font_digits_as_mnist, 500 if quick else PUBLIC_IMAGES, seed=0)),
        methods=[
            PublicOnly(model, loda.tunings.at(10.0)),
            loda,
            ChosenLoDA(loda, by_epsilon(lambda epsilon: _choice(epsilon, quick)), samples_reach=0.1),
            DPDiffusion(model, all_weights),
            DPLDM(AutoencoderTraining(halvings=2, steps=10 if quick else 1000), latent_model, all_weights),
            DPMEPF(**moments),
            DPMERF(steps=moments["steps"]),
            DirectDPSGD(by_epsilon(lambda epsilon: direct)),
            NoDP(judge),
        ],
        classifiers={"cnn": judge},
        synthetic_images=20 if quick else IMAGES,
        how_chosen={
            "DP-LoDA": AS_FOR_DIGITS,
            "DP-LoDA on chosen data": AS_FOR_DIGITS,
            "DP-SGD": AS_FOR_DIGITS,
            "the others": BEFOREHAND,
        },
        extractor_steps=10 if quick else 500,
        public_seed=0,  # training the public model takes half an hour
    )


def _some(part: int, quick: bool) -> LabelledImages:
    images = mnist5k_split()[part]
    return stratified_subset(images, count=200) if quick else images


def _public(steps: int) -> PublicTraining:
    return PublicTraining(
        steps=steps, batch_size=min(128, 8 * steps), warmup=min(50, steps), ema_decay=1 - 1 / max(2, steps / 4)
    )


def _tuning(epsilon: float, quick: bool) -> PrivateTuning:
    steps, views = (3, 1) if quick else (100, 4) if epsilon < 3 else (200, 2)
    training = FineTuning(learning_rate=1e-2, schedule="cosine", micro_batch_size=128 // views)
    return PrivateTuning(steps, 50 if quick else 500, views, training=training, sampler_steps=2 if quick else 18)


def _of_all_weights(tuning: PrivateTuning) -> PrivateTuning:
    return replace(tuning, training=replace(tuning.training, learning_rate=tuning.training.learning_rate / 10))


def _choice(epsilon: float, quick: bool) -> PublicChoice:
    training = _public(5 if quick else 600)
    return PublicChoice(CHOICE_NOISE[epsilon], drawn=50 if quick else 8000, training=training)
