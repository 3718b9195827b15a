"""timm's models with GroupNorm: private steps equal one backward pass per sample; what has no rule is refused by name."""

from functools import partial

import drawn
import oracle
import pytest
import torch
from timm_models import (
    BasicBlock,
    GroupNorm,
    GroupNormAct,
    ResNet,
    ResNetV2,
    ScaledStdConv2d,
    StdConv2d,
    StdConv2dSame,
    timm,
)
from torch import nn

from fastloda import GhostClipper, LoDAConv2d, PrivacyError, attach_loda, per_sample_grad_norms
from fastloda.engine.group_norm import replace_batch_norm
from fastloda.integrations.timm import fold_weight_standardization

GROUPS = 4


def resnet():
    norm = partial(GroupNorm, num_groups=GROUPS)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, norm_layer=norm, channels=(8, 8, 8, 16))


def bit(conv=StdConv2d):
    """Make a pre-activation ResNet with weight standardisation, as BiT."""
    norm = partial(GroupNormAct, num_groups=GROUPS)
    return ResNetV2([1, 1], channels=(16, 16), num_classes=5, stem_chs=8, norm_layer=norm, conv_layer=conv)


def folded_bit():
    fold_weight_standardization(model := bit())
    return model


def named(name, **settings):
    return partial(timm.create_model, name, num_classes=5, **settings)


def renormed(name, groups=GROUPS):
    def make():
        replace_batch_norm(model := named(name)(), groups)
        return model

    return make


def attached(make):
    def make_attached():
        attach_loda(model := make(), rank=2)
        return model

    return make_attached


MODELS = {
    "resnet, GroupNorm": resnet,
    "resnet, BatchNorm replaced": renormed("test_resnet"),
    "efficientnet, GroupNorm": named("test_efficientnet_gn"),
    "efficientnet, BatchNorm replaced": renormed("test_efficientnet"),
    "vit": named("test_vit", img_size=32),
    "bit, folded": folded_bit,
    "resnet, LoDA": attached(resnet),
    "bit, folded, LoDA": attached(folded_bit),
    "efficientnet, LoDA": attached(named("test_efficientnet_gn")),
    "convnext, LoDA": attached(named("test_convnext")),
    "vit, LoDA": attached(named("test_vit", img_size=32)),
}


def losses_of(model, x):
    return drawn.curved(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_private_step_is_exact(name):
    model, views = drawn.randomise(MODELS[name]().double()).train(), 2
    x = torch.randn(2 * views, 3, 32, 32, dtype=torch.float64)
    truth = oracle.sample_grads(drawn.composed(model), losses_of, x, views)
    norms = oracle.norms(truth)
    losses = losses_of(model, x)
    torch.testing.assert_close(per_sample_grad_norms(losses, model, views=views), norms, rtol=1e-9, atol=0)
    bound = 0.9 * float(norms.median())
    clipper = GhostClipper(model, bound, views)
    clipper.accumulate(losses)
    clipper.privatize(0, 1)
    wanted = oracle.clipped_sum(truth, bound)
    got = {name: p.grad - wanted[name] for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == wanted.keys() and oracle.norm(got) <= 1e-9 * bound


REFUSED = {
    "batch norm": (named("test_resnet"), r"layer 'conv1\.1' \(BatchNorm2d\) takes statistics over the batch"),
    "weight standardisation": (bit, r"parameter 'stem\.conv\.weight' .* has no exact per-sample rule"),
    "scaled weight standardisation": (named("test_nfnet"), r"parameter 'stem\..*' .* has no exact per-sample rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_rule_is_refused_by_name(name):
    make, message = REFUSED[name]
    model = make().train()
    with pytest.raises(PrivacyError, match=message):
        per_sample_grad_norms(losses_of(model, torch.randn(3, 3, 32, 32)), model)


# ---- weight standardisation


@pytest.mark.filterwarnings("ignore:attach_loda adapted only")
@pytest.mark.parametrize("conv", [StdConv2d, StdConv2dSame, ScaledStdConv2d])
def test_folding_leaves_the_output_alone(conv):
    model = drawn.randomise(bit(conv).double())
    standardised = {name: module for name, module in model.named_modules() if isinstance(module, conv)}
    skipped = attach_loda(bit(conv), rank=2).skipped  # the head is a plain convolution, and is adapted
    assert skipped.keys() == standardised.keys()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    names = fold_weight_standardization(model)
    assert names == [name for name, module in standardised.items() if not getattr(module, "same_pad", False)]
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    attach_loda(model, rank=2)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert all(isinstance(model.get_submodule(name), LoDAConv2d) for name in names)
    assert fold_weight_standardization(model) == []


# ---- GroupNorm in place of BatchNorm


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.BatchNorm2d(6, eps=0.1)
        self.again = self.plain
        self.bare = nn.BatchNorm1d(8, affine=False)
        self.deep = nn.ModuleList([nn.SyncBatchNorm(5), nn.GroupNorm(2, 4), nn.BatchNorm3d(64)])


def test_batch_norm_is_replaced_everywhere_with_its_scale_and_shift():
    model = Norms().eval()
    weight, bias = model.plain.weight, model.plain.bias
    weight.requires_grad_(False)
    assert replace_batch_norm(model, 4) == ["plain", "bare", "deep.0", "deep.2"]
    assert model.again is model.plain and type(model.plain) is nn.GroupNorm
    assert model.plain.weight is weight and model.plain.bias is bias and not weight.requires_grad
    assert (model.plain.eps, model.plain.num_groups, model.plain.affine, model.plain.training) == (0.1, 2, True, False)
    assert (model.bare.weight, model.bare.num_groups, model.deep[0].num_groups, model.deep[2].num_groups) == (
        None,
        4,
        1,
        4,
    )
    assert not list(model.buffers()) and replace_batch_norm(model) == []
    x = torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(model.plain(x), nn.functional.group_norm(x, 2, weight, bias, 0.1))
    model.load_state_dict(model.state_dict())


def test_activation_and_dropout_stay():
    model = named("test_efficientnet")()
    old = dict(model.named_modules())
    names = replace_batch_norm(model, 8)
    acting = [name for name in names if not isinstance(old[name].act, nn.Identity)]
    assert acting
    x = torch.randn(2, old[acting[0]].num_features, 3, 3)
    norm = model.get_submodule(acting[0])
    wanted = old[acting[0]].act(nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    torch.testing.assert_close(norm(x), wanted)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in named("test_efficientnet")().named_parameters()
    ]


class OwnNorm(nn.BatchNorm2d):
    pass


BAD_NORMS = {
    "groups": (Norms, 0, "groups must be an integer >= 1, got 0"),
    "the model": (lambda: nn.BatchNorm2d(4), 4, "a single BatchNorm2d"),
    "a subclass": (lambda: nn.Sequential(nn.BatchNorm2d(4), OwnNorm(4)), 4, "'1' is a OwnNorm"),
    "one feature a group": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(8)),
        32,
        "'1': 8 groups of 8 features",
    ),
}


@pytest.mark.parametrize("name", BAD_NORMS)
def test_what_cannot_be_replaced_is_named_and_nothing_changes(name):
    make, groups, message = BAD_NORMS[name]
    model = make()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_batch_norm(model, groups)
    assert list(model.modules()) == before
