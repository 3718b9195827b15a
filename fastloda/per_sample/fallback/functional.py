"""Exact per-sample gradients of any layer through `torch.func`: one forward and backward of it for each row, vectorised.

This is slower than a rule, and stores all per-row gradients. `cover(model)` installs it on the layers whose operations have no
rule. It also lets the forward pass mark values that are computed from parameters alone, which need no rule (`composites.py`).
"""

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.amx import watch_convolutions
from fastloda.per_sample.batch_axis import LAYER_CALL
from fastloda.per_sample.composites import is_marking, marking
from fastloda.per_sample.fallback.layer_call import (
    LayerCall,
    call_as_one,
    detached,
    differentiable,
    grads_of,
    may_be_one,
    tensors,
    trainable,
)
from fastloda.per_sample.graph import Use, trace
from fastloda.per_sample.node import output_shape
from fastloda.per_sample.planner import chunk_samples
from fastloda.per_sample.refusals import parting
from fastloda.per_sample.rules import may_cover, uncovered

KNOWN: set[type[nn.Module]] = {nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding}
KNOWN |= {nn.GroupNorm, nn.LayerNorm, nn.RMSNorm}
KNOWN |= {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.PReLU, nn.MultiheadAttention, nn.EmbeddingBag}
KNOWN |= {nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d}  # always have rules
WHOLE = "If a module around it takes one row for each sample, cover(model, [its name]) takes that module as a whole"
HOLDERS = (nn.ParameterList, nn.ParameterDict)  # never called: what they hold belongs to the layer around them

# Layers that were found to need nothing from this module, with the names of the parameters that trained at that time.
_left_alone: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()


class Covered:
    """The result of `cover`. `layers`: the names of the layers that turned out to need torch.func, known after a forward pass."""

    def __init__(self, chosen: Mapping[str, nn.Module]):
        self._chosen = chosen

    @property
    def layers(self) -> list[str]:
        return [name for name, layer in self._chosen.items() if isinstance(_installed(layer), FunctionalRule)]

    def remove(self) -> None:
        """Restore the layers' own forward."""
        for layer in self._chosen.values():
            if _installed(layer):
                del layer.forward


def cover(model: nn.Module, layers: Iterable[str] | None = None) -> Covered:
    """Give layers without a per-sample rule an exact one through torch.func. Call it before the forward pass.

    >>> fastloda.cover(model)
    >>> fastloda.ghost_dp_step(losses(model(x)), model, optimizer, ...)

    The first call of each unknown layer with trainable parameters of its own is examined. If its operations have rules, the
    layer is left alone from then on. Otherwise a warning names it once, and its own parameters (and those of its
    parametrizations and lists) get per-row gradients by vmap over one forward and backward of a row, or by a loop over the rows
    where vmap fails. Parameters of layers inside it keep their rules. Without a private step the layer trains as before, at the
    cost of one more forward and backward pass. nn.RNN, nn.LSTM and nn.GRU run without their fused kernels instead, as linear
    maps, which have rules; with packed sequences they are computed row by row. To call `cover` again does no harm.

    The first forward pass of the model is watched. What it computes from parameters and constants alone is treated as a
    parameter by the rules. Where an operation still has no rule, or reads rows that are not the samples' (experts, windows),
    the smallest module around it that has one row for each sample goes through torch.func as a whole, with a warning that names
    the module.

    Guarantees: the gradients are exact, or the step is refused by name before anything changes. In every step the layer is
    computed once more, row by row, and must give the same outputs. In the first step, and when the batch has more than twice as
    many rows as were checked, the rows' gradients must also sum to autograd's, and a row's outputs must depend on that row
    alone. So layers that mix samples, draw random numbers, change a state, or branch on the batch are refused, and so are
    inputs whose batch is not the first dimension.

    Args:
        model: the model that the private step trains.
        layers: names of layers that go through torch.func in any case, each as a whole, with the parameters of all layers
            inside it. Default: the layers that need it.

    Raises:
        ValueError: no layer has the name, or none of its parameters trains.
    """
    modules = dict(model.named_modules())
    if layers is None:
        _left_alone.pop(model, None)  # the user asks for it: watch the model once more
        return cover_modules(modules, trainable(model))
    chosen = {name: _find_layer(modules, name) for name in layers}
    for name, layer in chosen.items():
        _install(layer, FunctionalRule(name), trainable(layer))
    return Covered(chosen)


