"""One sample changes the clipped sum by at most max_grad_norm, whatever it holds; noise of the right size is added once.

Sums are read before they are rounded to the parameters' dtype, and compared in float64.
"""

import math
import os

import drawn
import oracle
import pytest
import torch
import torch.nn.functional as F
from fuzz import SIZE, SLACK, C, Fuzz, clipped_sum, flat, fuzzed
from scipy import stats as statistics
from torch import Generator, nn

from fastloda import GhostClipper, LoDAConv2d, LoDALinear, ghost_dp_step, per_sample_grad_norms
from fastloda.per_sample import planner as plan
from fastloda.privacy.noise import gaussian

# ---- records of every kind


def check_contribution(case: Fuzz) -> float:
    """Compute the hostile record's contribution over max_grad_norm: alone, and as the difference that it makes to the batch."""
    model, x = case.build()
    views, bound, mine = case.views, case.max_grad_norm, slice(case.views, 2 * case.views)
    total, stats = clipped_sum(model, case.losses(model, x, mine), bound, None, views)
    parts = []
    for mask in ([False, True, False], [True, False, True]):
        part, _ = clipped_sum(model, case.losses(model, x, mine), bound, torch.tensor(mask), views)
        parts.append(part)
    alone, without = parts
    assert total.isfinite().all() and stats.samples == 3
    if stats.nonfinite:  # then it contributes nothing at all
        assert stats.nonfinite == 1 and not alone.any() and torch.equal(total, without)
    if case.dtype == torch.float64:  # compare with a batch from which the record is missing, not masked
        others = torch.cat([x[: mine.start], x[mine.stop :]])
        absent, _ = clipped_sum(model, case.losses(model, others, slice(0)), bound, None, views)
        assert (absent - without).norm() <= 1e-9 * bound
    contribution = max(alone.norm().item(), (total - without).norm().item()) / bound
    assert contribution <= SLACK
    return contribution


def test_no_record_contributes_more_than_the_bound(counts, proof, monkeypatch):
    """This holds for every kind of record, in every precision, under every plan."""
    largest, cases = 0.0, 0

    def check(case):
        nonlocal largest, cases
        monkeypatch.setattr(plan, "KEEP_FACTOR", case.keep)
        largest, cases = max(largest, check_contribution(case)), cases + 1

    drawn.hold_for(fuzzed, counts(500, 10_000), check)
    proof("fuzzed records: cases", cases)
    proof("fuzzed records: largest contribution over max_grad_norm", largest)
    assert largest > 0.999, "no case was clipped: the fuzzing tests nothing"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("record", ["cancelling", "cancelling and large"])
def test_cancelling_positions_do_not_hide_a_gradient(record, precision):
    """A norm by the Gram matrix let 14 C through here: the norm must be that of the very sum that cancels."""
    for seed in range(20):
        assert check_contribution(Fuzz("adapters", precision, record, 1e3, "even", 1, 1e-3, 4.0, seed)) <= SLACK


def test_a_factor_too_small_for_float32_is_not_rounded_up():
    """Here max_grad_norm / norm is 1e-44, where float32 has steps of 1.4e-45."""
    layer = nn.Linear(8, 1, bias=False)
    for size in torch.linspace(1, 3, 50):
        total, stats = clipped_sum(layer, layer(torch.full((1, 8), 1e19 * size)).flatten() * 1e19, 1e-6)
        assert stats.nonfinite == 0 and total.norm() <= 1e-6 * SLACK


