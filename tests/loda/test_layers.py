"""A LoDA layer is an ordinary PyTorch layer: the same values, gradients and behaviour, with or without privacy."""

import copy
import io
import json
import pickle
import re
import warnings

import drawn
import oracle
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastloda import (
    GhostClipper,
    LoDAConv2d,
    LoDALinear,
    attach_loda,
    ghost_dp_step,
    load_loda,
    loda_parameters,
    loda_state_dict,
    per_sample_grad_norms,
    save_loda,
)
from fastloda.integrations.peft import load_peft, save_peft


def adapted_conv(**settings):
    arguments = dict(rank=3, padding=1) | settings
    return drawn.randomise(LoDAConv2d(4, 6, 3, **arguments).double())


def images(n=3, dtype=torch.float64):
    return torch.randn(n, 4, 5, 6, dtype=dtype)


def small_model():
    convs = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, groups=2))
    return drawn.randomise(nn.ModuleDict({"body": convs, "head": nn.Linear(6, 5)}))


def run(model, x):
    return model["head"](model["body"](x).mean((2, 3)))


# ---- values and gradients


def check_equals_composed(case):
    """Check the output, and the gradients of x and of every parameter that trains, by an ordinary backward pass."""
    layer = case.model
    x = case.x.detach().requires_grad_()
    wanted = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    results = []
    for model in (layer, drawn.Composed(layer)):
        y = model(x)
        results.append([y, *torch.autograd.grad(drawn.READOUTS[case.readout](y).sum(), list(wanted.values()))])
    for name, ours, plain in zip(["y", *wanted], *results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cases", [drawn.adapted_convs(), drawn.adapted_linears()], ids=["conv", "linear"])
def test_values_and_gradients_are_pytorchs(cases, counts):
    drawn.hold_for(cases, counts(80, 1000), check_equals_composed)


def check_gradcheck(case):
    layer = case.model
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = case.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *trained), fast_mode=True)


@pytest.mark.parametrize(
    "cases", [drawn.adapted_convs(samples=2), drawn.adapted_linears(samples=2)], ids=["conv", "linear"]
)
def test_gradcheck(cases, counts):
    drawn.hold_for(cases, counts(10, 200), check_gradcheck)


def test_output_starts_unchanged():
    conv, linear = nn.Conv2d(4, 6, 3), nn.Linear(4, 6)
    x = images(dtype=torch.float32)
    assert torch.equal(LoDAConv2d.from_conv(conv)(x), conv(x))
    assert torch.equal(LoDALinear.from_linear(linear)(x[..., 0, 0]), linear(x[..., 0, 0]))


def test_unbatched_input():
    conv, linear = adapted_conv(), drawn.randomise(LoDALinear(4, 6).double())
    x = images()
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    torch.testing.assert_close(linear(x[0, :, 0, 0]), linear(x[:, :, 0, 0])[0])


def test_the_input_may_be_named_as_pytorch_names_it():
    conv, linear = adapted_conv(), drawn.randomise(LoDALinear(4, 6).double())
    x = images()
    assert torch.equal(conv(input=x), conv(x))
    assert torch.equal(linear(input=x[..., 0, 0]), linear(x[..., 0, 0]))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", [dict(padding=1), dict(padding=2, padding_mode="reflect"), dict(stride=2)])
def test_memory_format_is_kept(padding, format):
    layer = adapted_conv(**padding).to(memory_format=format)
    x = images().contiguous(memory_format=format).requires_grad_()
    y = layer(x)
    (gx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=format)
    if "padding_mode" not in padding:  # PyTorch's own padding decides for the others
        assert gx.is_contiguous(memory_format=format)


def test_frozen_parameters_get_no_gradient():
    layer = adapted_conv()
    layer(images()).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.loda_A.grad is not None and layer.loda_B.grad is not None


def test_nothing_trains_nothing_is_kept():
    layer = adapted_conv().requires_grad_(False)
    assert layer(images()).grad_fn is None
    with torch.no_grad():
        assert not adapted_conv()(images()).requires_grad


