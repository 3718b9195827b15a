"""Checks of norms and clipped sums against one backward pass per sample, in float64, over drawn cases."""

import drawn
import oracle
import torch

from fastloda import GhostClipper, per_sample_grad_norms
from fastloda.per_sample import planner as plan

PLANS = {
    "as planned": {},
    "kept": {"KEEP_FACTOR": float("inf"), "GHOST_FACTOR": 0.0},
    "made again": {"KEEP_FACTOR": 0.0, "GHOST_FACTOR": 0.0},
    "made again in tiny chunks": {
        "KEEP_FACTOR": 0.0,
        "GHOST_FACTOR": 0.0,
        "CHUNK_NUMBERS": 1,
        "SCRATCH_BYTES": {"cpu": 1},
    },
    "kept from tiny chunks": {"KEEP_FACTOR": float("inf"), "GHOST_FACTOR": 0.0, "SCRATCH_BYTES": {"cpu": 1}},
}


KINDS = {
    "adapted conv": (drawn.adapted_convs(), 200, 3000),
    "adapted conv, frozen base": (drawn.adapted_convs(base_trains=False), 200, 3000),
    "adapted linear": (drawn.adapted_linears(), 100, 1000),
    "plain layer": (drawn.plain_layers(), 250, 3000),
    "stack": (drawn.stacks(), 120, 1500),
    "reused linear": (drawn.reused_linears(), 80, 500),
    "broadcast": (drawn.broadcasts(), 200, 2000),
    "checkpointed stack": (drawn.stacks(checkpointed=True), 80, 1000),
}


def use_plan(monkeypatch, name):
    for key, value in PLANS[name].items():
        monkeypatch.setattr(plan, key, value)


def clipped_sum(case, max_grad_norm):
    """Compute {name: clipped sum} of the case by FastLoDA."""
    clipper = GhostClipper(case.model, max_grad_norm, case.views)
    clipper.accumulate(case.losses())
    clipper.privatize(0, 1)
    return {name: p.grad for name, p in case.model.named_parameters() if p.requires_grad}


def between(norms):
    """Choose a clipping norm that some samples exceed and some do not."""
    return float(norms.median()) * 0.9 + 1e-30


def distance(got, wanted):
    return oracle.norm({name: got[name].double() - wanted[name].double() for name in wanted}).item()


def check_exact(case, of_squares=0.0):
    """Check norms and clipped sums to 1e-10 of the largest gradient; the activations are near 1.

    Args:
        of_squares: how much too large the squared norms may be.
    """
    truth = case.truth()
    norms = oracle.norms(truth)
    tolerance = 1e-10 * norms.max().item() + 1e-12  # 1e-12 for what rounding leaves of a constant after normalisation
    tolerance += ((norms.square() + of_squares).sqrt() - norms).sum().item()
    assert (per_sample_grad_norms(case.losses(), case.model, views=case.views) - norms).abs().max() <= tolerance
    bound = between(norms)
    assert distance(clipped_sum(case, bound), oracle.clipped_sum(truth, bound)) <= 1e-10 * bound + tolerance


def own_error(case, truth):
    """Compute PyTorch's float32 error on each sample: |gradient - truth|, by one backward pass per sample."""
    found = case.truth(torch.float32)
    return torch.tensor([distance(f, t) for f, t in zip(found, truth)])


def check_float32(case):
    """Check that float32 errors are at most twice PyTorch's own error; where that is 0, at most a few ulp."""
    case = case.to(torch.float32)
    truth = case.truth()
    norms = oracle.norms(truth)
    allowed = 2 * own_error(case, truth) + 8 * torch.finfo(torch.float32).eps * norms
    error = (per_sample_grad_norms(case.losses(), case.model, views=case.views) - norms).abs()
    assert (error <= allowed.max()).all()
    bound = float(norms.max()) + 1e-30  # nothing is clipped, so that only the sum's own error counts
    assert distance(clipped_sum(case, bound), oracle.clipped_sum(truth, bound)) <= allowed.sum()
