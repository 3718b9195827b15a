"""Opacus trains LoDA layers: its per-sample gradients and norms are those of one backward pass per sample, in every mode."""

import importlib
import math
import sys

import drawn
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import LoDAConv2d, LoDALinear, attach_loda

opacus = pytest.importorskip("opacus", reason="Opacus is not installed (extra: bench)")
loda_in_opacus = importlib.import_module("fastloda.integrations.opacus")

from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing")

KINDS = {
    "conv": (drawn.adapted_convs(), 60, 1500),
    "conv, frozen base": (drawn.adapted_convs(base_trains=False), 40, 1000),
    "linear": (drawn.adapted_linears(), 30, 800),
}
WRAPPERS = {
    "hooks": lambda model: GradSampleModule(model),
    "functorch": lambda model: GradSampleModule(model, force_functorch=True),
    "ghost": lambda model: GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0),
}


def backward(case, mode, reduction="mean"):
    """Run Opacus's backward pass over the case, with every row a sample; return the trainable parameters of its model."""
    wrapped = WRAPPERS[mode](case.model)
    wrapped.loss_reduction = reduction
    losses = case.loss_of(wrapped, case.x)
    (losses.mean() if reduction == "mean" else losses.sum()).backward()
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    frozen = [p for p in case.model.parameters() if not p.requires_grad]
    assert all(getattr(p, "grad_sample", None) is None for p in frozen)
    return parameters


def check_gradients(case, mode):
    case.views = 1
    truth = case.truth()
    parameters = backward(case, mode)
    scale = max(oracle.norms(truth).max().item(), 1e-2)
    for name, p in parameters.items():
        wanted = torch.stack([grads[name] for grads in truth])
        if mode == "ghost":
            got, wanted = p._norm_sample, wanted.flatten(1).norm(dim=1)
        else:
            got = p.grad_sample
        assert (got - wanted).abs().max() <= 1e-10 * scale, name


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_norms_are_exact(kind, mode, counts):
    cases, small, full = KINDS[kind]
    drawn.hold_for(cases, counts(small, full), lambda case: check_gradients(case, mode))