def test_double_backward_says_why_not():
    layer, x = adapted_conv(), images().requires_grad_()
    (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.square().sum().backward()


def test_input_changed_in_place_after_use_is_an_error():
    layer, x = adapted_conv(), images()
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_activations_follow():
    layer = adapted_conv()
    x = images()
    plain = drawn.composed(layer)
    F.relu_(layer(x)).square().sum().backward()
    F.relu_(plain(x)).square().sum().backward()
    torch.testing.assert_close(layer.loda_A.grad, plain.loda_A.grad)
    torch.testing.assert_close(layer.loda_B.grad, plain.loda_B.grad)


# ---- dtypes


@pytest.mark.parametrize("enabled_for", ["forward", "forward and backward"])
def test_autocast_computes_in_its_dtype_and_keeps_parameters(enabled_for):
    layer = adapted_conv().float()
    x = images(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        plain = drawn.Composed(layer)(x)
        if enabled_for == "forward and backward":
            y.float().square().sum().backward()
    if enabled_for == "forward":
        y.float().square().sum().backward()
    assert y.dtype == plain.dtype == torch.bfloat16
    assert x.grad.dtype == layer.loda_A.grad.dtype == layer.loda_B.grad.dtype == torch.float32
    exact = drawn.Composed(layer)(x)
    assert (y - exact).norm() <= 2 * (plain - exact).norm()


def doubled_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


EDITS = {
    "in place": doubled_in_place,
    "past the version counter": lambda layer: layer.weight.data.mul_(2),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight.detach(), requires_grad=False)),
    "loaded": lambda layer: layer.load_state_dict(layer.state_dict() | {"weight": 2 * layer.weight}),
    "of the adapter": lambda layer: layer.loda_A.data.mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_casts_are_of_the_forward_pass_in_which_they_were_made(edit):
    """An edit after the forward pass changes nothing in its backward pass, and takes full effect in the next forward pass."""
    layer = adapted_conv().float()
    x = images(dtype=torch.float32).requires_grad_()
    leaves = [x, layer.loda_A, layer.loda_B]
    forward = torch.autocast("cpu", torch.bfloat16)(lambda layer: layer(x))
    before = forward(layer)
    truth = torch.autograd.grad(forward(layer).float().square().sum(), leaves)
    EDITS[edit](layer)
    grads = torch.autograd.grad(before.float().square().sum(), leaves)
    assert all(map(torch.equal, grads, truth))
    after = forward(layer)
    assert torch.equal(after, forward(copy.deepcopy(layer))) and not torch.equal(after, before)


def test_autocast_leaves_float64_alone():
    layer, x = adapted_conv(), images()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x)) and layer(x).dtype == torch.float64
    torch.testing.assert_close(layer(x), drawn.Composed(layer)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    layer = adapted_conv().to(dtype)
    y = layer(images(dtype=dtype))
    y.float().square().sum().backward()
    assert y.dtype == layer.weight.dtype == dtype and layer.loda_A.grad.isfinite().all()
    assert layer.loda_A.dtype == layer.loda_A.grad.dtype == torch.float32


HALVES = [torch.bfloat16, torch.float16]
MADE = {
    "the constructor": lambda dtype: nn.Sequential(LoDAConv2d(3, 4, 3, dtype=dtype), LoDAConv2d(4, 2, 1, dtype=dtype)),
    "attach_loda": lambda dtype: attached(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).to(dtype)),
    "attach_loda, then a cast": lambda dtype: attached(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))).to(dtype),
    "attach_loda, then casts": lambda dtype: attached(nn.Sequential(nn.Conv2d(3, 4, 3))).double().half().to(dtype),
    "from_linear": lambda dtype: nn.Sequential(nn.Flatten(), LoDALinear.from_linear(nn.Linear(75, 3, dtype=dtype))),
    "a copy": lambda dtype: copy.deepcopy(attached(nn.Sequential(nn.Conv2d(3, 4, 3)))).to(dtype),
}


