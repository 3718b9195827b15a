"""`fastloda.compile`: private steps of a compiled model equal those of the eager one; what can't be exact is refused by name."""

import copy
import pickle
from weakref import WeakKeyDictionary

import drawn
import oracle
import pytest
import torch
from drawn import Checkpointed, Twice, randomise
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastloda
from fastloda import (
    GhostClipper,
    LoDAConv2d,
    LoDALinear,
    PrivacyError,
    attach_loda,
    ghost_dp_step,
    per_sample_grad_norms,
)
from fastloda.loda import opaque
from fastloda.per_sample import refusals
from fastloda.per_sample.graph import nodes_below
from fastloda.per_sample.regions import COMPILED, _backward_code, _picks_rows, may_pick_rows
from fastloda.synthesis.diffusion.unet import UNet, UNetConfig

EXACT = dict(rtol=1e-10, atol=1e-13)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Clear compiled code before each test, because modules with equal code share it."""
    torch._dynamo.reset()


def compiled(model, **options):
    return fastloda.compile(model, **{"backend": "aot_eager", "fullgraph": True} | options)


def conv(c_in, c_out, kernel=3, **settings):
    return LoDAConv2d(c_in, c_out, kernel, **{"padding": 1, "rank": 2} | settings)


def norm(channels):
    return nn.GroupNorm(2, channels).requires_grad_(False)


def conv_stack():
    body = [conv(3, 6), norm(6), nn.SiLU(), conv(6, 4, (2, 1), stride=2, groups=2, scale=0.5)]
    return nn.Sequential(*body, nn.Flatten(), LoDALinear(4 * 3 * 4, 3, rank=2))


def linear_stack():
    """Make layers for [N, 3, 4, 5], of which all dimensions but the last are leading ones."""
    layer_norm = nn.LayerNorm(4).requires_grad_(False)
    return nn.Sequential(
        LoDALinear(5, 4, rank=2), layer_norm, nn.GELU(), LoDALinear(4, 6, rank=3, activation="identity", bias=False)
    )


def tied():
    """Make two layers that share both parameters of their adapters but pad in different ways."""
    first, second = conv(3, 3), conv(3, 3, padding_mode="circular")
    second.loda_A, second.loda_B = first.loda_A, first.loda_B
    return nn.Sequential(first, nn.SiLU(), second)


class Recipes(nn.Module):
    """Each sample is cut into two rows for one layer; the other layer sees only the sample's first row."""

    def __init__(self, first_of):
        super().__init__()
        self.first_of, self.halves, self.once = first_of, conv(3, 4), LoDALinear(3, 4, rank=1)

    def forward(self, x):
        halves = self.halves(x.unflatten(2, (2, -1)).movedim(2, 1).flatten(0, 1))
        once = self.once(x[:: self.first_of].mean((2, 3))).repeat_interleave(self.first_of, 0)
        return halves.unflatten(0, (-1, 2)).sum(1) * once[..., None, None]


MODELS = {
    "conv stack": (conv_stack, 1),
    "linear stack": (linear_stack, 1),
    "views": (lambda: nn.Sequential(conv(3, 4), nn.SiLU()), 2),
    "layer called twice": (lambda: Twice(conv(3, 3, (1, 3), padding=(0, 1), dilation=(2, 1))), 1),
    "tied adapters": (tied, 1),
    "more rows, and fewer": (lambda: Recipes(first_of=2), 2),
    "checkpoint inside": (lambda: nn.Sequential(conv(3, 4), Checkpointed(nn.Sequential(nn.SiLU(), conv(4, 3)))), 1),
}


def case_of(name, dtype=torch.float64):
    make, views = MODELS[name]
    return drawn.Case(randomise(make().double()).to(dtype), torch.randn(4, 3, 4, 5, dtype=dtype), views=views)


def small(dtype=torch.float64):
    """Make the smallest case with a convolution, an operation to fuse, and a linear layer."""
    model = nn.Sequential(conv(3, 4, rank=1), nn.SiLU(), nn.Flatten(), LoDALinear(4 * 20, 2, rank=1))
    return drawn.Case(randomise(model.double()).to(dtype), torch.randn(4, 3, 4, 5, dtype=dtype))