@pytest.mark.parametrize("parts", [1, 64])
def test_many_alike_records_do_not_round_up(parts):
    """Of 1,024 equal records clipped to the bound, one is removed: the float32 sum changes by at most the bound."""
    layer = drawn.randomise(LoDALinear(32, 32, rank=4))
    x = torch.randn(1, 32).expand(1024 // parts, 32)
    mask = torch.arange(len(x)) != 3
    sums = []
    for first_mask in (None, mask):
        clipper = GhostClipper(layer, 0.1)
        for part in range(parts):
            clipper.accumulate(drawn.curved(layer(x)), None if part else first_mask)
        sums.append(flat(clipper))
    assert (sums[0] - sums[1]).norm() <= 0.1 * SLACK


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_fast_matrix_products_do_not_stretch_the_bound(precision):
    """tf32 may round the gradients, but the norm is that of the rounded gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        layer = nn.Linear(64, 64, bias=False, device=device)
        x = torch.full((8, 64), 1 + 2**-12.5, device=device)
        for i in range(8):
            alone = torch.arange(8, device=device) == i
            total, _ = clipped_sum(layer, layer(x).sum(1), 0.37, alone)
            assert total.norm() <= 0.37 * SLACK
    finally:
        torch.set_float32_matmul_precision(before)


def test_views_are_one_sample():
    """A sample of three views, each with a gradient far over the bound, contributes one bound, not three."""
    layer = drawn.randomise(LoDALinear(5, 4, rank=2).double())
    x = 100 * torch.randn(2 * 3, 5, dtype=torch.float64)
    total, stats = clipped_sum(layer, layer(x).square().sum(1), 0.5, torch.tensor([True, False]), views=3)
    assert total.norm().item() == pytest.approx(0.5) and stats.samples == stats.clipped == 1


def test_opposite_views_cancel_before_the_clip():
    layer = nn.Linear(3, 1, bias=False).double()
    x = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    norms = per_sample_grad_norms(layer(x).flatten(), layer, views=2)
    assert norms.tolist() == [0.0, 1.0]


# ---- NaN and Inf


class Guided(nn.Module):
    """An image model with a condition, so that a NaN can enter in several places."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.shift = (
            LoDAConv2d(C, C, 3, padding=1, rank=2),
            nn.GroupNorm(2, C),
            LoDALinear(3, C, rank=2),
        )
        self.out = nn.Conv2d(C, 2, 1)

    def forward(self, x, t):
        return self.out(F.silu(self.norm(self.conv(x)) + self.shift(t)[..., None, None]))


def loss_of(model, x, t, target, weight):
    return (model(x, t) - target).square().flatten(1).mean(1).add(1e-12).sqrt() * weight


def batch(n=4, dtype=torch.float32):
    draw = lambda *shape: torch.randn(n, *shape, dtype=dtype)  # noqa: E731
    return {"x": draw(C, *SIZE), "t": draw(3), "target": draw(2, *SIZE), "weight": draw().abs()}


def test_a_nonfinite_sample_contributes_nothing_wherever_it_is(counts, proof):
    """A NaN or Inf in any input, target or loss weight is counted and adds zero; the others' sum is the same bit for bit."""
    model = drawn.randomise(Guided())
    cases = counts(100, 1000)
    for case in range(cases):
        torch.manual_seed(case)
        inputs, bad = batch(), int(torch.randint(4, ()))
        mask = torch.arange(4) != bad
        expected, _ = clipped_sum(model, loss_of(model, **inputs), 0.1, mask)
        place = list(inputs)[case % len(inputs)]
        values = inputs[place][bad : bad + 1].view(-1)
        values[torch.randint(len(values), ())] = (math.nan, math.inf, -math.inf)[case % 3]
        total, stats = clipped_sum(model, loss_of(model, **inputs), 0.1)
        assert (stats.samples, stats.nonfinite) == (4, 1), place
        assert torch.equal(total, expected), place
        assert math.isfinite(stats.mean_loss)
    proof("NaN and Inf positions: cases finite", f"{cases} of {cases}")


def test_a_gradient_that_is_nan_though_the_loss_is_not():
    """The loss sqrt(0) is 0, but its gradient is not a number."""
    layer = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    total, stats = clipped_sum(layer, layer(x).square().sum(1).sqrt(), 1.0)
    assert stats.nonfinite == 1 and stats.samples == 2
    assert total.norm().item() == pytest.approx(1.0)


def test_a_batch_of_nothing_but_nan_makes_a_step_of_pure_noise():
    layer = drawn.randomise(LoDALinear(3, 2, rank=1))
    sgd = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 1.0)
    losses = layer(torch.full((3, 3), math.nan)).sum(1)
    with pytest.warns(UserWarning, match="3 of 3 samples had a gradient that is not finite"):
        stats = ghost_dp_step(losses, layer, sgd, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=3)
    assert stats.nonfinite == stats.samples == 3 and math.isnan(stats.mean_loss) and stats.clipped == 0
    assert all(p.isfinite().all() for p in layer.parameters())


def test_a_masked_sample_may_hold_anything():
    model = drawn.randomise(Guided())
    inputs = batch()
    mask = torch.tensor([True, False, True, False])
    expected, _ = clipped_sum(model, loss_of(model, **inputs), 0.1, mask)
    for name, value in (("x", math.nan), ("target", math.inf), ("t", 1e30), ("weight", math.nan)):
        inputs[name][~mask] = value
        total, stats = clipped_sum(model, loss_of(model, **inputs), 0.1, mask)
        assert torch.equal(total, expected) and (stats.samples, stats.nonfinite) == (2, 0)
        assert math.isfinite(stats.mean_loss)


# ---- noise


class Wide(nn.Module):
    """A million parameters, to measure noise on."""

    def __init__(self, width=1000):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.linear(x).sin().sum(1)


