"""Layers that no rule covers train exactly, without any call by their user, or are refused with the true cause.

They are: values computed from parameters alone (positions, prompts, normalised or masked weights, adapters of other
packages), packed sequences, complex features, and layers that torch.func can't vectorise. All are compared with one backward
pass per sample, in float64.
"""

import copy
import ctypes
from collections.abc import Callable

import drawn
import oracle
import pytest
import torch
import torch.nn.functional as F
from exactness import check_exact, use_plan
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastloda import GhostClipper, PrivacyError, explain, per_sample_grad_norms
from fastloda.per_sample.fallback.functional import Covered, cover

N, T, C = 5, 3, 4  # samples, positions and features
pytestmark = pytest.mark.filterwarnings("ignore:.*no per-sample rule", "ignore:.*weight_norm")


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return drawn.curved(model(x))


def sequences() -> Tensor:
    return torch.randn(N, T, C, dtype=torch.float64)


def check_norms(model: nn.Module, x: Tensor) -> Covered:
    """Check the norms of the covered model against one backward pass per sample; `explain` must say that a step would run."""
    covered = cover(model.double())
    norms = per_sample_grad_norms(losses_of(model, x), model)
    assert not explain(model, x, loss=drawn.curved, show=False).refused
    layers = covered.layers
    covered.remove()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for i, norm in enumerate(norms):
        grads = torch.autograd.grad(losses_of(model, x[i : i + 1]).sum(), parameters, allow_unused=True)
        truth = oracle.norm({str(j): g for j, g in enumerate(grads) if g is not None})
        torch.testing.assert_close(norm, truth, rtol=1e-10, atol=0)
    return layers


# ---- values computed from parameters alone


def written(v: Tensor, q: Tensor, m: nn.Module) -> Tensor:
    into = torch.zeros_like(v)
    into[1:] = v[1:]
    into[0] = q[0]
    return into


MADE: dict[str, Callable[[Tensor, Tensor, nn.Module], Tensor]] = {  # v and q [T, C] -> [T, C]
    "sine": lambda v, q, m: v.sin(),
    "product": lambda v, q, m: v * q,
    "both ways": lambda v, q, m: v / (1 + q.square()) + v,
    "attention": lambda v, q, m: (v @ q.T).softmax(-1) @ q,
    "unit rows": lambda v, q, m: F.normalize(v, dim=-1),
    "looked up": lambda v, q, m: F.embedding(torch.arange(T).flip(0), v),
    "network": lambda v, q, m: m.network(v),
    "network of constants": lambda v, q, m: v + m.network(m.constants),
    "masked": lambda v, q, m: torch.where(m.constants > 0, v, q),
    "repeated": lambda v, q, m: (v.expand(2, T, C) * q).mean(0),
    "in place": lambda v, q, m: v.clone().mul_(q).add_(1),
    "written": written,
    "joined": lambda v, q, m: torch.cat([v, q])[1 : T + 1],
    "sums": lambda v, q, m: v.cumsum(0) - q.mean(),
    "kron": lambda v, q, m: torch.kron(v[:1, :1], q),
    "checkpointed": lambda v, q, m: torch.utils.checkpoint.checkpoint(torch.sin, v, use_reentrant=False) * q,
}
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # x [N, T, C]
    "shift": lambda x, v: x + v.mean(0),
    "positions": lambda x, v: x + v,
    "positions of one row": lambda x, v: x - v[None],
    "scale": lambda x, v: x * (1 + v),
    "weight": lambda x, v: F.linear(x, v),
    "weight turned": lambda x, v: F.linear(x.mT, v.t()),
    "filter": lambda x, v: F.conv1d(x.mT, v[..., None], padding=1),
    "prompts": lambda x, v: torch.cat([v.expand(len(x), T, C), x], 1).cumsum(1),
    "prompts repeated": lambda x, v: torch.cat([x, v[None].repeat(len(x), 1, 1)], 1).cumsum(1),
    "keys": lambda x, v: (x @ v.expand(len(x), T, C).mT).softmax(-1),
    "bias of scores": lambda x, v: (x @ x.mT + v @ v.T).softmax(-1),
    "norm": lambda x, v: F.layer_norm(x, (C,), v[0], v[1]),
    "table": lambda x, v: F.embedding(x.argmax(-1) % T, v),
    "of the features' shape": lambda x, v: x * (v.mean(0).expand_as(x[0]) * torch.ones_like(x[0])).exp(),
    "where": lambda x, v: torch.where(x > 0, x, v),
    "masked": lambda x, v: v.masked_fill(x > 0, 0.5) * x,
    "twice": lambda x, v: (x * v).sin() + v,
}


