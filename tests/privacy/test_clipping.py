"""Every style of clipping keeps one promise: a sample contributes at most max_grad_norm, whatever it holds.

Results are compared with each style's definition, written out over one backward pass per sample.
"""

import dataclasses
import json
import math
import os

import drawn
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fuzz import SLACK, Fuzz, fuzzed
from hypothesis import strategies as st
from jsonargparse import ArgumentError
from torch import Generator, Tensor, nn

from fastloda import GhostClipper, LoDALinear, PrivacyError, ghost_dp_step
from fastloda.per_sample import planner as plan
from fastloda.privacy.adaptive import AdaptiveClipping, centred_count
from fastloda.privacy.clip import STYLES, clip_factors, clipping_style
from fastloda.privacy.ranks import World
from fastloda.privacy.styles import Automatic, Flat, PerLayer
from fastloda.synthesis.budget import Privacy, privacy_statement, private_training
from fastloda.synthesis.diffusion import DDPM
from fastloda.synthesis.parser import build_parser
from fastloda.synthesis.settings import FineTuning
from fastloda.synthesis.stages import finetune
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def layers(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(layer_of(name) for name, p in model.named_parameters() if p.requires_grad))


def uneven(model: nn.Module, max_grad_norm: float) -> PerLayer:
    """Make a bound for each layer, all of them different."""
    weights = {layer: 1.0 + i for i, layer in enumerate(layers(model))}
    total = math.hypot(*weights.values())
    return PerLayer({layer: max_grad_norm * weight / total for layer, weight in weights.items()})


MAKE = {
    "flat": lambda model, bound: "flat",
    "automatic": lambda model, bound: "automatic",
    "automatic, gamma 3": lambda model, bound: Automatic(gamma=3.0),
    "per_layer": lambda model, bound: "per_layer",
    "per_layer, uneven": uneven,
    "adaptive": lambda model, bound: "adaptive",
}


def clip_by_definition(grads: dict[str, Tensor], style: Flat, bound: float) -> dict[str, Tensor]:
    """Compute one sample's contribution by the definition of the style."""
    if isinstance(style, PerLayer):
        names = dict.fromkeys(layer_of(name) for name in grads)
        bounds = style.bounds or {layer: bound / math.sqrt(len(names)) for layer in names}
        parts = {layer: {n: g for n, g in grads.items() if layer_of(n) == layer} for layer in names}
        return {
            n: g * min(1.0, bounds[layer] / max(oracle.norm(part).item(), 1e-300))
            for layer, part in parts.items()
            for n, g in part.items()
        }
    norm = oracle.norm(grads).item()
    factor = bound / (norm + style.gamma) if isinstance(style, Automatic) else min(1.0, bound / max(norm, 1e-300))
    return {name: factor * g for name, g in grads.items()}


def summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def flat(sums: dict[str, Tensor]) -> Tensor:
    return torch.cat([total.double().flatten() for total in sums.values()])


def sums_of(model, losses, bound, clipping, mask=None, views=1):
    clipper = GhostClipper(model, bound, views, clipping=clipping)
    stats = clipper.accumulate(losses, mask)
    return clipper._sums.by_name, stats


# ---- exact