def attached(model, **settings):
    attach_loda(model, rank=1, **settings)
    return model


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", MADE)
def test_adapters_of_a_half_precision_base_are_float32_and_train(way, dtype):
    """Adam's epsilon and small moments vanish in float16, and a step of 1e-3 times a weight vanishes in bfloat16."""
    torch.manual_seed(0)
    model = MADE[way](dtype)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    optimizer = torch.optim.Adam(loda_parameters(model), 1e-3)
    settings = dict(max_grad_norm=1.0, noise_multiplier=0.5, expected_batch_size=8)
    x, before = torch.randn(8, 3, 5, 5, dtype=dtype), [p.detach().clone() for p in loda_parameters(model)]
    for _ in range(5):
        y = model(x)
        assert y.dtype == dtype
        stats = ghost_dp_step(y.float().flatten(1).square().mean(1), model, optimizer, **settings)
        assert stats.nonfinite == 0
    for p, was in zip(loda_parameters(model), before, strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert p.isfinite().all() and (p != was).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_files_of_adapters_are_float32_whatever_the_base(tmp_path, dtype):
    model = drawn.randomise(attached(small_model().to(dtype)))
    save_loda(model, tmp_path / "a.safetensors")
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "a.safetensors").values()} == {torch.float32}
    other = small_model().to(dtype)
    load_loda(other, tmp_path / "a.safetensors")
    for name, tensor in loda_state_dict(other).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, loda_state_dict(model)[name])
    model, other = (
        drawn.randomise(attached(small_model().to(dtype), activation="identity", targets=nn.Linear)),
        small_model().to(dtype),
    )
    save_peft(model, tmp_path / "peft")
    load_peft(other, tmp_path / "peft")
    assert all(torch.equal(tensor, loda_state_dict(model)[name]) for name, tensor in loda_state_dict(other).items())
    halved = {name: t.to(dtype) for name, t in model.state_dict().items()}
    other.load_state_dict(halved, assign=True)
    assert {p.dtype for p in loda_parameters(other)} == {torch.float32}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_merged_layer_has_the_bases_dtype(dtype):
    layer = drawn.randomise(LoDALinear(4, 6, dtype=dtype, activation="identity"))
    merged, x = layer.merge(), torch.randn(3, 4, dtype=dtype)
    assert merged.weight.dtype == dtype
    torch.testing.assert_close(merged(x), layer(x), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_integers_are_refused_as_by_pytorch(activation):
    layer = LoDALinear(3, 3, activation=activation)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        layer(torch.ones(2, 3, dtype=torch.long))


# ---- copies


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(io.BytesIO(saved(layer)), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal_and_apart(again):
    layer, x = adapted_conv(activation="identity", scale=0.5), images()
    twin = again(layer)
    assert torch.equal(twin(x), layer(x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    with torch.no_grad():
        twin.loda_A.zero_()
    assert layer.loda_A.any() and not torch.equal(twin(x), layer(x))


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return buffer.getvalue()


def test_a_deep_copy_of_a_used_model_trains_privately():
    model = nn.Sequential(adapted_conv(), nn.Flatten())
    per_sample_grad_norms(drawn.curved(model(images())), model)
    twin = copy.deepcopy(model)
    losses = drawn.curved(twin(images()))
    assert per_sample_grad_norms(losses, twin).all()


def test_the_unadapted_models_state_loads():
    """The state loads strictly, and the adapters keep their values; a state with adapters replaces them."""
    plain, model = small_model(), trained_model()
    before = {name: t.clone() for name, t in loda_state_dict(model).items()}
    assert not any(model.load_state_dict(plain.state_dict(), strict=True))
    assert torch.equal(model["body"][0].weight, plain["body"][0].weight)
    assert all(torch.equal(t, before[name]) for name, t in loda_state_dict(model).items())
    other = copy.deepcopy(model)
    drawn.randomise(other)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(t, loda_state_dict(other)[name]) for name, t in loda_state_dict(model).items())


def test_a_state_with_half_an_adapter_is_refused():
    model = trained_model()
    state = model.state_dict()
    del state["body.0.loda_B"]
    with pytest.raises(RuntimeError, match="loda_B"):
        model.load_state_dict(state)


# ---- settings


@pytest.mark.parametrize(
    "bad",
    [
        dict(rank=0),
        dict(rank=-1),
        dict(rank=2.0),
        dict(rank=True),
        dict(activation="relu"),
        dict(scale=float("nan")),
        dict(negative_slope=float("inf")),
        dict(scale=float("-inf")),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda **s: LoDAConv2d(3, 3, 3, **s), lambda **s: LoDALinear(3, 3, **s)], ids=["conv", "linear"]
)
def test_bad_settings_are_refused_with_their_value(make, bad):
    with pytest.raises(ValueError, match="got"):
        make(**bad)


def test_from_conv_keeps_every_argument_and_shares_the_tensors():
    conv = nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False, "circular", dtype=torch.float64).eval()
    layer = LoDAConv2d.from_conv(conv, rank=2)
    assert layer.weight is conv.weight and layer.bias is None and not layer.training
    assert layer.loda_A.dtype == torch.float64 and not conv.weight.requires_grad
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    assert torch.equal(layer(x), conv(x))
    assert "rank=2" in repr(layer) and "circular" in repr(layer)


# ---- merging


@pytest.mark.parametrize(
    "layer",
    [
        LoDAConv2d(4, 6, (3, 2), 2, 1, rank=2, activation="identity", scale=0.5),
        LoDAConv2d(4, 6, 2, padding="same", bias=False, rank=2, activation="leaky_relu", negative_slope=1.0),
        LoDALinear(4, 6, rank=2, activation="identity", scale=-2.0),
    ],
    ids=["conv", "slope 1", "linear"],
)
def test_identity_adapters_merge_exactly(layer):
    drawn.randomise(layer.double())
    merged = layer.merge()
    assert type(merged) in (nn.Conv2d, nn.Linear)
    x = images() if isinstance(layer, LoDAConv2d) else images().movedim(1, -1)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-12)
    before = layer(x)
    with torch.no_grad():
        merged.weight.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (LoDAConv2d(4, 4, 3), "not linear"),
        (LoDALinear(4, 4), "leaky_relu"),
        (LoDAConv2d(4, 4, 3, groups=2, activation="identity"), "groups=2"),
    ],
)
def test_what_no_weight_can_hold_does_not_merge(layer, reason):
    with pytest.raises(ValueError, match=reason):
        layer.merge()