class Composite(nn.Module):
    """A value computed from two parameters, a network and constants, and features that it is combined with."""

    def __init__(self, steps: list[str], use: str):
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.empty(T, C)) for _ in range(2))
        self.network = nn.Sequential(nn.Linear(C, 2), nn.Tanh(), nn.Linear(2, C))
        self.below, self.above = nn.Linear(C, C), nn.LazyLinear(2)
        self.register_buffer("constants", torch.linspace(-1, 1, T * C).view(T, C))
        self.steps, self.use = steps, use
        self.above(USES[use](torch.zeros(1, T, C), torch.zeros(T, C)))

    def value(self) -> Tensor:
        v = self.p
        for step in self.steps:
            v = MADE[step](v, self.q, self)
        return v

    def forward(self, x: Tensor) -> Tensor:
        return self.above(USES[self.use](self.below(x), self.value()))

    def extra_repr(self) -> str:
        return f"{self.steps}, {self.use}"


@st.composite
def made(draw) -> drawn.Case:
    steps = draw(st.lists(st.sampled_from(sorted(MADE)), min_size=1, max_size=3))
    model = drawn.thaw_some(draw, Composite(steps, draw(st.sampled_from(sorted(USES)))))
    model.above.requires_grad_(True)
    return drawn.draw_case(draw, model, (T, C))


def check_covered(case: drawn.Case) -> None:
    plain = copy.deepcopy(case.model)
    covered = cover(case.model)
    case.truth = lambda: drawn.Case(plain, case.x, case.readout, case.views).truth()
    check_exact(case)
    lone = len(case.x) == 1  # with one sample, nothing distinguishes the one row of the prompts from features
    assert not covered.layers or lone, "through torch.func"


@pytest.mark.parametrize("chosen", ["as planned", "made again"])
def test_values_made_of_parameters_are_exact(chosen, counts, monkeypatch):
    use_plan(monkeypatch, chosen)
    drawn.hold_for(made(), counts(60, 1000), check_covered)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("step", ["network", "product", "checkpointed"])
def test_every_use_of_what_is_made_is_exact(step, use):
    model = drawn.randomise(Composite([step], use).double())
    check_covered(drawn.Case(model, torch.randn(4, T, C, dtype=torch.float64), views=2))


class Positions(nn.Module):
    """A table of positions as in GPT-2 and BERT, looked up for `arange`: the same rows for all samples."""

    def __init__(self, rows: Callable[[Tensor], Tensor]):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, C), nn.Embedding(9, C)
        self.drop, self.head, self.rows = nn.Dropout(0.0), nn.Linear(C, C), rows

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.tokens(x) + self.drop(self.positions(self.rows(x)))).tanh())