@pytest.mark.parametrize("way", MAKE)
@pytest.mark.parametrize("kept", [True, False])
def test_the_sum_is_the_definition(way, kept, counts, monkeypatch):
    """This holds for any model, geometry and memory layout, with views, and for both ways to make the gradients."""
    monkeypatch.setattr(plan, "KEEP_FACTOR", math.inf if kept else 0.0)

    def check(case):
        truth = case.truth()
        norms = oracle.norms(truth)
        bound = float(norms.median()) * 0.9 + 1e-30
        clipping = MAKE[way](case.model, bound)
        style = clipping_style(clipping)
        if isinstance(style, Automatic) and norms.min() == 0:
            return  # a constant's gradient may be nothing but rounding
        got, stats = sums_of(case.model, case.losses(), bound, clipping, views=case.views)
        wanted = summed([clip_by_definition(grads, style, bound) for grads in truth])
        assert (flat(got) - flat(wanted)).norm() <= 1e-9 * bound + 1e-11
        assert stats.samples == case.samples and stats.nonfinite == 0

    drawn.hold_for(st.one_of(drawn.stacks(), drawn.reused_linears(), drawn.adapted_convs()), counts(16, 500), check)


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_flat_sums_are_the_former_ones_bit_for_bit(clipping):
    """The default is what it was before there were styles: one norm, one product, one factor for all parameters."""
    norms = torch.cat([torch.rand(1000, dtype=torch.float64) * 2, torch.tensor([0.0, 0.37, 1e-300, 1e300, math.inf])])
    mask = torch.rand(len(norms)) < 0.8
    former = (0.37 / norms).clamp(max=1.0)
    former = torch.where(norms.isfinite() & mask & (former >= torch.finfo(torch.float32).tiny), former, 0.0)
    now = clip_factors(norms[None], torch.tensor([[0.37]], dtype=torch.float64), mask, clipping_style(clipping))
    assert torch.equal(now[0], former)