def cover_modules(modules: Mapping[str, nn.Module], names: Iterable[str]) -> Covered:
    """Cover those of a model's `modules` that need it; names: the model's trainable parameters. The module "" is the model."""
    watch_convolutions(modules.values())
    chosen = {name: layer for name, layer in modules.items() if _may_need_it(name, layer)}
    for name, layer in chosen.items():
        _install(layer, Undecided(name), own_parameters(layer))
    model, names = modules[""], tuple(names)
    if names and _is_free(model) and names not in _left_alone.get(model, ()):
        _install(model, Watched(), names)
    return Covered(modules)


def own_parameters(layer: nn.Module) -> tuple[str, ...]:
    """List the names of the trainable parameters that the layer holds itself, in a list or dictionary, or by parametrizations."""
    inside = (
        f"{key}.{name}"
        for key, module in layer._modules.items()
        if module is not None and (key == "parametrizations" or isinstance(module, HOLDERS))
        for name in trainable(module)
    )
    return (*trainable(layer, recurse=False), *inside)


class NotByRow(PrivacyError):
    """The error of a layer call that can't be run for one row alone, or whose outputs lack one dimension for the batch."""

    def __init__(self, message: str, call: LayerCall):
        super().__init__(message)
        self.layer, self.names = call.layer, call.names