def clipped_sum(case, bound=1e30):
    clipper = GhostClipper(case.model, bound, case.views)
    stats = clipper.accumulate(case.losses())
    clipper.privatize(0, 1)
    return {name: p.grad for name, p in clipper.parameters.items()}, stats


def check_exact(case, truth):
    """Check norms and the clipped sum, with a clipping norm that some samples exceed and some do not."""
    norms = oracle.norms(truth)
    torch.testing.assert_close(per_sample_grad_norms(case.losses(), case.model, views=case.views), norms, **EXACT)
    bound = norms.median().item() * 0.9
    sums, stats = clipped_sum(case, bound)
    assert stats.clipped == (norms > bound).sum()
    for name, wanted in oracle.clipped_sum(truth, bound).items():
        torch.testing.assert_close(sums[name], wanted, **EXACT)


def check_refused(case, message):
    with pytest.raises(PrivacyError, match=message):
        GhostClipper(case.model, 1.0).accumulate(case.losses())
    assert all(p.grad is None for p in case.model.parameters())


# ---- exactness


@pytest.mark.parametrize("name", MODELS)
def test_private_steps_are_exact(name):
    """Ordinary training is exact too. The compiled backward runs once at first, later several times over one graph."""
    case = case_of(name)
    truth = case.truth()
    compiled(case.model)
    case.losses().sum().backward()
    for name, parameter in case.model.named_parameters():
        if parameter.requires_grad:
            wanted = case.views * sum(grads[name] for grads in truth)
            torch.testing.assert_close(parameter.grad, wanted, **EXACT)
    check_exact(case, truth)


@pytest.mark.parametrize("name", MODELS)
def test_operations_that_hide_the_arithmetic_are_as_exact(name, monkeypatch):
    """These are the operations for Triton's kernels, here with PyTorch's products inside."""
    monkeypatch.setattr("fastloda.loda.rowwise._way", lambda t: opaque)
    test_private_steps_are_exact(name)


def test_adapters_of_two_dtypes():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).to(self[1].weight.dtype))

    case = drawn.Case(randomise(Doubled(conv(3, 4), conv(4, 2)).double()), torch.randn(4, 3, 4, 5))
    case.model[0].float()
    norms = oracle.norms(case.truth())
    compiled(case.model)
    torch.testing.assert_close(per_sample_grad_norms(case.losses(), case.model), norms, rtol=1e-5, atol=0)