@pytest.mark.parametrize("way", MAKE)
def test_stats_count_the_gradients_longer_than_their_bound(way):
    """One layer has weight gradient x and bias gradient 1, another one has gradient y."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1, bias=False)}).double()
    x, y = torch.tensor([[0.0, 0.0, 9.0, 0.5], [0.0, 9.0, 0.0, 9.0]], dtype=torch.float64)[..., None]
    mask = torch.tensor([True, True, True, False])
    bound = 4.0
    clipping = MAKE[way](model, bound)
    losses = (model["a"](x) + model["b"](y)).flatten()
    _, stats = sums_of(model, losses, bound, clipping, mask)
    assert (stats.samples, stats.clipped, stats.nonfinite) == (3, 2, 0)
    # The first layer's bound is exactly as long as its longest gradient.
    exact = PerLayer({"a": math.sqrt(82.5), "b": math.sqrt(16.5)})
    losses = (model["a"](x) + model["b"](y)).flatten()
    assert sums_of(model, losses, math.sqrt(99), exact, mask)[1].clipped == 1


# ---- the promise


@pytest.mark.parametrize("way", ["automatic", "per_layer", "per_layer, uneven", "adaptive"])
def test_no_record_contributes_more_than_the_bound(way, counts, proof, monkeypatch):
    """The fuzzed records of test_sensitivity, in every style: alone, and as the difference that they make to the batch."""
    largest = 0.0

    def check(case: Fuzz):
        nonlocal largest
        monkeypatch.setattr(plan, "KEEP_FACTOR", case.keep)
        model, x = case.build()
        bound, mine = case.max_grad_norm, slice(case.views, 2 * case.views)
        clipping = MAKE[way](model, bound)
        masks = [None, torch.tensor([False, True, False]), torch.tensor([True, False, True])]
        outcomes = [sums_of(model, case.losses(model, x, mine), bound, clipping, m, case.views) for m in masks]
        (total, stats), (alone, _), (without, _) = outcomes
        assert flat(total).isfinite().all() and stats.samples == 3
        if stats.nonfinite:
            assert not flat(alone).any() and torch.equal(flat(total), flat(without))
        part = max(flat(alone).norm().item(), (flat(total) - flat(without)).norm().item()) / bound
        largest = max(largest, part)
        assert part <= SLACK
        style = clipping_style(clipping)
        if isinstance(style, PerLayer):
            bounds = style.bounds or dict.fromkeys(layers(model), bound / math.sqrt(len(layers(model))))
            for layer, limit in bounds.items():
                of_layer = {name: total for name, total in alone.items() if layer_of(name) == layer}
                assert flat(of_layer).norm() <= limit * SLACK

    drawn.hold_for(fuzzed, counts(30, 3000), check)
    proof(f"fuzzed records, {way}: largest contribution over max_grad_norm", largest)
    assert largest > 0.9, "no case came near the bound: the fuzzing tests nothing"


class Greedy(Flat):
    """A style that asks for larger factors than it may have."""

    def wanted(self, norms, bounds):
        return torch.full_like(norms, 1e3)


def test_no_style_gets_more_than_the_promise_allows():
    layer = drawn.randomise(LoDALinear(5, 4, rank=2).double())
    x = 100 * torch.randn(1, 5, dtype=torch.float64)
    total, _ = sums_of(layer, drawn.curved(layer(x)), 0.5, Greedy())
    assert flat(total).norm().item() == pytest.approx(0.5)


@pytest.mark.parametrize("way", MAKE)
def test_a_sample_that_is_not_finite_in_one_layer_contributes_to_none(way):
    """The first layer's gradient is finite, but the second's is not."""
    model = nn.ModuleDict({"first": nn.Linear(2, 1), "second": nn.Linear(2, 1)})
    x = torch.ones(3, 2)
    y = torch.tensor([[1.0, 1.0], [math.inf, 1.0], [math.nan, 1.0]])

    def losses():
        return (model["first"](x) + model["second"](y)).flatten()

    clipping = MAKE[way](model, 1.0)
    alone, _ = sums_of(model, losses(), 1.0, clipping, torch.tensor([True, False, False]))
    total, stats = sums_of(model, losses(), 1.0, clipping)
    assert stats.nonfinite == 2 and stats.samples == 3 and torch.equal(flat(total), flat(alone)) and flat(alone).any()


def test_automatic_clipping_brings_every_gradient_near_the_bound():
    layer = nn.Linear(3, 1, bias=False).double()
    for size in (1e-3, 1.0, 1e6):
        total, stats = sums_of(layer, layer(torch.full((1, 3), size, dtype=torch.float64)).flatten(), 0.5, "automatic")
        norm = size * math.sqrt(3)
        assert flat(total).norm().item() == pytest.approx(0.5 * norm / (norm + 0.01)) and flat(total).norm() < 0.5
        assert stats.clipped == (norm > 0.5)


def test_a_factor_too_large_for_float32_is_none():
    """With C / (|g| + gamma) beyond float32, a gradient would become inf, and a zero NaN."""
    layer = nn.Linear(3, 1, bias=False)
    for size in (0.0, 1e-30, 1.0):
        total, _ = sums_of(layer, layer(torch.full((1, 3), size)).flatten(), 1e38, Automatic(gamma=1e-3))
        assert flat(total).isfinite().all()


# ---- virtual batches


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("way", MAKE)
def test_micro_batches_empty_ones_and_masks_do_not_change_the_step(way, views):
    """1, 2 or 4 micro-batches, an empty one and a padded one give the same gradient and the same next bound."""
    model = drawn.randomise(nn.Sequential(LoDALinear(5, 4, rank=2), nn.SiLU(), LoDALinear(4, 3, rank=1)).double())
    x = torch.randn(8, views, 5, dtype=torch.float64) * torch.logspace(-1, 1, 8, dtype=torch.float64)[:, None, None]
    clipping = MAKE[way](model, 0.7)

    def step(parts, masks=None):
        clipper = GhostClipper(model, 0.7, views, clipping=clipping)
        for part, mask in zip(parts, masks or [None] * len(parts)):
            clipper.accumulate(drawn.curved(model(part.flatten(0, 1))), mask)
        clipper.privatize(1.5, 20.0, Generator().manual_seed(1))
        return torch.cat([p.grad.flatten() for p in clipper.parameters.values()]), clipper.max_grad_norm

    whole, bound = step([x])
    padded = torch.cat([x[5:], torch.full_like(x[:1], math.nan), 2 * x[:1]])
    others = [step(x.chunk(2)), step(x.chunk(4)), step([x[:3], x[:0], x[3:]])]
    others.append(step([x[:5], padded], [None, torch.tensor([True] * 3 + [False] * 2)]))
    for grad, next_bound in others:
        torch.testing.assert_close(grad, whole, rtol=1e-12, atol=1e-14)
        assert next_bound == bound
    assert (bound != 0.7) == (way == "adaptive")


@pytest.mark.parametrize("way", MAKE)
def test_an_empty_batch_makes_a_step_of_pure_noise(way):
    model = nn.Linear(200, 200).double()
    clipper = GhostClipper(model, 2.0, clipping=MAKE[way](model, 2.0))
    assert clipper.accumulate(torch.zeros(0)).samples == 0
    clipper.privatize(0.5, 40.0)
    std = clipper.clipping.gradient_noise(0.5, 40.0) * 2.0 / 40.0
    assert model.weight.grad.std().item() == pytest.approx(std, rel=0.03)


def rank_of_two(rank: int, store: str, sending: int) -> None:
    """In a child process: take one step of two ranks, five of eight samples on the first; write gradient and next bound."""
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        os.write(sending, json.dumps(step_of(slice(0, 5) if rank == 0 else slice(5, 8))).encode())
    finally:
        os._exit(0)  # the child must not return into the tests


def step_of(rows: slice) -> list[float]:
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(8, 2)[rows]
    clipper = GhostClipper(layer, 1.0, clipping="adaptive")
    clipper.accumulate(layer(x).flatten())
    clipper.privatize(1.0, 20.0, Generator().manual_seed(2))
    return [*layer.weight.grad.flatten().tolist(), clipper.max_grad_norm]


def test_two_processes_move_one_bound(tmp_path):
    """Samples are counted over all ranks, the count is noised once, and each rank has the same bits."""
    pipes = []
    for rank in range(2):
        receiving, sending = os.pipe()
        if (child := os.fork()) == 0:
            rank_of_two(rank, str(tmp_path / "store"), sending)
        os.close(sending)
        pipes.append((child, receiving))
    outcomes = []
    for child, receiving in pipes:
        with os.fdopen(receiving) as pipe:
            outcomes.append(json.loads(pipe.read()))
        os.waitpid(child, 0)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == pytest.approx(step_of(slice(0, 8)), rel=1e-12)


# ---- adaptive clipping: the count


def test_a_record_moves_the_centred_count_by_one_half_at_most():
    """Adding or removing a record changes it by one half, short or long; masked or not finite, by nothing."""
    norms = torch.rand(50, dtype=torch.float64) * 2
    norms[::7] = math.nan
    norms[3::7] = math.inf
    mask = torch.rand(50) < 0.7
    total = centred_count(norms, 1.0, mask)
    for i in range(50):
        others = torch.arange(50) != i
        moved = (total - centred_count(norms[others], 1.0, mask[others])).item()
        assert moved == (0.0 if not mask[i] or not norms[i].isfinite() else 0.5 if norms[i] <= 1 else -0.5)


@pytest.mark.parametrize("z", [0.3, 1.0, 4.7])
@pytest.mark.parametrize("count_noise", [2.5, 10.0, 1e6])
def test_both_releases_together_cost_what_the_accountant_charges(z, count_noise):
    """Measured in units of each release's noise, one record adds a vector of length at most 1 / z."""
    adaptive = AdaptiveClipping(count_noise=count_noise)
    z_gradient = adaptive.gradient_noise(z, 100.0)
    assert z_gradient >= z
    assert math.hypot(1 / z_gradient, 0.5 / count_noise) == pytest.approx(1 / z, rel=1e-12)
    assert adaptive.share(z, 100.0) == pytest.approx((0.5 / count_noise) ** 2 * z**2)


