"""PEFT's LoRA: saving and loading gives the same outputs, other adapters are refused, and live PEFT models train."""

import copy
import json
import os
import pickle
from dataclasses import dataclass

import drawn
import oracle
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastloda import (
    GhostClipper,
    LoDAConv2d,
    LoDALinear,
    PrivacyError,
    attach_loda,
    loda_parameters,
    loda_state_dict,
    per_sample_grad_norms,
)
from fastloda.integrations.peft import CONFIG, TENSORS, load_peft, save_peft
from fastloda.loda.attach import loda_layers

os.environ["HF_HUB_OFFLINE"] = "1"
peft = pytest.importorskip("peft", reason="peft is not installed: pip install fastloda[peft]")


class Net(nn.Module):
    """A network with layer names that end in each other, and every geometry of convolution that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.ModuleDict({"conv": nn.Conv2d(6, 6, (1, 3), stride=(1, 2), padding=(0, 1), bias=False)})
        self.conv1 = nn.Conv2d(6, 4, 3, padding="same")
        self.norm = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(5, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["conv"](self.conv(x).sin())
        return self.head(self.fc(self.norm(self.conv1(x)).flatten(2).mT))


LAYERS = ("conv", "block.conv", "conv1", "fc", "head.1")
PATTERNS = ("conv", "^conv", "block.conv", r"^block\.conv", "conv1", "fc", "1", r"^head\.1", "nothing")


def randomise_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name or "loda_" in name:
            nn.init.normal_(parameter)


def assert_same_outputs(model, other):
    x = torch.randn(3, 3, 4, 6, dtype=torch.float64)
    wanted = other.eval()(x)
    rounding = 1e-14 * wanted.abs().max().item()  # some outputs are small differences of large numbers
    torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-12, atol=1e-12 + rounding)


# ---- round trips


@dataclass
class Adapters:
    """The layers that get adapters, as {name: (rank, scale)}."""

    chosen: dict[str, tuple[int, float]]
    seed: int


@st.composite
def adapters(draw) -> Adapters:
    names = draw(st.sets(st.sampled_from(LAYERS), min_size=1))
    pairs = st.tuples(st.integers(1, 3), st.sampled_from([1.0, 0.1, -2.0, 0.0]))
    return Adapters({name: draw(pairs) for name in sorted(names)}, draw(st.integers(0, 99)))


def check_export(case: Adapters, folder):
    torch.manual_seed(case.seed)
    plain = Net().double()
    model = copy.deepcopy(plain)
    for name, (rank, scale) in case.chosen.items():
        layer = model.get_submodule(name)
        make = LoDAConv2d.from_conv if isinstance(layer, nn.Conv2d) else LoDALinear.from_linear
        model.set_submodule(name, make(layer, rank=rank, activation="identity", scale=scale))
    randomise_adapters(model)
    save_peft(model, folder)
    assert_same_outputs(peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder), model)
    again = copy.deepcopy(plain)
    assert set(load_peft(again, folder)) == set(case.chosen)
    assert_same_outputs(again, model)
    trained = [p for p in again.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in loda_parameters(again)}
    attached = copy.deepcopy(model)
    randomise_adapters(attached)
    load_peft(attached, folder)
    assert_same_outputs(attached, model)


def test_peft_gives_the_outputs_of_what_was_exported(counts, tmp_path):
    drawn.hold_for(adapters(), counts(25, 500), lambda case: check_export(case, tmp_path / "adapter"))


def test_a_scale_that_rounding_moves_goes_back_where_it_came_from(tmp_path):
    """In floating point, 0.1 * 3 / 3 is not 0.1."""
    check_export(Adapters({"conv": (3, 0.1)}, 0), tmp_path)


@pytest.mark.parametrize(
    "ranks", [{"conv": 1}, {"conv": 1, "block.conv": 2, "fc": 2}, {"conv": 2, "block.conv": 1, "fc": 2}]
)
def test_a_name_that_others_end_in_means_that_layer_alone(ranks, tmp_path):
    check_export(Adapters({name: (rank, 1 / rank) for name, rank in ranks.items()}, 0), tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    found = {
        name: module.r["default"]
        for name, module in loaded.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == ranks


@st.composite
def lora_configs(draw) -> dict:
    names = draw(st.sets(st.sampled_from(LAYERS), min_size=1))
    in_order = lambda patterns: dict(sorted(patterns.items()))  # PEFT's order; its first match counts # noqa: E731
    patterns = lambda values: st.dictionaries(st.sampled_from(PATTERNS), values, max_size=3).map(in_order)  # noqa: E731
    return dict(
        r=draw(st.integers(1, 4)),
        lora_alpha=draw(st.integers(1, 16)),
        target_modules=sorted(names),
        rank_pattern=draw(patterns(st.integers(1, 4))),
        alpha_pattern=draw(patterns(st.integers(1, 9))),
        use_rslora=draw(st.booleans()),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        init_lora_weights=draw(st.sampled_from([True, "gaussian"])),
    )


def check_import(settings: dict, folder):
    torch.manual_seed(0)
    plain = Net().double()
    wrapped = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**settings)).double()
    randomise_adapters(wrapped)
    wrapped.save_pretrained(folder)
    model = copy.deepcopy(plain)
    load_peft(model, folder)
    assert_same_outputs(model, wrapped)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # some are drawn on purpose
def test_what_peft_saved_gives_its_outputs(counts, tmp_path):
    drawn.hold_for(lora_configs(), counts(30, 500), lambda case: check_import(case, tmp_path / "adapter"))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return drawn.curved(model(x))


def assert_private_step_is_exact(model, plain, views=2):
    """Check a private step of `model` against `plain`, the same function without LoDA layers."""
    x = torch.randn(3 * views, 3, 4, 6, dtype=torch.float64)
    truth = oracle.sample_grads(plain, losses_of, x, views)
    norms = oracle.norms(truth)
    torch.testing.assert_close(per_sample_grad_norms(losses_of(model, x), model, views=views), norms, rtol=1e-9, atol=0)
    bound = 0.9 * float(norms.median())
    clipper = GhostClipper(model, bound, views)
    clipper.accumulate(losses_of(model, x))
    clipper.privatize(0, 1)
    wanted = oracle.clipped_sum(truth, bound)
    got = {name: p.grad - wanted[name] for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == wanted.keys() and oracle.norm(got) <= 1e-9 * bound


def test_an_imported_adapter_trains_on_privately(tmp_path):
    plain = Net().double()
    wrapped = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, lora_alpha=6, target_modules=LAYERS))
    randomise_adapters(wrapped)
    wrapped.save_pretrained(tmp_path)
    model = copy.deepcopy(plain)
    load_peft(model, tmp_path)
    assert_private_step_is_exact(model, drawn.composed(model))


def test_an_import_goes_onto_attached_adapters_of_the_same_settings(tmp_path):
    wrapped = peft.get_peft_model(plain := Net(), peft.LoraConfig(r=3, lora_alpha=1, target_modules=["conv", "fc"]))
    wrapped.save_pretrained(tmp_path)
    plain = Net()
    attach_loda(plain, rank=3, targets=["conv", "fc"], activation="identity", scale=1 / 3, negative_slope=0.7)
    load_peft(plain, tmp_path)
    saved = load_file(tmp_path / TENSORS)
    assert torch.equal(plain.conv.loda_A, saved["base_model.model.conv.lora_A.weight"])
    other = Net()
    attach_loda(other, rank=3, targets=["conv", "fc"], activation="identity", scale=0.5)
    with pytest.raises(ValueError, match="conv has scale=0.333.*the model has 0.5"):
        load_peft(other, tmp_path)


def test_the_files_are_as_peft_expects_and_equal_for_equal_adapters(tmp_path):
    model = Net()
    attach_loda(model, rank=2, targets=(nn.Conv2d, nn.Linear), activation="identity", scale=0.5)
    for folder in ("one", "two"):
        save_peft(model, tmp_path / folder, base_model="somewhere/net")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = peft.PeftConfig.from_pretrained(tmp_path / "one")
    assert isinstance(config, peft.LoraConfig) and config.base_model_name_or_path == "somewhere/net"
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 1.0, {}, {})
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "one" / TENSORS).items()}
    assert shapes["base_model.model.block.conv.lora_A.weight"] == (2, 6, 1, 3)
    assert shapes["base_model.model.block.conv.lora_B.weight"] == (6, 2, 1, 1)


# ---- what can't be exported


def adapted(layer: nn.Module, **settings) -> nn.Module:
    model = nn.Sequential(layer)
    attach_loda(model, rank=1, **{"activation": "identity"} | settings)
    return model


UNEXPORTABLE = {
    "nonlinear": (
        lambda: adapted(nn.Conv2d(2, 2, 1), activation="leaky_relu"),
        "0: activation 'leaky_relu' is not linear",
    ),
    "groups": (lambda: adapted(nn.Conv2d(2, 2, 1, groups=2)), "0: the convolution has groups=2"),
    "dilation": (lambda: adapted(nn.Conv2d(2, 2, 3, dilation=2)), r"0: the convolution has dilation=\(2, 2\)"),
    "padding": (lambda: adapted(nn.Conv2d(2, 2, 3, padding_mode="circular")), "padding_mode='circular'"),
    "no adapters": (lambda: Net(), "no adapters to save"),
    "one layer": (lambda: LoDALinear(2, 2, rank=1, activation="identity"), "a single layer"),
}


@pytest.mark.parametrize("name", UNEXPORTABLE)
def test_what_peft_cannot_represent_is_refused(name, tmp_path):
    make, message = UNEXPORTABLE[name]
    with pytest.raises(ValueError, match=message):
        save_peft(make(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_leaky_relu_of_slope_one_is_the_identity(tmp_path):
    save_peft(adapted(nn.Linear(3, 3), activation="leaky_relu", negative_slope=1.0), tmp_path)


def test_a_crash_leaves_no_new_tensors_under_old_settings(tmp_path, monkeypatch):
    save_peft(adapted(nn.Linear(3, 3), scale=2.0), tmp_path)
    calls = []
    real = save_file

    def crash(*arguments):
        calls.append(real(*arguments))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastloda.integrations.peft.save_file", crash)
    with pytest.raises(OSError, match="cannot write"):
        save_peft(adapted(nn.Linear(3, 3), scale=5.0), tmp_path)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_peft(nn.Sequential(nn.Linear(3, 3)), tmp_path)


# ---- what can't be imported


def a_saved_adapter(folder) -> None:
    config = peft.LoraConfig(r=2, target_modules=["conv", "fc"])
    peft.get_peft_model(Net(), config).save_pretrained(folder)


def configured(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def with_tensors(**changes):
    def change(folder):
        tensors = load_file(folder / TENSORS)
        tensors |= {key.replace("__", "."): value for key, value in changes.items()}
        save_file({key: value for key, value in tensors.items() if value is not None}, folder / TENSORS)

    return change


def pickled(folder):
    """Write a pickle as an attacker would: loading it would run code."""

    class Exploit:
        def __reduce__(self):
            return os.system, (f"touch {folder}/exploited",)

    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploit()))


PRE = "base_model__model__"
UNIMPORTABLE = {
    "dora": (configured(use_dora=True), "sets use_dora=True, which is no plain LoRA"),
    "bias": (configured(bias="all"), "sets bias='all'"),
    "lora_bias": (configured(lora_bias=True), "sets lora_bias=True"),
    "modules_to_save": (configured(modules_to_save=["fc"]), r"sets modules_to_save=\['fc'\]"),
    "pissa": (configured(init_lora_weights="pissa"), "init_lora_weights='pissa', which may have changed the base"),
    "a variant to come": (configured(use_newlora={"x": 1}), "sets use_newlora="),
    "another method": (configured(peft_type="IA3"), "peft_type must be 'LORA'"),
    "not an object": (lambda folder: (folder / CONFIG).write_text("[]"), "no LoRA configuration"),
    "not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON"),
    "rank": (configured(r=3), "conv has r=3 in the configuration, 2 in its tensors"),
    "rank 0": (configured(r=0), "r=0"),
    "rank of text": (configured(r="2"), "r of .*conv is '2', no number"),
    "alpha": (configured(lora_alpha=float("nan")), "lora_alpha of .*conv is nan, no number"),
    "alpha pattern": (configured(alpha_pattern={"fc": None}), "lora_alpha of fc is None"),
    "patterns": (configured(rank_pattern=["fc"]), "rank_pattern must map names to numbers"),
    "slow pattern": (configured(alpha_pattern={"(.*)*(.*)*(.*)*x": 1}), "only layer names or their ends"),
    "pickle": (pickled, "adapter_model.bin is a pickle, which could run code"),
    "damaged": (lambda folder: (folder / TENSORS).write_bytes(b"\xff" * 64), "no safetensors file"),
    "empty": (lambda folder: save_file({}, folder / TENSORS), "holds no adapters"),
    "other tensors": (with_tensors(**{PRE + "fc__weight": torch.zeros(2)}), "holds 'base_model.model.fc.weight'"),
    "integers": (with_tensors(**{PRE + "fc__lora_A__weight": torch.zeros(2, 4, dtype=torch.int8)}), "torch.int8"),
    "half a layer": (with_tensors(**{PRE + "fc__lora_A__weight": None}), "holds fc.loda_B without fc.loda_A"),
    "shape": (with_tensors(**{PRE + "fc__lora_B__weight": torch.zeros(9, 2)}), r"fc.loda_B has shape \(9, 2\)"),
    "another model": (
        with_tensors(**{PRE + f"gone__lora_{x}__weight": torch.zeros(2, 2) for x in "AB"}),
        r"adapts \['gone'\], no Conv2d or Linear of this model",
    ),
}


@pytest.mark.parametrize("name", UNIMPORTABLE)
def test_files_that_are_no_plain_lora_are_refused_and_nothing_changes(name, tmp_path):
    change, message = UNIMPORTABLE[name]
    a_saved_adapter(tmp_path)
    change(tmp_path)
    model = Net()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_peft(model, tmp_path)
    assert list(model.modules()) == modules and not (tmp_path / "exploited").exists()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file_is_named(missing, tmp_path):
    a_saved_adapter(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_peft(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.Conv2d(4, 4, 1, groups=2)], ids=str)
def test_convolutions_that_peft_adapts_otherwise_are_refused(layer, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapts 0, a convolution with (groups=2|dilation)"):
        load_peft(nn.Sequential(layer), tmp_path)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_computes_something_else_is_not_replaced(tmp_path):
    a_saved_adapter(tmp_path)
    model = Net()
    model.fc = Doubled(4, 5)
    with pytest.raises(ValueError, match="adapts 'fc', which can't be replaced here: Doubled is a subclass"):
        load_peft(model, tmp_path)
    assert type(model.conv) is nn.Conv2d and not list(loda_layers(model)) and not loda_state_dict(model)


# ---- a live PEFT model

LIVE = {
    "lora": {},
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"fc": 3}, alpha_pattern={"conv": 1}),
    "biases": dict(bias="all"),
    "biases of B": dict(lora_bias=True),
    "a layer in full": dict(target_modules=["conv", "conv1"], modules_to_save=["fc"]),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("name", LIVE)
def test_a_private_step_on_a_peft_model_is_exact(name):
    config = peft.LoraConfig(**dict(r=2, lora_alpha=3, target_modules=LAYERS) | LIVE[name])
    model = peft.get_peft_model(Net().double(), config).double()
    randomise_adapters(model)
    assert_private_step_is_exact(model, model)


def test_dora_is_refused_by_name():
    """DoRA divides its magnitude by a norm of the weights."""
    config = peft.LoraConfig(r=2, target_modules=["conv", "fc"], use_dora=True)
    model = peft.get_peft_model(Net(), config)
    with pytest.raises(PrivacyError, match="lora_magnitude_vector.* has no exact per-sample rule"):
        per_sample_grad_norms(losses_of(model, torch.randn(3, 3, 4, 6)), model)


def test_a_peft_model_and_its_import_have_the_same_norms(tmp_path):
    """Scale and adapters are where PEFT has them, so that the gradients are PEFT's too."""
    plain = Net().double()
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=LAYERS)
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config).double()
    randomise_adapters(wrapped)
    wrapped.save_pretrained(tmp_path)
    load_peft(plain, tmp_path)
    x = torch.randn(4, 3, 4, 6, dtype=torch.float64)
    norms = [per_sample_grad_norms(losses_of(model, x), model) for model in (plain, wrapped)]
    torch.testing.assert_close(*norms, rtol=1e-10, atol=0)
