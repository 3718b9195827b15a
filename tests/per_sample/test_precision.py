"""Mixed precision and checkpointing: the norm is that of the very gradient that is summed, and no sum is in half precision."""

import copy
from contextlib import nullcontext

import drawn
import oracle
import pytest
import torch
from drawn import Case, Checkpointed, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint_sequential

from fastloda import GhostClipper, LoDAConv2d, LoDALinear, PrivacyError, cover, ghost_dp_step, per_sample_grad_norms

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def image_model():
    """Make a model of adapters, and of layers that train in full."""
    layers = [LoDAConv2d(3, 4, 3, padding=1, rank=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)]
    return nn.Sequential(*layers, nn.Flatten(), LoDALinear(4 * 20, 3, rank=2))


def sequence_model():
    """Make a model for [N, 4, 5, 3]: LayerNorm, which autocast computes in float32, and linear layers, which it does not."""
    return nn.Sequential(LoDALinear(3, 6, rank=2), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4), nn.LayerNorm(4))


def case_of(make, dtype=torch.float32, shape=(3, 4, 5)):
    shape = shape if make is image_model else (*shape[1:], shape[0])
    return Case(randomise(make().double()).to(dtype), torch.randn(4, *shape, dtype=torch.float64).to(dtype))


def clipped_sum(case, bound=1e30, mask=None):
    """Compute the clipped sum, in the precision in which it is accumulated, and the step's statistics."""
    clipper = GhostClipper(case.model, bound, case.views)
    stats = clipper.accumulate(case.losses(), mask)
    return {name: total.clone() for name, total in clipper._sums.by_name.items()}, stats


def only(case, i):
    return torch.arange(case.samples) == i


def errors(case, precision):
    """Compute |norm - truth| of each sample in `precision`, for FastLoDA and for PyTorch itself; and the true norms."""
    truth = oracle.norms(case.truth())
    with precision():
        found = per_sample_grad_norms(case.losses(), case.model)
        plain = oracle.norms(case.truth(torch.float32))
    return (found - truth).abs(), (plain - truth).abs(), truth


# ---- autocast