ROWS = {
    "a row": lambda x: torch.arange(x.shape[1]),
    "one of a batch": lambda x: torch.arange(x.shape[1])[None],
    "for each sample": lambda x: torch.arange(x.shape[1]).expand_as(x),
    "read off the tokens": lambda x: (x > 0).cumsum(1),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("samples", [1, 6])
def test_positions_are_looked_up_for_all_samples(rows, samples):
    assert not check_norms(drawn.randomise(Positions(ROWS[rows])), torch.randint(7, (samples, 6)))


class Scale(nn.Linear):
    """A layer of its own class with a factor, not a buffer, that it reads while the fallback looks into the layer."""

    factor = torch.tensor(0.5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def test_looking_into_a_layer_does_not_make_what_follows_private():
    model = Positions(ROWS["a row"])
    model.tokens = nn.Sequential(model.tokens, Scale(C, C), Scale(C, C))
    assert not check_norms(drawn.randomise(model), torch.randint(7, (N, 6)))


def test_a_private_step_clips_and_sums_what_is_made():
    """`GhostClipper` needs no call of `cover`, and dropout above and below does no harm."""
    model = Positions(ROWS["a row"])
    model.drop = nn.Dropout(0.5)
    x = torch.randint(7, (N, 6))
    clipper = GhostClipper(model, 1e-3)
    for _ in range(2):
        assert clipper.accumulate(losses_of(model, x)).clipped == N
    clipper.privatize(0, 1)
    assert oracle.norm({n: p.grad for n, p in model.named_parameters()}) <= 2 * N * 1e-3 * (1 + 1e-5)


class Conditioned(nn.Module):
    """A scale that a linear map computes from a constant; its last operation is a view."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(C, C)
        self.register_buffer("constant", torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.map(self.constant)


def test_what_a_linear_map_makes_is_exact_at_every_step():
    model = Conditioned()
    clipper = GhostClipper(model, 1e-3)
    for rows in (4, 3, C, 2):
        assert clipper.accumulate(model(torch.randn(rows, T, C)).square().sum((1, 2))).clipped == rows


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 4))])
def test_models_that_are_scripted_or_traced(make):
    model = make(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = torch.randn(5, 4)
    for call in range(4):
        try:
            assert GhostClipper(model, 1e-3).accumulate(model(x).square().sum(1)).clipped == 5
        except PrivacyError as error:  # TorchScript fuses operations after some calls
            assert call and "train the Python module" in str(error)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(C, C))])
        self.named = nn.ParameterDict({"power": nn.Parameter(torch.empty(C))})

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.rows[0].exp()) @ self.rows[1].sin()


class ListedWithoutRule(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().add(1).pow(self.named["power"])


class Standardised(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, centred / centred.std((1, 2), keepdim=True), self.bias)


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, 2, 5, dropout=0.0, batch_first=True)
    parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    return layer


def spectral(norm: Callable[[nn.Module], nn.Module], mode: bool) -> nn.Module:
    return norm(nn.Linear(C, C)).train(mode)


LAYERS = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(C, C)),
    "weight_norm by a hook": lambda: nn.utils.weight_norm(nn.Linear(C, C)),
    "spectral_norm in eval": lambda: spectral(parametrizations.spectral_norm, False),
    "spectral_norm by a hook, in eval": lambda: spectral(nn.utils.spectral_norm, False),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(C, C)),
    "prune": lambda: prune.random_unstructured(nn.Linear(C, C), "weight", 0.4),
    "prune, structured": lambda: prune.ln_structured(nn.Linear(C, C), "weight", 0.5, 2, 0),
    "lists of parameters": Listed,
    "standardised filters": lambda: Standardised(T, T, 1),
    "attention of a normalised weight": attention,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_made_weights_are_exact_without_torch_func(name):
    layer = LAYERS[name]()
    if name.startswith("lists"):
        layer = drawn.randomise(layer)
    assert not check_norms(nn.Sequential(layer, nn.Tanh(), nn.Linear(C, 2)), sequences())


def test_lists_of_parameters_without_a_rule_belong_to_the_layer_around_them():
    model = drawn.randomise(nn.Sequential(nn.Linear(C, C), ListedWithoutRule()))
    assert check_norms(model, sequences()) == ["1"]


def peft_models():
    """Yield PEFT's tuners that can adapt a linear layer: the name of each one's config, and an adapted model."""
    peft = pytest.importorskip("peft")
    tuners = {
        "LoraConfig": dict(r=2, use_dora=True),
        "LoHaConfig": dict(r=2),
        "LoKrConfig": dict(r=2),
        "IA3Config": dict(feedforward_modules=["3"]),
        "AdaLoraConfig": dict(init_r=2, total_step=10),
        "OFTConfig": dict(r=0, oft_block_size=4),
        "BOFTConfig": dict(boft_block_size=4),
        "VeraConfig": dict(r=2),
        "FourierFTConfig": dict(n_frequency=5),
        "HRAConfig": dict(r=2),
        "VBLoRAConfig": dict(r=2, num_vectors=4, vector_length=4, topk=2),
        "RandLoraConfig": dict(r=2),
        "WaveFTConfig": dict(n_frequency=5),
        "ShiraConfig": dict(r=1),
        "C3AConfig": dict(block_size=4),
        "MissConfig": dict(r=2),
        "RoadConfig": dict(group_size=4),
        "GraloraConfig": dict(r=2),
        "DeloraConfig": dict(r=2),
    }
    for name, arguments in tuners.items():
        if hasattr(peft, name):
            model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8))
            yield name, peft.get_peft_model(model, getattr(peft, name)(target_modules=["0", "3"], **arguments))


@pytest.mark.filterwarnings("ignore")
def test_peft_tuners_are_exact():
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    for name, model in peft_models():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
        try:
            check_norms(model, x)
        except (AssertionError, PrivacyError) as error:
            raise AssertionError(name) from error


@pytest.mark.filterwarnings("ignore")
def test_swin_transformers_are_exact_with_shifted_windows():
    from timm_models import timm

    size = dict(img_size=8, patch_size=2, window_size=2, embed_dim=4, depths=(2,), num_heads=(2,), num_classes=3)
    for kind in (timm.models.swin_transformer.SwinTransformer, timm.models.swin_transformer_v2.SwinTransformerV2):
        check_norms(kind(**size, drop_path_rate=0.0), torch.randn(3, 3, 8, 8, dtype=torch.float64))


# ---- what only looks as if it were computed from parameters


class Leaky(nn.Module):
    """A value computed from a parameter and the batch's statistics: samples mix, although no gradient shows it."""

    def __init__(self, statistics: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gain, self.statistics = nn.Parameter(torch.rand(C)), statistics
        self.register_buffer("kept", torch.zeros(C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain * self.statistics(x))


def copied(x: Tensor) -> Tensor:
    return torch.zeros(C, dtype=x.dtype).copy_(x.mean(0))


def assigned(x: Tensor) -> Tensor:
    into = torch.ones(C, dtype=x.dtype)
    into[1:] = x.mean(0)[1:]
    return into


def chosen(x: Tensor) -> Tensor:
    """Return a row that the batch chooses, the same one for all samples."""
    return torch.arange(9 * C, dtype=x.dtype).view(9, C)[int((10 * x.mean()).abs()) % 9]


def through_a_view(x: Tensor) -> Tensor:
    into = torch.ones(1, C, dtype=x.dtype)
    into[0].copy_(x.mean(0))
    return into[0]


def written_unseen(x: Tensor) -> Tensor:
    """Return the mean, written by something other than an operation of PyTorch, as kernels in Triton or C++ do."""
    mean, out = x.mean(0), torch.empty(C, dtype=x.dtype)
    ctypes.memmove(out.data_ptr(), mean.data_ptr(), mean.nbytes)
    return out


SOMEWHERE = torch.rand(9)
LEAKS = {
    "mean": lambda x: x.mean(0),
    "first row": lambda x: x[0],
    "copied": copied,
    "assigned": assigned,
    "through a view": through_a_view,
    "written unseen": written_unseen,
    "out": lambda x: torch.mean(x, 0, out=torch.empty(C, dtype=x.dtype)),
    "a number": lambda x: torch.full((C,), x.mean().item(), dtype=x.dtype),
    "numbers": lambda x: torch.tensor(x.mean(0).tolist(), dtype=x.dtype),
    "numpy": lambda x: torch.from_numpy(x.numpy().mean(0)),
    "a chosen row": chosen,
    "a closure": lambda x: SOMEWHERE[:C].to(x) + x.std(),
    "added to constants": lambda x: torch.arange(C) + x.mean(0),
    "an index": lambda x: torch.randn(9, C, dtype=x.dtype)[(x[0, 0] > 0).long()] + x[1],
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("first", [True, False])
def test_what_the_batch_enters_is_not_made_of_parameters(name, first):
    layers = [Leaky(LEAKS[name]), nn.Linear(C, 2)]
    model = nn.Sequential(*layers if first else [nn.Linear(C, C).requires_grad_(False), *layers]).double()
    cover(model)
    losses = losses_of(model, torch.randn(N, C, dtype=torch.float64))
    with pytest.raises(PrivacyError, match="Leaky"):
        per_sample_grad_norms(losses, model)


def test_a_parameter_that_the_forward_pass_wrote_to_is_no_parameter_any_more():
    class Overwritten(Leaky):
        def forward(self, x):
            with torch.no_grad():
                self.kept.copy_(x.mean(0))
            return x * (self.gain * self.kept)

    model = nn.Sequential(Overwritten(None), nn.Linear(C, 2)).double()
    cover(model)
    losses = losses_of(model, torch.randn(N, C, dtype=torch.float64))
    with pytest.raises(PrivacyError, match="gain.*Overwritten"):
        per_sample_grad_norms(losses, model)


# ---- layers that torch.func can't vectorise


class Chosen(nn.Module):
    """Experts, each of which sees any number of positions, those that are routed to it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(C, 3), nn.ModuleList(nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights = self.gate(rows).softmax(-1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = (weights.argmax(-1) == i).nonzero()[:, 0]
            out = out.index_put((chosen,), expert(rows[chosen]).tanh() * weights[chosen, i : i + 1])
        return out.view_as(x)


class Opaque(torch.autograd.Function):
    """A product that has no way to be vectorised."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, gy):
        x, p = ctx.saved_tensors
        return gy * p, (gy * x).sum_to_size(p.shape)


class UsesOpaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x, self.p)


def test_a_layer_that_cannot_be_vectorised_goes_row_after_row():
    assert check_norms(nn.Sequential(nn.Linear(C, C), UsesOpaque()), sequences()) == ["1"]


# ---- modules that are taken whole without the user's asking


class Windows(nn.Module):
    """A module whose rows are windows, two to a sample; no window can be computed alone."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(-1, 2, *x.shape[1:]) + torch.zeros(2, 1, 1)).view_as(x).square().add(1).pow(self.power)


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.windows = Windows()

    def forward(self, x: Tensor) -> Tensor:
        return self.windows(torch.stack([x, -x], 1).flatten(0, 1)).unflatten(0, (-1, 2))


class Borrowing(nn.Module):
    """A weight that its own layer uses soundly, and an operation without a rule uses again."""

    def __init__(self):
        super().__init__()
        self.lends = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.lends(x).square().add(1).pow(self.lends.weight.norm().sigmoid())


class SharedRow(nn.Module):
    """A table looked up for indices that are no buffer, so that nothing distinguishes them from data of the batch."""

    def __init__(self):
        super().__init__()
        self.table, self.indices = nn.Embedding(9, C), torch.tensor([4, 2, 7])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table(self.indices)


class Table(nn.Module):
    """A table that is called without a tensor; its operation has no rule, and its indices might be data of the batch."""

    def __init__(self):
        super().__init__()
        self.rows, self.indices = nn.Parameter(torch.ones(9, C)), torch.tensor([4, 2, 7])

    def forward(self) -> Tensor:
        return F.interpolate(self.rows[None, None], scale_factor=1.0, mode="bilinear")[0, 0][self.indices]


class Tabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = Table()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table()


class WindowedFirst(Windowed):
    """A layer of its own class after windows; it is looked into before the windows are taken whole."""

    def __init__(self):
        super().__init__()
        self.after = Listed()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


@pytest.mark.filterwarnings("ignore:.*whole")
@pytest.mark.parametrize("make", [Chosen, Windowed, WindowedFirst, Borrowing, SharedRow, Tabled])
@pytest.mark.parametrize("by_name", [True, False])
def test_the_smallest_module_that_has_rows_is_taken_whole(make, by_name):
    model = drawn.randomise(nn.Sequential(nn.Linear(C, C), nn.Sequential(make()), nn.Linear(C, 2)))
    x = torch.randn(7, T, C, dtype=torch.float64)
    plain = copy.deepcopy(model.double())
    covered = cover(model, ["1.0"] if by_name else None)
    truth = oracle.norms(oracle.sample_grads(plain, losses_of, x))
    for _ in range(2):
        torch.testing.assert_close(per_sample_grad_norms(losses_of(model, x), model), truth, rtol=1e-10, atol=0)
    assert covered.layers == ["1.0"] and not explain(model, x, loss=drawn.curved, show=False).refused
    covered.remove()
    assert all("forward" not in layer.__dict__ for layer in model.modules())


class Experts(nn.Module):
    """A layer of experts, in which each row goes through the expert that it chooses."""

    def __init__(self):
        super().__init__()
        self.choose, self.experts = nn.Linear(C, 2), nn.ModuleList(nn.Linear(C, C) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.choose(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y


@pytest.mark.filterwarnings("ignore:.*whole")
def test_experts_are_refused_with_a_way_out_that_is_exact():
    model, x = nn.Sequential(nn.Linear(C, C), Experts()).double(), sequences()
    truth = oracle.norms(oracle.sample_grads(model, losses_of, x))
    with pytest.raises(PrivacyError, match=r"'1.experts.*cover\(model, \[name\]\) of a module around it"):
        per_sample_grad_norms(losses_of(model, x), model)
    cover(model, ["1"])
    torch.testing.assert_close(per_sample_grad_norms(losses_of(model, x), model), truth, rtol=1e-10, atol=0)


def test_a_gradient_that_is_zero_but_for_rounding_is_not_called_mixed():
    """This is the gradient of the bias of an attention's keys, which moves all scores alike."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    model, x = Attention().double(), sequences()
    truth = oracle.norms(oracle.sample_grads(model, losses_of, x))
    cover(model, [""])
    torch.testing.assert_close(per_sample_grad_norms(losses_of(model, x), model), truth, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:.*whole")
@pytest.mark.parametrize("samples", [3, 4, 6, 12])
@pytest.mark.parametrize("make", [SharedRow, Tabled])
def test_a_row_for_all_samples_is_told_whatever_the_numbers(make, samples):
    """A tensor of shape [3, 4] could also have the rows of 3, 4, 6 or 12 samples."""
    model, x = drawn.randomise(nn.Sequential(make())).double(), torch.randn(samples, T, C, dtype=torch.float64)
    truth = oracle.norms(oracle.sample_grads(model, losses_of, x))
    assert cover(model).layers == []
    torch.testing.assert_close(per_sample_grad_norms(losses_of(model, x), model), truth, rtol=1e-10, atol=0)


def test_it_warns_once_by_name():
    model = nn.Sequential(Borrowing())
    cover(model)
    with pytest.warns(UserWarning, match=r"'0' \(Borrowing\).*whole") as found:
        losses_of(model, torch.randn(N, C))
        losses_of(model, torch.randn(N, C))
    assert len(found) == 1


def test_where_no_module_has_rows_the_use_is_refused_by_name():
    class Summed(Borrowing):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    model = nn.Sequential(nn.Linear(C, C), Summed())
    cover(model)
    with pytest.warns(UserWarning), pytest.raises(PrivacyError, match="samples mix|mixes samples|something else"):
        per_sample_grad_norms(losses_of(model, torch.randn(N, C)), model)


# ---- packed sequences


class Packed(nn.Module):
    """A recurrent layer of packed sequences; the first feature determines each one's length."""

    def __init__(self, layer: nn.RNNBase, last: bool, in_order: bool, given: bool):
        super().__init__()
        self.below, self.layer, self.last, self.in_order = nn.Linear(C, C), layer, last, in_order
        states = layer.num_layers * (1 + layer.bidirectional)
        self.given = torch.randn(states, 1, layer.hidden_size, dtype=torch.float64) if given else None
        self.above = nn.LazyLinear(2)
        self.double()(torch.zeros(1, T, C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, 0, 0].abs() * 10).long() % T + 1
        lengths = torch.full_like(lengths, T) if self.in_order else lengths
        packed = pack_padded_sequence(self.below(x), lengths, batch_first=True, enforce_sorted=self.in_order)
        state = None if self.given is None else self.given.repeat(1, len(x), 1)
        out, hidden = self.layer(packed, state)
        if self.last:
            return self.above(hidden[0][-1] if isinstance(hidden, tuple) else hidden[-1])
        return self.above(pad_packed_sequence(out, batch_first=True, total_length=T)[0])


@st.composite
def packed(draw) -> drawn.Case:
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    flag = st.booleans()
    options = dict(
        num_layers=draw(st.integers(1, 2)), bidirectional=draw(flag), bias=draw(flag), batch_first=draw(flag)
    )
    given = draw(flag) and kind is not nn.LSTM
    model = Packed(kind(C, 2, **options), draw(flag), draw(flag), given)
    return drawn.draw_case(draw, drawn.thaw_some(draw, model), (T, C))


def test_packed_sequences_are_exact(counts):
    def check(case):
        plain = copy.deepcopy(case.model)
        cover(case.model)
        case.truth = lambda: drawn.Case(plain, case.x, case.readout, case.views).truth()
        check_exact(case)

    drawn.hold_for(packed(), counts(12, 300), check)


# ---- complex numbers


class Fourier(nn.Module):
    """A product in Fourier space with complex weights, whose two parts are real parameters."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight, self.below = weight, nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(self.below(x).mT)[..., :2]
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return torch.fft.irfft(torch.einsum("nct,cot->not", found, weight), n=T)


class Spectrum(nn.Module):
    """A layer with a complex output."""

    def __init__(self, with_rule: bool):
        super().__init__()
        self.power, self.with_rule = nn.Parameter(torch.randn(C)), with_rule

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.fft(x)
        return found * self.power if self.with_rule else found**self.power


class Parts(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.view_as_real(z).flatten(-2)


def test_real_parameters_of_complex_features_are_exact():
    check_norms(nn.Sequential(nn.Linear(C, C), Fourier(nn.Parameter(torch.randn(C, C, 2, 2)))), sequences())
    for with_rule in (True, False):
        check_norms(nn.Sequential(nn.Linear(C, C), Spectrum(with_rule), Parts(), nn.Linear(2 * C, 2)), sequences())


def test_complex_parameters_are_refused_by_name():
    """They are refused wherever they enter; the test above shows that the remedy works."""
    model = nn.Sequential(nn.Linear(C, C), Fourier(nn.Parameter(torch.randn(C, C, 2, dtype=torch.cfloat))))
    with pytest.raises(PrivacyError, match="'1.weight' is complex.*view_as_complex"):
        GhostClipper(model, 1.0)
    with pytest.raises(PrivacyError, match="'1.weight' is complex"):
        per_sample_grad_norms(losses_of(model, torch.randn(N, T, C)), model)
    assert "'1.weight' is complex" in " ".join(explain(model, torch.randn(N, T, C), show=False).refused)
    model[1].weight.requires_grad_(False)
    GhostClipper(model, 1.0)


# ---- true causes


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["parametrized", "hook"])
def test_spectral_norm_in_training_is_refused_and_trains_in_eval_mode(norm):
    model = nn.Sequential(norm(nn.Linear(C, C)), nn.Linear(C, 2))
    x = torch.randn(N, C)
    clipper = GhostClipper(model, 1.0)
    with pytest.raises(PrivacyError, match=r"'0\..*spectral_norm.*eval"):
        clipper.accumulate(losses_of(model, x))
    model[0].eval()
    clipper = GhostClipper(model, 1.0)
    assert clipper.accumulate(losses_of(model, x)).samples == N
