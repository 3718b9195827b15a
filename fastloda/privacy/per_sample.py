"""The norms and gradients of single samples, for inspection; a private step does not return them."""

import torch
from torch import Tensor, nn

from fastloda.per_sample.compute import check_losses, check_views, compute_per_sample_grads, in_full_precision
from fastloda.per_sample.gradient import PerSampleGrad, squared_norms
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import trainable_parameters
from fastloda.privacy.ranks import World, check_not_sharded, hand_back_shards


def per_sample_grad_norms(losses: Tensor, model: nn.Module, *, views: int = 1) -> Tensor:
    """Compute the L2 norms of the samples' gradients over all trainable parameters: [samples], float64.

    A norm is not finite where the gradient is not. losses [samples * views], errors: as in `GhostClipper.accumulate`.
    `.grad` and the graph of losses stay as they are.
    """
    samples, _ = check_losses(losses, check_views(views), None)
    with in_full_precision(losses.device):
        grads = _compute(losses, model, trainable_parameters(Members.of(model)), samples)
        return squared_norms(grads.values(), samples, losses.device).sqrt()


def per_sample_grads(losses: Tensor, model: nn.Module, *, views: int = 1) -> dict[str, Tensor]:
    """Compute each sample's gradients by parameter name, [samples, *parameter.shape]: Opacus's `p.grad_sample`. They are private.

    Args:
        losses: [samples * views], as in `GhostClipper.accumulate`.
        model: the model that computed losses; for a private module, pass its `to_standard_module()`.

    `.grad` and the graph of losses stay as they are. A parameter that losses do not use has zeros. Errors are those of
    `GhostClipper`.
    """
    samples, _ = check_losses(losses, check_views(views), None)
    parameters = trainable_parameters(Members.of(model))
    with in_full_precision(losses.device):
        grads = _compute(losses, model, parameters, samples)
        return {name: _whole(grads.get(name), p, samples) for name, p in parameters.items()}


def _compute(
    losses: Tensor, model: nn.Module, parameters: dict[str, nn.Parameter], samples: int
) -> dict[str, PerSampleGrad]:
    """Compute the samples' gradients; without samples the result is empty."""
    world = World.of() if hand_back_shards(model) else World()
    if not samples:
        check_not_sharded(world.size > 1)
        return {}
    return compute_per_sample_grads(losses, model, parameters, samples, world.most, retain_graph=True)


def _whole(grad: PerSampleGrad | None, parameter: Tensor, samples: int) -> Tensor:
    parts = [part for _, part in grad.chunks()] if grad else []
    if not grad or not parts:
        return parameter.new_zeros(samples, *parameter.shape)
    return grad.order(torch.cat(parts)).reshape(samples, *parameter.shape).clone()
