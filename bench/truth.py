"""The check that no provider is fast because it is wrong: clipped gradients against one plain backward pass per sample."""

from dataclasses import replace
from functools import lru_cache

import torch
from adapters import trainable
from cases import Case
from machine import CUDA
from providers import PROVIDERS, Privacy
from torch import Tensor

SAMPLES = 32  # number of samples that are compared with the truth
TOLERANCE = {"float32": 1e-3 if CUDA else 1e-4, "bfloat16": 0.1}  # largest difference over the gradient's length


class WrongAnswer(AssertionError):
    """An error of a contender's gradient, which fails the bench."""


def check(case: Case, provider: str) -> None:
    """Compare three steps of the first samples, without noise: no step or replay of a graph may add to an earlier one's sum.

    Raises:
        WrongAnswer: the gradient differs by more than rounding.
    """
    few = replace(case, batch=min(case.batch, SAMPLES))
    bound = _median_norm(few)
    make, kind, _, slack = PROVIDERS[provider]
    contender = make(few, Privacy(max_grad_norm=bound, noise_multiplier=0.0))
    wanted = _clipped_mean(few, float("inf") if kind == "plain" else bound)
    allowed = TOLERANCE[case.dtype] + slack / bound  # with slack, gradients are clipped to a little less than the bound
    for step in ("first", "second", "third"):
        _compare(contender.gradients(), wanted, allowed, f"{provider}, {case.name}, {step} step")


def _compare(found: list[Tensor], wanted: list[Tensor], tolerance: float, what: str) -> None:
    difference, length = (_norm(tensors) for tensors in ([a - b for a, b in zip(found, wanted, strict=True)], wanted))
    if not difference <= tolerance * length:
        raise WrongAnswer(f"{what}: the clipped gradient is off by {difference / length:.2g} of its length")


def _clipped_mean(case: Case, max_grad_norm: float) -> list[Tensor]:
    grads = _sample_grads(case)
    factors = [min(1.0, max_grad_norm / _norm(g)) / case.batch for g in grads]
    return [sum(f * g for f, g in zip(factors, of_parameter)) for of_parameter in zip(*grads)]


def _median_norm(case: Case) -> float:
    """Compute the median of the gradients' norms; as the bound it clips half of the samples."""
    return float(torch.tensor([_norm(g) for g in _sample_grads(case)]).median())


@lru_cache(maxsize=1)  # for every provider of one case
def _sample_grads(case: Case) -> list[list[Tensor]]:
    """Compute each sample's gradient of its mean loss over views, by a backward pass of its own, without autocast."""
    case = replace(case, dtype="float32")
    model, batch = case.build(), case.inputs()
    samples = zip(*(t.split(case.views) for t in batch))
    return [torch.autograd.grad(case.losses(model, sample).mean(), trainable(model)) for sample in samples]


def _norm(tensors) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