class OfOneInput(nn.Module):
    """A diffusion model at fixed times and classes."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x):
        y = x[:, 0, 0, 0].abs().mul(9).long() % 3
        return self.unet(x, 100 * y + 7, y)


def test_the_unet_compiles_whole():
    """There is no graph break: fullgraph=True would raise an error."""
    shape = dict(
        image_size=4, in_channels=1, width=2, multipliers=(1,), blocks_per_level=1, num_classes=2, class_width=3
    )
    unet = UNet(UNetConfig(**shape, norm_groups=2, attention=False, zero_init=False))
    attach_loda(unet, rank=1, targets=(nn.Conv2d, nn.Linear))
    case = drawn.Case(OfOneInput(randomise(unet.double())), torch.randn(3, 1, 4, 4, dtype=torch.float64))
    truth = case.truth()
    compiled(unet)
    check_exact(case, truth)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_memory_layout(layout):
    case = drawn.Case(case_of("views").model, drawn.LAYOUTS[layout](torch.randn(4, 3, 4, 5, dtype=torch.float64)))
    truth = case.truth()
    compiled(case.model)
    check_exact(case, truth)


def test_float32_is_as_good_as_eager():
    case = small(torch.float32)
    norms = oracle.norms(case.truth())
    eager = per_sample_grad_norms(case.losses(), case.model)
    compiled(case.model)
    found = per_sample_grad_norms(case.losses(), case.model)
    allowed = 2 * (eager - norms).abs().max() + 8 * torch.finfo(torch.float32).eps * norms.max()
    assert (found - norms).abs().max() <= allowed


def test_inductor():
    """The default backend generates code around the layers that relies on the memory layout of their outputs."""
    case = small(torch.float32)
    truth = case.truth()
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    fastloda.compile(case.model, fullgraph=True)
    norms = oracle.norms(truth)
    sums, _ = clipped_sum(case, bound := norms.median().item())
    wanted = oracle.clipped_sum(truth, bound)
    for name, got in sums.items():
        torch.testing.assert_close(got.double(), wanted[name], rtol=1e-5, atol=1e-6 * bound)
    losses = case.losses()
    for _ in range(2):  # its saved tensors must last for a second backward pass
        torch.testing.assert_close(per_sample_grad_norms(losses, case.model), norms, rtol=1e-5, atol=0)


def test_a_graph_break_costs_no_exactness():
    class Broken(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            x = self.first(x).sin()
            torch._dynamo.graph_break()
            return self.second(x)

    case = drawn.Case(randomise(Broken(conv(3, 4), conv(4, 2)).double()), torch.randn(3, 3, 4, 5, dtype=torch.float64))
    truth = case.truth()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(case.model)(case.x)
    compiled(case.model, fullgraph=False)
    check_exact(case, truth)


def test_a_bad_record_contributes_nothing():
    case = small()
    compiled(case.model)
    case.x[1, 0, 0, 0], case.x[2] = float("nan"), 1e200
    norms = per_sample_grad_norms(case.losses(), case.model)
    sums, stats = clipped_sum(case, 1.0)
    assert stats.nonfinite == (~norms.isfinite()).sum() >= 1
    case.x = case.x[norms.isfinite()]
    alone, _ = clipped_sum(case, 1.0)
    for name in sums:
        torch.testing.assert_close(sums[name], alone[name], **EXACT)


# ---- batch sizes


def test_one_graph_for_one_batch_size_and_one_for_all_others():
    case, counter = small(), CompileCounterWithBackend("aot_eager")
    x = torch.randn(9, 3, 4, 5, dtype=torch.float64)
    truth = oracle.norms(drawn.Case(case.model, x).truth())
    compiled(case.model, backend=counter)
    frames = []
    for rows in (4, 4, 5, 9, 2):
        found = per_sample_grad_norms(case.loss_of(case.model, x[:rows]), case.model)
        torch.testing.assert_close(found, truth[:rows], **EXACT)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2]


def test_empty_batches_and_lone_samples():
    case = small()
    truth = oracle.norms(case.truth())
    compiled(case.model)
    for rows in (0, 1):
        found = per_sample_grad_norms(case.loss_of(case.model, case.x[:rows]), case.model)
        torch.testing.assert_close(found, truth[:rows], **EXACT)


# ---- in place


def test_it_stays_the_same_model(tmp_path):
    case = small()
    names, expected = list(case.model.state_dict()), case.model(case.x)
    assert compiled(case.model) is case.model
    torch.testing.assert_close(case.model(case.x), expected)
    with torch.no_grad():
        torch.testing.assert_close(case.model(case.x), expected.detach())
    assert list(case.model.state_dict()) == names and case.model[0].by_row is None
    fastloda.save_loda(case.model, tmp_path / "adapter")
    other = small().model
    fastloda.load_loda(other, tmp_path / "adapter")
    ours, theirs = (fastloda.loda_state_dict(model) for model in (case.model, other))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_train_and_eval_mode_are_heeded():
    model = randomise(nn.Sequential(conv(3, 4), nn.Dropout(0.5), conv(4, 2)).double())
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    compiled(model)
    assert not torch.equal(model(x), model(x))
    case = drawn.Case(model.eval(), x)
    check_exact(case, case.truth())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_eager_and_apart(again):
    case = small()
    compiled(case.model)
    case.losses()
    twin = again(case.model)
    assert twin._compiled_call_impl is None
    randomise(twin)
    assert not torch.equal(twin(case.x), case.model(case.x))
    check_exact(drawn.Case(twin, case.x), drawn.Case(twin, case.x).truth())


# ---- parts of a model


class Parts(nn.Module):
    """A frozen stem, an adapted body, a frozen top, and a head that trains."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4)).requires_grad_(False)
        self.body = nn.Sequential(conv(4, 4), nn.SiLU(), conv(4, 4))
        self.top = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU()).requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.top(self.body(self.stem(x))).mean((2, 3)))


