"""The rules of common layers, users' own layers, layers through torch.func and Gram norms: exact, or refused by name."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import drawn
import oracle
import pytest
import torch
import torch.nn.functional as F
from exactness import check_exact, check_float32, distance, use_plan
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastloda import GhostClipper, LoDALinear, PrivacyError, ghost_dp_step, per_sample_grad_norms
from fastloda.per_sample import graph
from fastloda.per_sample import planner as plan
from fastloda.per_sample.batch_axis import BatchPlaces
from fastloda.per_sample.fallback.functional import cover
from fastloda.per_sample.fallback.register import check_rule, register_rule
from fastloda.per_sample.graph import trace
from fastloda.per_sample.rules import Call, gram
from fastloda.per_sample.rules.norm import rms_norm

KINDS = {
    "transposed conv": (drawn.transposed_convs(), 45, 2000),
    "norm": (drawn.more_norms(), 45, 1500),
    "bag": (drawn.bags(), 45, 1500),
    "slope or pair": (drawn.slopes_and_pairs(), 30, 1000),
    "attention": (drawn.attentions(), 60, 2000),
    "sequence first": (drawn.sequences_first(), 90, 2000),
    "recurrent": (drawn.recurrent(), 45, 1000),
    "form": (drawn.forms(), 90, 2000),
}


@pytest.mark.filterwarnings("ignore:layer .* is taken through torch.func whole")
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_clipped_sums_are_exact(kind, counts):
    cases, small, full = KINDS[kind]
    drawn.hold_for(cases, counts(small, full), check_exact)


@pytest.mark.parametrize("chosen", ["kept", "made again in tiny chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_under_every_plan(kind, chosen, counts, monkeypatch):
    use_plan(monkeypatch, chosen)
    cases, small, full = KINDS[kind]
    drawn.hold_for(cases, counts(small // 5, full // 3), check_exact)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bag"])
def test_float32_is_as_good_as_pytorch(kind, counts):
    cases, small, full = KINDS[kind]
    cases = cases.filter(varies) if kind == "norm" else cases
    drawn.hold_for(cases, counts(small // 5, full // 3), check_float32_with_fused_kernels_off)


@pytest.mark.parametrize("keep", [0.0, math.inf])
@pytest.mark.parametrize("cases", [drawn.plain_convs(), drawn.transposed_convs()], ids=["conv", "transposed conv"])
def test_convolutions_by_pytorchs_kernel_for_each_sample(cases, keep, counts, monkeypatch):
    """Large convolutions are computed so: exact in float64, as good as PyTorch in float32, with the norm of what is summed."""
    monkeypatch.setattr(plan, "MANY_POSITIONS", 0)
    monkeypatch.setattr(plan, "KEEP_FACTOR", keep)

    def check(case):
        check_exact(case)
        check_float32(case)
        check_clips_what_it_sums(case.to(torch.float32))

    drawn.hold_for(cases, counts(40, 1000), check)


def check_clips_what_it_sums(case):
    """Check that the norm and the sum agree to 1e-5, whatever the size of the numbers."""
    case.x[..., 1:] *= 1e3
    norms = per_sample_grad_norms(case.losses(), case.model, views=case.views)
    for i, norm in enumerate(norms):
        clipper = GhostClipper(case.model, 1e30, case.views)
        clipper.accumulate(case.losses(), torch.arange(case.samples) == i)
        assert abs(oracle.norm(clipper._sums.by_name) - norm) <= 1e-5 * norm


@pytest.mark.parametrize("order", ["pooled", "unbound", "permuted", "copied", "rows", "stacked"])
def test_an_adapter_on_sequences_of_one_position(order):
    """In [1, N, C] the dimensions before the batch have size 1, and yet the batch is not the first dimension."""
    layers = nn.Sequential(LoDALinear(3, 3, rank=2), LoDALinear(3, 3, rank=2))
    model = drawn.randomise(drawn.SequenceFirst(layers, order).double())
    check_exact(drawn.Case(model, torch.randn(4, 1, 3, dtype=torch.float64)))


@pytest.mark.parametrize("make", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_output_padding_beyond_a_single_tap(make):
    model = drawn.randomise(make(2, 2, 1, dilation=2, output_padding=1).double())
    dims = 1 + [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d].index(make)
    check_exact(drawn.Case(model, torch.randn(3, 2, *[3] * dims, dtype=torch.float64)))


def varies(case):
    """Tell whether the inputs differ: normalising a constant leaves nothing but float32's rounding."""
    return case.x.std() > 0 if case.x.numel() > 1 else True


