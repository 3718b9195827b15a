"""Settings that fit images of a size and a promise, computed from public facts alone: size, epsilon, nominal record count."""

import math

from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods.base import ByEpsilon
from fastloda.synthesis.methods.diffusion_model import PrivateTuning
from fastloda.synthesis.methods.public_choice import PublicChoice
from fastloda.synthesis.settings import Classifier, FineTuning

STRICT, RELAXED = 0.0, 3.0  # epsilons from which on the settings hold
SMALL = 16  # side in pixels below which images are taken for digits
# Set by trials on public digits that stand for private ones (docs/results/demo-tuning.md). Timesteps: the noisiest images of
# digits say little about the private ones, and the least noisy little about their shape.
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
CHOICES = ByEpsilon({STRICT: PublicChoice(4.2), RELAXED: PublicChoice(4.0, tolerance=2.0, reach=0.0)})


def default_delta(records: int) -> float:
    """Return the largest power of ten below 1 / (10 records)."""
    return 10.0 ** -len(str(10 * records))


def batch_size(records: int) -> int:
    """Return the expected number of records in a step: a quarter of few records, 256 of many, up to 1,024 of very many."""
    return min(math.ceil(records / 4), max(256, min(1024, records // 100)))


def micro_batch_size(size: int, views: int) -> int:
    """Return a number of records that computes in about a gigabyte with the presets of the U-Net."""
    return max(8, min(512, 2**17 // (size * size * views)))


def public_training(size: int, steps: int, seed: int) -> PublicTraining:
    """Make the settings of public training: smaller batches of larger images, and an average over the last quarter."""
    images = 256 if size < 32 else 128 if size < 48 else 64
    ema_decay = 1 - 1 / max(2, steps / 4)
    return PublicTraining(steps=steps, batch_size=images, warmup=min(50, steps), ema_decay=ema_decay, seed=seed)


def judge(size: int) -> Classifier:
    """Make the settings of the classifier that is trained on synthetic images and tested on real ones."""
    return Classifier(augment="jitter" if size < SMALL else "flip-crop")
