"""A small model, its data and losses, and a trainer for them, for tests of the trainer's parts."""

import torch
import torch.nn.functional as F
from torch import nn

from fastloda import DPTrainer, PrivateTraining, attach_loda

RUN = dict(sample_rate=0.2, expected_batch_size=12, steps=8, delta=1e-5, micro_batch_size=5, ema_decay=0.9)
SETTINGS = PrivateTraining(**RUN, noise_multiplier=1.0, seed=3)


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(144, 3)
        )
        attach_loda(model, rank=1)
    return model


def small_data(records: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(3, (records,), generator=generator)
    return torch.randn(records, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels


def losses(model, batch, generator):
    noise = torch.randn(batch[0].shape, generator=generator)
    return F.cross_entropy(model(batch[0] + 0.1 * noise), batch[1], reduction="none")


def trainer(settings=SETTINGS, model=None, **options) -> DPTrainer:
    torch.manual_seed(5)  # dropout draws from the global generator
    return DPTrainer(model or small_model(), small_data(), losses, settings, progress=False, **options)


def assert_same_run(a: DPTrainer, b: DPTrainer) -> None:
    """Assert that both trainers have taken the same steps, bit for bit."""
    assert a.step == b.step
    for name, p in a.parameters.items():
        assert torch.equal(p, b.parameters[name]), name
        assert torch.equal(a.average.values[name], b.average.values[name]), name