def check_float32_with_fused_kernels_off(case):
    cover(case.model)  # this turns off the fused kernels of recurrent layers
    check_float32(case)


@pytest.mark.parametrize("form", drawn.FORMS)
def test_every_form_is_exact(form):
    model = drawn.randomise(drawn.Form(form).double())
    for views in (1, 2):
        check_exact(drawn.Case(model, torch.randn(6, 3, 4, dtype=torch.float64), views=views))


def test_the_fused_rms_norm_of_gpus():
    """The node is made as PyTorch's derivatives.yaml describes it, for elsewhere RMSNorm is composed of other operations."""
    x, gy = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    rstd = x.square().mean(-1, keepdim=True).rsqrt()
    node = SimpleNamespace(_saved_normalized_shape=[5], _saved_input=x, _saved_result1=rstd)
    recipe = rms_norm(Call(node, gy, 4, 1, {1: torch.Size([5])}))[1]
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for i, found in enumerate(recipe.compute(4, slice(0, 4))):
        y = F.rms_norm(x[i], (5,), weight, eps=0.0)
        torch.testing.assert_close(found, torch.autograd.grad(y, weight, gy[i])[0])


def test_sequences_of_other_lengths_need_no_new_probe():
    """The batch dimension is read off each graph: a probe for one length holds for others, and for one sample."""
    model = drawn.randomise(drawn.SequenceFirst(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "rows").double())
    for samples, length in ((3, 4), (4, 3), (2, 7), (1, 5), (5, 1), (6, 6)):
        check_exact(drawn.Case(model, torch.randn(samples, length, 3, dtype=torch.float64)))


def test_a_batch_in_the_last_dimension_is_exact_or_refused():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3, 1))

        def forward(self, x):
            return (x.t() * self.scale).t()

    check_exact(drawn.Case(Last().double(), torch.randn(4, 3, dtype=torch.float64)))


@pytest.mark.parametrize("wrong", [1, 3, 5])
def test_a_wrong_reading_of_the_layout_is_refused(wrong, monkeypatch):
    """The probe keeps samples apart, not the reading."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(3, 5, 4)
    losses = model(x, x, x)[0].sin().sum((1, 2))
    monkeypatch.setattr(graph, "follow_batch", lambda edges, rows: BatchPlaces(dict.fromkeys(edges, wrong), {}, []))
    if wrong == 5:
        per_sample_grad_norms(losses, model)  # the batch is there
    else:
        with pytest.raises(PrivacyError, match="samples mix|multiple|batch"):
            per_sample_grad_norms(losses, model)


# ---- norms by the Gram matrix


def ghosts(monkeypatch):
    """Let every linear map's norm be computed by the Gram matrix; return a list with one entry for each time this was done."""
    taken = []
    monkeypatch.setattr(plan, "GHOST_FACTOR", math.inf)
    monkeypatch.setattr(gram, "_squares", lambda *a, of=gram._squares: taken.append(1) or of(*a))
    return taken


GRAM_ROUNDING = 1e-13  # k u S^2 of `rules/gram.py` for up to 1,000 roundings, of activations and gradients near 1
GHOSTS = {"linear": drawn.plain_linears(), "stack": drawn.stacks(), "attention": drawn.attentions()}


