"""Mixed precision and activation checkpointing: the norm is that of the very sum, accumulated in float32."""

from contextlib import nullcontext

import drawn
import oracle
import pytest
import torch
from drawn import Case, Checkpointed, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from fastloda import GhostClipper, LoDAConv2d, LoDALinear, PrivacyError, ghost_dp_step, per_sample_grad_norms

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def image_model():
    """Adapters, and layers that train in full."""
    layers = [LoDAConv2d(3, 4, 3, padding=1, rank=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)]
    return nn.Sequential(*layers, nn.Flatten(), LoDALinear(4 * 20, 3, rank=2))


def sequence_model():
    """[N, 4, 5, 3]: LayerNorm, which autocast computes in float32, between linear layers, which it does not."""
    return nn.Sequential(LoDALinear(3, 6, rank=2), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4), nn.LayerNorm(4))


def case_of(make, dtype=torch.float32, shape=(3, 4, 5)):
    shape = shape if make is image_model else (*shape[1:], shape[0])
    return Case(randomise(make().double()).to(dtype), torch.randn(4, *shape, dtype=torch.float64).to(dtype))


def clipped_sum(case, bound=1e30, mask=None):
    """-> the sum in the precision that it is accumulated in, and the counts."""
    clipper = GhostClipper(case.model, bound, case.views)
    stats = clipper.accumulate(case.losses(), mask)
    return {name: total.clone() for name, total in clipper._sums.by_name.items()}, stats


def only(case, i):
    return torch.arange(case.samples) == i


def errors(case, precision):
    """|norm - truth| of each sample: FastLoDA's and PyTorch's own, in `precision`."""
    truth = oracle.norms(case.truth())
    with precision():
        found = per_sample_grad_norms(case.losses(), case.model)
        plain = oracle.norms(case.truth(torch.float32))
    return (found - truth).abs(), (plain - truth).abs(), truth


# ---- autocast


@pytest.mark.parametrize("make", [image_model, sequence_model])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_autocast_clips_what_it_sums(make, dtype):
    """To 1e-5, and as near to the truth as PyTorch's own gradient in that dtype."""
    case = case_of(make)
    autocast = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    ours, theirs, truth = errors(case, autocast)
    assert ours.max() <= 2 * theirs.max() + torch.finfo(dtype).eps * truth.max()
    with autocast():
        norms = per_sample_grad_norms(case.losses(), case.model)
        for i, norm in enumerate(norms):
            total, _ = clipped_sum(case, mask=only(case, i))
            assert all(t.dtype == torch.float64 for t in total.values())
            assert abs(oracle.norm(total) - norm) <= 1e-5 * norm