def test_the_noise_of_both_releases_has_its_scale():
    """40,000 gradient values and 3,000 counts are drawn; each count is computed from the change of the bound."""
    z, expected, sigma, eta = 1.2, 10.0, 0.9, 0.2
    model = nn.Linear(200, 200, bias=False).double()
    adaptive = AdaptiveClipping(count_noise=sigma, learning_rate=eta)
    generator = Generator().manual_seed(0)
    clipper = GhostClipper(model, 2.0, clipping=adaptive)
    clipper.privatize(z, expected, generator)
    std = model.weight.grad.std().item() * expected / 2.0
    assert std == pytest.approx((z**-2 - (2 * sigma) ** -2) ** -0.5, rel=0.015)
    small = nn.Linear(1, 1, bias=False)
    moves = []
    for _ in range(3000):
        clipper = GhostClipper(small, 2.0, clipping=adaptive)
        clipper.privatize(z, expected, generator)
        moves.append(-math.log(clipper.max_grad_norm / 2.0) / eta * expected)
    moves = torch.tensor(moves)
    assert moves.std().item() == pytest.approx(sigma, rel=0.05) and abs(moves.mean()) < 4 * sigma / math.sqrt(3000)


def test_the_bound_moves_as_the_paper_says():
    """Without noise it is C exp(-eta (b - gamma)); b is centred at 1/2, over the expected batch size, without nonfinite ones."""
    layer = nn.Linear(1, 1, bias=False).double()
    clipper = GhostClipper(layer, 1.0, clipping=AdaptiveClipping(quantile=0.7, learning_rate=0.3, initial=2.0))
    assert clipper.max_grad_norm == 2.0
    x = torch.tensor([0.5, 2.0, 3.0, 4.0, math.nan, 1.0], dtype=torch.float64)
    mask = torch.tensor([True] * 5 + [False])
    clipper.accumulate(layer(x[:, None]).flatten(), mask)
    clipper.privatize(0, 8.0)
    below = (2 - 4 / 2) / 8 + 0.5
    assert clipper.max_grad_norm == pytest.approx(2.0 * math.exp(-0.3 * (below - 0.7)))
    clipper.privatize(0, 8.0)  # a new count begins: an empty batch gives 1/2
    assert clipper.max_grad_norm == pytest.approx(2.0 * math.exp(-0.3 * (below + 0.5 - 2 * 0.7)))


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [1e-3, 1e2])
def test_the_bound_finds_the_quantile_of_the_norms(quantile, start):
    layer = nn.Linear(1, 1, bias=False).double()
    x = torch.linspace(0.01, 1, 200, dtype=torch.float64)[:, None]  # so that the q-quantile of the norms is q
    clipper = GhostClipper(layer, start, clipping=AdaptiveClipping(quantile=quantile))
    generator, bounds = Generator().manual_seed(0), []
    for _ in range(250):
        clipper.accumulate(layer(x).flatten())
        clipper.privatize(1.0, 200.0, generator)
        bounds.append(clipper.max_grad_norm)
    assert sum(bounds[-50:]) / 50 == pytest.approx(quantile, rel=0.15)