@pytest.mark.filterwarnings("ignore:layer .* is taken through torch.func whole")
@pytest.mark.parametrize("kind", GHOSTS)
def test_ghost_is_exact(kind, counts, monkeypatch):
    taken = ghosts(monkeypatch)
    drawn.hold_for(GHOSTS[kind], counts(25, 500), lambda case: check_exact(case, GRAM_ROUNDING))
    assert taken


def test_a_map_called_twice_is_exact_without_a_gram(counts, monkeypatch):
    """The gradients of two calls may cancel, which no sum of Grams shows: then the gradients are made again."""
    taken = ghosts(monkeypatch)
    drawn.hold_for(drawn.reused_linears(), counts(25, 500), check_exact)
    assert not taken


def test_ghost_in_float32_is_as_good_as_pytorch(counts, monkeypatch):
    taken = ghosts(monkeypatch)
    drawn.hold_for(drawn.plain_linears(), counts(40, 500), check_float32)
    assert taken


def cancelling(samples, positions, inputs, outputs, size, dtype):
    """Draw positions whose products cancel up to rounding, plus small ones that do not."""
    signs = (1 - 2 * (torch.arange(positions) % 2)).view(-1, 1)
    x = size * torch.randn(samples, 1, inputs, dtype=torch.float64) * signs + 1e-3 * torch.randn(
        samples, positions, inputs
    )
    gy = torch.randn(samples, 1, outputs, dtype=torch.float64).expand(samples, positions, outputs)
    return x.to(dtype), gy.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e6])
@pytest.mark.parametrize("positions", [2, 16, 64])
def test_ghost_never_underestimates_what_it_sums(positions, size, dtype, counts):
    """Compare each sample's own contribution with its norm, and the norm with the gradient, up to float64's rounding."""
    for seed in range(counts(3, 100)):
        torch.manual_seed(seed)
        x, gy = cancelling(3, positions, 7, 5, size, dtype)
        norms = gram.squares(x, gy, 3).sum(1).sqrt()
        exact = torch.einsum("ntc,nto->nco", x.double(), gy.double()).flatten(1).norm(dim=1)
        for i, norm in enumerate(norms):
            alone = (torch.arange(3) == i).float()
            assert gram.weighted_sum(x, gy, alone).double().norm() <= norm * (1 + 1e-5)
        rounding = (positions + 4) * 2.0**-53 * (x.double().norm(dim=2) * gy.double().norm(dim=2)).sum(1)
        assert (norms >= exact - rounding).all()
        # The norm exceeds the truth by at most the square root of these roundings of what cancels.
        roundings = 7 + 5 + positions**2 + 8
        above = math.sqrt(2 * roundings * 2.0**-53) * (x.double().norm(dim=2) * gy.double().norm(dim=2)).sum(1)
        assert (norms <= exact + above).all()


def test_a_gram_in_float32_would_underestimate():
    """This shows that the case above is hard: it is the same without float64."""
    x, gy = cancelling(3, 16, 7, 5, 1e3, torch.float32)
    naive = ((x @ x.mT) * (gy @ gy.mT)).sum((1, 2)).clamp(min=0).sqrt().double()
    exact = torch.einsum("ntc,nto->nco", x.double(), gy.double()).flatten(1).norm(dim=1)
    assert ((naive - exact).abs() > 1e-2 * exact).any()


def test_ghost_keeps_bad_samples_out(monkeypatch):
    """A sample that is not finite contributes zero, and does not affect the others."""
    taken = ghosts(monkeypatch)
    layer = nn.Linear(5, 4)
    x = torch.randn(6, 5)
    x[1, 2], x[4] = math.nan, math.inf
    clipper = GhostClipper(layer, 1e-3)
    stats = clipper.accumulate(layer(x).sin().sum(1))
    clipper.privatize(0, 1)
    assert taken and stats.nonfinite == 2
    sound = torch.tensor([0, 2, 3, 5])
    case = drawn.Case(layer, x[sound], "mean")
    losses = lambda model, x: model(x).sin().sum(1)  # noqa: E731
    truth = oracle.clipped_sum(oracle.sample_grads(layer, losses, case.x), 1e-3)
    assert distance({n: p.grad for n, p in layer.named_parameters()}, truth) < 1e-8


