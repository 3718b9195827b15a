"""The audit finds planted faults, each by the checks that should see it, and raises no alarm about correct steps.

The steps under audit are DP-SGD written out for a linear model; each fault replaces one line of it.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm
from torch import nn

from fastloda import DPTrainer, LoDALinear, PrivacyError, PrivateTraining, attach_loda, ghost_dp_step
from fastloda.audit import (
    CHECKS,
    Claim,
    PrivateStep,
    Released,
    Sampler,
    audit_step,
    of_ghost_step,
    of_loop,
    of_trainer,
)
from fastloda.audit.canary import CountedMu, GaussianMu
from fastloda.audit.noise import NoiseRecord, Scale
from fastloda.audit.report import Finding, judge
from fastloda.audit.sampler import audit_sampler
from fastloda.training.sampling import poisson_sample

C, SIGMA, BATCH, RATE, POPULATION = 0.5, 0.8, 16, 0.05, 320
CLAIM = Claim(SIGMA, C, BATCH)
SAMPLED = Claim(SIGMA, C, BATCH, sample_rate=RATE, steps=200)
FEATURES, OUTPUTS, VIEWS = 4, 3, 2


def records(n=16, seed=0):
    """Draw inputs [n, views, features] and targets [n, outputs]."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(n, VIEWS, FEATURES), draw(n, OUTPUTS)


# ---- a correct step, and faulty ones


class Textbook:
    """DP-SGD by its definition, for the squared error of a linear model; each line of the algorithm is a method."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(OUTPUTS, FEATURES, generator=generator, dtype=torch.float64)
        self.calls = 0

    def __call__(self, batch, generator):
        self.calls += 1
        shares = self.clip(self.gradients(*batch))
        noise = self.noise(shares, generator)
        release = self.divide(self.sum(shares), noise, len(shares))
        return {"weight": release[: OUTPUTS * FEATURES], "bias": release[OUTPUTS * FEATURES :]}

    def of_views(self, x, y):
        """Compute the gradient of each view, [n, views, d]."""
        error = x @ self.weight.T - y[:, None]
        return torch.cat([(error[..., None] * x[..., None, :]).flatten(2), error], 2)

    def gradients(self, x, y):
        return self.of_views(x, y).mean(1)

    def norms(self, g):
        return g.norm(dim=1, keepdim=True)

    def factors(self, g):
        return (C / self.norms(g)).clamp(max=1.0)

    def clip(self, g):
        finite = g.isfinite().all(1, keepdim=True)
        return torch.where(finite, g * self.factors(g), 0.0)

    def sum(self, shares):
        return shares.sum(0)

    def standard(self, generator):
        return torch.randn((OUTPUTS * (FEATURES + 1),), generator=generator, dtype=torch.float64)

    def noise(self, shares, generator):
        return SIGMA * C * self.standard(generator)

    def divide(self, total, noise, n):
        return (total + noise) / BATCH


class NoClipping(Textbook):
    def factors(self, g):
        return torch.ones_like(g[:, :1])


class ClippedToTwice(Textbook):
    def factors(self, g):
        return (2 * C / self.norms(g)).clamp(max=1.0)


class ClippedByValue(Textbook):
    def clip(self, g):
        return g.nan_to_num(0, 0, 0).clamp(-C, C)


class ClippedByTensor(Textbook):
    """Weight and bias are clipped to C each."""

    def clip(self, g):
        parts = [super(ClippedByTensor, self).clip(part) for part in g.split([OUTPUTS * FEATURES, OUTPUTS], 1)]
        return torch.cat(parts, 1)


class ClippedAsABatch(Textbook):
    """The mean gradient is clipped instead of each record's."""

    def clip(self, g):
        return g.nan_to_num(0, 0, 0)

    def sum(self, shares):
        total = shares.sum(0, keepdim=True)
        return (total * super().factors(total)).flatten()


class ViewsApart(Textbook):
    def gradients(self, x, y):
        return self.of_views(x, y).flatten(0, 1)


class BiasOutOfTheNorm(Textbook):
    def norms(self, g):
        return g[:, : OUTPUTS * FEATURES].norm(dim=1, keepdim=True)


class CoarseNorm(Textbook):
    """The norm is rounded to bf16's 8 bits."""

    def norms(self, g):
        return super().norms(g).bfloat16().double()


class WeightedAfterTheClip(Textbook):
    def clip(self, g):
        return super().clip(g) * (1 + (super().norms(g) > 5 * C))


class NaNPasses(Textbook):
    def clip(self, g):
        return g * self.factors(g)