@pytest.mark.parametrize("kind", ["conv, frozen base", "linear"])
def test_functorch_mode_is_exact(kind, counts):
    cases, _, full = KINDS[kind]
    drawn.hold_for(cases, counts(8, full // 10), lambda case: check_gradients(case, "functorch"))


def small_model(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 6, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    model = nn.Sequential(*layers)
    attach_loda(model, rank=2, targets=["0", "2", "4"])
    return drawn.randomise(model.double()).to(dtype)


def loss_of(model, x):
    return F.cross_entropy(model(x), x.flatten(1).sum(1).long() % 3, reduction="none")


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts(layout, mode):
    """Opacus's own Conv2d is wrong for channels_last; LoDA's sampler reads any strides."""
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
    truth = oracle.sample_grads(drawn.composed(small_model()), loss_of, x)
    model = small_model().to(memory_format=layout)
    wrapped = WRAPPERS[mode](model)
    loss_of(wrapped, x).mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = torch.stack([grads[name] for grads in truth])
            got = p._norm_sample if mode == "ghost" else p.grad_sample
            torch.testing.assert_close(got, wanted.flatten(1).norm(dim=1) if mode == "ghost" else wanted)


def test_a_sum_is_not_scaled_by_the_batch():
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = small_model()
    truth = oracle.sample_grads(drawn.composed(model), loss_of, x)
    loss_of(GradSampleModule(model, loss_reduction="sum"), x).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad_sample, torch.stack([grads[name] for grads in truth]))


CANCELLING = {
    "conv": (lambda: LoDAConv2d(2, 3, 1, rank=2), (3, 2, 1, 1), (3, 2, 8, 8)),
    "linear": (lambda: LoDALinear(4, 3, rank=2), (3, 1, 4), (3, 64, 4)),
}


@pytest.mark.parametrize("kind", CANCELLING)
def test_norms_do_not_underestimate_where_positions_cancel(kind, counts):
    """Gram norms fail on huge activations that are equal at all positions, with gradients that sum to almost nothing."""
    make, distinct, shape = CANCELLING[kind]
    for seed in range(counts(40, 1000)):
        torch.manual_seed(seed)
        layer, x = make(), 1e3 * torch.randn(distinct).expand(shape)
        nn.init.normal_(layer.loda_B)
        gy = torch.randn_like(layer(x))
        positions = (2, 3) if kind == "conv" else (1,)
        gy -= gy.mean(positions, keepdim=True)
        grads = loda_in_opacus.grad_samples(layer, [x], gy)
        norms = loda_in_opacus.norm_samples(layer, [x], gy)
        assert set(grads) == set(norms) == {layer.loda_A, layer.loda_B}  # no entry for frozen parameters
        for p, g in grads.items():
            assert (norms[p].double() >= g.double().flatten(1).norm(dim=1) * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", CANCELLING)
def test_norms_are_not_rounded_down_in_any_dtype(kind, dtype):
    make, _, shape = CANCELLING[kind]
    torch.manual_seed(0)
    layer = drawn.randomise(make().to(dtype))
    x = torch.randn(32, *shape[1:], dtype=dtype)
    gy = torch.randn_like(layer(x))
    grads, norms = (sampler(layer, [x], gy) for sampler in (loda_in_opacus.grad_samples, loda_in_opacus.norm_samples))
    for p, g in grads.items():
        assert (norms[p] >= g.double().flatten(1).norm(dim=1) * (1 - 1e-12)).all()


def test_nothing_is_computed_where_memory_may_be_unwritten(counts):
    """z is computed again in the same way as in the layer."""

    def check(case):
        layer, x = case.model.to(torch.bfloat16), case.x.to(torch.bfloat16)
        gy = torch.ones_like(layer(x))
        sound = loda_in_opacus.grad_samples(layer, [x], gy)
        with drawn.UnwrittenMemory():
            torch.testing.assert_close(
                loda_in_opacus.grad_samples(layer, [x], gy), sound, rtol=0, atol=0, equal_nan=True
            )

    drawn.hold_for(drawn.adapted_convs().filter(drawn.strided_and_dilated), counts(10, 200), check)


# ---- Opacus's engine


def data(records=24):
    x = torch.randn(records, 3, 6, 6, dtype=torch.float64)
    return x, x.flatten(1).sum(1).long() % 3


def opacus_step(mode, x, y, bound, criterion=None):
    """Take one step of Opacus's engine on the batch x, y, without noise; return {name: gradient x expected batch size}."""
    model = small_model(x.dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    made = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        criterion=(criterion := nn.CrossEntropyLoss()),
        data_loader=DataLoader(TensorDataset(*data()), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        grad_sample_mode=mode,
    )
    wrapped, private = made[:2]
    criterion = made[2] if mode == "ghost" else criterion
    private.zero_grad()
    criterion(wrapped(x), y).backward()
    private.step()
    return {name: p.grad * private.expected_batch_size for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", WRAPPERS)
def test_a_step_of_opacus_is_the_clipped_sum(mode):
    x, y = data(7)
    truth = oracle.sample_grads(drawn.composed(small_model()), loss_of, x)
    norms = oracle.norms(truth)
    bound = float(norms.median())
    factors = (bound / (norms + 1e-6)).clamp(max=1)  # the factors of Opacus
    got = opacus_step(mode, x, y, bound)
    for name, grad in got.items():
        torch.testing.assert_close(grad, sum(c * grads[name] for c, grads in zip(factors, truth)))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_a_lower_precision_clips_too(dtype, mode):
    """The errors are at most what Opacus's own arithmetic in that dtype causes."""
    x, y = data(7)
    exact, got = (opacus_step(mode, t, y, bound := 0.1) for t in (x, x.to(dtype)))
    for name, grad in got.items():
        assert (grad.double() - exact[name]).norm() <= 4 * torch.finfo(dtype).eps * len(x) * bound


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_empty_poisson_batch(mode):
    x, y = data(1)
    assert all((grad == 0).all() for grad in opacus_step(mode, x[:0], y[:0], 1.0).values())


@pytest.mark.parametrize("mode", WRAPPERS)
def test_opacus_trains_a_model_with_loda_layers(mode):
    model = small_model(torch.float32)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = data()
    loader, criterion = DataLoader(TensorDataset(x.float(), y), batch_size=12), nn.CrossEntropyLoss()
    engine = opacus.PrivacyEngine()
    arguments = dict(noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode, criterion=criterion)
    made = engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **arguments)
    wrapped, private, *rest = made
    criterion, loader = rest if mode == "ghost" else (criterion, rest[0])
    for images, labels in loader:
        private.zero_grad()
        criterion(wrapped(images), labels).backward()
        private.step()
    assert len(engine.accountant) > 0 and math.isfinite(engine.get_epsilon(1e-5))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert all(not torch.equal(now[name], p) and now[name].isfinite().all() for name, p in adapters.items())


def test_expanded_weights_are_refused_by_pytorch():
    with pytest.raises(RuntimeError, match="Expanded Weights"):
        opacus_step("ew", *data(4), 1.0)


def test_validator_accepts_loda_layers():
    model = small_model()
    assert ModuleValidator.validate(model) == []
    fixed = ModuleValidator.fix(model)
    assert [type(layer) for layer in fixed] == [type(layer) for layer in model]


def test_an_input_without_a_batch_is_refused():
    layer = LoDAConv2d(2, 3, 1)
    with pytest.raises(ValueError, match=r"\[n, C, H, W\], got \(2, 4, 4\)"):
        loda_in_opacus.grad_samples(layer, [torch.randn(2, 4, 4)], torch.randn(3, 4, 4))


def test_without_opacus_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastloda.integrations.opacus")
    with pytest.raises(ImportError, match=r"fastloda\[opacus\]"):
        importlib.import_module("fastloda.integrations.opacus")