def parts():
    return drawn.Case(randomise(Parts().double()), torch.randn(4, 3, 4, 5, dtype=torch.float64))


def test_the_adapted_parts_compile_and_the_rest_trains_eagerly():
    case = parts()
    truth = case.truth()
    with pytest.raises(PrivacyError, match=r"'head.weight', 'head.bias'.*compile the parts"):
        compiled(case.model)
    for part in (case.model.stem, case.model.body, case.model.top):
        compiled(part)
    check_exact(case, truth)


def test_a_compiled_part_of_a_compiled_model():
    case = parts()
    case.model.head.requires_grad_(False)
    truth = case.truth()
    compiled(case.model.body)
    compiled(case.model)
    check_exact(case, truth)


def test_frozen_parts_may_be_compiled_by_torch():
    """The frozen parts are above and below what trains."""
    case = parts()
    truth = case.truth()
    case.model.stem = torch.compile(case.model.stem, backend="aot_eager")
    case.model.top = torch.compile(case.model.top, backend="aot_eager")
    check_exact(case, truth)


def test_a_part_that_runs_only_once_is_refused():
    """torch.compile frees what a frozen part saved if its backward is first compiled for a single pass."""
    case = parts()
    case.model.top = torch.compile(case.model.top, backend="aot_eager")
    case.losses().sum().backward()
    case.model.zero_grad()
    check_refused(case, "compile that part by fastloda.compile")


def test_checkpointing_around_a_compiled_part():
    case = parts()
    truth = case.truth()
    compiled(case.model.body)
    case.model.body = Checkpointed(case.model.body)
    truth = [{name.replace("body.", "body.inner."): grad for name, grad in grads.items()} for grads in truth]
    check_exact(case, truth)


def test_transforms_see_the_eager_model():
    case = small()
    truth = case.truth()
    compiled(case.model)
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(parameters, x):
        return case.loss_of(lambda x: torch.func.functional_call(case.model, parameters, (x,)), x[None]).sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, case.x)
    for i, grads in enumerate(truth):
        for name, grad in grads.items():
            torch.testing.assert_close(together[name][i], grad, **EXACT)


# ---- precision


def test_autocast_accumulates_in_float32_and_clips_what_it_sums():
    case = small(torch.float32)
    truth = case.truth()
    errors = []
    for prepare in (lambda model: model, compiled):
        prepare(case.model)
        with torch.autocast("cpu", torch.bfloat16):
            assert case.model(case.x).dtype == torch.bfloat16
            norms = per_sample_grad_norms(case.losses(), case.model)
            for i in range(case.samples):
                one = drawn.Case(case.model, case.x[i : i + 1])
                grads, _ = clipped_sum(one)
                assert abs(oracle.norm(grads) - norms[i]) <= 1e-5 * norms[i]
        errors.append((norms - oracle.norms(truth)).abs().max())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("disable", [False, True], ids=["compiled", "as if it could not be compiled"])
@pytest.mark.parametrize("around", ["forward", "forward and backward"])
def test_autocast_may_reach_into_backward(around, disable):
    """Autocast in backward would compute the gradients' products in bfloat16."""
    case = small(torch.float32)
    compiled(case.model, disable=disable)
    sums = []
    for way in ("step", "backward"):
        with torch.autocast("cpu", torch.bfloat16):
            losses = case.losses()
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "forward and backward"):
            if way == "step":
                clipper = GhostClipper(case.model, 1e30)
                clipper.accumulate(losses)
                sums.append(list(clipper._sums.by_name.values()))
            else:
                losses.sum().backward()
                sums.append([p.grad.double() for p in clipper.parameters.values()])
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-6)


def test_half_precision_models_keep_gradients_in_float32():
    case = small(torch.bfloat16)
    case.x = case.x[:1]
    eager = per_sample_grad_norms(case.losses(), case.model)
    compiled(case.model)
    clipper = GhostClipper(case.model, 1e30)
    clipper.accumulate(case.losses())
    norm = oracle.norm(clipper._sums.by_name)
    assert abs(norm - eager) <= 1e-2 * eager and any(
        not torch.equal(s, s.bfloat16().double()) for s in clipper._sums.by_name.values()
    )


# ---- training