class InfCountsAsHuge(Textbook):
    """Inf / Inf is caught, but such entries are set to a number far over the bound."""

    def clip(self, g):
        return (g * self.factors(g)).nan_to_num(nan=1e3 * C)


class SamplesMix(Textbook):
    """Inputs are centred by batch statistics, as in BatchNorm."""

    def of_views(self, x, y):
        return super().of_views(x - x.mean(0, keepdim=True) if len(x) else x, y)


class RealisedDivisor(Textbook):
    def divide(self, total, noise, n):
        return (total + noise) / max(n, 1)


class RealisedDivisorBeforeTheNoise(Textbook):
    def divide(self, total, noise, n):
        return total / max(n, 1) + noise / BATCH


class HalfTheNoise(Textbook):
    def noise(self, shares, generator):
        return super().noise(shares, generator) / 2


class NoiseOverRootTwo(Textbook):
    def noise(self, shares, generator):
        return super().noise(shares, generator) / math.sqrt(2)


class NoiseFivePercentLow(Textbook):
    def noise(self, shares, generator):
        return super().noise(shares, generator) * 0.95


class NoiseOfTheMean(Textbook):
    """The noise is divided by the batch size twice."""

    def noise(self, shares, generator):
        return super().noise(shares, generator) / BATCH


class NoiseMissesAMicroBatch(Textbook):
    """Four micro-batches get a quarter of the variance each, except the last, which gets none."""

    def noise(self, shares, generator):
        return sum(super(NoiseMissesAMicroBatch, self).noise(shares, generator) / 2 for _ in range(3))


class BiasWithoutNoise(Textbook):
    def noise(self, shares, generator):
        noise = super().noise(shares, generator)
        noise[-OUTPUTS:] = 0
        return noise


class OneCoordinateWithHalfTheNoise(Textbook):
    def noise(self, shares, generator):
        noise = super().noise(shares, generator)
        noise[7] /= 2
        return noise


class NoiseOfTheLargestShare(Textbook):
    """The noise is scaled by the largest share in the batch instead of by C."""

    def noise(self, shares, generator):
        largest = shares.norm(dim=1).max() / C if len(shares) else 1.0
        return super().noise(shares, generator) * largest


class NoNoiseWhenEmpty(Textbook):
    def noise(self, shares, generator):
        return super().noise(shares, generator) * (len(shares) > 0)


class EmptyBatchFails(Textbook):
    def clip(self, g):
        assert len(g), "an empty batch"
        return super().clip(g)


class SameNoiseEveryStep(Textbook):
    def noise(self, shares, generator):
        return super().noise(shares, torch.Generator().manual_seed(1))


class NoiseFromAPool(Textbook):
    """The noise is one of a few thousand vectors, which are used again and again."""

    def noise(self, shares, generator):
        seed = int(torch.randint(4096, (), generator=generator))
        return super().noise(shares, torch.Generator().manual_seed(seed))


class NoiseTakenBack(Textbook):
    """Each step subtracts half of the previous step's noise."""

    def __init__(self):
        super().__init__()
        self.last, self.stream = 0.0, None

    def noise(self, shares, generator):
        if generator is not self.stream:  # another run begins
            self.last, self.stream = 0.0, generator
        fresh = super().noise(shares, generator)
        noise, self.last = (fresh - 0.5 * self.last) / math.sqrt(1.25), fresh
        return noise


class SameNoiseInEveryRow(Textbook):
    def noise(self, shares, generator):
        noise = super().noise(shares, generator)
        return noise[:OUTPUTS].repeat(FEATURES + 1)


class WeightAndBiasShareNoise(Textbook):
    """The noise of each tensor starts from the same seed."""

    def noise(self, shares, generator):
        noise = super().noise(shares, generator)
        noise[-OUTPUTS:] = noise[:OUTPUTS]
        return noise


class UniformNoise(Textbook):
    def standard(self, generator):
        shape = (OUTPUTS * (FEATURES + 1),)
        return math.sqrt(12) * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)


class TruncatedNoise(Textbook):
    """No noise is beyond 2 standard deviations; the variance is what it should be."""

    def standard(self, generator):
        return super().standard(generator).clamp(-2, 2) / 0.95946


class NoiseEverySecondStep(Textbook):
    """A random half of the steps get twice the variance, the others none: right on average."""

    def noise(self, shares, generator):
        on = torch.rand((), generator=generator) < 0.5
        return super().noise(shares, generator) * (math.sqrt(2) if on else 0.0)


REPLAY, CANARY, NOISE = {"neighbour replay"}, {"canary, as a Gaussian", "canary, by counts"}, {"noise scale"}