def noise_of(parts, x, noise_multiplier=0.7, max_grad_norm=2.0, expected_batch_size=5.0, generator=None):
    """Compute the noise, in units of noise_multiplier * max_grad_norm, of a batch in `parts` micro-batches."""
    model = Wide(x.shape[1])
    clipper = GhostClipper(model, max_grad_norm)
    for part in x.chunk(parts):
        clipper.accumulate(model(part))
    clean = flat(clipper)
    clipper.privatize(noise_multiplier, expected_batch_size, generator)
    noisy = model.linear.weight.grad.double().flatten() * expected_batch_size
    return (noisy - clean) / (noise_multiplier * max_grad_norm)


def test_noise_comes_once_however_many_micro_batches(proof):
    x = torch.randn(4, 1000)
    ratios = {parts: noise_of(parts, x).std().item() for parts in (1, 2, 4)}
    proof("noise over its nominal std, for 1, 2, 4 micro-batches", [round(r, 4) for r in ratios.values()])
    assert all(abs(ratio - 1) <= 0.005 for ratio in ratios.values()), ratios


def test_noise_has_the_promised_scale_and_shape(proof):
    """Check 1e7 values: standard deviation within 0.2%, mean 0, normal by Kolmogorov-Smirnov, no correlation."""
    values = gaussian(torch.Size([10_000_000]), 3.0, torch.device("cpu"), Generator().manual_seed(1)) / 3.0
    proof("noise std over nominal, 1e7 values", round(values.std().item(), 6))
    assert abs(values.std().item() - 1) <= 0.002
    assert abs(values.mean().item()) <= 5 / math.sqrt(len(values))
    assert statistics.kstest(values[:1_000_000].numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 8, 16, 1000):
        assert abs((values[:-lag] * values[lag:]).mean().item()) <= 5 / math.sqrt(len(values)), lag
    assert values.abs().max() > 5


def test_noise_reaches_beyond_eight_sigma():
    """It is the Box-Muller transform of uniforms with 53 bits: the smallest, 2^-53, gives 8.57 sigma."""
    uniform = torch.rand(16, dtype=torch.float64, generator=Generator().manual_seed(3))
    radius = (-2 * torch.log1p(-uniform[:8])).sqrt()
    angle = 2 * math.pi * uniform[8:]
    by_hand = torch.cat([radius * angle.cos(), radius * angle.sin()])
    values = gaussian(torch.Size([16]), 1.0, torch.device("cpu"), Generator().manual_seed(3))
    torch.testing.assert_close(values, by_hand, rtol=1e-12, atol=1e-12)
    steps = torch.rand(1000, dtype=torch.float64) * 2**53
    assert torch.equal(steps, steps.round()) and (steps % 2 == 1).any(), "uniforms have 53 bits"
    assert math.sqrt(-2 * math.log(2**-53)) > 8.5


def test_noise_is_finer_than_float32():
    values = gaussian(torch.Size([1000]), 1.0, torch.device("cpu"))
    assert values.dtype == torch.float64 and (values.float().double() != values).float().mean() > 0.99


def test_noise_is_new_at_every_step_and_in_every_parameter():
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    clipper = GhostClipper(model, 1.0)
    draws = []
    for _ in range(2):
        clipper.privatize(1.0, 1.0)
        draws += [p.grad.flatten().clone() for p in model.parameters()]
    correlation = torch.corrcoef(torch.stack(draws).double())
    assert (correlation - torch.eye(4)).abs().max() < 5 / 300


def test_a_generator_repeats_and_nothing_else_does():
    x = torch.randn(1, 20)

    def draw(seed=None):
        torch.manual_seed(0)
        model = Wide(20)
        clipper = GhostClipper(model, 1.0)
        clipper.accumulate(model(x))
        clipper.privatize(1.0, 1.0, None if seed is None else Generator().manual_seed(seed))
        return model.linear.weight.grad

    assert torch.equal(draw(1), draw(1)) and not torch.isclose(draw(1), draw(2)).any()
    assert not torch.isclose(draw(), draw()).all()


def test_a_private_step_leaves_pytorchs_generator_alone():
    model = drawn.randomise(LoDALinear(3, 2, rank=1))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    losses = model(torch.randn(4, 3)).sum(1)
    before = torch.get_rng_state()
    ghost_dp_step(losses, model, sgd, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forked_child_has_noise_of_its_own():
    gaussian(torch.Size([1]), 1.0, torch.device("cpu"))  # so that the parent has a generator
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, gaussian(torch.Size([16]), 1.0, torch.device("cpu")).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(reading, 1 << 12)), dtype=torch.float64)
    ours = gaussian(torch.Size([16]), 1.0, torch.device("cpu"))
    assert len(theirs) == 16 and not torch.isin(theirs, ours).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_added_before_rounding(dtype):
    """In bf16 too the noise has its scale, because it is added in float64 and the sum rounded once."""
    model = nn.Linear(300, 300, bias=False).to(dtype)
    clipper = GhostClipper(model, 1.0)
    clipper.privatize(1.5, 2.0)
    assert model.weight.grad.dtype == dtype
    assert model.weight.grad.double().std().item() * 2.0 / 1.5 == pytest.approx(1, abs=0.015)


