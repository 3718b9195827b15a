"""Per-sample gradients of all trainable parameters from a vector of losses, or a refusal before anything changes."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastloda.errors import UserError
from fastloda.per_sample.amx import check_convolutions
from fastloda.per_sample.averages import check_not_averaged
from fastloda.per_sample.backward import per_sample_grads
from fastloda.per_sample.gradient import PerSampleGrad
from fastloda.per_sample.graph import LossGraph, trace
from fastloda.per_sample.refusals import check_graph, check_independence


def compute_per_sample_grads(
    losses: Tensor,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    samples: int,
    agree: Callable[[int], int] = lambda passes: passes,
    retain_graph: bool = False,
) -> dict[str, PerSampleGrad]:
    """Compute the per-sample gradients of losses by one backward pass, after refusing what has no exact rule or mixes samples.

    Args:
        losses: [samples * views], sample-major.
        model: the module that computed the losses.
        parameters: all parameters that train, by name.
        samples: the number of samples.
        agree: the number of passes that this process wants -> the number to make: see `check_independence`.
        retain_graph: whether to keep the graph for another backward pass.

    Raises:
        PrivacyError: an operation has no exact rule, or samples mix; the message names the parameter or the operation.
    """
    graph = checked_graph(losses, model, parameters, samples)
    check_independence(losses, graph, model, parameters, samples, agree)
    return per_sample_grads(losses, graph, parameters, samples, retain_graph)


def checked_graph(losses: Tensor, model: nn.Module, parameters: Mapping[str, nn.Parameter], samples: int) -> LossGraph:
    """Read the graph of losses, and refuse it for what it shows. A GPU is waited for only where an index picks rows.

    Raises:
        PrivacyError: as in `compute_per_sample_grads`, except where samples mix and the graph does not show it.
    """
    graph = trace(losses, parameters, alone=samples == 1)
    check_graph(graph)
    check_not_averaged(losses)
    check_convolutions(dict(model.named_modules()), graph)
    return graph


@contextmanager
def in_full_precision(device: torch.device) -> Generator[None]:
    """Make a context without autograd and autocast, so that a gradient that is made again is what it was before."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def check_views(views: int) -> int:
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise UserError(f"views must be an integer >= 1, got {views!r}")
    return views


def check_losses(losses: Tensor, views: int, mask: Tensor | None) -> tuple[int, Tensor]:
    """Check losses [samples * views] and mask (None: all true); return the number of samples and the mask, bool [samples].

    Raises:
        UserError: losses is not a vector of floats with a graph, its length is no multiple of `views`, or mask does not fit.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"a {losses.dtype} tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise UserError(f"losses must be a vector with one number per sample (reduction='none'), got {got}")
    if len(losses) % views:
        raise UserError(f"{len(losses)} losses are no multiple of views={views}")
    samples = len(losses) // views
    if samples and losses.grad_fn is None:
        raise UserError(
            "losses has no graph: compute it with gradients enabled, from a model with trainable parameters"
        )
    return samples, check_mask(mask, samples, losses.device)


def check_mask(mask: Tensor | None, samples: int, device: torch.device) -> Tensor:
    """Check that mask is bool [samples], or None, which stands for all true; return it on the device."""
    if mask is None:
        return torch.ones(samples, dtype=torch.bool, device=device)
    if mask.shape != (samples,) or mask.dtype != torch.bool:
        raise UserError(f"mask must be bool of shape ({samples},), got {mask.dtype} of shape {tuple(mask.shape)}")
    return mask.to(device)