def test_the_planner_takes_the_cheapest_sound_way():
    """It goes by counts of operations, not times: for small and large maps, few and many positions."""

    def sizes(n, t, c, o):
        product = ("tc,to->co", ((n * t, c), (n * t, o)))
        return plan.Sizes(n, c * o, 4 * n * t * (c + o), product, fused=False, ghost=True)

    assert plan.choose(sizes(32, 1, 512, 512)) is plan.Way.GHOST
    assert plan.choose(sizes(32, 4096, 64, 64)) is plan.Way.KEPT
    without = sizes(32, 1, 512, 512)._replace(ghost=False)
    assert plan.choose(without) is plan.Way.AGAIN
    assert plan.costs(without)[plan.Way.AGAIN].flops == 2 * 2 * 32 * 512 * 512
    four = sizes(2, 4, 8, 16)
    by_hand = 2 * (2 * 2 * 4 * 8 * 16 + 2 * (2 * 16 * 8 + 2 * 16 * 16 + 2 * 16))
    assert plan.costs(four)[plan.Way.GHOST].flops == by_hand


# ---- layers without a rule, through torch.func


class Rotated(nn.Module):
    """A layer whose power by a norm of its parameter and matrix exponential have no rule, and whose bias has one."""

    def __init__(self, width: int):
        super().__init__()
        self.skew, self.bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        turned = (x + shift) @ torch.linalg.matrix_exp(self.skew)
        return turned.square().add(1).pow(self.skew.norm().sigmoid()) + self.bias