# Planted fault -> the checks that must find it. Other checks may find it too.
FAULTS: dict[type[Textbook], set[str]] = {
    NoClipping: REPLAY | CANARY,
    ClippedToTwice: REPLAY | CANARY,
    ClippedByValue: REPLAY,
    ClippedByTensor: REPLAY,
    ClippedAsABatch: REPLAY,
    ViewsApart: REPLAY,
    BiasOutOfTheNorm: REPLAY,
    CoarseNorm: REPLAY,
    WeightedAfterTheClip: REPLAY | CANARY,
    NaNPasses: REPLAY,
    InfCountsAsHuge: REPLAY,
    SamplesMix: REPLAY,
    RealisedDivisor: REPLAY | {"noise at other batches"},
    RealisedDivisorBeforeTheNoise: REPLAY,
    HalfTheNoise: CANARY | NOISE,
    NoiseOverRootTwo: NOISE | {"canary, as a Gaussian"},
    NoiseFivePercentLow: NOISE,
    NoiseOfTheMean: CANARY | NOISE,
    NoiseMissesAMicroBatch: NOISE,
    BiasWithoutNoise: NOISE | {"noise in each tensor"},
    OneCoordinateWithHalfTheNoise: {"noise in each tensor"},
    NoiseOfTheLargestShare: {"noise at other batches"},
    NoNoiseWhenEmpty: {"empty batch"},
    EmptyBatchFails: {"empty batch"},
    SameNoiseEveryStep: CANARY | NOISE,
    NoiseFromAPool: {"noise between steps"},
    NoiseTakenBack: {"noise between steps"},
    SameNoiseInEveryRow: {"noise lengths", "noise between coordinates"},
    WeightAndBiasShareNoise: {"noise between coordinates"},
    UniformNoise: {"noise tails"},
    TruncatedNoise: {"noise tails"},
    NoiseEverySecondStep: {"noise tails", "noise lengths"},
}
# Small faults need more observations; the others are found with 300.
OBSERVATIONS = {NoiseFivePercentLow: 1000, TruncatedNoise: 1000}


def audit(step, batch=None, claim=CLAIM, **options):
    options = {"observations": 300, "progress": False} | options
    return audit_step(step, records() if batch is None else batch, claim, **options)


def violated(report):
    return {check.name for check in report.violations}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_faults_in_the_step_are_found(fault):
    report = audit(fault(), observations=OBSERVATIONS.get(fault, 300))
    assert FAULTS[fault] <= violated(report), report
    assert (report.epsilon_lower > report.epsilon_claimed) == bool(CANARY & violated(report))
    with pytest.raises(PrivacyError, match="breaks its claim"):
        report.raise_if_violated()


def test_rounding_is_allowed_for_and_no_more():
    """In float32 a correct step passes, and one whose norm is up to 0.4% too small does not."""
    for step, holds in ((Textbook(), True), (CoarseNorm(), False)):
        rounded = lambda batch, g: {k: v.float() for k, v in step(batch, g).items()}  # noqa: E731,B023
        assert audit(rounded, checks=["replay"]).passed == holds


# ---- samplers


class Shuffled:
    """A sampler that uses every record once in an epoch."""

    def __init__(self):
        self.left = torch.empty(0, dtype=torch.long)

    def __call__(self, generator):
        size = round(POPULATION * RATE)
        if not len(self.left):
            self.left = torch.randperm(POPULATION, generator=generator)
        batch, self.left = self.left[:size], self.left[size:]
        return batch


class UsedTwice:
    """A sampler whose batches serve two steps each."""

    def __init__(self):
        self.batch = None

    def __call__(self, generator):
        if self.batch is not None:
            batch, self.batch = self.batch, None
            return batch
        self.batch = poisson_sample(POPULATION, RATE, generator)
        return self.batch


def fixed_size(generator):
    return torch.randperm(POPULATION, generator=generator)[: round(POPULATION * RATE)]


def with_replacement(generator):
    return torch.randint(POPULATION, (round(POPULATION * RATE),), generator=generator)


def tenth_more(generator):
    return poisson_sample(POPULATION, 1.1 * RATE, generator)


def one_always(generator):
    return torch.cat([poisson_sample(POPULATION - 1, RATE, generator), torch.tensor([POPULATION - 1])])


def two_together(generator):
    chosen = poisson_sample(POPULATION - 1, RATE, generator)
    return torch.cat([chosen, torch.tensor([POPULATION - 1])]) if 0 in chosen else chosen


