"""`explain` lists each trainable layer with the planner's choice and costs, names refusals, and changes nothing."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda import LoDAConv2d, attach_loda, per_sample_grad_norms
from fastloda.per_sample import planner as plan
from fastloda.per_sample.explain import explain
from fastloda.per_sample.fallback.functional import cover
from fastloda.per_sample.fallback.register import register_rule


class Rotated(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.skew = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x.square().add(1).pow(self.skew.norm())


class Classifier(nn.Module):
    """A model with a layer for each way: kept, made again, ghost, functional."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.wide = nn.Conv2d(8, 64, 3, stride=4)
        self.head, self.odd = nn.Linear(256, 128), Rotated(128)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.odd(self.head(self.wide(x).flatten(1) + shift))


def rows_of(explanation):
    return {row.layer: row for row in explanation.rows}


def test_a_row_for_each_trainable_layer_with_the_planners_choice():
    model = Classifier()
    found = explain(model, torch.randn(5, 3, 8, 8), torch.randn(5, 256))
    rows = rows_of(found)
    ways = {"conv": "kept", "norm": "kept", "wide": "made again", "head": "ghost", "odd": "functional"}
    assert {layer: row.way for layer, row in rows.items()} == ways and not found.refused
    conv = rows["conv"]
    assert (conv.kind, conv.operations, conv.samples, conv.positions) == ("Conv2d", ("Convolution",), 5, 64)
    assert conv.parameters == 3 * 8 * 9 + 8 and conv.gradient_bytes == 4 * 5 * conv.parameters
    assert conv.recipe_bytes == 4 * 5 * 64 * (3 + 8 + 8)  # x and gy for the weight, gy for the bias
    weight, bias = 2 * 5 * 64 * 9 * 3 * 8, 2 * 5 * 64 * 8
    assert conv.flops["kept"] == weight + bias and conv.flops["made again"] == 2 * (weight + bias)
    assert set(rows["head"].flops) == {"kept", "made again", "ghost"} and set(conv.flops) == {"kept", "made again"}
    assert found.held_bytes == sum(row.held_bytes for row in found.rows) > 0 < found.flops


def test_the_text_names_layers_ways_costs_total_and_why_not_ghost():
    text = str(explain(Classifier(), torch.randn(5, 3, 8, 8), torch.randn(5, 256)))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert re.search(r"conv +Conv2d +Convolution +224 +5 x 64 +kept .* KiB .* k .*ghost: no bound", lines["conv"])
    assert re.search(r"head +Linear +Addmm +32,896 +5 x 1 +ghost", lines["head"])
    assert "torch.func" in lines["odd"] and f"{sum(p.numel() for p in Classifier().parameters()):,}" in lines["total"]
    model = nn.Sequential(nn.Linear(8, 8))
    assert "ghost: " in str(explain(model, torch.randn(4, 64, 8))) and "x the cost of kept" in str(
        explain(model, torch.randn(4, 64, 8))
    )


def test_it_prints_the_table_unless_told_not_to(capsys):
    found = explain(Classifier(), torch.randn(5, 3, 8, 8), torch.randn(5, 256))
    assert capsys.readouterr().out == f"{found}\n"
    explain(Classifier(), torch.randn(5, 3, 8, 8), torch.randn(5, 256), show=False)
    assert not capsys.readouterr().out


def test_it_follows_the_planner(monkeypatch):
    monkeypatch.setattr(plan, "GHOST_FACTOR", 0.0)
    monkeypatch.setattr(plan, "KEEP_FACTOR", 0.0)
    rows = rows_of(explain(Classifier(), torch.randn(5, 3, 8, 8), torch.randn(5, 256)))
    assert {row.way for layer, row in rows.items() if layer != "odd"} == {"made again"}


def test_adapters_registered_rules_and_layers_the_loss_does_not_use():
    class Gated(Rotated):
        def forward(self, x):
            return x * self.skew[0].exp()

    register_rule(Gated)(lambda layer, inputs, gy: {"skew": torch.zeros(len(gy), *layer.skew.shape)})
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), Gated(4)), "unused": nn.Linear(2, 2)})
    attach_loda(model, rank=2, targets=["body.0"])
    for name in ("body.1", "unused"):
        model.get_submodule(name).requires_grad_(True)
    model.forward = lambda x: model["body"](x)
    rows = rows_of(explain(model, torch.randn(3, 4, 5, 4)))
    assert isinstance(model["body"][0], LoDAConv2d) and rows["body.0"].operations == ("LoDAFunction",)
    assert rows["body.0"].way == "kept" and rows["body.1"].way == "registered" and rows["unused"].way == "unused"


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(h - h.mean(0))


def test_what_a_step_would_refuse_is_told_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    penalised = explain(model, torch.randn(4, 3), loss=lambda y: y.square().sum(1) + model[0].weight.norm())
    rows = rows_of(penalised)
    assert rows["0"].way == "refused" and "LinalgVectorNormBackward0" in rows["0"].note
    assert {rows["1"].way, rows["2"].way} == {"kept"}
    assert len(penalised.refused) == 1 and "'0.weight'" in penalised.refused[0]
    assert "refused: parameter '0.weight'" in str(penalised)
    assert re.search("samples mix.*first", explain(Mixing(), torch.randn(4, 3)).refused[0])
    batch_norm = explain(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3)).refused
    assert "'1' (BatchNorm1d)" in batch_norm[0]


def test_it_leaves_everything_as_it_is():
    class Counting(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    model = nn.Sequential(nn.Linear(3, 3), Rotated(3), Counting(3), nn.Dropout(0.5)).train()
    model[0].weight.grad = torch.ones(3, 3)
    before, x = copy.deepcopy(model), torch.randn(4, 3)
    state = torch.get_rng_state()
    explain(model, x)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    for (name, ours), theirs in zip(model.state_dict().items(), before.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert torch.equal(model[0].weight.grad, torch.ones(3, 3)) and x.grad is None
    assert all("forward" not in layer.__dict__ for layer in model.modules())


@pytest.mark.filterwarnings("ignore:.*no per-sample rule")
def test_a_covered_model_stays_covered():
    model, x = nn.Sequential(nn.Linear(3, 3), Rotated(3)), torch.randn(4, 3)
    covered = cover(model)
    explain(model, x)
    per_sample_grad_norms(model(x).sin().sum(1), model)
    assert covered.layers == ["1"]
    assert rows_of(explain(model, x))["1"].way == "functional" and covered.layers == ["1"]


def test_an_explained_model_that_mixes_is_still_refused():
    model = Mixing()
    x = torch.randn(4, 3)
    explain(model, x)
    with pytest.raises(Exception, match="samples mix"):
        per_sample_grad_norms(model(x).square().sum(1), model)


def test_a_loss_of_ones_own_and_wrong_calls():
    model, x, labels = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    found = explain(model, x, loss=lambda y: F.cross_entropy(y, labels, reduction="none"))
    assert rows_of(found)["(the model)"].kind == "Linear"
    with pytest.raises(ValueError, match=r"each of 4 samples, got shape \(\)"):
        explain(model, x, loss=lambda y: F.cross_entropy(y, labels))
    with pytest.raises(ValueError, match="input with a batch"):
        explain(model)
    with pytest.raises(ValueError, match="trainable parameters, got 0"):
        explain(copy.deepcopy(model).requires_grad_(False), x)
