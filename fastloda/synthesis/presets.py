"""Settings that fit the image size and the promise, computed from public facts only: size, epsilon, nominal record count."""

import math
from dataclasses import replace

from fastloda.synthesis.diffusion import TIMESTEPS
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods.base import ByEpsilon
from fastloda.synthesis.methods.diffusion_model import PrivateTuning
from fastloda.synthesis.methods.moves import UNMOVED
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.settings import Classifier, FineTuning

STRICT, RELAXED = 0.0, 3.0  # the settings hold from these epsilons on
PUBLIC_STEPS, SAMPLER_STEPS = 2000, 50  # more of either would change little
SMALL = 16  # side in pixels below which images are treated as digits
# Chosen by trials on public digits in the place of private ones (docs/results/demo-tuning.md). Timesteps: the noisiest images
# of digits tell little about the private ones, and the least noisy ones little about their shape.
TUNINGS = ByEpsilon(
    {
        STRICT: PrivateTuning(
            steps=100,
            views=4,
            training=FineTuning(learning_rate=1.6e-2, schedule="cosine", timesteps=(200, 800)),
            guidance=0.25,
        ),
        RELAXED: PrivateTuning(
            steps=400, training=FineTuning(learning_rate=1e-2, schedule="cosine", timesteps=(100, 800))
        ),
    }
)
CHOICES = ByEpsilon({STRICT: PublicChoice(4.2), RELAXED: PublicChoice(4.0, tolerance=2.0, reach=UNMOVED)})


def default_delta(records: int) -> float:
    """Return the largest power of ten below 1 / (10 records)."""
    return 10.0 ** -len(str(10 * records))


def batch_size(records: int) -> int:
    """Return the expected number of records in a step: a quarter of few records, 256 of many, up to 1,024 of very many."""
    return min(math.ceil(records / 4), max(256, min(1024, records // 100)))


def micro_batch_size(size: int, views: int) -> int:
    """Return a number of records that takes about a gigabyte of memory with the presets of the U-Net."""
    return max(8, min(512, 2**17 // (size * size * views)))


def private_tuning(epsilon: float, size: int, seed: int | None) -> PrivateTuning:
    """Return the settings of private training for a budget and an image size; the batch size still depends on the records."""
    tuning = TUNINGS.at(epsilon)
    training = replace(tuning.training, micro_batch_size=micro_batch_size(size, tuning.views), seed=seed)
    if size >= SMALL:  # the range of timesteps was found on digits
        training = replace(training, timesteps=(0, TIMESTEPS))
    return replace(tuning, training=training)


def public_batch_size(size: int) -> int:
    """Return the number of images in a step of public training: fewer if they are larger."""
    return 256 if size < 32 else 128 if size < 48 else 64


def public_training(steps: int, batch_size: int, seed: int) -> PublicTraining:
    """Return the settings of public training, with an average over the last quarter of the steps."""
    ema_decay = 1 - 1 / max(2, steps / 4)
    return PublicTraining(steps=steps, batch_size=batch_size, warmup=min(50, steps), ema_decay=ema_decay, seed=seed)


def public_choice(epsilon: float, pretraining: PublicTraining) -> PublicChoice:
    """Return the settings of a choice of public images; its training gets shorter with that of the public model."""
    choice = CHOICES.at(epsilon)
    steps = min(choice.training.steps, math.ceil(choice.training.steps * pretraining.steps / PUBLIC_STEPS))
    images = min(choice.training.batch_size, pretraining.batch_size)
    training = replace(choice.training, steps=steps, batch_size=images, warmup=min(choice.training.warmup, steps))
    return replace(choice, training=training)


def judge(size: int) -> Classifier:
    """Return the settings of the classifier that is trained on synthetic images and tested on real ones."""
    return Classifier(augment="jitter" if size < SMALL else "flip-crop")
