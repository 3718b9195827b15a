"""A layer of one's own in private training: a per-sample rule for it, checked, and a table of what a step does with each layer.

python examples/custom_layer.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloda


class Gated(nn.Module):
    """A layer with one learned gate for each feature: y = x * sigmoid(gate)."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate.sigmoid()


class LowPass(nn.Module):
    """A filter with a learned gain for each frequency: it has no rule, so that its gradients are taken through torch.func."""

    def __init__(self, width: int):
        super().__init__()
        self.gains = nn.Parameter(torch.linspace(1, 0, width // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.gains, n=x.shape[-1])


@fastloda.register_rule(Gated)
def gated(layer: Gated, inputs: tuple[Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    (x,) = inputs
    slope = layer.gate.sigmoid() * (1 - layer.gate.sigmoid())
    return {"gate": grad_output * x * slope}  # [rows, width]


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    labels = (x[:, :3].sum(1) > 0).long()
    print("the rule's error against one backward per sample:", fastloda.check_rule(Gated(20), x[:8]))

    model = nn.Sequential(
        nn.Linear(20, 256), nn.GELU(), nn.LayerNorm(256), Gated(256), nn.Linear(256, 16), LowPass(16), nn.Linear(16, 2)
    )
    fastloda.explain(model, x[:64])

    fastloda.cover(model, ["5"])  # as the table says, LowPass has no rule; without its name a warning would say so
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    settings = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=64)
    sampling = torch.Generator()
    sampling.seed()  # from the operating system: which records take part must not be foreseen
    for step in range(40):
        batch = torch.rand(len(x), dtype=torch.float64, generator=sampling) < 64 / len(x)  # Poisson sampling
        losses = F.cross_entropy(model(x[batch]), labels[batch], reduction="none")
        fastloda.ghost_dp_step(losses, model, optimizer, **settings)
        if step % 10 == 9:
            accuracy = (model(x).argmax(1) == labels).float().mean()
            print(f"step {step + 1}: accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