# ---- transforms, checkpointing, compilation


def test_vmap_of_grad_is_the_truth():
    model = nn.Sequential(adapted_conv(), nn.SiLU(), drawn.randomise(LoDAConv2d(6, 2, 3, rank=2).double()))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters, x):
        return drawn.curved(torch.func.functional_call(model, parameters | frozen, (x[None],))).sum()

    x = images()
    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, truth in enumerate(drawn.Case(model, x).truth()):
        for name, grad in truth.items():
            torch.testing.assert_close(together[name][i], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpointing_changes_nothing(preserve):
    """With use_reentrant=False, norms and sums of a private step are the same."""
    model = drawn.randomise(nn.Sequential(adapted_conv(), nn.SiLU(), LoDAConv2d(6, 2, 3, padding=1).double()))
    x = images().requires_grad_()
    checkpointed = checkpoint(model, x, use_reentrant=False, preserve_rng_state=preserve)
    norms = oracle.norms(drawn.Case(model, x.detach()).truth())
    torch.testing.assert_close(per_sample_grad_norms(drawn.curved(checkpointed), model), norms, rtol=1e-10, atol=0)
    sums = []
    for y in (model(x), checkpoint(model, x, use_reentrant=False)):
        clipper = GhostClipper(model, float(norms.median()))
        clipper.accumulate(drawn.curved(y))
        clipper.privatize(0, 1)
        sums.append([p.grad.clone() for p in clipper.parameters.values()])
    torch.testing.assert_close(*sums)


def test_saved_tensors_may_live_elsewhere():
    model = nn.Sequential(adapted_conv(), nn.SiLU(), nn.Conv2d(6, 2, 1).double())
    x = images()
    with torch.autograd.graph.save_on_cpu():
        losses = drawn.curved(model(x))
    norms = oracle.norms(drawn.Case(model, x).truth())
    torch.testing.assert_close(per_sample_grad_norms(losses, model), norms, rtol=1e-10, atol=0)


def test_a_compiled_model_computes_the_same():
    """A private step does too if the graph keeps PyTorch's own operations (otherwise it is refused)."""
    model = drawn.randomise(nn.Sequential(adapted_conv(), nn.SiLU(), nn.Conv2d(6, 2, 1)).double())
    x = images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    norms = oracle.norms(drawn.Case(model, x).truth())
    torch.testing.assert_close(per_sample_grad_norms(drawn.curved(compiled(x)), model), norms, rtol=1e-10, atol=0)


# ---- attach


def names_for(targets, **settings):
    return list(attach_loda(small_model(), targets=targets, rank=1, **settings))


@pytest.mark.parametrize(
    "targets, names",
    [
        (None, ["body.0", "body.2"]),
        (nn.Conv2d, ["body.0", "body.2"]),
        (nn.Linear, ["head"]),
        ((nn.Conv2d, nn.Linear), ["body.0", "body.2", "head"]),
        (r"body\.\d", ["body.0", "body.2"]),
        (r".*", ["body.0", "body.2", "head"]),
        (["2", "head"], ["body.2", "head"]),
        (["body.0"], ["body.0"]),
        (lambda name, layer: "2" in name, ["body.2"]),
    ],
)
def test_targets(targets, names):
    assert names_for(targets) == names


def test_the_default_is_linear_without_convolutions():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert attach_loda(model) == ["0", "2"]


def test_attach_freezes_all_else_and_changes_no_output():
    model = small_model()
    x = torch.randn(2, 3, 4, 4)
    before = run(model, x)
    attach_loda(model, rank=2)
    assert torch.equal(run(model, x), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["body.0.loda_A", "body.0.loda_B", "body.2.loda_A", "body.2.loda_B"]
    assert {id(p) for p in loda_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_skipped_layers_say_why(caplog):
    class Odd(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Odd(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[2].register_forward_hook(lambda *_: None)
    torch.nn.utils.parametrizations.weight_norm(model[3])
    with pytest.warns(UserWarning, match="only 4, with 23%") as warned:
        adapted = attach_loda(model, rank=4)
    assert len(warned) == 1 and not caplog.records and "not adapted: 4 of the 5 layers" in str(warned[0].message)
    assert adapted == ["4"] and set(adapted.skipped) == {"0", "1", "2", "3"}
    for name, reason in {"0": "rank 4 > min", "1": "subclass", "2": "hooks", "3": "subclass"}.items():
        assert reason in adapted.skipped[name]


def test_what_is_left_is_told_in_one_line(caplog):
    narrow = [nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 32, 1)]
    adapted = attach_loda(nn.Sequential(*narrow, nn.Conv2d(32, 32, 3)), rank=4)
    assert adapted == ["5"] and len(adapted.skipped) == 5
    (record,) = caplog.records
    assert record.getMessage() == (
        "not adapted: 5 of the 6 layers that match: 0 (rank 4 > min(C_in, C_out) = 1); 1, 2 (rank 4 > min(C_in, C_out) = 2); "
        "3, 4 (rank 4 > min(C_in, C_out) = 3)"
    )


class Conv1D(nn.Module):
    """A linear map as in transformers' GPT-2, where the weight is [in, out]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj, self.norm = Conv1D(24, 8), Conv1D(8, 24), nn.LayerNorm((3, 8))

    def forward(self, x):
        return self.norm(x + self.c_proj(self.c_attn(x).relu()))


def language_model():
    return nn.Sequential(nn.Embedding(11, 8), Block(), Block(), nn.Linear(8, 11))


def test_layers_of_another_kind_are_named_where_little_else_is_adapted():
    model = language_model()
    with pytest.warns(UserWarning, match=r"only 3, with 10% .* 1.c_attn, .* and 1 more \(Conv1D is no"):
        adapted = attach_loda(model)
    assert adapted == ["3"] and set(adapted.skipped) == {"1.c_attn", "1.c_proj", "2.c_attn", "2.c_proj"}


@pytest.mark.parametrize("targets", [r"1\.c_.*", ["c_attn"], [Conv1D], Conv1D])
def test_layers_of_another_kind_alone_are_refused_by_name(targets):
    model = language_model()
    state = state_of(model)
    if targets == [Conv1D]:
        targets = (Conv1D,)
    with pytest.raises(ValueError, match="1.c_attn: Conv1D is no nn.Conv2d and no nn.Linear"):
        attach_loda(model, targets=targets)
    assert_same_state(model, state)


OTHERS = {
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 2),
    "one dimension": lambda: nn.Conv1d(8, 8, 2),
    "recurrent": lambda: nn.LSTM(8, 8),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "bilinear": lambda: nn.Bilinear(8, 8, 2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_no_kind_of_layer_with_weights_is_passed_over_silently(kind):
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "other": OTHERS[kind]()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = attach_loda(model)
    assert adapted == ["head"] and "other" in adapted.skipped


def test_tables_scales_and_positions_are_no_layers_to_adapt():
    class WithPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 99, 8))
            self.parts = nn.Sequential(nn.Embedding(99, 8), nn.LayerNorm((99, 8)), nn.Linear(8, 8), nn.PReLU(8))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (WithPositions(), nn.Sequential(WithPositions())):
            assert not attach_loda(model).skipped


def test_the_way_out_of_another_kind_of_layer():
    """An nn.Linear on the transposed weight computes the same, and is adapted."""
    model, x = language_model(), torch.randint(11, (4, 3))
    before = model(x)
    for block in (model[1], model[2]):
        for name, layer in block.named_children():
            if isinstance(layer, Conv1D):
                linear = nn.Linear(*layer.weight.shape)
                linear.weight, linear.bias = nn.Parameter(layer.weight.detach().t()), layer.bias
                setattr(block, name, linear)
    assert len(attach_loda(model)) == 5
    torch.testing.assert_close(model(x), before)


def test_a_shared_module_stays_shared():
    conv = nn.Conv2d(4, 4, 1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.ReLU()), "c": nn.Conv2d(4, 4, 1)})
    assert attach_loda(model, rank=2) == ["a", "c"]
    assert model["a"] is model["b"][0] and isinstance(model["a"], LoDAConv2d)


def state_of(model):
    """Collect everything that an error must leave unchanged."""
    return (
        str(model),
        {name: (id(p), p.requires_grad, p.detach().clone(), p.grad) for name, p in model.named_parameters()},
        {name: id(module) for name, module in model.named_modules()},
    )


def assert_same_state(model, state):
    text, parameters, modules = state
    now_text, now_parameters, now_modules = state_of(model)
    assert (now_text, now_modules) == (text, modules)
    for name, (identity, trains, value, grad) in parameters.items():
        now_identity, now_trains, now_value, now_grad = now_parameters[name]
        assert (now_identity, now_trains, now_grad) == (identity, trains, grad), name
        assert torch.equal(now_value, value), name


@pytest.mark.parametrize(
    "bad",
    [
        dict(targets="nothing"),
        dict(targets=["missing"]),
        dict(targets=nn.Embedding),
        dict(rank=100),
        dict(rank=0),
        dict(rank=1.5),
        dict(activation="relu"),
        dict(scale=float("nan")),
        dict(targets=lambda name, layer: False),
        dict(targets="["),
        dict(targets=[]),
    ],
)
def test_a_refused_attach_changes_nothing(bad):
    model = small_model()
    state = state_of(model)
    with pytest.raises((ValueError, re.error)):
        attach_loda(model, **bad)
    assert_same_state(model, state)


def test_attach_refuses_twice_and_a_bare_layer():
    model = small_model()
    attach_loda(model)
    state = state_of(model)
    with pytest.raises(ValueError, match="already has adapters"):
        attach_loda(model)
    assert_same_state(model, state)
    with pytest.raises(ValueError, match="from_conv"):
        attach_loda(nn.Conv2d(8, 8, 3))


# ---- files


def trained_model(**settings):
    model = small_model()
    attach_loda(model, **(dict(rank=2, activation="identity", scale=0.5) | settings))
    return drawn.randomise(model)


@pytest.mark.parametrize("adapted", [True, False])
def test_adapters_round_trip(tmp_path, adapted):
    """They load into an adapted model, and into one without adapters, which then gets those that the file describes."""
    model = trained_model()
    save_loda(model, tmp_path / "a.safetensors")
    other = trained_model() if adapted else small_model()
    names = load_loda(other, tmp_path / "a.safetensors")
    assert names == ["body.0", "body.2"]
    for name, tensor in loda_state_dict(model).items():
        assert torch.equal(tensor, loda_state_dict(other)[name])
    assert (other["body"][0].rank, other["body"][0].activation, other["body"][0].scale) == (2, "identity", 0.5)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == list(loda_state_dict(model))
    x = torch.randn(2, 3, 4, 4)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "loda" not in k}, strict=False)
    assert torch.equal(run(other, x), run(model, x))


def test_the_file_holds_only_adapters(tmp_path):
    model = trained_model()
    save_loda(model, tmp_path / "a.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "a.safetensors")) == set(loda_state_dict(model))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_saving_nothing_to_a_new_folder_and_to_nowhere(tmp_path):
    with pytest.raises(ValueError, match="no adapters.*attach_loda.*save_pretrained"):
        save_loda(small_model(), tmp_path / "a.safetensors")
    save_loda(trained_model(), tmp_path / "new" / "folder" / "a.safetensors")
    with pytest.raises(OSError, match="a.safetensors"):
        save_loda(trained_model(), tmp_path / "new" / "folder" / "a.safetensors" / "b.safetensors")


def write(path, layers, tensors):
    safetensors.torch.save_file(tensors, path, {"loda": layers if isinstance(layers, str) else json.dumps(layers)})


def good_file():
    settings = {"rank": 2, "activation": "identity", "negative_slope": 0.1, "scale": 0.5}
    layers = {"body.0": settings, "body.2": dict(settings)}
    return layers, {name: t.clone() for name, t in loda_state_dict(trained_model()).items()}


def drop(dictionary, key):
    del dictionary[key]


DAMAGES = {
    "another layer": lambda layers, tensors: layers.update({"body.7": layers.pop("body.2")}),
    "a layer that is no convolution": lambda layers, tensors: layers.update({"body.1": layers["body.2"]}),
    "a tensor missing": lambda layers, tensors: drop(tensors, "body.2.loda_A"),
    "a tensor too many": lambda layers, tensors: tensors.update(extra=torch.ones(1)),
    "another shape": lambda layers, tensors: tensors.update({"body.2.loda_A": torch.ones(2, 6, 5, 5)}),
    "another rank": lambda layers, tensors: layers["body.2"].update(rank=3),
    "rank 0": lambda layers, tensors: layers["body.2"].update(rank=0),
    "an enormous rank": lambda layers, tensors: layers["body.2"].update(rank=1 << 50),
    "a rank past all numbers": lambda layers, tensors: layers["body.2"].update(rank=10**400),
    "a scale past all numbers": lambda layers, tensors: layers["body.2"].update(scale=10**400),
    "a rank in words": lambda layers, tensors: layers["body.2"].update(rank="two"),
    "a scale in words": lambda layers, tensors: layers["body.2"].update(scale="half"),
    "an infinite scale": lambda layers, tensors: layers["body.2"].update(scale=float("inf")),
    "an unknown activation": lambda layers, tensors: layers["body.2"].update(activation="relu"),
    "a setting missing": lambda layers, tensors: drop(layers["body.2"], "scale"),
    "a setting too many": lambda layers, tensors: layers["body.2"].update(dropout=1),
    "settings as a list": lambda layers, tensors: layers.update({"body.2": list(layers["body.2"])}),
    "no layer": lambda layers, tensors: (layers.clear(), tensors.clear()),
    "a tensor without dimensions": lambda layers, tensors: tensors.update({"body.2.loda_A": torch.tensor(1.0)}),
    "settings as a number": lambda layers, tensors: layers.update({"body.2": 5}),
}


@pytest.mark.parametrize("adapted", [True, False], ids=["into adapters", "into a plain model"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_another_models_or_a_damaged_file_changes_nothing(tmp_path, damage, adapted):
    layers, tensors = good_file()
    DAMAGES[damage](layers, tensors)
    write(tmp_path / "a.safetensors", layers, tensors)
    assert_load_refused(trained_model() if adapted else small_model(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"no safetensors at all", "truncated", "flipped", "no metadata", "no json"]
)
def test_what_is_no_adapter_file_changes_nothing(tmp_path, content, adapted):
    path = tmp_path / "a.safetensors"
    write(path, "{" if content == "no json" else good_file()[0], good_file()[1])
    if content == "no metadata":
        safetensors.torch.save_file(good_file()[1], path)
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif content == "flipped":
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert_load_refused(trained_model() if adapted else small_model(), path)


def assert_load_refused(model, path, message=""):
    for p in model["head"].parameters():
        p.requires_grad_(True)  # a half-done load would undo this
    state = state_of(model)
    with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
        load_loda(model, path)
    assert_same_state(model, state)


def lora_head():
    return drawn.randomise(attached(small_model(), activation="identity", targets=nn.Linear))


def tensors_named(*names):
    return {name: torch.ones(2, 2) for name in names}


KOHYA = ("lora_unet_down_blocks_0_attn.lora_down.weight", "lora_unet_down_blocks_0_attn.lora_up.weight")
FOREIGN = {
    "PEFT": (
        tensors_named("base_model.model.head.lora_A.weight", "base_model.model.head.lora_B.weight"),
        r"PEFT's LoRA: .*load_peft\(model, folder\)",
    ),
    "webui": (tensors_named(*KOHYA, "lora_unet_down_blocks_0_attn.alpha"), "webui and kohya .*load_lora_weights"),
    "diffusers": (tensors_named("unet.head.lora_A.weight", "unet.head.lora_B.weight"), "a LoRA of diffusers"),
    "diffusers, older": (tensors_named("unet.mid.to_q.lora.down.weight"), "a LoRA of diffusers"),
    "a state dict": (tensors_named("body.0.weight", "body.0.bias"), r"a state dict: model.load_state_dict\("),
    "an adapted model's state dict": (
        tensors_named("body.0.weight", "body.0.loda_A"),
        "adapters but not their settings",
    ),
    "something else": (tensors_named("x_embeddings"), r"1 tensors of something else \(x_embeddings\)"),
    "nothing": ({}, "no tensors at all"),
}


@pytest.mark.parametrize("adapted", [True, False], ids=["into adapters", "into a plain model"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_says_what_it_is_and_what_loads_it(tmp_path, kind, adapted):
    tensors, message = FOREIGN[kind]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    assert_load_refused(trained_model() if adapted else small_model(), tmp_path / "a.safetensors", message)


def test_a_file_may_begin_with_any_length_of_its_header(tmp_path):
    """Files whose first byte is that of a pickle are adapters too."""
    path, first = tmp_path / "adapter.safetensors", set()
    for length in range(1, 90):
        model = nn.ModuleDict({"n" * length: nn.Conv2d(4, 4, 1)})
        attach_loda(model, rank=1)
        save_loda(model, path)
        first.add(path.read_bytes()[0])
        assert load_loda(nn.ModuleDict({"n" * length: nn.Conv2d(4, 4, 1)}), path) == ["n" * length]
    assert len(first) == 32, "a multiple of 8: every one of them"


@pytest.mark.parametrize("adapted", [True, False], ids=["into adapters", "into a plain model"])
@pytest.mark.parametrize(
    "kind", ["pickle", "old pickle", "plain pickle", "empty", "cut short", "folder", "PEFT's folder"]
)
def test_what_can_be_no_safetensors_file_says_what_it_is(tmp_path, kind, adapted):
    path = tmp_path / "a.safetensors"
    message = {
        "empty": "is empty",
        "cut short": "cut short",
        "folder": "is a folder",
        "PEFT's folder": "load_peft loads it",
    }
    if "folder" in kind.lower():
        save_peft(lora_head(), path)
        if kind == "folder":
            (path / "adapter_config.json").unlink()
    elif "pickle" in kind:
        write_pickle = dict(_use_new_zipfile_serialization=kind == "pickle")
        torch.save({"a": torch.ones(2)}, path, **write_pickle) if kind != "plain pickle" else path.write_bytes(
            pickle.dumps({"a": [1]})
        )
    else:
        save_loda(trained_model(), path)
        path.write_bytes(path.read_bytes()[: 0 if kind == "empty" else -1])
    wanted = message.get(kind, "a pickle, .* could run code")
    assert_load_refused(trained_model() if adapted else small_model(), path, wanted)


def test_the_ways_out_of_a_foreign_file_load_it(tmp_path):
    model = lora_head()
    save_peft(model, tmp_path / "peft")
    with pytest.raises(ValueError, match="load_peft"):
        load_loda(small_model(), tmp_path / "peft" / "adapter_model.safetensors")
    other = small_model()
    load_peft(other, tmp_path / "peft")
    assert all(torch.equal(t, loda_state_dict(model)[name]) for name, t in loda_state_dict(other).items())
    safetensors.torch.save_file(loda_state_dict(model), tmp_path / "state")
    again = lora_head()
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "state"), strict=False)
    assert all(torch.equal(t, loda_state_dict(model)[name]) for name, t in loda_state_dict(again).items())


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        load_loda(trained_model(), tmp_path / "gone")


def test_other_settings_name_the_setting(tmp_path):
    save_loda(trained_model(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="body.0 has scale=0.5, the model has 0.25"):
        load_loda(trained_model(scale=0.25), tmp_path / "a.safetensors")


# ---- a private step on the whole


def test_a_private_step_learns_and_warns_of_nothing():
    model = trained_model()
    optimizer = torch.optim.Adam(loda_parameters(model), 0.05)
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8) % 5
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            stats = ghost_dp_step(
                F.cross_entropy(run(model, x), y, reduction="none"),
                model,
                optimizer,
                max_grad_norm=1.0,
                noise_multiplier=0.01,
                expected_batch_size=8,
            )
            losses.append(stats.mean_loss)
    assert losses[-1] < 0.8 * losses[0]
