"""Audit a private step of your own: a correct one, and one whose noise is half of what it claims.

The step is an ordinary training loop's inner part; the audit runs it with and without one record, looks at its noise, and
bounds epsilon from below. Run it with `python examples/audit_step.py`.
"""

import torch
from torch import nn

from fastloda import audit, ghost_dp_step
from fastloda.training.sampling import poisson_sample

RECORDS, SAMPLE_RATE, BATCH, CLIP, NOISE = 400, 0.02, 8, 1.0, 1.0


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, noise_multiplier: float):
    """Make a step of the loop on a given batch, whose noise comes from the generator."""

    def run(batch, generator):
        x, y = batch
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        settings = dict(max_grad_norm=CLIP, noise_multiplier=noise_multiplier, expected_batch_size=BATCH)
        ghost_dp_step(losses, model, optimizer, **settings, generator=generator)

    return run


def main() -> None:
    torch.manual_seed(0)
    records = torch.randn(16, 6), torch.randint(3, (16,))
    claim = audit.Claim(NOISE, CLIP, BATCH, sample_rate=SAMPLE_RATE, steps=500, delta=1e-5)
    sampler = audit.Sampler(lambda generator: poisson_sample(RECORDS, SAMPLE_RATE, generator), RECORDS)
    for title, noise_multiplier in (("the noise it claims", NOISE), ("half of it", NOISE / 2)):
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        step = audit.of_loop(model, training_step(model, optimizer, noise_multiplier))
        report = audit.audit_step(step, records, claim, sampler=sampler, observations=300, progress=False)
        print(f"\nA step that adds {title}", report, sep="\n")


if __name__ == "__main__":
    main()