class Turned(Rotated):
    """A layer of operations on parameters alone, which need no torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.matrix_exp(self.skew - self.skew.T) * (self.bias * self.bias)


class Holder(nn.Module):
    """A layer with a parameter that has no rule, and a linear layer inside that has one."""

    def __init__(self, width: int):
        super().__init__()
        self.power, self.inner = nn.Parameter(torch.empty(width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().add(1).pow(self.power)


class Pairs(nn.Module):
    """A layer with several outputs, one of them integers, one with the batch second; its input is passed by name."""

    def __init__(self, width: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(width))

    def forward(self, *, x: Tensor):
        y = x * self.w.exp()
        return {"y": y, "second": y.transpose(0, -1).sin() if x.dim() == 2 else y[None].sin(), "largest": y.argmax(-1)}


class TakesPairs(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.pairs = Pairs(width)

    def forward(self, x: Tensor) -> Tensor:
        found = self.pairs(x=x)
        second = found["second"].transpose(0, -1) if x.dim() == 2 else found["second"][0]
        return found["y"] + 2 * second


class SharedWithOutside(nn.Module):
    """An odd layer that is called twice, and whose bias is also that of another layer."""

    def __init__(self, width: int):
        super().__init__()
        self.odd, self.plain = Rotated(width), nn.Linear(width, width)
        self.plain.bias = self.odd.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.plain(self.odd(x).tanh()), shift=x)


ODD = {
    "rotated": Rotated,
    "turned": Turned,
    "holder": Holder,
    "several outputs": TakesPairs,
    "shared and called twice": SharedWithOutside,
    "weight norm": lambda width: parametrizations.weight_norm(nn.Linear(width, width)),
    "in a stack": lambda width: nn.Sequential(
        nn.Linear(width, width), nn.Tanh(), Rotated(width), LoDALinear(width, 2, rank=1)
    ),
    "checkpointed": lambda width: nn.Sequential(
        nn.Linear(width, width), drawn.Checkpointed(Rotated(width)), nn.Linear(width, 2)
    ),
}


@st.composite
def odd_layers(draw):
    width, rest = draw(st.integers(1, 3)), draw(drawn.leading())
    model = drawn.thaw_some(draw, ODD[draw(st.sampled_from(sorted(ODD)))](width))
    return drawn.draw_case(draw, model, (*rest, width))


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
@pytest.mark.parametrize("chosen", ["as planned", "made again"])
def test_layers_without_a_rule_are_exact_through_torch_func(chosen, counts, monkeypatch):
    use_plan(monkeypatch, chosen)

    def check(case):
        plain = copy.deepcopy(case.model)
        cover(case.model)
        case.truth = lambda: drawn.Case(plain, case.x, case.readout, case.views).truth()
        check_exact(case)

    drawn.hold_for(odd_layers(), counts(40, 500), check)


def losses_of(model, x):
    return drawn.curved(model(x))


def test_one_warning_names_the_layer_and_layers_with_rules_are_left_alone():
    model = drawn.randomise(nn.Sequential(drawn.Form("view"), nn.Flatten(), Rotated(12)))
    covered = cover(model)
    x, ran = torch.randn(3, 3, 4), []
    model[0].form = lambda x, p, form=model[0].form: ran.append(1) or form(x, p)
    with pytest.warns(UserWarning, match=r"'2' \(Rotated\).*torch.func") as found:
        model(x)
    assert len(found) == 1 and covered.layers == ["2"] and "forward" not in model[0].__dict__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran.clear()
        for _ in range(2):
            cover(model)
            per_sample_grad_norms(losses_of(model, x), model)
    assert len(ran) == 2  # the covered layer is not looked into again
    covered.remove()
    assert all("forward" not in layer.__dict__ for layer in model.modules())
    with pytest.raises(PrivacyError, match=r"'2.skew'.*fastloda.cover"):
        per_sample_grad_norms(losses_of(model, x), model)


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_covered_layer_trains_as_before_without_a_private_step():
    plain = drawn.randomise(SharedWithOutside(3).double())
    model = copy.deepcopy(plain)
    cover(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2):
        for m in (plain, model):
            m.zero_grad()
            losses_of(m, x).sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_covered_model_is_copied_and_pickled():
    model = drawn.randomise(Rotated(3).double())
    cover(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    truth = per_sample_grad_norms(losses_of(model, x), model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.skew.add_(0.1)
        assert (per_sample_grad_norms(losses_of(other, x), other) != truth).all()
        assert torch.equal(per_sample_grad_norms(losses_of(model, x), model), truth)


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_covered_layer_under_autocast_clips_what_it_sums():
    model = drawn.randomise(nn.Sequential(nn.Linear(3, 3), Rotated(3)))
    cover(model)
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = drawn.curved(model(x).float())
    norms = per_sample_grad_norms(losses, model)
    for i in range(4):
        clipper = GhostClipper(model, 1e30)
        with torch.autocast("cpu", torch.bfloat16):
            clipper.accumulate(drawn.curved(model(x).float()), torch.arange(4) == i)
        clipper.privatize(0, 1)
        found = oracle.norm({n: p.grad for n, p in model.named_parameters()})
        torch.testing.assert_close(found, norms[i], rtol=1e-5, atol=0)


def test_a_whole_part_of_the_model_by_name():
    """The weight is used soundly by its own layer, and once more by the layer around it."""

    class Borrows(nn.Module):
        def __init__(self):
            super().__init__()
            self.lends = nn.Linear(3, 3)

        def forward(self, x):
            return self.lends(x) * self.lends.weight.norm()

    model = drawn.randomise(nn.Sequential(nn.Linear(3, 3), Borrows()).double())
    plain, x = copy.deepcopy(model), torch.randn(4, 3, dtype=torch.float64)
    cover(model, ["1"])
    truth = oracle.norms(oracle.sample_grads(plain, losses_of, x))
    torch.testing.assert_close(per_sample_grad_norms(losses_of(model, x), model), truth, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="'nowhere'"):
        cover(model, ["nowhere"])
    with pytest.raises(ValueError, match="trains"):
        cover(model.requires_grad_(False), ["1"])


def test_recurrent_layers_run_without_their_fused_kernels():
    """In float32 the CPU's LSTM is one operation; when covered, it is composed of several."""
    model = nn.LSTM(3, 4, 2, batch_first=True)
    plain, x = copy.deepcopy(model), torch.randn(5, 6, 3)
    losses = lambda model, x: model(x)[0].sin().sum((1, 2))  # noqa: E731
    with pytest.raises(PrivacyError, match="fastloda.cover"):
        per_sample_grad_norms(losses(model, x), model)
    cover(model)
    losses(model, x)
    cover(model).remove()  # cover it again
    cover(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms = per_sample_grad_norms(losses(model, x), model)
    torch.testing.assert_close(norms, oracle.norms(oracle.sample_grads(plain, losses, x)), rtol=1e-5, atol=0)


# what has no exact per-sample gradients


class Coupled(Rotated):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class FaintlyCoupled(Rotated):
    """The coupling is smaller than a rounding, so that only the gradients show it."""

    def forward(self, x):
        return super().forward(x) + 1e-12 * x.sum(0)


class Offset(Rotated):
    """The samples mix, but no gradient shows it."""

    def forward(self, x):
        return super().forward(x) + x.detach().mean(0)


class Random(Rotated):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5))