def test_the_bound_stays_a_number_whatever_the_noise():
    layer = nn.Linear(1, 1)
    for seed in range(5):
        clipper = GhostClipper(layer, 1.0, clipping=AdaptiveClipping(count_noise=1e6, learning_rate=1e3))
        for _ in range(3):
            clipper.privatize(1.0, 1e-3, Generator().manual_seed(seed))
            assert 1e-21 < clipper.max_grad_norm < 1e21


def test_the_count_is_nowhere_to_be_read():
    """It is neither in the statistics nor in the clipper after the step."""
    layer = nn.Linear(1, 1, bias=False)
    clipper = GhostClipper(layer, 1.0, clipping="adaptive")
    stats = clipper.accumulate(layer(torch.tensor([[0.1], [9.0], [8.0]])).flatten())
    assert stats.totals.shape == (4,)
    clipper.privatize(1.0, 60.0)
    assert clipper._bound.observed(World()) == (0,)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: clipping_style("fixed"), "'fixed'"),
        (lambda: clipping_style(None), "None"),
        (lambda: clipping_style(Automatic), "Automatic"),
        (lambda: Automatic(gamma=0), "gamma.*0"),
        (lambda: Automatic(gamma=math.nan), "gamma.*nan"),
        (lambda: PerLayer({"0": -1.0}), r"bounds\['0'\].*-1"),
        (lambda: AdaptiveClipping(quantile=1.0), "quantile.*1.0"),
        (lambda: AdaptiveClipping(learning_rate=0), "learning_rate.*0"),
        (lambda: AdaptiveClipping(count_noise=math.inf), "count_noise.*inf"),
        (lambda: AdaptiveClipping(initial=-2.0), "initial.*-2"),
    ],
)
def test_bad_styles_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ({"0": 1.0}, r"layers \['0', '2'\], got \['0'\]"),
        ({"0": 0.6, "1": 0.8}, "got"),
        ({"0": 0.6, "2": 0.8, "3": 0.1}, "got"),
        ({"0": 0.6, "2": 0.9}, "max_grad_norm=1.0.*1.08"),
        ({"0": 0.5, "2": 0.5}, "max_grad_norm=1.0.*0.7"),
    ],
)
def test_bounds_that_do_not_fit_the_model_are_refused(bounds, told):
    model = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=told):
        GhostClipper(model, 1.0, clipping=PerLayer(bounds))
    GhostClipper(model, 1.0, clipping=PerLayer({"0": 0.6, "2": 0.8}))