SAMPLING_FAULTS = {
    "shuffled": (Shuffled, {"sampler: each record", "sampler: batch sizes", "sampler: successive steps"}),
    "fixed size": (lambda: fixed_size, {"sampler: batch sizes"}),
    "with replacement": (lambda: with_replacement, {"sampler: each record once"}),
    "a tenth more records": (lambda: tenth_more, {"sampler: rate"}),
    "one record always": (lambda: one_always, {"sampler: each record"}),
    "two records together": (lambda: two_together, {"sampler: pairs"}),
    "each batch twice": (UsedTwice, {"sampler: successive steps"}),
}


@pytest.mark.parametrize("fault", SAMPLING_FAULTS)
def test_planted_faults_in_the_sampler_are_found(fault):
    make, wanted = SAMPLING_FAULTS[fault]
    report = audit(Textbook(), claim=SAMPLED, sampler=Sampler(make(), POPULATION), checks=["sampler"])
    assert wanted <= violated(report), report


# ---- what rounding hides


NUMBERS = 20_000


class ManyNumbers(Textbook):
    """A record's gradient has few nonzero entries among many; it is clipped to `clipped_to` C and released in `dtype`."""

    def __init__(self, clipped_to, dtype, batch=BATCH, parameter=0.0):
        self.clipped_to, self.dtype, self.batch, self.parameter = clipped_to, dtype, batch, parameter

    def __call__(self, batch, generator):
        g = F.pad(batch[0].flatten(1), (0, NUMBERS - VIEWS * FEATURES))
        finite = g.isfinite().all(1, keepdim=True)
        shares = torch.where(finite, g * (self.clipped_to * C / g.norm(dim=1, keepdim=True)).clamp(max=1.0), 0.0)
        noise = SIGMA * C * torch.randn(NUMBERS + 2, generator=generator, dtype=torch.float64)
        many = (shares.sum(0) + noise[2:]) / self.batch
        # The release is the difference of the parameters after and before the step.
        moved = (self.parameter + many).to(self.dtype) - self.parameter
        return {"many": moved, "few": noise[:2] / self.batch}


ROUNDED = {
    "bfloat16": (1.6, torch.bfloat16, BATCH),
    "float16": (1.2, torch.float16, BATCH),
    "float16, a large divisor": (1.6, torch.float16, 1e6),
    "float16, all of it vanishes": (1.6, torch.float16, 1e12),
    "float32, differences of large parameters": (1.6, torch.float32, BATCH, 1e4),
    "float64, differences of huge parameters": (1.6, torch.float64, BATCH, 1e14),
}


def replayed(step):
    report = audit(step, claim=Claim(SIGMA, C, step.batch), checks=["replay"])
    return report.checks[0], report


@pytest.mark.parametrize("rounded", ROUNDED)
@pytest.mark.parametrize("clips", ["right", "wrong"])
def test_a_replay_that_rounding_hides_holds_nothing(rounded, clips):
    clipped_to, *rounding = ROUNDED[rounded]
    check, report = replayed(ManyNumbers(clipped_to if clips == "wrong" else 1.0, *rounding))
    assert (check.verdict, check.holds) == ("not run", None) and check.meaning.startswith("Too coarse"), report
    assert (
        "let the step release" in check.meaning and "no violation found; not run: neighbour replay" in report.summary()
    )
    assert "the claim holds" not in str(report) and report.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clipped_to, verdict", [(1.0, "holds"), (1.6, "violated"), (1.05, "violated")])
def test_the_way_out_of_a_coarse_replay(dtype, clipped_to, verdict):
    check, _ = replayed(ManyNumbers(clipped_to, dtype))
    assert check.verdict == verdict


def test_what_is_far_below_the_bound_holds_through_rounding():
    check, _ = replayed(ManyNumbers(0.05, torch.float16))
    assert check.verdict == "holds"


def test_what_is_far_over_the_bound_is_seen_through_rounding():
    check, _ = replayed(ManyNumbers(1e3, torch.bfloat16))
    assert check.verdict == "violated"