class Branching(Rotated):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Stateful(Rotated):
    """A layer that computes something else at each call."""

    def __init__(self, width):
        super().__init__(width)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Global(Rotated):
    """A layer that reads a parameter that is not its own."""

    other = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return super().forward(x).square().add(1).pow(self.other.norm())


REFUSED = {
    Coupled: "Coupled",
    Offset: "Offset",
    FaintlyCoupled: "mixes samples",
    Random: "Random",
    Branching: "Branching",
    Stateful: "Stateful",
}


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
@pytest.mark.parametrize("make", REFUSED)
@pytest.mark.parametrize("below", [nn.Identity, lambda: nn.Linear(3, 3)], ids=["first", "above another"])
def test_what_cannot_be_exact_is_refused_before_anything_changes(make, below):
    model = drawn.randomise(nn.Sequential(below(), make(3)))
    cover(model)
    optimizer = torch.optim.Adam(model.parameters())
    before = copy.deepcopy(list(model.parameters()))
    losses = losses_of(model, torch.randn(4, 3))
    with pytest.raises(PrivacyError, match=f"1.skew.*{REFUSED[make]}|samples mix.*0.weight|{REFUSED[make]}"):
        ghost_dp_step(losses, model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before)) and not optimizer.state


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_random_layer_has_no_ordinary_gradient_either():
    model = drawn.randomise(Random(3))
    cover(model)
    with pytest.raises(PrivacyError, match="Random"):
        losses_of(model, torch.randn(4, 3)).sum().backward()


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_parameter_used_outside_its_layer_needs_a_rule_there():
    model = drawn.randomise(Global(3))
    model.register_parameter("also", Global.other)
    cover(model)
    with pytest.raises(PrivacyError, match="also"):
        per_sample_grad_norms(losses_of(model, torch.randn(4, 3)), model)


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_sample_that_is_not_finite_contributes_zero_through_torch_func():
    model = drawn.randomise(nn.Sequential(nn.Linear(3, 3), Holder(3)))
    cover(model)
    x = torch.randn(4, 3)
    x[1] = math.nan
    clipper = GhostClipper(model, 1.0)
    stats = clipper.accumulate(losses_of(model, x))
    clipper.privatize(0, 1)
    assert stats.nonfinite == 1 and all(p.grad.isfinite().all() for p in model.parameters())


# ---- rules of one's own


def make_scaled():
    class Scaled(nn.Module):
        """y = x exp(scale) + inner(x + shift): `scale` needs a registered rule, `inner` has one."""

        def __init__(self, width: int):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.empty(width)), nn.Linear(width, width)

        def forward(self, x: Tensor, shift: float = 1.0) -> Tensor:
            return x * self.scale.exp() + self.inner(x + shift)

    return Scaled


def right(layer, inputs, grad_output):
    x, shift = inputs
    assert isinstance(shift, float)
    grads = grad_output * x * layer.scale.exp()
    return {"scale": grads.reshape(len(x), -1, x.shape[-1]).sum(1)}


