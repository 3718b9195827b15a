"""Trials of the demo's hyper-parameters on public data only: font digits written by another "hand" stand in for private ones.

    python scripts/tune_demo.py '{"learning_rate": 0.006}' '{"epsilon": 1, "steps": 100}'

Each argument is one trial: what differs from the defaults below. Prints the accuracy of a classifier trained on the synthetic
digits and tested on 2,000 held-out ones of the same hand. docs/results/demo-tuning.md lists the trials that were made.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastloda import DPTrainer, PrivateTraining, attach_loda, calibrate_noise
from fastloda.adapt import loda_layers
from fastloda.classify import accuracy, train_classifier
from fastloda.data import Hands, LabelledImages, font_digits
from fastloda.diffusion import Diffusion, class_balanced_labels, digits_unet, sample
from fastloda.diffusion.pretrain import PublicTraining, pretrain
from fastloda.methods import PublicChoice
from fastloda.methods.gaussian_release import noise_stream

RECORDS, DELTA = 1437, 1e-5
DEFAULTS = {
    "epsilon": 10.0,
    "choice_noise": None,  # a number: the public model is first trained further on chosen font digits
    "choice_tolerance": 2.0,
    "steps": 250,
    "batch_size": 256,
    "views": 2,
    "max_grad_norm": 1e-3,
    "learning_rate": 1.5e-2,
    "ema_decay": 0.98,
    "schedule": "constant",
    "timesteps": [0, 1000],
    "rank": 4,
    "scale": 1.0,
    "targets": None,
    "train_A": True,
    "samples": 1000,
    "guidance": 0.0,
}
ONE_HAND = Hands(angle=(-0.15, 0.15), slant=(-0.2, 0.2), stretch=(0.8, 1.3), pen=(0.05, 0.09), bend=0.0)
SWIRL, SLANT, WOBBLE = (
    0.33,
    -0.45,
    0.07,
)  # of the stand-in hand; a classifier of plain font digits gets about two thirds


def stand_in(count: int, seed: int) -> LabelledImages:
    """Font digits that vary little, swirled and slanted alike, each wobbling a little on its own."""
    digits = font_digits(count, seed + 12345, size=32, hands=ONE_HAND)
    generator = torch.Generator().manual_seed(seed)
    wobble = F.interpolate(
        WOBBLE * torch.randn(count, 2, 5, 5, generator=generator), size=(32, 32), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    slant = SLANT + 0.1 * torch.randn(count, generator=generator)
    affine = torch.eye(2, 3).repeat(count, 1, 1)
    affine[:, 0, 1] = slant
    x, y = F.affine_grid(affine, [count, 1, 32, 32], align_corners=False).unbind(-1)
    angle = SWIRL * 1.5 * torch.pi / 2 * (1 - (x**2 + y**2).sqrt().clamp(max=1))
    swirled = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    ink = F.avg_pool2d(F.grid_sample((digits.images + 1) / 2, swirled + wobble, align_corners=False), 4)
    ink = (ink / ink.amax((1, 2, 3), keepdim=True).clamp(min=0.3)).clamp(0, 1)
    return LabelledImages((ink * 16).round() / 8 - 1, digits.labels, 10)


def public_model(path: Path = Path("runs/tune-public.pt")) -> torch.nn.Module:
    """The demo's public model, kept for the next trials."""
    model = digits_unet().to(memory_format=torch.channels_last)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    pretrain(model, Diffusion(), font_digits(20_000, 0), PublicTraining(steps=2000, ema_decay=0.998))
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def trial(changes: dict) -> str:
    """Fine-tune, sample, classify; -> a line of the record."""
    s = DEFAULTS | changes
    began, diffusion = time.monotonic(), Diffusion.between(*s["timesteps"])
    train, test = stand_in(RECORDS, 0), stand_in(2000, 7)
    model, earlier = public_model(), ()
    if s["choice_noise"]:
        pool, choice = font_digits(100_000, 0), PublicChoice(s["choice_noise"], tolerance=s["choice_tolerance"])
        sums, release = choice.release(train, pool, 0, noise_stream(0))
        choice.train_further(model, pool, sums, RECORDS, seed=0)
        earlier = (release[1:],)
    torch.manual_seed(0)
    attach_loda(model, **{name: s[name] for name in ("rank", "scale", "targets")})
    for _, layer in loda_layers(model):
        layer.loda_A.requires_grad_(s["train_A"])
    rate = s["batch_size"] / RECORDS
    settings = PrivateTraining(
        sample_rate=rate,
        expected_batch_size=s["batch_size"],
        noise_multiplier=calibrate_noise(s["epsilon"], DELTA, rate, s["steps"], earlier),
        earlier=earlier,
        delta=DELTA,
        micro_batch_size=512 // s["views"],
        fixed_shape=False,
        seed=0,
        **{name: s[name] for name in ("steps", "views", "max_grad_norm", "learning_rate", "ema_decay", "schedule")},
    )

    def losses(model, batch, generator):
        return diffusion.losses(model, *batch, views=s["views"], generator=generator)

    trainer = DPTrainer(model, (train.images, train.labels), losses, settings).fit()
    labels = class_balanced_labels(s["samples"], 10)
    with trainer.average.in_place():
        images = sample(model, diffusion, labels, guidance=s["guidance"], seed=0)
    judge = train_classifier(LabelledImages(images.clamp(-1, 1), labels, 10), steps=400)
    return f"{json.dumps(changes)}: accuracy {accuracy(judge, test):.3f}, {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["{}"]:
        print(trial(json.loads(argument)), flush=True)