def test_a_count_with_too_little_noise_is_refused_before_anything_changes():
    layer = nn.Linear(2, 1)
    clipper = GhostClipper(layer, 1.0, clipping=AdaptiveClipping(count_noise=0.5))
    losses = layer(torch.randn(3, 2)).flatten()
    clipper.accumulate(losses)
    before = {name: total.clone() for name, total in clipper._sums.by_name.items()}
    for noise in (1.0, 1.5):
        with pytest.raises(ValueError, match=f"count_noise must be at least .*noise_multiplier={noise:.4g}, got 0.5"):
            clipper.privatize(noise, 8.0)
    assert layer.weight.grad is None and all(
        torch.equal(before[n], total) for n, total in clipper._sums.by_name.items()
    )
    clipper.privatize(0.9, 8.0)
    with pytest.raises(ValueError, match=r"got 0.4 \(expected_batch_size / 20, the default\)"):
        dataclasses.replace(SETTINGS, clipping="adaptive", expected_batch_size=8.0)


def test_one_step_alone_has_no_adaptive_bound():
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    options = dict(max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=4)
    sgd = torch.optim.SGD(layer.parameters(), 1.0)
    with pytest.raises(ValueError, match="GhostClipper"):
        ghost_dp_step(layer(torch.randn(3, 2)).flatten(), layer, sgd, clipping="adaptive", **options)
    assert torch.equal(layer.weight, before)
    stats = ghost_dp_step(layer(torch.randn(3, 2)).flatten(), layer, sgd, clipping="automatic", **options)
    moved = (before - layer.weight).norm() * 4
    assert stats.samples == 3 and 0 < moved <= 3


# ---- the trainer


SETTINGS = PrivateTraining(
    sample_rate=0.4,
    expected_batch_size=24,
    steps=6,
    noise_multiplier=1.0,
    delta=1e-5,
    max_grad_norm=0.5,
    views=2,
    micro_batch_size=7,
    ema_decay=0.9,
    seed=3,
)
ADAPTIVE = AdaptiveClipping(count_noise=2.0)


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def jittered(model, batch, generator):
    """Compute losses of two noisy copies of each record."""
    x, y = (t.repeat_interleave(2, dim=0) for t in batch)
    return F.cross_entropy(model(x + 0.1 * torch.randn(x.shape, generator=generator)), y, reduction="none")


def trainer(settings, **options) -> DPTrainer:
    generator = torch.Generator().manual_seed(7)
    y = torch.randint(3, (60,), generator=generator)
    data = torch.randn(60, 6, generator=generator) + y[:, None], y
    return DPTrainer(small_model(), data, jittered, settings, progress=False, **options)


WITH = {
    "automatic": "automatic",
    "per_layer": PerLayer({"0": 0.3, "2": 0.4}),
    "adaptive": ADAPTIVE,
}