def test_a_registered_rule_is_exact_and_needs_no_cover(counts):
    Scaled = make_scaled()
    register_rule(Scaled)(right)

    @st.composite
    def cases(draw):
        width, rest = draw(st.integers(1, 3)), draw(st.sampled_from([(), (3,)]))
        layer = Scaled(width)
        model = draw(st.sampled_from([layer, drawn.Twice(layer), nn.Sequential(nn.Linear(width, width), layer)]))
        return drawn.draw_case(draw, drawn.thaw_some(draw, model), (*rest, width))

    drawn.hold_for(cases(), counts(25, 300), check_exact)
    assert max(check_rule(drawn.randomise(Scaled(3)), torch.randn(4, 3)).values()) < 1e-12


@pytest.mark.parametrize(
    "wrong, match",
    [
        (lambda layer, inputs, gy: {"scale": 2 * right(layer, inputs, gy)["scale"]}, "'scale' are off by 1 of"),
        (lambda layer, inputs, gy: {"scale": right(layer, inputs, gy)["scale"].flip(0)}, "'scale'"),
        (
            lambda layer, inputs, gy: {"scale": right(layer, inputs, gy)["scale"] * float("nan")},
            "'scale' are off by nan",
        ),
        (lambda layer, inputs, gy: {}, "'scale' a gradient of shape \\(4, 3\\), got none"),
        (lambda layer, inputs, gy: {"scale": right(layer, inputs, gy)["scale"].sum(0)}, "got one of shape \\(3,\\)"),
    ],
)
def test_check_rule_finds_a_wrong_rule(wrong, match):
    Scaled = make_scaled()
    register_rule(Scaled)(wrong)
    with pytest.raises((ValueError, PrivacyError), match=match):
        check_rule(drawn.randomise(Scaled(3)), torch.randn(4, 3))


def test_a_rule_may_be_registered_anew_and_not_for_just_anything():
    Scaled = make_scaled()
    register_rule(Scaled)(lambda *_: {})
    register_rule(Scaled)(right)
    check_rule(drawn.randomise(Scaled(3)), torch.randn(4, 3))
    with pytest.raises(TypeError, match="nn.Module class"):
        register_rule(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two rows"):
        check_rule(nn.Linear(2, 2), torch.randn(1, 2))


def test_a_rule_for_an_autograd_function():
    class Stretch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor, alpha):
            ctx.factor = factor
            ctx.save_for_backward(x, alpha)
            return x * alpha * factor

        @staticmethod
        def backward(ctx, gy):
            x, alpha = ctx.saved_tensors
            return gy * alpha * ctx.factor, None, (gy * x * ctx.factor).sum(0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return Stretch.apply(x, 2.0, self.alpha)

    model = nn.Sequential(nn.Linear(3, 3), Layer())
    with pytest.raises(PrivacyError, match="1.alpha.*StretchBackward"):
        check_rule(model, torch.randn(4, 3))

    @register_rule(Stretch)
    def stretch(ctx, gy):
        return {1: gy * ctx.saved_tensors[0] * ctx.factor}

    check_rule(model, torch.randn(4, 3))
    register_rule(Stretch)(lambda ctx, gy: {0: gy})
    with pytest.raises(PrivacyError, match="Stretch gives no gradient for its tensor inputs \\[1\\]"):
        check_rule(model, torch.randn(4, 3))


def test_check_rule_takes_whole_models():
    model = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    assert set(check_rule(model, torch.randn(3, 4, 6))) == {name for name, _ in model.named_parameters()}


def test_attention_reads_its_packed_weight_in_three_parts():
    """This shows that the exact cases above split the weight, and do not use one product."""
    model = drawn.randomise(nn.MultiheadAttention(4, 2, batch_first=True).double())
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    found = trace(model(x, y, y.cos())[0].sum((1, 2)), dict(model.named_parameters()))
    assert sum(use.name == "in_proj_weight" for uses in found.uses.values() for use in uses) == 3