@given(st.integers(0, 99), st.floats(-6, 6), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
def test_rounding_is_never_more_than_is_allowed_for(seed, magnitude, dtype):
    exact = 10**magnitude * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rounded = exact.to(dtype)
    if rounded.isfinite().all():
        allowed = Released({"one": rounded[:50], "other": rounded[50:]}).rounding()
        assert (rounded.double() - exact).norm() <= allowed


def test_no_canary_of_rounding():
    """A canary's share that is all rounding can't be told apart from none, so that no bound on epsilon follows."""
    report = audit(ManyNumbers(1.0, torch.bfloat16), observations=100)
    checks = {check.name: check for check in report.checks}
    assert checks["canary"].verdict == "not run" and "rounding" in checks["canary"].meaning
    assert report.epsilon_lower is None and "canary" in report.summary()


def test_a_buffer_that_turns_from_zero_to_nan_is_seen():
    def step(batch, generator):
        released = Textbook()(batch, generator)
        return Released(released, {"mean": torch.zeros(3) if batch[0].isfinite().all() else torch.full((3,), math.nan)})

    report = audit(PrivateStep(step, shows_state=True), checks=["replay"])
    assert "nothing unnoised" in violated(report)


# ---- faults in the loop around the step, as PyTorch users make them


def small_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, OUTPUTS))


