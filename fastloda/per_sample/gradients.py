"""The gradients of single samples, for a look at them: a private step keeps none."""

import torch
from torch import Tensor, nn

from fastloda.per_sample.members import Members
from fastloda.per_sample.recipe import PerSampleGrad
from fastloda.per_sample.refusals import trainable_parameters
from fastloda.privacy.ranks import World
from fastloda.privacy.step import _check_losses, _check_views, _per_sample_grads


def per_sample_grads(losses: Tensor, model: nn.Module, *, views: int = 1) -> dict[str, Tensor]:
    """Name -> each sample's gradient, [samples, *parameter.shape]: what Opacus keeps as `p.grad_sample`. They are private.

    Args:
        losses: [samples * views], as in `GhostClipper`, of the model itself: of a private module it is `to_standard_module()`.

    Leaves `.grad`, and the graph below losses, as they are. A parameter that takes no part has zeros. Raises what `GhostClipper`
    does.
    """
    samples, _ = _check_losses(losses, _check_views(views), None)
    parameters = trainable_parameters(Members.of(model))
    if not samples:
        return {name: p.new_zeros(0, *p.shape) for name, p in parameters.items()}
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        grads = _per_sample_grads(losses, model, parameters, samples, World(), retain_graph=True)
        return {name: _whole(grads[name], p, samples) for name, p in parameters.items()}


def _whole(grad: PerSampleGrad, parameter: Tensor, samples: int) -> Tensor:
    parts = [part for _, part in grad.chunks()]
    if not parts:
        return parameter.new_zeros(samples, *parameter.shape)
    return grad.order(torch.cat(parts)).reshape(samples, *parameter.shape).clone()