@pytest.mark.parametrize("around", ["forward", "forward and step"])
def test_autocast_may_end_before_the_step(around):
    case = case_of(image_model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = case.losses()
        inside = per_sample_grad_norms(losses, case.model)
    with torch.autocast("cpu", torch.bfloat16) if around == "forward and step" else nullcontext():
        torch.testing.assert_close(per_sample_grad_norms(losses, case.model), inside, rtol=0, atol=0)


def test_an_ordinary_backward_inside_autocast_loses_nothing():
    """The adapters' gradients are those of a backward outside, as autocast's own documentation wants it."""
    case = case_of(lambda: nn.Sequential(LoDALinear(3, 6, rank=2), nn.GELU(), LoDALinear(6, 4, rank=2)))
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            losses = case.losses()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            trains = [p for p in case.model.parameters() if p.requires_grad]
            grads.append(torch.autograd.grad(losses.sum(), trains))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_a_weight_that_autocast_cast_once_for_two_calls():
    """Its cache then shares one cast between them."""
    case = case_of(lambda: drawn.Twice(nn.Linear(3, 3)))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        cached = per_sample_grad_norms(case.losses(), case.model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        torch.testing.assert_close(per_sample_grad_norms(case.losses(), case.model), cached, rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", ["autocast", "model"])
def test_a_sample_that_overflows_float16_contributes_nothing(way):
    dtype = torch.float16 if way == "model" else torch.float32
    case = case_of(image_model, dtype)
    case.x[2] = 6e4  # finite in float16; what the first convolution makes of it is not
    with torch.autocast("cpu", torch.float16, enabled=way == "autocast"):
        total, stats = clipped_sum(case, 0.5)
        case.x[2] = 0.0
        without, others = clipped_sum(case, 0.5, ~only(case, 2))
    assert (stats.nonfinite, others.nonfinite) == (1, 0)
    for name, t in total.items():
        torch.testing.assert_close(t, without[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_half_precision_weights_accumulate_in_float32(dtype):
    """The sum is no half-precision number; only the private gradient is rounded, after the noise."""
    case = case_of(image_model, dtype)
    bound = 0.1
    total, stats = clipped_sum(case, bound)
    assert stats.clipped == case.samples and any(not torch.equal(t, t.to(dtype).float()) for t in total.values())
    for i in range(case.samples):
        alone, _ = clipped_sum(case, bound, only(case, i))
        assert abs(oracle.norm(alone) / bound - 1) <= 1e-5
    clipper = GhostClipper(case.model, bound)
    clipper.accumulate(case.losses())
    clipper.privatize(0, 1)
    assert all(p.grad.dtype == dtype for p in clipper.parameters.values())


# ---- loss scaling: a constant factor that the bound and the divisor share, in place of torch.amp.GradScaler


def step(case, scale):
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], 0.5)
    settings = dict(max_grad_norm=0.3 * scale, noise_multiplier=0.7, expected_batch_size=4 * scale)
    generator = torch.Generator().manual_seed(5)
    return ghost_dp_step(case.losses() * scale, case.model, optimizer, generator=generator, **settings)


def test_a_scaled_loss_with_a_scaled_bound_and_divisor_is_the_same_step():
    torch.manual_seed(1)
    plain = case_of(image_model, torch.float64)
    torch.manual_seed(1)
    scaled = case_of(image_model, torch.float64)
    assert step(plain, 1).clipped == step(scaled, 2**16).clipped > 0
    for ours, theirs in zip(scaled.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_scaling_saves_what_float16_would_lose():
    case = case_of(image_model)
    tiny, scale = 2.0**-26, 2.0**20
    truth = oracle.norms(case.truth()) * tiny
    with torch.autocast("cpu", torch.float16):
        lost = per_sample_grad_norms(case.losses() * tiny, case.model)
        saved = per_sample_grad_norms(case.losses() * (tiny * scale), case.model) / scale
    assert (lost < 0.9 * truth).any()
    torch.testing.assert_close(saved, truth, rtol=1e-2, atol=0)


def test_a_scaled_loss_alone_keeps_the_bound():
    """What torch.amp.GradScaler would do: private all the same, but clipped as if the bound were smaller."""
    case = case_of(image_model)
    clipper = GhostClipper(case.model, 0.3)
    stats = clipper.accumulate(case.losses() * 2**16, only(case, 1))
    assert stats.clipped == 1 and abs(oracle.norm(clipper._sums.by_name) / 0.3 - 1) <= 1e-5


# ---- checkpointing


def checkpointed(model):
    """The same layers, all of them checkpointed, in two segments."""
    layers = list(model)
    half = len(layers) // 2
    return nn.Sequential(*(Checkpointed(nn.Sequential(*part)) for part in (layers[:half], layers[half:])))


@pytest.mark.parametrize("make", [image_model, sequence_model])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_checkpointing_under_autocast_changes_nothing(make, dtype):
    """What is recomputed in backward is recomputed in the forward's precision, also where the step ran outside of autocast."""
    case = case_of(make)
    norms = []
    for model in (case.model, checkpointed(case.model)):
        with torch.autocast("cpu", dtype):
            losses = case.loss_of(model, case.x)
        norms.append(per_sample_grad_norms(losses, model))
        clipper = GhostClipper(model, norms[0].median().item())
        with torch.autocast("cpu", dtype):
            losses = case.loss_of(model, case.x)
        clipper.accumulate(losses)
        norms.append(torch.stack([total.norm() for total in clipper._sums.by_name.values()]))
    torch.testing.assert_close(norms[:2], norms[2:], rtol=1e-6, atol=1e-7)


class InSegments(nn.Sequential):
    reentrant = False

    def forward(self, x):
        return checkpoint_sequential(list(self), 3, x, use_reentrant=self.reentrant)


def test_checkpoint_sequential_is_exact():
    case = case_of(image_model, torch.float64)
    norms = oracle.norms(case.truth())
    case.model = InSegments(*case.model)
    torch.testing.assert_close(per_sample_grad_norms(case.losses(), case.model), norms, rtol=1e-10, atol=0)


@pytest.mark.parametrize("trains", ["adapters", "all"])
def test_reentrant_checkpoint_sequential_is_refused(trains):
    """Its first segment's input needs no gradient, so that PyTorch itself gives that segment none: the rest is refused."""
    case = case_of(image_model)
    case.model = InSegments(*case.model)
    case.model.reentrant = True
    if trains == "adapters":
        for name, p in case.model.named_parameters():
            p.requires_grad_("loda" in name)
    case.x.requires_grad_()
    with pytest.raises(PrivacyError, match="use_reentrant=False"):
        GhostClipper(case.model, 1.0).accumulate(case.losses())
    assert all(p.grad is None for p in case.model.parameters())