@dataclass
class FunctionalRule:
    """The rule that computes per-row gradients by vmap, or by a loop where that fails; `cover` says what is checked."""

    name: str
    verified: int = 0  # the most rows for which the gradients were verified
    vectorised: bool = True
    dims: dict[int, tuple[int, ...]] = field(default_factory=dict)  # number of outputs -> the batch dimension of each

    def row_grads(self, call: LayerCall, gys: list[Tensor]) -> dict[str, Tensor]:
        try:
            rows = len(_batched(call)[0])
            if rows > 2 * self.verified:
                self._verify(call, rows)
            grads, outputs = self._by_row(call, gys)
            call.check_same(outputs, "row by row")
        except (PrivacyError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any operation of a user's layer may raise anything
            raise PrivacyError(f"{self._label(call)} can't be run row by row: {error}. {WHOLE}") from error
        return grads

    def batch_dims(self, call: LayerCall) -> tuple[int, ...]:
        """Find the batch dimension of each output: the one whose size is 1 for one row and 2 for two."""
        found = self.dims.get(len(call.outputs))
        if found is None:
            try:
                one, two = ([y.shape for y in self._first_rows(call, count)] for count in (1, 2))
            except Exception as error:  # any operation of a user's layer may raise anything
                raise NotByRow(f"{self._label(call)} can't be run for one row alone: {error}. {WHOLE}", call) from error
            differ = [[d for d, (a, b) in enumerate(zip(s, t)) if (a, b) == (1, 2)] for s, t in zip(one, two)]
            if any(len(s) != len(t) or len(d) != 1 for s, t, d in zip(one, two, differ)):
                cause = f"{self._label(call)} gives outputs without one dimension for the batch: {one}, {two}. {WHOLE}"
                raise NotByRow(cause, call)
            found = self.dims[len(call.outputs)] = tuple(d for (d,) in differ)
        return found

    def _label(self, call: LayerCall) -> str:
        return _label(self.name, call.layer)

    def _first_rows(self, call: LayerCall, count: int) -> tuple[Tensor, ...]:
        args, kwargs = _with_rows(call, [t[[0] * count] for t in _batched(call)])
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(call)):
            return call.run({}, args, kwargs)

    def _by_row(self, call: LayerCall, gys: Sequence[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Compute the per-row gradients {name: [rows, *shape]} and the outputs."""
        if self.vectorised:
            try:
                return self._vectorised(call, gys)
            except Exception:  # operations without a batching rule, sizes that depend on values
                self.vectorised = False
        return self._one_by_one(call, gys)

    def _one_by_one(self, call: LayerCall, gys: Sequence[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        dims, own, grads, outputs = self.batch_dims(call), _own(call), [], []
        for row in range(len(_batched(call)[0])):
            args, kwargs = _with_rows(call, [t[row : row + 1] for t in _batched(call)])
            with torch.enable_grad(), torch.random.fork_rng(devices=_cuda(call)):
                ys = call.run(own, args, kwargs)
            row_gys = [gy.narrow(dim, row, 1) for gy, dim in zip(gys, dims)]
            grads.append(_grads(ys, list(own.values()), row_gys))
            outputs.append([y.detach() for y in ys])
        joined = tuple(torch.cat(ys, dim) for ys, dim in zip(zip(*outputs), dims))
        return {name: torch.stack(by_row) for name, by_row in zip(own, zip(*grads))}, joined

    def _vectorised(self, call: LayerCall, gys: Sequence[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        dims = self.batch_dims(call)
        own = {name: p.detach() for name, p in _own(call).items()}

        def of_row(row: list[Tensor], gys: list[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
            args, kwargs = _with_rows(call, [t[None] for t in row])
            outputs, back = torch.func.vjp(lambda own: call.run(own, args, kwargs), own)[:2]  # the third is aux
            return back(tuple(gy.unsqueeze(dim) for gy, dim in zip(gys, dims)))[0], outputs

        at_a_time = chunk_samples(sum(p.numel() for p in own.values()))
        by_row = torch.func.vmap(of_row, randomness="error", chunk_size=at_a_time)
        with warnings.catch_warnings():
            # PyTorch's warning says that this is slow, as the layer's own warning does.
            warnings.filterwarnings("ignore", message=".*batching rule.*")
            grads, outputs = by_row(_batched(call), [gy.movedim(dim, 0) for gy, dim in zip(gys, dims)])
        return grads, tuple(y.squeeze(dim + 1).movedim(0, dim) for y, dim in zip(outputs, dims))

    def _verify(self, call: LayerCall, rows: int) -> None:
        """Check against autograd that the rows' gradients sum to the batch's, and that no row's output depends on another row."""
        generator = torch.Generator().manual_seed(0)
        gys = [torch.randn(y.shape, generator=generator).to(y) for y in call.outputs]
        own = _own(call)
        inputs = [t.detach().requires_grad_(differentiable(t)) for t in _batched(call)]
        args, kwargs = _with_rows(call, inputs)
        with torch.enable_grad():
            outputs = call.run(own, args, kwargs)
        call.check_same(tuple(y.detach() for y in outputs), "when it is run again")
        self._check_sums(call, gys, _grads(outputs, list(own.values()), gys))
        leaves = [t for t in inputs if t.requires_grad]
        for chosen in parting(torch.ones(rows, dtype=torch.bool, device=gys[0].device)) if leaves else ():
            only = [gy * chosen.view(-1, *[1] * (gy.dim() - dim - 1)) for gy, dim in zip(gys, self.batch_dims(call))]
            others = [gx[~chosen] for gx in _grads(outputs, leaves, only)]
            if any(((gx != 0) & ~gx.isnan()).any() for gx in others):
                raise PrivacyError(
                    f"{self._label(call)} mixes samples: the output of one depends on the input of another"
                )
        self.verified = rows

    def _check_sums(self, call: LayerCall, gys: list[Tensor], total: Sequence[Tensor]) -> None:
        grads, _ = self._by_row(call, gys)
        # The tolerance is relative to the largest gradient: some are zero but for rounding, such as the bias of attention's keys.
        size = max(float(by_row.abs().sum(0).amax()) if by_row.numel() else 0.0 for by_row in grads.values())
        for (name, by_row), summed in zip(grads.items(), total):
            if ((by_row.sum(0) - summed).abs() > call.tolerance(by_row.dtype) * size).any():
                raise PrivacyError(
                    f"{self._label(call)}: the gradients of {name!r} for each row alone do not sum to that of all rows: it mixes "
                    "samples, or draws random numbers"
                )


@dataclass
class Undecided:
    """The mark of a layer whose first call decides whether it is left alone or goes through torch.func."""

    name: str
    looked_into: bool = False


@dataclass
class Watched:
    """The mark of a layer or model that may compute values from its parameters alone, which `composites.py` marks in the graph.

    A recurrent layer keeps this mark, with which it runs without its fused kernels: as linear maps, which have rules.

    looked_into: whether all uses of its parameters were examined.
    """

    looked_into: bool = False


Mark = FunctionalRule | Undecided | Watched


def _forward(layer: nn.Module, mark: Mark, names: tuple[str, ...], *args, **kwargs):
    own = [functools.reduce(getattr, name.split("."), layer) for name in names]
    stood_in = any(not isinstance(p, nn.Parameter) for p in own)  # a layer around this one goes through torch.func
    if stood_in or not may_be_one() or not any(p.requires_grad for p in own):
        return type(layer).forward(layer, *args, **kwargs)
    outermost = not is_marking()
    with marking(layer) as marks:
        before = marks.count
        result = _call(layer, mark, names, args, kwargs)
        if outermost and isinstance(mark, (Undecided, Watched)) and not mark.looked_into:
            mark.looked_into = True
            result = _whole_where_needed(layer, args, kwargs, result)
    if isinstance(_installed(layer), Watched) and marks.count == before and not isinstance(layer, nn.RNNBase):
        layer.__dict__.pop("forward")
        _left_alone.setdefault(layer, set()).add(names)
    return result


def _call(layer: nn.Module, mark: Mark, names: tuple[str, ...], args: tuple, kwargs: dict):
    forward: Callable = _compose if isinstance(layer, nn.RNNBase) else type(layer).forward
    if isinstance(layer, nn.RNNBase) and isinstance(args[0] if args else kwargs.get("input"), PackedSequence):
        return _call_packed(layer, names, *args, **kwargs)
    if isinstance(mark, Watched):
        return forward(layer, *args, **kwargs)
    if isinstance(mark, Undecided):
        lacking = _lacking(layer, forward, names, args, kwargs)
        layer.__dict__.pop("forward")
        if not lacking:
            _install(layer, Watched(looked_into=True), names)
            return forward(layer, *args, **kwargs)
        warnings.warn(
            f"{_label(mark.name, layer)} has no per-sample rule for {lacking[0].node.name()}: its gradients are taken through "
            "torch.func, exact but slower. fastloda.register_rule gives it a faster one",
            stacklevel=5,
        )
        mark = FunctionalRule(mark.name)
        _install(layer, mark, names)
    return call_as_one(layer, forward, mark, names, args, kwargs)


def _lacking(layer: nn.Module, forward: Callable, names: tuple[str, ...], args: tuple, kwargs: dict) -> list[Use]:
    """Find the uses of the layer's parameters that have no rule, by a trial call; random number generators stay as they are."""
    args, kwargs = detached((args, kwargs))
    devices = {t.device for t in tensors((args, kwargs)) if t.is_cuda}
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # not an outer checkpoint's hooks
    with torch.random.fork_rng(devices=devices), as_it_is:
        outputs = [t for t in tensors(forward(layer, *args, **kwargs)) if t.requires_grad]
    parameters = {name: layer.get_parameter(name) for name in names}
    return uncovered(trace(outputs, parameters, may_cover), may_cover) if outputs else []


def _whole_where_needed(model: nn.Module, args: tuple, kwargs: dict, result: Any) -> Any:
    """Take modules through torch.func as a whole where a layer inside has no rule, or reads rows that are not the samples'.

    Each is the smallest module around such a layer that has one row for each sample; where there is none, nothing is changed.
    Returns the model's result, computed again if a module was tried.
    """
    modules, tried, hopeless = dict(model.named_modules()), {}, set()
    while lacking := [name for name in _without_rule(model, (args, kwargs), result, tried) if name not in hopeless]:
        before = tried.setdefault(lacking[0], {})
        for path, forward in before.items():  # it did not help: undo it
            modules[path].__dict__.pop("forward", None)
            modules[path].__dict__.update({"forward": forward} if forward else {})
        place = next((path for path in _around(lacking[0]) if path not in before), None)
        if place is None:
            hopeless.add(lacking[0])
            del tried[lacking[0]]
        else:
            before[place] = modules[place].__dict__.get("forward")
            _install(modules[place], FunctionalRule(place), trainable(modules[place]))
        result = model.forward(*args, **kwargs)
    for path in {path for places in tried.values() for path in places}:
        if isinstance(_installed(modules[path]), FunctionalRule):
            _drop_inside(modules[path])
            warnings.warn(
                f"{_label(path, modules[path])} is taken through torch.func whole, exact but slower: an operation inside it has "
                "no per-sample rule, or does not see the samples' rows",
                stacklevel=6,
            )
    return result


def _drop_inside(whole: nn.Module) -> None:
    """Remove what is installed on the modules inside `whole`, which goes through torch.func: there it has no effect."""
    for layer in whole.modules():
        if layer is not whole and _installed(layer):
            del layer.forward


def _without_rule(model: nn.Module, given: Any, result: Any, tried: Mapping[str, Collection[str]]) -> list[str]:
    """List the parameters that enter operations without a rule, or with rows that can't be the samples'.

    tried: parameter -> the modules that were tried for it as a whole; it is listed again if such a module has no rows.
    """
    outputs = [t for t in tensors(result) if differentiable(t) and t.grad_fn is not None]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {len(t) for t in (*outputs, *tensors(given)) if t.dim()}
    try:
        if not outputs:
            return []
        graph = trace(outputs, parameters, may_cover)
        lacking = uncovered(graph, may_cover)
        uses = [use for of_node in graph.uses.values() for use in of_node]
        return [use.name for use in uses if use.node in graph.shared or use in lacking or not _has_rows(use, rows)]
    except NotByRow as error:
        (path,) = [path for path, layer in model.named_modules() if layer is error.layer]
        whole_for = [name for name, places in tried.items() if path in places]
        return whole_for[-1:] or [f"{path}.{error.names[0]}".lstrip(".")]


def _has_rows(use: Use, rows: Collection[int]) -> bool:
    """Tell whether the operation's output may have rows of the samples; rows: the possible numbers of them.

    Raises:
        NotByRow: the operation is the call of a layer that can't be run row by row.
    """
    if use.node.name() == LAYER_CALL:
        use.node.call.outer_blocks()
        return True
    numbers = output_shape(use.node).numel()
    return numbers > 0 and any(numbers % count == 0 for count in rows if count)


def _around(name: str) -> list[str]:
    """List the paths of the modules around the layer that holds the parameter, the smallest first."""
    parts = name.split(".")[:-2]
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)] if "." in name else []


