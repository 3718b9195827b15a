"""Per-sample norms and clipped sums are exact: they equal one backward pass per sample, in float64.

The clip bounds the true gradient of each sample only if these are equal for every geometry, memory layout and reuse of a
layer, and under every plan that the planner may choose.
"""

import math
import warnings

import drawn
import oracle
import pytest
import torch
import torch.nn.functional as F
from exactness import KINDS, PLANS, check_exact, check_float32, clipped_sum, distance, use_plan
from torch import nn

from fastloda import GhostClipper, LoDAConv2d, LoDALinear, ghost_dp_step, per_sample_grad_norms
from fastloda.per_sample import refusals as coverage


@pytest.mark.parametrize("chosen", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_clipped_sums_are_exact(kind, chosen, counts, monkeypatch):
    use_plan(monkeypatch, chosen)
    cases, small, full = KINDS[kind]
    share = 1 if chosen == "as planned" else 3
    drawn.hold_for(cases, counts(small // share, full // share), check_exact)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_good_as_pytorch(kind, counts):
    cases, small, full = KINDS[kind]
    drawn.hold_for(cases, counts(small // 3, full // 3), check_float32)


BF16 = {
    "conv": drawn.adapted_convs(base_trains=False),
    "linear": drawn.adapted_linears(),
    "stack": drawn.stacks(),
}


@pytest.mark.parametrize("chosen", ["kept", "made again"])
@pytest.mark.parametrize("kind", BF16)
def test_bf16_autocast_clips_what_it_sums(kind, chosen, counts, monkeypatch):
    """The norm is that of the very gradient that is summed, to 1e-5, and is near the true one.

    The error in each case is comparable with that of PyTorch's bf16 itself, and over all samples no larger than PyTorch's in
    the geometric mean. One bound shows a rare blunder, the other one rounding too many everywhere.
    """
    use_plan(monkeypatch, chosen)
    ratios = []
    drawn.hold_for(BF16[kind], counts(100, 500), lambda case: ratios.extend(check_bf16(case)))
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1


def check_bf16(case):
    """Check a case; return for each sample FastLoDA's error divided by PyTorch's."""
    case = case.to(torch.float32)
    summed = []
    with torch.autocast("cpu", torch.bfloat16):
        norms = per_sample_grad_norms(case.losses(), case.model, views=case.views)
        for i, norm in enumerate(norms):
            alone = torch.arange(case.samples) == i
            clipper = GhostClipper(case.model, 1e30, case.views)
            clipper.accumulate(case.losses(), alone)
            clipper.privatize(0, 1)
            summed.append({n: p.grad for n, p in case.model.named_parameters() if p.requires_grad})
            assert abs(oracle.norm(summed[-1]) - norm) <= 1e-5 * norm
    truth = case.truth()
    largest = float(oracle.norms(truth).max())
    ours, theirs = [distance(s, t) for s, t in zip(summed, truth)], bf16_errors(case)
    excess = max(ours) - 2**-7 * largest
    assert excess <= 2 * max(theirs) or any(excess <= 2 * max(bf16_errors(case.nudged(seed))) for seed in range(64))
    floor = 2**-16 * largest + 1e-30  # far below a rounding of bf16: two errors of nothing are equal
    return [(e + floor) / (t + floor) for e, t in zip(ours, theirs)]


def bf16_errors(case):
    """Compute PyTorch's own error on each sample under autocast; near a kink of LeakyReLU its size is a matter of chance.

    On processors with AMX oneDNN computes some convolutions wrongly (`per_sample/amx.py`); then PyTorch without oneDNN is used.
    """
    truth = case.truth()

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            return [distance(f, t) for f, t in zip(case.truth(torch.float32), truth)]

    found, largest = errors(), float(oracle.norms(truth).max())
    if isinstance(case.model, LoDAConv2d) and not max(found) <= 2**-3 * largest:
        warnings.warn(f"left out oneDNN's bf16, off by {max(found):.3g} of {largest:.3g}: {case}", stacklevel=2)
        with torch.backends.mkldnn.flags(enabled=False):
            found = errors()
    return found


@pytest.mark.parametrize(
    "cases", [drawn.adapted_convs(samples=0), drawn.adapted_linears(samples=0)], ids=["conv", "linear"]
)
def test_an_empty_batch_adds_nothing(cases, counts):
    def check(case):
        norms = per_sample_grad_norms(case.losses(), case.model, views=case.views)
        assert norms.shape == (0,) and all(not g.any() for g in clipped_sum(case, 1.0).values())

    drawn.hold_for(cases, counts(10, 200), check)


def check_plain_step(case):
    """Check that without clipping and noise, the step is the one that PyTorch takes on the mean loss."""
    plain = drawn.composed(case.model)
    case.loss_of(plain, case.x.contiguous()).mean().backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], 0.1)
    settings = dict(max_grad_norm=1e12, noise_multiplier=0, expected_batch_size=case.samples, views=case.views)
    ghost_dp_step(case.losses(), case.model, optimizer, **settings)
    for ours, theirs in zip(case.model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["adapted conv", "stack", "reused linear"])
def test_no_clip_and_no_noise_is_plain_sgd(kind, counts):
    drawn.hold_for(KINDS[kind][0], counts(20, 500), check_plain_step)


@pytest.mark.parametrize("make", [LoDAConv2d, nn.Conv2d])
def test_a_1x1_kernel_that_is_no_plain_product(make):
    """Stride 2 and padding 1 keep a size of 3, but output position q is not input position q."""
    layer = drawn.randomise(make(2, 3, 1, stride=2, padding=1).double())
    check_exact(drawn.Case(layer, torch.randn(2, 2, 3, 3, dtype=torch.float64)))


@pytest.mark.parametrize("readout", drawn.READOUTS)
def test_a_grouped_1x1_kernel_takes_any_grad_output(readout):
    layer = drawn.randomise(nn.Conv2d(4, 6, 1, groups=2).double())
    check_exact(drawn.Case(layer, torch.randn(3, 4, 5, 3, dtype=torch.float64), readout))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("make, dims", [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_padding_in_words(make, dims, padding):
    """In this case PyTorch saves one number for all dimensions."""
    layer = drawn.randomise(make(2, 3, (1, 3, 2)[:dims], padding=padding).double())
    check_exact(drawn.Case(layer, torch.randn(3, 2, *(4, 5, 3)[:dims], dtype=torch.float64)))


def test_micro_batches_and_masks_add_up():
    """A batch in parts, in any order and with padding, has the same clipped sum as the whole batch."""
    model = drawn.randomise(nn.Sequential(drawn.BLOCKS["tied"](4), nn.Flatten(), nn.Linear(64, 3)).double())
    x = torch.randn(7, 4, 4, 4, dtype=torch.float64)
    whole = clipped_sum(drawn.Case(model, x), 0.5)
    clipper = GhostClipper(model, 0.5)
    padded = torch.cat([x, torch.full_like(x[:2], 9.0)])
    stats = [
        clipper.accumulate(drawn.curved(model(part)), mask)
        for part, mask in (
            (padded[5:], torch.tensor([True, True, False, False])),
            (x[0:1], None),
            (x[1:5], None),
            (x[:0], None),
        )
    ]
    clipper.privatize(0, 1)
    assert sum(stats[1:], stats[0]).samples == 7
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-10, atol=1e-13)


def test_norms_leave_grad_and_graph_alone():
    layer = drawn.randomise(LoDALinear(3, 4, rank=2))
    losses = layer(torch.randn(5, 3)).square().sum(1)
    first = per_sample_grad_norms(losses, layer)
    assert torch.equal(first, per_sample_grad_norms(losses, layer))
    assert all(p.grad is None for p in layer.parameters())
    losses.sum().backward()


class Conditioned(nn.Module):
    """A convolution modulated by an embedding of the label, whose rows come once per sample, not once per view."""

    def __init__(self, views: int):
        super().__init__()
        self.views, self.conv = views, LoDAConv2d(2, 3, 3, padding=1, rank=2)
        self.label, self.project = drawn.Rows(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        labels = self.project(self.label(x[:: self.views, 0, 0, 0].abs().mul(2).clamp(max=4)))
        return self.conv(x) * labels.repeat_interleave(self.views, 0)[..., None, None]


@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_layer_may_see_each_sample_once_whatever_the_views(views):
    model = drawn.randomise(Conditioned(views).double())
    check_exact(drawn.Case(model, torch.randn(4 * views, 2, 4, 5, dtype=torch.float64), views=views))


FORMS = ("x @ W", "addmm", "conv", "linear on views", "turned bias", "turned table", "flipped weight", "flipped twice")


@pytest.mark.parametrize("form", FORMS)
def test_functional_uses_with_a_rule_are_exact(form):
    """The operation in the graph matters, not the module that holds the parameter."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = (4, 4), 4, (4, 1, 3), (2, 1)
            self.W, self.b, self.K, self.T = (nn.Parameter(torch.empty(shape)) for shape in shapes)

        def forward(self, x):
            return {
                "x @ W": lambda: x.sin() @ self.W,
                "addmm": lambda: torch.addmm(self.b, x, self.W),
                "conv": lambda: F.conv1d(x[:, None], self.K, self.b, padding=2),
                "turned bias": lambda: F.linear(x, self.W, self.b.t()),
                "flipped weight": lambda: F.linear(x, self.W.flip(0), self.b.flip(-1)),
                "flipped twice": lambda: F.conv1d(x[:, None], self.K.flip(0, 2), self.b),
                "turned table": lambda: x.view(-1, 2, 2) * self.T.t(),
                "linear on views": lambda: F.linear(x.view(-1, 2, 2).flatten(1), self.W, self.b),
            }[form]()

    model = drawn.randomise(Functional().double())
    check_exact(drawn.Case(model, torch.randn(4, 4, dtype=torch.float64)))


@pytest.mark.parametrize("way", drawn.COMBINED)
def test_a_parameter_broadcast_over_single_numbers(way):
    for p, q in (((), (1,)), ((1,), ()), ((1,), None)):
        model = drawn.randomise(drawn.Combined(way, "x * p", p, q).double())
        check_exact(drawn.Case(model, torch.randn(4, dtype=torch.float64)))


@pytest.mark.parametrize(
    "below", [nn.Identity(), nn.Conv2d(2, 2, 1)], ids=["nothing trains below", "a layer trains below"]
)
def test_a_checkpointed_layer_is_recomputed_once(below, monkeypatch):
    monkeypatch.setattr(coverage, "LOOK_AGAIN", 0)  # never by chance
    computed = []
    inner = nn.Sequential(nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv2d(2, 2, 3), nn.GroupNorm(2, 2))
    inner.register_forward_pre_hook(lambda *_: computed.append(1))
    model = drawn.randomise(nn.Sequential(below, drawn.Checkpointed(inner)).double())
    case = drawn.Case(model, torch.randn(3, 2, 4, 5, dtype=torch.float64))
    clipper = GhostClipper(case.model, 1.0)
    for _ in range(2):
        clipper.accumulate(case.losses())  # these batches are probed too
    losses = case.losses()
    computed.clear()
    clipper.accumulate(losses)
    assert len(computed) == 1


def test_a_checkpointed_dropout_is_the_same_twice():
    """The recomputation draws the same random numbers."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    model = drawn.randomise(nn.Sequential(nn.Linear(4, 4), model))
    x = torch.randn(5, 4)
    norms = []
    for forward in (model, nn.Sequential(model[0], drawn.Checkpointed(model[1]))):
        torch.manual_seed(1)
        losses = drawn.curved(forward(x))
        torch.manual_seed(2)
        norms.append(per_sample_grad_norms(losses, model))
    torch.testing.assert_close(*norms, rtol=0, atol=0)


def test_a_parameter_shared_by_an_adapter_and_an_unfused_one():
    """The second layer is not fused because its base trains; it shares A and B with the first layer, which is fused."""
    first, second = (drawn.randomise(LoDAConv2d(2, 2, 3, padding=1, rank=2)).double() for _ in range(2))
    second.loda_A, second.loda_B = first.loda_A, first.loda_B
    second.weight.requires_grad_(True)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for model in (nn.Sequential(first, nn.SiLU(), second), nn.Sequential(second, nn.SiLU(), first)):
        losses = lambda m, x: m(x).square().sum((1, 2, 3))  # noqa: E731
        truth = oracle.norms(oracle.sample_grads(model, losses, x))
        torch.testing.assert_close(per_sample_grad_norms(losses(model, x), model), truth, rtol=1e-10, atol=0)
        # `accumulate` frees the graph: everything else must have been read before.
        stats = GhostClipper(model, 1e-3).accumulate(losses(model, x))
        assert stats.clipped == 3


class Affine(nn.Module):
    """The affine map that a BatchNorm computes from its running statistics, written out."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.shift = norm.bias.detach() - norm.running_mean * self.scale

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift[:, None, None]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("trains", [False, True])
def test_a_batch_norm_before_tokens_is_exact_for_a_batch_of_one(samples, trains):
    """PyTorch 2.13's own backward on the CPU is not: a record's gradient depends on whether another record is in the batch."""
    norm = nn.BatchNorm2d(4).double().eval().requires_grad_(trains)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_var, norm.running_mean):
            t.uniform_(1, 2)
    head = nn.Linear(4, 3).double().requires_grad_(False)
    first = nn.Conv2d(3, 4, 1).double()
    tokens = lambda conv, norm, x: head(norm(conv(x)).flatten(2).transpose(1, 2)).square().sum((1, 2))  # noqa: E731
    x = torch.randn(samples, 3, 2, 2, dtype=torch.float64)
    truth = torch.autograd.grad(tokens(first, Affine(norm), x).sum(), list(first.parameters()))
    model = nn.ModuleList([first, norm, head])
    clipper = GhostClipper(model, 1e9)
    clipper.accumulate(tokens(first, norm, x))
    clipper.privatize(0, 1)
    for p, wanted in zip(first.parameters(), truth):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-10, atol=0)