def data(n=16):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, FEATURES, generator=generator), torch.randint(OUTPUTS, (n,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def looped(fault=None):
    """Make a loop around ghost_dp_step; `fault` spoils one line of it."""
    model = small_model()
    model.register_buffer("mean", torch.zeros(FEATURES))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    settings = dict(max_grad_norm=C, noise_multiplier=SIGMA, expected_batch_size=BATCH)

    def run(batch, generator):
        found = losses(model, batch)
        if fault == "a parameter trains beside the step":
            extra = torch.autograd.grad(found.sum(), model[2].bias, retain_graph=True)[0]
        ghost_dp_step(found, model, optimizer, **settings, generator=generator)
        if fault == "a parameter trains beside the step":
            torch.optim.SGD([beside], 0.1).zero_grad()
            beside.grad = extra
            torch.optim.SGD([beside], 0.1).step()
        if fault == "a buffer keeps a mean":
            model.mean.copy_(0.9 * model.mean + 0.1 * batch[0].sum(0).clamp(-1, 1))
        if fault == "a frozen parameter moves":
            with torch.no_grad():
                frozen.add_(batch[0].sum())

    beside = nn.Parameter(torch.zeros(OUTPUTS))
    frozen = nn.Parameter(torch.zeros(()), requires_grad=False)
    model.register_parameter("frozen", frozen)
    return of_loop(model, run)


LOOP_FAULTS = {  # fault -> the kind of check, and the check
    "a parameter trains beside the step": ("noise", "noise in each tensor"),
    "a buffer keeps a mean": ("replay", "nothing unnoised"),
    "a frozen parameter moves": ("replay", "nothing unnoised"),
}


@pytest.mark.parametrize("fault", LOOP_FAULTS)
def test_planted_faults_in_the_loop_are_found(fault):
    kind, wanted = LOOP_FAULTS[fault]
    report = audit(looped(fault), data(), observations=100, checks=[kind])
    assert wanted in violated(report), report


def in_parts(fault):
    """Make a step with a fault that shows only in micro-batches."""

    def release(batch, generator, parts=1):
        step = Textbook()
        shares = step.clip(step.gradients(*batch))
        noise = SIGMA * C * step.standard(generator)
        if parts > 1 and fault == "noise shared out, one part without":
            shared = [step.noise(None, generator) / math.sqrt(parts) for _ in range(parts - 1)]
            noise = sum(shared)
        if parts > 1 and fault == "clipped after the parts are summed":
            raw = step.gradients(*batch).nan_to_num(0, 0, 0)
            sums = torch.stack([part.sum(0) for part in raw.chunk(parts) if len(part)] or [raw.sum(0)])
            shares = step.clip(sums) * 4
        return (shares.sum(0) + noise) / BATCH

    return PrivateStep(release, release)


@pytest.mark.parametrize(
    "fault, wanted",
    [
        (None, set()),
        ("noise shared out, one part without", {"noise at other batches"}),
        ("clipped after the parts are summed", {"neighbour replay"}),
    ],
)
def test_planted_faults_in_micro_batches_are_found(fault, wanted):
    found = violated(audit(in_parts(fault)))
    assert wanted <= found and bool(wanted) == bool(found)


# ---- correct steps


def ghost():
    model = small_model()
    attach_loda(model, rank=2)
    with torch.no_grad():
        model[2].loda_B.normal_()
    return of_ghost_step(model, losses, max_grad_norm=C, noise_multiplier=SIGMA, expected_batch_size=BATCH)


def ghost_views():
    """Make a step of several views per record: inputs [n, views, features], losses with a record's views in a row."""
    torch.manual_seed(1)
    layer = LoDALinear(FEATURES, OUTPUTS, rank=2)
    nn.init.normal_(layer.loda_B)

    def of_views(model, batch):
        x, y = batch
        return (model(x.flatten(0, 1)) - y.repeat_interleave(VIEWS, 0)).square().sum(1)

    settings = dict(max_grad_norm=C, noise_multiplier=SIGMA, expected_batch_size=BATCH, views=VIEWS)
    return of_ghost_step(layer, of_views, **settings)


SETTINGS = PrivateTraining(
    sample_rate=RATE,
    expected_batch_size=BATCH,
    steps=200,
    noise_multiplier=SIGMA,
    delta=1e-5,
    max_grad_norm=C,
    micro_batch_size=8,
)


def trained():
    model = small_model()

    def make(dataset, settings):
        return DPTrainer(model, dataset, lambda model, batch, _: losses(model, batch), settings, progress=False)

    return of_trainer(make, SETTINGS, data())


OWNED = replace(SETTINGS, per_owner=2)


def owned_data():
    """Draw the records of 16 owners, who have one to four each, which lie apart in the data set."""
    owners = torch.arange(16).repeat_interleave(torch.tensor([1, 2, 3, 4] * 4))
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(3))
    return *data(len(owners)), owners[order]


def trained_by_owner(owners_are_known=True):
    model = small_model()

    def make(dataset, settings, owners):
        told = {"owners": owners} if owners_are_known else {}
        chosen = settings if owners_are_known else replace(settings, per_owner=1)
        return DPTrainer(model, dataset, lambda model, batch, _: losses(model, batch), chosen, progress=False, **told)

    return of_trainer(make, OWNED, owned_data(), owned=True)


def test_records_clipped_by_themselves_are_no_protection_of_their_owner():
    """An owner with four records moves the sum by up to four times the bound."""
    report = audit(trained_by_owner(owners_are_known=False), owned_data(), Claim.of(OWNED), checks=["replay"])
    assert violated(report) == {"neighbour replay"}, report
    shares = next(check for check in report.checks if check.name == "neighbour replay").statistic
    assert float(re.search(r"largest share ([0-9.]+) C", shares)[1]) > 2, shares


@pytest.mark.parametrize("owners", [None, torch.rand(16), torch.zeros(16, dtype=torch.long)])
def test_an_audit_by_owner_wants_the_owners(owners):
    batch = data() if owners is None else (*data(), owners)
    batch = (batch[0], batch[1].float()) if owners is None else batch
    with pytest.raises(ValueError, match="the last tensor of records must say whose each record is"):
        audit(trained_by_owner(), batch, Claim.of(OWNED), checks=["replay"])


def float_views(n=16):
    return tuple(t.float() for t in records(n))


# name -> step, records, claim, number of audits by default and under --prove
CORRECT = {
    "textbook": (Textbook, records, CLAIM, 5, 200),
    "micro-batches": (lambda: in_parts(None), records, CLAIM, 2, 100),
    "ghost_dp_step in a loop": (looped, data, CLAIM, 1, 20),
    "GhostClipper": (ghost, data, CLAIM, 1, 20),
    "GhostClipper, views": (ghost_views, float_views, CLAIM, 1, 20),
    "DPTrainer": (trained, data, Claim.of(SETTINGS), 1, 20),
    "DPTrainer, owners": (trained_by_owner, owned_data, Claim.of(OWNED), 1, 20),
}


@pytest.mark.parametrize("kind", CORRECT)
def test_correct_steps_pass(kind, counts, proof):
    """There are no more false alarms than chance allows at significance 1e-3: by default, none."""
    make, batch, claim, small, full = CORRECT[kind]
    alarms, audits = Counter(), counts(small, full)
    for seed in range(audits):
        report = audit(make(), batch(), claim, observations=100, draws=100, seed=seed)
        alarms.update(violated(report))
        assert report.passed == (report.violations == ())
        assert not report.passed or 0 <= report.epsilon_lower <= report.epsilon_claimed
        assert {c.name for c in report.checks if c.verdict == "not run"} <= {"nothing unnoised", "sampler"}
    proof(f"audit: false alarms of {audits} audits of a correct step ({kind})", sum(alarms.values()))
    assert sum(alarms.values()) <= binom.isf(1e-3, audits, 1e-3), alarms


@pytest.mark.parametrize("population, rate", [(320, 0.05), (100, 0.01), (50, 0.5), (2000, 0.002)])
def test_the_poisson_sampler_passes(population, rate, counts, proof):
    """There are no more false alarms than the significance allows, at rates where batches are small too."""
    audits, alarms = counts(10, 300), 0
    for seed in range(audits):
        sampler = Sampler(lambda g: poisson_sample(population, rate, g), population)
        found = audit_sampler(sampler, rate, 500, torch.Generator().manual_seed(seed), lambda: None)
        alarms += any(check.verdict == "violated" for check in judge(found, 0.01))
    proof(f"audit: false alarms of {audits} Poisson samplers at 1e-2, rate {rate}", alarms)
    assert alarms <= binom.isf(1e-3, audits, 0.01)


def test_false_alarms_of_the_noise_checks_are_as_rare_as_promised(counts, proof):
    """The significance is 5%, which many audits can measure."""
    audits, alarms = counts(40, 2000), Counter()
    for seed in range(audits):
        generator = torch.Generator().manual_seed(seed)
        release = lambda: torch.randn(20, generator=generator, dtype=torch.float64) * CLAIM.noise_std  # noqa: E731,B023
        record = NoiseRecord(Released({"a": torch.zeros(15), "b": torch.zeros(5)}), CLAIM)
        for _ in range(150):
            record.add("batch", release(), release())
        checks = judge(record.findings(), 0.05)
        alarms.update(check.name for check in checks if check.verdict == "violated")
    proof(f"audit: false alarms of {audits} noise audits at 5%", sum(alarms.values()))
    assert sum(alarms.values()) <= binom.isf(1e-3, audits, 0.05), alarms


# ---- the bounds


@pytest.mark.parametrize("mu", [0.25, 1.0, 3.0])
def test_bounds_on_mu_cover_the_truth(mu, counts):
    """Both lower bounds exceed the true mu no more often than they claim, and are not trivial."""
    repeats, significance, n = counts(300, 5000), 0.05, 400
    generator = torch.Generator().manual_seed(int(100 * mu))
    over = Counter()
    for _ in range(repeats):
        outside, inside = torch.randn(2, n, generator=generator, dtype=torch.float64).numpy()
        inside = inside + mu
        for bound in (GaussianMu(inside, outside), CountedMu(inside, outside, mu / 2)):
            over[type(bound).__name__] += bound.lower(significance) > mu
            reached = bound.lower(bound.p_value(mu))
            assert reached == pytest.approx(mu, rel=1e-3) or bound.p_value(mu) > 0.5 or not reached
    assert max(over.values()) <= binom.isf(1e-3, repeats, significance)
    assert over["GaussianMu"] >= binom.ppf(1e-3, repeats, significance)


@pytest.mark.parametrize("wrong, of", [(0, 50), (3, 50), (200, 1000)])
def test_counted_bounds_are_clopper_pearsons_at_half_the_significance_each(wrong, of):
    inside, outside = np.arange(of) >= wrong, np.arange(of) < 2 * wrong  # 1 where the guess is "in"
    rates = [binomtest(k, of).proportion_ci(1 - 0.01, "exact").high for k in (wrong, 2 * wrong)]
    expected = max(0.0, norm.isf(rates).sum())
    assert CountedMu(inside, outside, 0.5).lower(0.01) == pytest.approx(expected)


class Scalar(Textbook):
    """The cheapest Gaussian mechanism: sums of clipped numbers in a few dimensions."""

    def __init__(self, noise_multiplier):
        self.noise_multiplier = noise_multiplier

    def __call__(self, batch, generator):
        noise = torch.randn(batch.shape[1:], generator=generator, dtype=torch.float64)
        finite = batch.isfinite().all(1, keepdim=True)
        shares = torch.where(finite, batch * (1 / batch.norm(dim=1, keepdim=True)).clamp(max=1), 0.0)
        return shares.sum(0) + self.noise_multiplier * noise


SIGMAS = {  # (sampling rate, steps) -> {epsilon: noise multiplier} at delta 1e-5, accurate enough for these tests
    (1.0, 1): {1: 3.7307, 4: 1.0812, 8: 0.6003},
    (0.01, 1000): {1: 1.4168, 4: 0.7354, 8: 0.5868},
}
REACHED = {1: (0.9, 0.3), 4: (3.6, 2.5), 8: (7.4, 5.6)}  # epsilon -> reached with 100,000 observations, with 1,000


@pytest.mark.parametrize("target", REACHED)
def test_lower_bounds_come_close_to_the_claim(target, counts, proof):
    check_lower_bound(target, 1.0, 1, counts, proof)


def test_lower_bounds_of_many_sampled_steps_come_close_to_the_claim(counts, proof):
    for target in counts([4], REACHED):
        check_lower_bound(target, 0.01, 1000, counts, proof)


def check_lower_bound(target, rate, steps, counts, proof):
    sigma = SIGMAS[rate, steps][target]
    observations = counts(1000, 100_000)
    batch = torch.randn(8, 4, dtype=torch.float64)
    claim = Claim(sigma, 1.0, 1.0, rate, steps)
    report = audit(Scalar(sigma), batch, claim, observations=observations, checks=["canary"])
    name = f"audit: lower bound at claim {target}, {observations} observations, rate {rate}, {steps} steps"
    proof(f"{name}, Gaussian", report.epsilon_lower_gaussian)
    proof(f"{name}, counts", report.epsilon_lower_counts)
    assert report.passed, report
    assert report.epsilon_claimed == pytest.approx(target, rel=0.01)
    full, small = REACHED[target]
    assert counts(small, full) <= report.epsilon_lower <= report.epsilon_claimed


def test_a_million_noise_values_show_half_a_percent():
    scale = 0.995**2
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    assert Scale(values.square().sum().item(), len(values)).p_too_small > 1e-3
    assert Scale(scale * values.square().sum().item(), len(values)).p_too_small < 1e-3


# ---- the report


def test_the_report_reads_well_and_is_json():
    report = audit(HalfTheNoise(), observations=200)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["passed"] is False and len(content["checks"]) == len(report.checks)
    text = str(report)
    for check in report.checks:
        assert check.name.split()[0] in text
    assert "VIOLATED" in text and f"{report.epsilon_claimed:.2f}" in text
    assert any(check.verdict == "not run" and "sampler" in check.name for check in report.checks)


def test_more_noise_than_claimed_is_no_violation():
    class Louder(Textbook):
        def noise(self, shares, generator):
            return 1.5 * super().noise(shares, generator)

    report = audit(Louder(), observations=200)
    assert report.passed and "more than claimed" in str(report.checks)


def test_an_audit_repeats_and_leaves_randomness_and_model_alone():
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    step = of_ghost_step(model, losses, max_grad_norm=C, noise_multiplier=SIGMA, expected_batch_size=BATCH)
    state = torch.get_rng_state()
    first, second = (audit(step, data(), observations=100, checks=["canary"]).to_dict() for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_chance_is_judged_together():
    """Bonferroni: the more checks there are, the smaller the p-value that each must reach."""
    alone = [Finding("a", "", "", p_value=0.005)]
    many = alone + [Finding(str(i), "", "", p_value=0.5) for i in range(9)]
    assert [c.verdict for c in judge(alone, 0.01)] == ["violated"]
    assert {c.verdict for c in judge(many, 0.01)} == {"holds"}


# ---- bad input


def unrepeatable(batch, generator):
    return torch.randn(3, generator=torch.Generator().manual_seed(unrepeatable.calls.pop()))


unrepeatable.calls = list(range(100))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"records": torch.zeros(1, 3)}, "at least 2"),
        ({"records": (torch.zeros(4, 3), torch.zeros(5))}, "as many in each"),
        ({"records": [1, 2]}, "records must be a tensor"),
        ({"step": 3}, "step must be"),
        ({"step": lambda batch, generator: None}, "must release"),
        ({"step": lambda batch, generator: torch.full((2,), math.nan)}, "ordinary records"),
        ({"step": unrepeatable}, "same seed"),
        ({"claim": 1.0}, "claim must be"),
        ({"observations": 10}, "observations"),
        ({"observations": 1e3}, "observations"),
        ({"draws": 0}, "draws"),
        ({"checks": ["canarie"]}, "canarie"),
        ({"checks": "replay"}, "checks"),
        ({"significance": 0.0}, "significance"),
        (
            {"sampler": Sampler(lambda generator: [400], POPULATION), "claim": SAMPLED, "checks": ["sampler"]},
            "index outside",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(change, message):
    arguments = {"step": Textbook(), "records": records(), "claim": CLAIM, "progress": False} | change
    with pytest.raises((ValueError, TypeError), match=message):
        audit_step(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"max_grad_norm": 0.0},
        {"expected_batch_size": math.inf},
        {"sample_rate": 0.0},
        {"steps": 0},
        {"delta": 0.0},
    ],
)
def test_a_claim_must_be_one(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Claim(**{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8} | change)


def test_a_loop_that_does_not_step_once_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="released nothing"):
        audit(of_loop(model, lambda batch, generator: None), data())

    def twice(batch, generator):
        losses(model, batch).sum().backward()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        optimizer.step()
        optimizer.step()

    with pytest.raises(ValueError, match="stepped twice"):
        audit(of_loop(model, twice), data())


def test_checks_are_known():
    assert set(CHECKS) == {"replay", "canary", "noise", "sampler"}