@pytest.mark.parametrize("way", WITH)
def test_a_run_resumes_bit_for_bit_in_every_style(way, tmp_path):
    """The checkpoint contains the adaptive bound and the style."""
    settings = dataclasses.replace(SETTINGS, clipping=WITH[way])
    whole = trainer(settings).fit()
    path = tmp_path / "run.pt"
    first = trainer(settings, checkpoint=path)
    for _ in range(3):
        first.train_step()
    first.save()
    first.train_step()  # this step is lost, and taken again below
    second = trainer(settings, checkpoint=path)
    assert (second.clipper.max_grad_norm != 0.5) == (way == "adaptive")
    second.fit()
    assert second.clipper.max_grad_norm == whole.clipper.max_grad_norm
    for name, p in whole.parameters.items():
        assert torch.equal(p, second.parameters[name])
    with pytest.raises(ValueError, match="clipping is"):
        trainer(SETTINGS, checkpoint=path)


@pytest.mark.parametrize("way", [*STYLES, "given"])
def test_the_statement_says_how_gradients_were_clipped(way):
    clipping = ADAPTIVE if way == "adaptive" else WITH["per_layer"] if way == "given" else way
    settings = dataclasses.replace(SETTINGS, clipping=clipping)
    statement = privacy_statement(trainer(settings), Privacy(10.0, 1e-5, records=60, batch_size=24))
    assert json.loads(json.dumps(statement, allow_nan=False)) == statement
    assert statement["clipping"] == clipping_style(clipping).name
    assert statement["noise_multiplier"] == 1.0
    if way == "adaptive":
        assert statement["count_noise"] == 2.0 and statement["share_spent_on_count"] == pytest.approx(1 / 16)
        assert statement["gradient_noise_multiplier"] == pytest.approx(1 / math.sqrt(15 / 16))
        assert "count" in statement["mechanism"]
    if way == "given":
        assert statement["bounds"] == {"0": 0.3, "2": 0.4}


def test_the_budget_chooses_the_style():
    privacy = Privacy(10.0, 1e-5, epochs=1, batch_size=30, records=60, clipping="automatic")
    assert private_training(privacy).clipping == "automatic"
    with pytest.raises(ValueError, match="clipping.*'other'"):
        dataclasses.replace(privacy, clipping="other")


@pytest.mark.parametrize("way", WITH)
def test_training_learns_in_every_style(way):
    settings = dataclasses.replace(
        SETTINGS, clipping=WITH[way], steps=15, noise_multiplier=0.2, learning_rate=0.1, micro_batch_size=60
    )
    t = trainer(settings)
    first = t.train_step().mean_loss
    while t.step < settings.steps:
        last = t.train_step().mean_loss
    assert last < first - 0.2


# ---- views: noise levels and flips


class Sees(nn.Module):
    """A model that keeps the images and timesteps of its last call, and predicts zero."""

    null_class = 10

    def forward(self, x, t, y):
        self.x, self.t = x, t
        return torch.zeros_like(x)