@pytest.mark.parametrize("make", [image_model, sequence_model])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_autocast_clips_what_it_sums(make, dtype):
    """The norm agrees with the sum to 1e-5, and both are as near to the truth as PyTorch's own gradient in that dtype."""
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
    """The adapters' gradients are those of a backward pass outside of autocast, as PyTorch's documentation recommends."""
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
    """Autocast's cache lets both calls share one cast."""
    case = case_of(lambda: drawn.Twice(nn.Linear(3, 3)))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        cached = per_sample_grad_norms(case.losses(), case.model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        torch.testing.assert_close(per_sample_grad_norms(case.losses(), case.model), cached, rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", ["autocast", "model"])
def test_a_sample_that_overflows_float16_contributes_nothing(way):
    dtype = torch.float16 if way == "model" else torch.float32
    case = case_of(image_model, dtype)
    case.x[2] = 6e4  # finite in float16, but the first convolution's output is not
    with torch.autocast("cpu", torch.float16, enabled=way == "autocast"):
        total, stats = clipped_sum(case, 0.5)
        case.x[2] = 0.0
        without, others = clipped_sum(case, 0.5, ~only(case, 2))
    assert (stats.nonfinite, others.nonfinite) == (1, 0)
    for name, t in total.items():
        torch.testing.assert_close(t, without[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_half_precision_weights_do_not_accumulate_in_half_precision(dtype):
    """The sum is not in half precision; only the private gradient of a half-precision weight is rounded, after the noise."""
    case = case_of(image_model, dtype)
    bound = 0.1
    total, stats = clipped_sum(case, bound)
    assert stats.clipped == case.samples and any(not torch.equal(t, t.to(dtype).to(t)) for t in total.values())
    for i in range(case.samples):
        alone, _ = clipped_sum(case, bound, only(case, i))
        assert abs(oracle.norm(alone) / bound - 1) <= 1e-5
    clipper = GhostClipper(case.model, bound)
    clipper.accumulate(case.losses())
    clipper.privatize(0, 1)
    for name, p in clipper.parameters.items():  # the adapters are float32 in any case
        assert p.grad.dtype == p.dtype == (torch.float32 if "loda" in name else dtype)


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
    """torch.amp.GradScaler would scale so: the step is still private, but clipped as if the bound were smaller."""
    case = case_of(image_model)
    clipper = GhostClipper(case.model, 0.3)
    stats = clipper.accumulate(case.losses() * 2**16, only(case, 1))
    assert stats.clipped == 1 and abs(oracle.norm(clipper._sums.by_name) / 0.3 - 1) <= 1e-5


# ---- checkpointing


def checkpointed(model):
    """Make the same layers in two segments, both checkpointed."""
    layers = list(model)
    half = len(layers) // 2
    return nn.Sequential(*(Checkpointed(nn.Sequential(*part)) for part in (layers[:half], layers[half:])))


@pytest.mark.parametrize("make", [image_model, sequence_model])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_checkpointing_under_autocast_changes_nothing(make, dtype):
    """Backward recomputes in the forward's precision, even if the step runs outside of autocast."""
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
    """The inputs need a gradient, for otherwise PyTorch itself computes none for the first segment."""
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


# ---- convolutions with stride and dilation, which oneDNN gets wrong in half precision where the processor has AMX


def gradients(case, dtype, way):
    """Compute losses, per-sample norms, and the ordinary gradients of the inputs and of all trained parameters."""
    x = case.x.detach().requires_grad_()
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        losses = case.loss_of(case.model, x)
    norms = per_sample_grad_norms(losses, case.model, views=case.views)
    return [losses.detach(), norms, *torch.autograd.grad(losses.sum(), [x, *parameters])]


@pytest.mark.parametrize("way", ["autocast", "model"])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_no_adapted_convolution_is_computed_where_memory_may_be_unwritten(dtype, way, counts):
    """Whatever trains, the numbers are the same with and without that fault of the processor."""

    def check(case):
        case = case.to(torch.float32 if way == "autocast" else dtype)
        sound = gradients(case, dtype, way)
        with drawn.UnwrittenMemory():
            torch.testing.assert_close(gradients(case, dtype, way), sound, rtol=0, atol=0, equal_nan=True)

    drawn.hold_for(drawn.adapted_convs().filter(drawn.strided_and_dilated), counts(20, 500), check)


def test_float32_that_may_be_computed_in_bfloat16_is_computed_in_float64():
    """torch.backends.mkldnn.conv.fp32_precision lets oneDNN compute in bfloat16."""
    layer = randomise(LoDAConv2d(3, 4, 3, stride=2, dilation=2, rank=2))
    x = torch.randn(2, 3, 9, 9)
    plain = layer(x)
    computed_in, before = [], torch.backends.mkldnn.conv.fp32_precision
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        with Watching(computed_in):
            found = layer(x)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    assert set(computed_in) == {torch.float64} and found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


class Watching(TorchDispatchMode):
    def __init__(self, dtypes):
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in drawn.UnwrittenMemory.CONVOLUTIONS:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


class InFloat32(nn.Module):
    """The remedy that the refusal names: the layer in float32, without autocast."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.float())


DILATED = dict(kernel_size=3, padding=2, stride=2, dilation=2)
CONVOLUTIONS = {
    1: lambda: nn.Conv1d(4, 4, **DILATED),
    2: lambda: nn.Conv2d(4, 4, **DILATED | dict(stride=(1, 3), dilation=(2, 1))),
    3: lambda: nn.Conv3d(4, 4, **DILATED),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, **DILATED),
    "grouped": lambda: nn.Conv2d(4, 4, groups=2, **DILATED),
}


class Around(nn.Module):
    """A plain convolution below or above the layers that train."""

    def __init__(self, layer, place, trains):
        super().__init__()
        self.layer, self.place = layer.requires_grad_(trains), place
        self.head = LoDALinear(4, 4, rank=2)

    def forward(self, x):
        if self.place == "below":
            x = self.layer(x)
        x = self.head(x.movedim(1, -1)).movedim(-1, 1)
        return self.layer(x) if self.place == "above" else x


def private_step(model, x, autocast=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(x).float().flatten(1).square().mean(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    settings = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=len(x))
    return ghost_dp_step(losses, model, optimizer, **settings)


@pytest.fixture
def amx(monkeypatch):
    """Let PyTorch say that the processor has AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("place, trains", [("below", False), ("above", False), ("above", True)])
def test_a_plain_convolution_of_that_kind_is_refused_by_name_and_the_way_out_works(amx, kind, place, trains):
    model = randomise(Around(CONVOLUTIONS[kind](), place, trains))
    dims = kind if isinstance(kind, int) else 2
    x = torch.randn(3, 4, *[9] * dims)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # the first time nothing has watched the layer yet
        with pytest.raises(PrivacyError, match=r"layer 'layer' \(Conv.*autocast disabled.*"):
            private_step(model, x)
    assert all(map(torch.equal, model.parameters(), before))
    private_step(model, x, autocast=False)
    private_step(copy.deepcopy(model), x, autocast=False)
    model.layer = InFloat32(model.layer)
    cover(model)
    private_step(model, x)


def test_an_adapter_is_a_way_out_too(amx):
    model = Around(CONVOLUTIONS["grouped"](), "below", False)
    with pytest.raises(PrivacyError, match="LoDAConv2d.from_conv"):
        private_step(model, x := torch.randn(3, 4, 9, 9))
    model.layer = LoDAConv2d.from_conv(model.layer)
    private_step(model, x)


def test_a_function_of_that_kind_is_refused_by_its_geometry(amx):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.kernel = LoDAConv2d(4, 4, 1), torch.randn(2, 4, 3, 3)

        def forward(self, x):
            return nn.functional.conv2d(self.below(x), self.kernel, stride=2, dilation=(1, 2))

    model, x = randomise(Functional()), torch.randn(3, 4, 9, 9)
    with pytest.raises(PrivacyError, match=r"a convolution with stride \(2, 2\) and dilation \(1, 2\)"):
        private_step(model, x)
    private_step(model, x, autocast=False)


def test_what_is_right_is_not_refused(amx, monkeypatch):
    """These are other geometries, calls without gradients, and every geometry on processors without AMX."""
    x = torch.randn(3, 4, 9, 9)
    for layer in (nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 1)):
        private_step(Around(layer, "below", False), x)
    model = Around(CONVOLUTIONS["grouped"](), "below", False)
    cover(model)
    losses = model(x).flatten(1).square().mean(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert per_sample_grad_norms(losses, model).isfinite().all()
    kept_out = Around(InFloat32(CONVOLUTIONS["grouped"]()), "below", False)
    cover(kept_out)
    private_step(kept_out, x)  # even the first step, because the call was watched
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    private_step(model, x)
