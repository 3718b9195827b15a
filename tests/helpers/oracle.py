"""True per-sample gradients, computed in the slow and obvious way: one backward pass per sample, by plain PyTorch in float64."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

LossOf = Callable[[nn.Module, Tensor], Tensor]  # (model, inputs [n * views, ...]) -> losses [n * views]


def sample_grads(
    model: nn.Module, loss_of: LossOf, x: Tensor, views: int = 1, dtype=torch.float64
) -> list[dict[str, Tensor]]:
    """Compute for each sample {name: gradient of the mean loss over its views}, by its own backward pass in `dtype`."""
    model = copy.deepcopy(model).to(dtype)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = []
    for i in range(len(x) // views):
        loss = loss_of(model, x[i * views : (i + 1) * views].to(dtype)).mean()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        grads.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)})
    return grads


def norm(grads: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()


def norms(per_sample: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([norm(grads) for grads in per_sample]) if per_sample else torch.zeros(0, dtype=torch.float64)


def clipped_sum(per_sample: list[dict[str, Tensor]], max_grad_norm: float) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for grads in per_sample:
        factor = min(1.0, max_grad_norm / max(norm(grads).item(), 1e-300))
        for name, g in grads.items():
            total[name] = total.get(name, torch.zeros_like(g)) + factor * g
    return total