def _compose(layer: nn.RNNBase, *args, **kwargs):
    on = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags would set tf32 too
    try:
        torch._C._set_mkldnn_enabled(False)
        with torch.backends.cudnn.flags(enabled=False):
            return type(layer).forward(layer, *args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(on)


def _call_packed(layer: nn.RNNBase, names: tuple[str, ...], input: PackedSequence, hx=None):
    """Call a recurrent layer on packed sequences by way of padded ones: only in these is each row one sample's."""
    padded, lengths = pad_packed_sequence(input, batch_first=True)
    rule = FunctionalRule(type(layer).__name__, vectorised=False)
    args = (padded, lengths, _swap(hx))
    outputs, hidden = call_as_one(layer, _run_padded, rule, names, args, {})
    if input.sorted_indices is not None:
        outputs, lengths = outputs[input.sorted_indices], lengths[input.sorted_indices.cpu()]
    data = pack_padded_sequence(outputs, lengths, batch_first=True).data
    return input._replace(data=data), _swap(hidden)


def _run_padded(layer: nn.RNNBase, padded: Tensor, lengths: Tensor, hx):
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    outputs, hidden = _compose(layer, packed, _swap(hx))
    return pad_packed_sequence(outputs, batch_first=True, total_length=padded.shape[1])[0], _swap(hidden)


def _swap(hidden):
    """Swap the first two dimensions of hidden states [layers, batch, width] or [batch, layers, width], one or LSTM's two."""
    return tree_map(lambda t: t.transpose(0, 1) if isinstance(t, Tensor) else t, hidden)


def _install(layer: nn.Module, mark: Mark, names: tuple[str, ...]) -> None:
    """Override the class's forward by an attribute of the layer, which copies and pickles include."""
    forward = functools.partial(_forward, layer, mark, names)
    # by which `inspect.signature` finds the arguments' names, as transformers' Trainer needs
    vars(forward)["__wrapped__"] = type(layer).forward
    layer.forward = forward


def _installed(layer: nn.Module) -> Mark | None:
    forward = layer.__dict__.get("forward")
    return forward.args[1] if isinstance(forward, functools.partial) and forward.func is _forward else None


def _may_need_it(name: str, layer: nn.Module) -> bool:
    if not _is_free(layer):
        return False
    names = own_parameters(layer)
    inside = isinstance(layer, (parametrize.ParametrizationList, *HOLDERS)) or ".parametrizations." in f".{name}."
    return bool(names) and not inside and names not in _left_alone.get(layer, ())


def _is_free(layer: nn.Module) -> bool:
    """Tell whether the layer's forward may be overridden: its class is not known, and it is not scripted or overridden yet."""
    if isinstance(layer, torch.jit.ScriptModule):  # scripted or traced: its forward pass is not Python's
        return False
    kind = type(layer)
    known = kind in KNOWN or "has_per_sample_rule" in vars(kind) or hasattr(kind.forward, "row_rule_of")
    return not (known or "forward" in layer.__dict__)


def _find_layer(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise UserError(f"the model has no layer {name!r}; it has {list(modules)[1:20]}")
    if not trainable(modules[name]):
        raise UserError(f"no parameter of layer {name!r} trains")
    return modules[name]


def _batched(call: LayerCall) -> list[Tensor]:
    """List the inputs with as many rows as the first; all others are the same for every sample."""
    given = [t for t in tensors((call.args, call.kwargs)) if t.dim()]
    if not given:
        raise PrivacyError("it is called without a tensor that has a batch dimension")
    return [t for t in given if len(t) == len(given[0])]


def _with_rows(call: LayerCall, rows: Sequence[Tensor]) -> tuple[tuple, dict]:
    leaves, tree = tree_flatten((call.args, call.kwargs))
    given, own = iter(rows), {id(t) for t in _batched(call)}
    return tree_unflatten([next(given) if id(leaf) in own else leaf for leaf in leaves], tree)


def _label(name: str, layer: nn.Module) -> str:
    return f"layer {name or '(the model)'!r} ({type(layer).__name__})"


def _own(call: LayerCall) -> dict[str, Tensor]:
    return {name: call.layer.get_parameter(name).detach().requires_grad_() for name in call.names}


def _grads(outputs: Sequence[Tensor], inputs: Sequence[Tensor], gys: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads_of(outputs, inputs, gys))]


def _cuda(call: LayerCall) -> list[torch.device]:
    return [t.device for t in _batched(call) if t.is_cuda][:1]