def test_the_trainer_takes_the_same_steps():
    settings = dict(
        sample_rate=0.5, expected_batch_size=4, steps=3, noise_multiplier=1.0, delta=1e-5, micro_batch_size=3, seed=1
    )
    x = torch.randn(8, 3, 4, 5, dtype=torch.float64)
    losses = lambda model, batch, generator: drawn.curved(model(batch[0]))  # noqa: E731
    eager = small().model
    models = eager, compiled(copy.deepcopy(eager))
    for model in models:
        fastloda.DPTrainer(model, (x,), losses, fastloda.PrivateTraining(**settings), progress=False).fit()
    for ours, theirs in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# ---- refusals


def test_a_model_compiled_by_torch_says_what_to_do():
    case = small()
    case.model.compile(backend="aot_eager")
    check_refused(case, r"'0.loda_A' is used by CompiledFunction.*use fastloda.compile\(model\)")
    optimizer = torch.optim.SGD(fastloda.loda_parameters(case.model), 0.1)
    settings = dict(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    before = copy.deepcopy(case.model.state_dict())
    with pytest.raises(PrivacyError, match="fastloda.compile"):
        ghost_dp_step(case.losses(), case.model, optimizer, **settings)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def test_adapters_attached_later_need_another_compile():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)).double())
    model.requires_grad_(False)
    case = drawn.Case(model, torch.randn(3, 3, 4, 5, dtype=torch.float64))
    compiled(model)
    attach_loda(model, rank=1)
    randomise(model)
    check_refused(case, "once more if they were attached since")
    truth = case.truth()
    compiled(model)
    check_exact(case, truth)


def test_a_base_thawed_later_is_refused():
    case = small()
    compiled(case.model)
    case.model[0].weight.requires_grad_(True)
    check_refused(case, "'0.(weight|loda_A)' is used by CompiledFunction")


@pytest.mark.parametrize("base", ["bias", "weight"])
def test_a_base_that_trains_is_refused_at_once(base):
    case = small()
    getattr(case.model[0], base).requires_grad_(True)
    with pytest.raises(PrivacyError, match=f"'0.{base}'"):
        compiled(case.model)


def test_an_adapter_that_trains_elsewhere_too_is_refused():
    model = nn.ModuleDict({"adapted": conv(3, 3), "plain": nn.Conv2d(3, 2, 3)})
    model["plain"].weight = model["adapted"].loda_A
    model["plain"].bias.requires_grad_(False)
    with pytest.raises(PrivacyError, match="'plain.weight'"):
        compiled(model)