# ---- the divisor, and empty batches


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_the_divisor_is_the_expected_batch_size(samples):
    """The actual batch size would change with the record that is added or removed."""
    layer = drawn.randomise(LoDALinear(3, 2, rank=1).double())
    x = torch.randn(samples, 3, dtype=torch.float64)
    total, _ = clipped_sum(layer, drawn.curved(layer(x)), 0.5)
    trained = [p for p in layer.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in trained])
    ghost_dp_step(
        drawn.curved(layer(x)),
        layer,
        torch.optim.SGD(trained, 1.0),
        max_grad_norm=0.5,
        noise_multiplier=0,
        expected_batch_size=4.5,
    )
    moved = before - torch.cat([p.detach().flatten() for p in trained])
    torch.testing.assert_close(moved, total / 4.5, rtol=1e-12, atol=1e-14)


def test_empty_batches_are_noised_and_counted(proof):
    """Each of 200 empty Poisson batches moves every parameter by noise of the usual size."""
    model = Wide(30).double()  # rounding of float32 weights would lose a few moves in millions
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    steps, scales = 0, []
    for _ in range(200):
        before = model.linear.weight.detach().clone()
        losses = model(torch.zeros(0, 30, dtype=torch.float64))
        stats = ghost_dp_step(losses, model, sgd, max_grad_norm=2.0, noise_multiplier=0.5, expected_batch_size=4.0)
        moved = model.linear.weight.detach() - before
        steps += bool(moved.all()) and stats.samples == stats.clipped == stats.nonfinite == 0
        scales.append(moved.square().mean())
    proof("empty batches noised", f"{steps} of 200")
    assert steps == 200
    assert torch.stack(scales).mean().sqrt().item() == pytest.approx(2.0 * 0.5 / 4.0, rel=0.01)


@pytest.mark.parametrize(
    "losses", [torch.zeros(0), torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.float64)]
)
def test_any_empty_vector_is_an_empty_batch(losses):
    model = nn.Linear(2, 2)
    for views in (1, 3):
        assert GhostClipper(model, 1.0, views).accumulate(losses).samples == 0
    assert per_sample_grad_norms(losses, model).shape == (0,)


def test_a_fully_masked_batch_adds_nothing():
    layer = drawn.randomise(LoDALinear(3, 2, rank=1))
    total, stats = clipped_sum(layer, drawn.curved(layer(torch.randn(4, 3))), 1.0, torch.zeros(4, dtype=torch.bool))
    assert not total.any() and stats.samples == 0


# ---- statistics


def test_statistics_are_right():
    layer = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [math.nan, 1.0], [30.0, 40.0], [0.0, 0.0]], dtype=torch.float64)
    losses = layer(x).flatten()
    _, stats = clipped_sum(layer, losses, 1.0, torch.tensor([True, True, True, False, True]))
    assert (stats.samples, stats.clipped, stats.nonfinite, stats.clipped_fraction) == (4, 1, 1, 0.25)
    assert stats.mean_loss == pytest.approx(losses[[0, 1, 4]].mean().item())
    both = stats + stats
    assert (both.samples, both.clipped, both.nonfinite) == (8, 2, 2) and both.mean_loss == pytest.approx(
        stats.mean_loss
    )


def test_factors_reach_their_own_sample():
    """The samples' norms are very different, and each sample is scaled by its own factor."""
    layer = drawn.randomise(LoDALinear(6, 5, rank=2).double())
    x = torch.randn(6, 6, dtype=torch.float64)
    scales = torch.tensor([1e-3, 1e3, 1.0, 1e2, 1e-2, 10.0], dtype=torch.float64)
    loss = lambda model, rows: drawn.curved(model(rows[:, :6])) * rows[:, 6]  # noqa: E731
    rows = torch.cat([x, scales[:, None]], 1)
    truth = oracle.sample_grads(layer, loss, rows)
    total, _ = clipped_sum(layer, loss(layer, rows), 0.05)
    wanted = torch.cat([g.flatten() for g in oracle.clipped_sum(truth, 0.05).values()])
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=1e-13)
