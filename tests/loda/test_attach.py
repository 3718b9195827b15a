"""Adapters have the names of the bare model, however the model was wrapped when it was trained, saved or loaded."""

import copy
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import fastloda
from fastloda import (
    LoDAConv2d,
    LoDALinear,
    attach_loda,
    detach_loda,
    load_loda,
    loda_parameters,
    loda_state_dict,
    merge_loda,
    save_loda,
)
from fastloda.integrations.peft import TENSORS, load_peft, save_peft
from fastloda.loda.attach import loda_layers
from fastloda.loda.wrappers import bare_modules


class Net(nn.Module):
    """A network of two convolutions, one of them in a block, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.Sequential(nn.SiLU(), nn.Conv2d(4, 4, 1), nn.SiLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


TARGETS = ("stem", "block.1", "head")
LODA_NAMES = {f"{name}.{key}" for name in TARGETS for key in ("loda_A", "loda_B")}


def plain():
    torch.manual_seed(0)
    return Net()


def adapted():
    model = plain()
    assert attach_loda(model, targets=list(TARGETS), rank=2, activation="identity") == list(TARGETS)
    return randomise(model)


def randomise(model):
    for p in loda_parameters(model):
        nn.init.normal_(p)
    return model


def private(model):
    for p in model.parameters():  # an unadapted model needs something that trains
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.zeros(4, 2, 3, 3)), batch_size=2)
    return fastloda.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)[0]


def inside(wrap, *names):
    """Return a function that wraps the named parts of a model."""

    def wrapped(model):
        for name in names:
            *path, last = name.split(".")
            parent = model.get_submodule(".".join(path))
            setattr(parent, last, wrap(getattr(parent, last)))
        return model

    return wrapped


def compiled(model):
    """Compile the model once; compiling twice would give a function, which is no module."""
    return model if hasattr(model, "_orig_mod") else torch.compile(model, backend="eager")


WHOLE = {
    "private": private,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "nothing": lambda model: model,
}
PARTS = {
    "a compiled block": inside(compiled, "block"),
    "a compiled layer": inside(compiled, "stem", "head"),
    "a parallel layer in a checkpointed block": lambda model: inside(checkpoint_wrapper, "block")(
        inside(nn.DataParallel, "block.1")(model)
    ),
}


def assert_same_adapters(one, two):
    for name, tensor in loda_state_dict(two).items():
        assert torch.equal(loda_state_dict(one)[name], tensor)


def assert_same_outputs(one, two):
    x = torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(one(x), two(x))


@settings(deadline=None, max_examples=25)
@given(
    saved=st.tuples(st.sampled_from([*PARTS, "nothing"]), st.lists(st.sampled_from(list(WHOLE)), max_size=3)),
    loaded=st.tuples(st.sampled_from([*PARTS, "nothing"]), st.lists(st.sampled_from(list(WHOLE)), max_size=3)),
    has_adapters=st.booleans(),
    through_peft=st.booleans(),
)
def test_an_adapter_goes_from_any_wrappers_into_any(tmp_path_factory, saved, loaded, has_adapters, through_peft):
    trained, fresh = (
        functools.reduce(lambda model, name: WHOLE[name](model), wholes, (PARTS | WHOLE)[part](model))
        for (part, wholes), model in ((saved, adapted()), (loaded, adapted() if has_adapters else plain()))
    )
    assert set(loda_state_dict(trained)) == LODA_NAMES
    path = tmp_path_factory.mktemp("adapter") / "a"
    save, load = (save_peft, load_peft) if through_peft else (save_loda, load_loda)
    save(trained, path)
    assert set(load(fresh, path)) == set(TARGETS)
    assert_same_adapters(fresh, trained)
    bare = plain()
    load(bare, path)
    assert_same_adapters(bare, trained)
    assert_same_outputs(bare, adapted())


@pytest.mark.parametrize("wrap", [compiled, PARTS["a compiled layer"]])
def test_what_is_compiled_computes_with_the_adapter_that_it_is_given(wrap, tmp_path):
    save_loda(adapted(), tmp_path / "a")
    model = wrap(plain())
    assert_same_outputs(model, plain())
    load_loda(model, tmp_path / "a")
    assert_same_outputs(model, adapted())


def test_data_parallel_across_processes(tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = compiled(nn.parallel.DistributedDataParallel(adapted()))
        save_loda(model, tmp_path / "a")
        assert load_loda(plain(), tmp_path / "a") == list(TARGETS)
        other = nn.parallel.DistributedDataParallel(adapted())
        load_loda(other, tmp_path / "a")
        assert_same_adapters(other, model)
    finally:
        destroy_process_group()


def test_fastlodas_own_compile_and_targets_see_the_bare_names():
    model = inside(compiled, "block")(plain())
    assert attach_loda(compiled(model), targets=r"block\.1|stem", rank=1) == ["stem", "block.1"]
    assert fastloda.compile(model, backend="eager") is model
    assert isinstance(model.stem, LoDAConv2d) and isinstance(model.block._orig_mod[1], LoDAConv2d)


@pytest.mark.parametrize(
    "prefix", ["_module.", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module._module."]
)
def test_files_that_hold_wrappers_names_are_read(prefix, tmp_path):
    """Earlier versions wrote such names, and so may wrappers that FastLoDA does not know."""
    model = adapted()
    save_loda(model, tmp_path / "good")
    names = {name: {"rank": 2, "activation": "identity", "negative_slope": 0.1, "scale": 1.0} for name in TARGETS}
    save_file(
        {prefix + name: tensor for name, tensor in load_file(tmp_path / "good").items()},
        tmp_path / "old",
        {"loda": json.dumps({prefix + name: chosen for name, chosen in names.items()})},
    )
    save_peft(model, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / TENSORS)
    save_file({k.replace(".model.", f".model.{prefix}", 1): t for k, t in tensors.items()}, tmp_path / "peft" / TENSORS)
    for other in (plain(), adapted(), compiled(plain())):
        for load, path in ((load_loda, "old"), (load_peft, "peft")):
            fresh = copy.deepcopy(other)
            assert set(load(fresh, tmp_path / path)) == set(TARGETS)
            assert_same_adapters(fresh, model)


class Holder(nn.Module):
    """A model of its own class that has a part called `module`, and perhaps another with the same names inside."""

    def __init__(self, beside=True):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(2, 2, 1))
        if beside:
            self.conv = nn.Sequential(nn.Conv2d(2, 2, 1))

    def forward(self, x):
        return self.module(x) + (self.conv(x) if hasattr(self, "conv") else 0)


def test_a_part_that_is_called_as_wrappers_call_theirs_keeps_its_name():
    model = nn.ModuleDict({"_module": nn.Sequential(nn.Conv2d(2, 2, 1)), "conv": nn.Sequential(nn.Conv2d(2, 2, 1))})
    assert attach_loda(model, rank=1) == ["_module.0", "conv.0"]


@pytest.mark.parametrize("beside", [True, False])
def test_a_part_that_is_called_module_keeps_its_name(beside, tmp_path):
    torch.manual_seed(0)
    base = Holder(beside)
    model = copy.deepcopy(base)
    names = attach_loda(model, rank=1)
    assert names == (["module.0", "conv.0"] if beside else ["module.0"])
    randomise(model)
    save_loda(model, tmp_path / "a")
    assert set(loda_state_dict(model)) == {f"{name}.{key}" for name in names for key in ("loda_A", "loda_B")}
    other = compiled(copy.deepcopy(base))
    assert load_loda(other, tmp_path / "a") == names
    assert_same_adapters(other, model)


# ---- adapters and layers in several places


def shared_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.SiLU(), nn.Conv2d(2, 2, 1))
    base = copy.deepcopy(model)
    attach_loda(model, rank=1, activation="identity")
    model[2].loda_A, model[2].loda_B = model[0].loda_A, model[0].loda_B
    return model, base


def a_view_of_one_tensor():
    model, base = shared_parameters()
    both = torch.randn(2, *model[0].loda_A.shape)
    for layer, part in zip((model[0], model[2]), both):
        layer.loda_A = nn.Parameter(part)
    return model, base


def one_layer_twice():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 1)
    base = nn.Sequential(layer, nn.SiLU(), layer)
    model = copy.deepcopy(base)
    attach_loda(model, rank=1, activation="identity")
    return model, base


@pytest.mark.parametrize("make", [shared_parameters, a_view_of_one_tensor, one_layer_twice])
@pytest.mark.parametrize("save, load", [(save_loda, load_loda), (save_peft, load_peft)])
def test_adapters_in_several_places_are_saved_and_loaded(make, save, load, tmp_path):
    model, base = make()
    randomise(model)
    assert len(set(loda_parameters(model))) == len(loda_parameters(model))
    torch.optim.SGD(loda_parameters(model), lr=0.1)  # it refuses a parameter that comes twice
    save(model, tmp_path / "a")
    load(base, tmp_path / "a")
    assert_same_outputs(base, model)
    again, _ = make()
    load(again, tmp_path / "a")
    assert_same_adapters(again, model)


def test_a_layer_that_stands_under_another_of_its_names_first():
    """The file has the layer under one of its names, while another one comes first in the model."""
    torch.manual_seed(0)
    shared = nn.Conv2d(2, 2, 1)
    one, two = nn.ModuleDict({"a": shared, "b": shared}), nn.ModuleDict({"b": shared, "a": shared})
    one, two = copy.deepcopy(one), copy.deepcopy(two)
    attach_loda(one, rank=1)
    randomise(one)
    tensors, layer = loda_state_dict(one), one["a"]
    chosen = {key: getattr(layer, key) for key in ("rank", "activation", "negative_slope", "scale")}
    assert fastloda.loda.attach.install_adapters(two, {"a": chosen}, tensors, "file") == ["b"]
    assert torch.equal(two["a"].loda_A, layer.loda_A)


def test_two_adapters_for_one_layer_are_another_models(tmp_path):
    model, _ = shared_parameters()
    save_loda(model, tmp_path / "a")
    _, tied = one_layer_twice()
    with pytest.raises(ValueError, match=r"\['0', '2'\], which are one layer of this model"):
        load_loda(tied, tmp_path / "a")
    assert type(tied[0]) is nn.Conv2d


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 2, 1), nn.Linear(2, 2)])
def test_a_bare_layer_cannot_be_replaced_and_a_wrapped_one_can(layer, tmp_path):
    make = LoDAConv2d.from_conv if isinstance(layer, nn.Conv2d) else LoDALinear.from_linear
    trained = randomise(make(layer, rank=1))
    save_loda(private(trained), tmp_path / "a")
    with pytest.raises(ValueError, match="single layer.*from_"):
        load_loda(copy.deepcopy(layer), tmp_path / "a")
    other = make(layer, rank=1)  # the remedy that the error names
    assert load_loda(other, tmp_path / "a") == [""]
    wrapped = nn.DataParallel(copy.deepcopy(layer))
    load_loda(wrapped, tmp_path / "a")
    assert torch.equal(wrapped.module.loda_A, trained.loda_A) and torch.equal(other.loda_A, trained.loda_A)


def test_a_file_of_pefts_is_named_as_such(tmp_path):
    save_peft(adapted(), tmp_path)
    with pytest.raises(ValueError, match="PEFT's LoRA: fastloda.integrations.peft.load_peft"):
        load_loda(plain(), tmp_path / TENSORS)


# ---- merging


@settings(deadline=None, max_examples=8)
@given(part=st.sampled_from([*PARTS, "nothing"]), wholes=st.lists(st.sampled_from(list(WHOLE)), max_size=2))
def test_a_merged_model_computes_the_same_without_adapters_in_any_wrappers(part, wholes):
    model = functools.reduce(lambda model, name: WHOLE[name](model), wholes, (PARTS | WHOLE)[part](adapted()))
    x = torch.randn(2, 2, 5, 5)
    before = model(x).detach()
    assert merge_loda(model) == list(TARGETS)
    torch.testing.assert_close(model(x), before)
    assert not loda_state_dict(model)
    bare = dict(bare_modules(model))
    assert [type(bare[name]) for name in TARGETS] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert not any(bare[name].weight.requires_grad for name in TARGETS)
    assert len(list(model.parameters())) == len(list(plain().parameters()))


def one_of(layer, **chosen):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), layer)
    attach_loda(model, rank=1, **{"activation": "identity"} | chosen)
    return model


def hooked():
    model = one_of(nn.Conv2d(2, 2, 1))
    model[1].register_forward_hook(lambda *_: None)
    return model


UNMERGEABLE = {
    "nonlinear": (lambda: one_of(nn.Conv2d(2, 2, 1), activation="leaky_relu"), "0: .*'leaky_relu'.*only .*identity"),
    "grouped": (lambda: one_of(nn.Conv2d(2, 2, 1, groups=2)), "1: .*groups=2"),
    "hooked": (hooked, "1 can't be merged: it has hooks"),
    "no adapters": (plain, "no adapters to merge"),
    "one layer": (lambda: LoDALinear(2, 2, rank=1, activation="identity"), r"single layer.*model.merge\(\)"),
}


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_cannot_be_merged_is_named_and_left_alone(name):
    make, message = UNMERGEABLE[name]
    model = make()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        merge_loda(model)
    assert list(model.modules()) == before


# ---- taking adapters off


@settings(deadline=None, max_examples=8)
@given(
    part=st.sampled_from([*PARTS, "nothing"]),
    wholes=st.lists(st.sampled_from(list(WHOLE)), max_size=2),
    keep=st.sets(st.sampled_from(list(TARGETS))),
)
def test_layers_without_their_adapters_are_as_before_in_any_wrappers(part, wholes, keep):
    model = functools.reduce(lambda model, name: WHOLE[name](model), wholes, (PARTS | WHOLE)[part](adapted()))
    kept = {name: dict(loda_layers(model))[name] for name in keep}
    assert detach_loda(model, keep=keep) == [name for name in TARGETS if name not in keep]
    assert dict(loda_layers(model)) == kept
    bare = dict(bare_modules(model))
    for name in set(TARGETS) - keep:
        assert type(bare[name]) is type(plain().get_submodule(name))
    if not keep:
        x = torch.randn(2, 2, 5, 5)
        torch.testing.assert_close(model(x), plain()(x))


UNDETACHABLE = {
    "hooked": (hooked, {}, "the adapter of 1 can't be taken off: it has hooks"),
    "no adapters": (plain, {}, "no adapters to take off"),
    "one layer": (lambda: LoDALinear(2, 2, rank=1), {}, r"single layer.*model.bare\(\)"),
    "strange": (adapted, {"keep": ["9.x"]}, r"keep names \['9.x'\], which have no adapters"),
}


@pytest.mark.parametrize("name", UNDETACHABLE)
def test_what_cannot_be_taken_off_is_named_and_left_alone(name):
    make, options, message = UNDETACHABLE[name]
    model = make()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        detach_loda(model, **options)
    assert list(model.modules()) == before


def test_the_rest_trains_and_is_saved(tmp_path):
    model = adapted()
    assert detach_loda(model, keep=["stem"]) == ["block.1", "head"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["stem.loda_A", "stem.loda_B"]
    save_loda(model, tmp_path / "a")
    assert load_loda(plain(), tmp_path / "a") == ["stem"]