def test_a_penalty_on_the_adapter_is_refused():
    """The adapter enters the graph once more, outside of its layer's call."""

    class Penalised(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + self[0].loda_A.square().sum()

    case = drawn.Case(randomise(Penalised(conv(3, 2)).double()), torch.randn(3, 3, 4, 5, dtype=torch.float64))
    compiled(case.model)
    check_refused(case, "'0.loda_A' is used by CompiledFunction")


class Mixing(nn.Sequential):
    """Samples mix if `mixes` is on; only the compiled code shows it."""

    mixes = False

    def forward(self, x):
        x = super().forward(x)
        return x + x.mean(0) if self.mixes else x + x.mean(1, keepdim=True)


def test_samples_that_mix_are_refused_whenever_the_code_changes():
    case = drawn.Case(randomise(Mixing(conv(3, 2)).double()), torch.randn(3, 3, 4, 5, dtype=torch.float64))
    compiled(case.model)
    per_sample_grad_norms(case.losses(), case.model)
    case.model.mixes = True
    check_refused(case, "samples mix")


class Picking(nn.Module):
    """Rows go from one layer to the next by an index that comes with the batch."""

    def __init__(self, pick):
        super().__init__()
        self.pick, self.first, self.second = pick, LoDALinear(5, 4, rank=1), LoDALinear(4, 3, rank=1)

    def forward(self, x, index):
        return self.second(self.pick(self.first(x).tanh(), index))


PICKS = {
    "index": lambda x, index: x[index],
    "turned": lambda x, index: x.mT[:, index].mT,
    "index_select": lambda x, index: x.index_select(0, index),
    "gather": lambda x, index: x.gather(0, index[:, None].expand_as(x)),
    "take_along_dim": lambda x, index: torch.take_along_dim(x, index[:, None], 0),
    "embedding": lambda x, index: nn.functional.embedding(index, x),
    "index_put": lambda x, index: torch.zeros_like(x).index_put((index,), x),
    "index_copy": lambda x, index: torch.zeros_like(x).index_copy(0, index, x),
    "index_add": lambda x, index: torch.zeros_like(x).index_add(0, index, x),
    "scatter": lambda x, index: torch.zeros_like(x).scatter(0, index[:, None].expand_as(x), x),
    "sorted": lambda x, index: x[index.double().argsort()],
}


def only_region(losses):
    (region,) = (node for node in nodes_below([losses.grad_fn]) if node.name() == COMPILED)
    return region


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pick", PICKS)
def test_rows_that_an_index_picks_inside_are_looked_at_every_time(pick, dynamic):
    """The schedule does not look at the third batch."""
    model = compiled(randomise(Picking(PICKS[pick]).double()), dynamic=dynamic)
    x, in_order = torch.randn(7, 5, dtype=torch.float64), torch.arange(7)
    for _ in range(2):
        per_sample_grad_norms(model(x, in_order).square().sum(1), model)
    with pytest.raises(PrivacyError, match="samples mix"):
        per_sample_grad_norms(model(x, in_order.roll(1)).square().sum(1), model)


def test_the_probe_comes_back_until_each_adapter_has_shown_a_gradient():
    case = small()
    nn.init.zeros_(case.model[0].loda_B)  # so that A of this layer has no gradient
    compiled(case.model)
    parted = []
    for _ in range(2):
        per_sample_grad_norms(case.losses(), case.model)
        parted.append(max(looks.parted for looks in refusals._looks[case.model].values()))
        randomise(case.model)
    assert parted == [0, case.samples]


@pytest.mark.parametrize("cached", [False, True])
def test_what_picks_no_rows_is_looked_at_on_the_schedule_only(cached, monkeypatch):
    """Resizing, pooling and padding index positions, and so does a gather along the features: no rows."""
    body = [conv(1, 2), nn.Upsample(scale_factor=2), nn.MaxPool2d(2), conv(2, 2, padding_mode="reflect")]
    model = compiled(randomise(nn.Sequential(*body, nn.Upsample(scale_factor=1.5, mode="bilinear")).double()))
    for size in (4, 5):  # one is the size of the batch
        region = only_region(model(torch.randn(4, 1, size, size, dtype=torch.float64)).flatten(1).sum(1))
        if cached:  # cached code has no shapes
            monkeypatch.setattr(
                "fastloda.per_sample.regions._value", lambda node: None if isinstance(node, fx.Node) else node
            )
        assert not _picks_rows(_backward_code(type(region)))
    picking = compiled(randomise(Picking(PICKS["index"]).double()))
    region = only_region(picking(torch.randn(7, 5, dtype=torch.float64), torch.arange(7)).sum(1))
    assert _picks_rows(_backward_code(type(region)))
    monkeypatch.setattr("fastloda.per_sample.regions._backward_code", lambda kind: None)
    monkeypatch.setattr("fastloda.per_sample.regions._picking", WeakKeyDictionary())
    assert may_pick_rows(region), "what can't be read may"


def test_rows_that_belong_to_no_sample_are_refused():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LoDALinear(5, 3, rank=1)

        def forward(self, x):
            return self.layer(x.reshape(3, -1, 5)).reshape(4, -1)

    case = drawn.Case(randomise(Folded().double()), torch.randn(4, 3, 4, 5, dtype=torch.float64))
    compiled(case.model)
    check_refused(case, "'layer.loda_A' is used by CompiledFunction.*rows must be those of the model's first input")


@pytest.mark.parametrize("options", [dict(mode="reduce-overhead"), dict(options={"triton.cudagraphs": True})])
def test_cuda_graphs_are_refused(options):
    with pytest.raises(ValueError, match="CUDA graphs"):
        fastloda.compile(small().model, **options)


def test_a_function_is_no_model():
    with pytest.raises(TypeError, match="function"):
        fastloda.compile(lambda x: x)