def test_each_view_has_a_noise_level_and_a_flip_of_its_own():
    model, views = Sees(), 4
    x = torch.arange(6.0).view(1, 1, 2, 3).expand(500, 1, 2, 3) / 6
    losses = DDPM().losses(
        model,
        x,
        torch.zeros(500).long(),
        views=views,
        flips=True,
        noise=torch.zeros(2000, 1, 2, 3),
        generator=Generator().manual_seed(0),
    )
    scale = DDPM().alphas_cumprod.sqrt().float()[model.t].view(-1, 1, 1, 1)
    straight, mirrored = ((model.x - scale * image).abs().amax((1, 2, 3)) < 1e-6 for image in (x[:1], x[:1].flip(-1)))
    assert losses.shape == (2000,) and (straight ^ mirrored).all()
    by_sample = mirrored.view(500, views).sum(1)
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)
    assert by_sample.double().var().item() == pytest.approx(views / 4, rel=0.3)  # flips are independent within a sample
    assert all(len(t.unique()) == views for t in model.t.view(500, views)[:50] // (1000 // views))


def test_flips_are_an_option_that_changes_nothing_else():
    model, x, y = Sees(), torch.rand(5, 1, 4, 4), torch.zeros(5).long()
    drawn_x = []
    for flips in (False, True):
        DDPM().losses(model, x, y, views=3, flips=flips, generator=Generator().manual_seed(1))
        drawn_x.append((model.x, model.t))
    assert torch.equal(drawn_x[0][1], drawn_x[1][1]) and not torch.equal(drawn_x[0][0], drawn_x[1][0])
    symmetric = (x + x.flip(-1)) / 2
    pair = []
    for flips in (False, True):
        DDPM().losses(model, symmetric, y, views=3, flips=flips, generator=Generator().manual_seed(1))
        pair.append(model.x)
    assert torch.equal(*pair)


@pytest.mark.parametrize("flips", [False, True])
def test_fine_tuning_passes_flips_on(flips, monkeypatch):
    seen = {}
    monkeypatch.setattr(DDPM, "losses", lambda self, *arguments, **options: seen.update(options))
    training = FineTuning(flips=flips)
    training.losses(DDPM(), 3)(Sees(), (torch.zeros(2, 1, 4, 4), torch.zeros(2).long()), None)
    assert seen["flips"] is flips and seen["views"] == 3
    assert "flips" not in training.optimization()


def test_the_command_line_chooses_style_flips_and_secure_noise():
    command = ["--run", "r", "--data", "d", "--privacy.target_epsilon", "3", "--privacy.delta", "1e-5"]
    parser = build_parser("fastloda finetune", finetune)
    for chosen in STYLES:
        options = ["--privacy.clipping", chosen, "--training.flips", "--training.secure_noise"]
        parsed = parser.instantiate(parser.parse_args(command + options))
        assert parsed.privacy.clipping == chosen and parsed.training.flips and parsed.training.secure_noise
    for wrong in (["--privacy.clipping", "fixed"], ["--training.secure_noise", "--training.seed", "1"]):
        with pytest.raises((ArgumentError, ValueError), match="clipping|secure_noise"):
            parser.instantiate(parser.parse_args(command + wrong))


def test_the_bound_changes_between_steps_only():
    """Within a step, samples that were clipped to the old bound would get the noise of the new one."""
    model = nn.Linear(3, 1)
    clipper = GhostClipper(model, 1.0)
    clipper.max_grad_norm = 2.0
    clipper.accumulate(model(torch.randn(4, 3)).flatten())
    clipper.max_grad_norm = 2.0
    with pytest.raises(PrivacyError, match="clipped to 2, and the noise would not fit it"):
        clipper.max_grad_norm = 0.1
    assert clipper.max_grad_norm == 2.0
    clipper.privatize(1.0, 4.0)
    clipper.max_grad_norm = 0.1
    for value in (0.0, math.inf, "1"):
        with pytest.raises(ValueError, match="max_grad_norm must be"):
            clipper.max_grad_norm = value
    assert clipper.max_grad_norm == 0.1


class FailsOnce:
    """A noise source that fails when the second part is drawn, and works at the next try."""

    def __init__(self):
        self.draws = 0

    def normal(self, shape):
        self.draws += 1
        if self.draws == 2:
            raise OSError("the source of noise is gone")
        return torch.ones(shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")  # ones are no noise
def test_a_draw_that_fails_leaves_no_noise_behind(monkeypatch):
    """The next try adds its own noise, and only once."""
    monkeypatch.setattr("fastloda.privacy.noise.AT_A_TIME", 2)
    model, source = nn.Linear(3, 1), FailsOnce()
    clipper = GhostClipper(model, 1.0)
    with pytest.raises(OSError, match="gone"):
        clipper.privatize(1.0, 1.0, source)
    assert all(p.grad is None for p in model.parameters())
    clipper.privatize(1.0, 1.0, source)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_the_style_of_clipping_is_fixed():
    """Otherwise adaptive clipping's count would still be released, without flat clipping's noise paying for it."""
    clipper = GhostClipper(nn.Linear(3, 1), 1.0, clipping="adaptive")
    with pytest.raises(AttributeError):
        clipper.clipping = Flat()
