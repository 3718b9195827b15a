"""The paper's own tables, in their full size, with step counts for a GPU."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from fastloda.errors import UserError
from fastloda.synthesis.data import LabelledImages, open_dataset, stratified_subset
from fastloda.synthesis.data.published import Split
from fastloda.synthesis.diffusion import UNetConfig, paper_unet
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import (
    DPLDM,
    DPMEPF,
    DPMERF,
    AutoencoderTraining,
    ByEpsilon,
    Direct,
    DirectDPSGD,
    DPDiffusion,
    DPLoDA,
    Method,
    NoDP,
    PrivateTuning,
    PublicModel,
    PublicOnly,
)
from fastloda.synthesis.methods.dp_diffusion import TIME_WEIGHTS
from fastloda.synthesis.methods.dp_sgd import DPSGD
from fastloda.synthesis.settings import Adapter, Classifier, FineTuning

from .published import Accuracies
from .recipe import BEFOREHAND, EPSILONS, Recipe, TableName, Variant

QUICK_IMAGES = 1000  # number of images of each published set in a quick run
IMAGENET10 = (
    " Which ten classes of ImageNet match CIFAR-10's is our own choice (`fastloda.synthesis.data.imagenet32.MATCHES`): the "
    "paper's could not be looked up, so the rows can't be compared with the published ones to the point."
)


@dataclass(frozen=True)
class _Scale:
    """The size of a run of the paper's tables: for a GPU, or (quick) just large enough to show that it runs."""

    unet: UNetConfig
    public_steps: int
    images: int
    classifier_steps: int
    private_epochs: int
    batch_size: int
    views: int
    sampler_steps: int = 50


def _paper_scale(variant: Variant, private_epochs: int, batch_size: int) -> _Scale:
    with torch.device("meta"):
        small = {"width": 8, "norm_groups": 4, "multipliers": (1, 1), "attention": (1,)} if variant.quick else {}
        unet = variant.shape(paper_unet(**small).config)
    if variant.quick:
        return _Scale(unet, 2, 40, 2, 1, batch_size, 1, sampler_steps=2)
    return _Scale(unet, 200_000, 50_000, 10_000, private_epochs, batch_size, 8)


def paper(
    name: TableName,
    title: str,
    names: tuple[str, str],
    variant: Variant,
    published: Accuracies,
    *,
    everything: str | None = None,
    private_epochs: int,
    batch_size: int,
    epsilons: tuple[float, ...] = EPSILONS,
    subset: float | None = None,
) -> Recipe:
    if variant.data is None:
        raise UserError(f"{name} reads published files: give their folder with --data (it holds {' and '.join(names)})")
    quick = variant.quick

    def open_part(name: str, split: Split) -> LabelledImages:
        images = open_dataset(name, variant.data, split, size=32, channels=3, partial=variant.partial)
        return stratified_subset(images, count=min(QUICK_IMAGES, len(images))) if quick else images

    whole = cache(lambda: open_part(names[0], "train"))
    private = cache(lambda: stratified_subset(whole(), fraction=subset, seed=0)) if subset else whole
    public, test = cache(lambda: open_part(names[1], "train")), cache(lambda: open_part(names[0], "test"))
    records = len(private())
    scale = _paper_scale(variant, private_epochs, min(batch_size, records))
    conditional = PublicTraining(
        scale.public_steps, min(128, len(public())), 2e-4, warmup=min(5000, scale.public_steps), ema_decay=0.999
    )
    all_public = cache(lambda: open_part(everything, "train")) if everything else None
    model = PublicModel(scale.unet, conditional, unconditional=conditional, everything=all_public)
    steps = max(1, round(scale.private_epochs * records / scale.batch_size))
    training = FineTuning(
        learning_rate=3e-4, ema_decay=0.999, flips=names[0] == "cifar10", micro_batch_size=512 // scale.views
    )
    loda = PrivateTuning(steps, scale.batch_size, scale.views, training=training, sampler_steps=scale.sampler_steps)
    natural = "flip-crop" if names[0] == "cifar10" else "jitter"
    usual = {"steps": scale.classifier_steps, "augment": natural, "norm": "batch"}
    judges = (
        {"cnn": Classifier(steps=2)}
        if quick
        else {
            "resnet9": Classifier(network="resnet9", **usual),
            "wrn-40-4": Classifier(network="wrn-40-4", optimizer="sgd", lr=0.1, weight_decay=5e-4, **usual),
        }
    )
    network = "cnn" if quick else "wrn-16-4"
    direct = Direct(DPSGD("sgd", 2.0, 0.0, 0.999, network, None, natural), steps, scale.batch_size, scale.views)
    same = lambda setting: ByEpsilon({epsilons[0]: setting})  # noqa: E731
    return Recipe(
        name=name,
        title=title,
        lead=f"{names[0]} is private ({records:,} images), {names[1]} public; tested on the test images of {names[0]}."
        + IMAGENET10 * (names[1] == "imagenet10"),
        private=private,
        test=test,
        public=public,
        methods=[
            DPLoDA(model, same(loda)),
            DPDiffusion(model, same(replace(loda, time_weights=TIME_WEIGHTS))),
            *_latent(scale, model, same(loda), quick),
            DPMEPF(**({"steps": 2, "encoder_steps": 2} if quick else {"steps": 50_000, "encoder_steps": 20_000})),
            DPMERF(steps=2 if quick else 50_000),
            DirectDPSGD(same(direct)),
            NoDP(judges["cnn" if quick else "wrn-40-4"]),
            PublicOnly(model, loda),
        ],
        classifiers=judges,
        synthetic_images=scale.images,
        how_chosen={"all": BEFOREHAND},
        epsilons=epsilons,
        published=published,
        extractor_steps=scale.classifier_steps,
    )


def _latent(scale: _Scale, model: PublicModel, tunings: ByEpsilon[PrivateTuning], quick: bool) -> list[Method]:
    """Make DP-LDM, and LoDA on the same latent model (future work in the paper), with latents of 3 x 8 x 8."""
    autoencoder = AutoencoderTraining(halvings=2, width=8 if quick else 128, steps=2 if quick else 50_000)
    latent_model = replace(model, unet=replace(scale.unet, image_size=8))
    loda = DPLDM(autoencoder, latent_model, tunings, Adapter(), name="DP-LoDA on latents")
    return [DPLDM(autoencoder, latent_model, tunings), loda]
