"""A DistributedDataParallel script, made private: all processes share one Poisson batch a step, one noise and one budget.

    torchrun --nproc_per_node 2 examples/distributed_loop.py
    python examples/distributed_loop.py                     # alone: the same batches on one process

`make_private` finds the other processes, copies rank 0's weights to them, and adds up their clipped sums: DistributedDataParallel
is no longer needed, but does no harm. The data set must be the same on all of them; the batch size is that of all together.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import PrivacyEngine

DELTA = 1e-4


def main() -> float:
    """Train for four passes; returns the accuracy."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)

    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=150)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    for _ in range(4):
        for x, y in loader:  # this rank's share of the batch, perhaps empty
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    epsilon = engine.get_epsilon(DELTA)
    print(f"rank {rank} of {size}: accuracy {accuracy:.1%}, epsilon {epsilon:.2f} at delta {DELTA}", flush=True)
    return accuracy


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")  # "nccl" for GPUs
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
