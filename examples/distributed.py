"""One private run on several processes: each clips its share of every batch, and the noise is added once.

    torchrun --nproc_per_node 2 examples/distributed.py
    python examples/distributed.py                          # alone: the same batches, the same noise, the same run

The only line that several processes need is `init_process_group`. With a seed, as here, the outcome does not depend on their
number, except for the last digits. Leave the seed out for a release: sampling and noise then can't be foreseen.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastloda import DPTrainer, PrivateTraining, attach_loda


def make_model() -> nn.Module:
    """Make a model of random features, in place of a pretrained one, with new adapters; all ranks then get rank 0's adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    attach_loda(model, rank=4)
    return model


def losses(model, batch, generator):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def main() -> DPTrainer:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])

    settings = PrivateTraining(
        sample_rate=0.1,
        expected_batch_size=150,  # of all ranks together
        steps=60,
        noise_multiplier=1.5,
        delta=1e-5,
        learning_rate=0.05,
        micro_batch_size=64,
        seed=0,
    )
    trainer = DPTrainer(make_model(), train, losses, settings, progress=False).fit()

    with torch.no_grad():
        accuracy = (trainer.model(test[0]).argmax(1) == test[1]).float().mean()
        size = sum(float(p.square().sum()) for p in trainer.parameters.values()) ** 0.5
    world = trainer.world
    print(
        f"rank {world.rank} of {world.size} ranks: accuracy {accuracy:.1%}, length of the adapters {size:.4f}",
        flush=True,
    )
    if world.first:
        print(
            f"one privacy budget for all of them: epsilon {trainer.epsilon():.2f} at delta {settings.delta}", flush=True
        )
    return trainer


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")  # "nccl" for GPUs
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
