"""Replacement of BatchNorm, whose batch statistics leave no per-sample gradient, by GroupNorm."""

import math

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastloda.errors import UserError

DEFAULT_GROUPS = 32  # the default of Wu & He 2018
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class GroupNormAct(nn.GroupNorm):
    """A GroupNorm followed by dropout and an activation in one layer, as in timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def replace_batch_norm(model: nn.Module, groups: int | None = None) -> list[str]:
    """Replace every BatchNorm in place by GroupNorm (Wu & He 2018) with the same scale and shift; return the layers' names.

    The model must be trained or fine-tuned afterwards: pretrained weights expect other statistics. The number of groups is
    the greatest common divisor of `groups` and the channels. The default of `groups` is 32; for BatchNorm1d, which may see one
    number per channel, it is 1, as in LayerNorm. timm's BatchNormAct2d keeps its dropout and activation.

    Raises:
        ValueError: groups < 1; the model is itself a BatchNorm; a layer is a subclass of BatchNorm, which may compute
            something else; or each group would hold a single number, normalised to zero (BatchNorm1d, one channel a group).
    """
    if groups is not None and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 1):
        raise UserError(f"groups must be an integer >= 1, got {groups!r}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    replacements = {layer: _group_norm(name, layer, groups) for name, layer in found.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and child in replacements:
                parent._modules[name] = replacements[child]
    return list(found)


def _group_norm(name: str, layer: _BatchNorm, groups: int | None) -> nn.GroupNorm:
    if not name:
        raise UserError(f"the model is a single {type(layer).__name__}: make a GroupNorm instead")
    with_act = hasattr(layer, "drop") and hasattr(layer, "act")
    if type(layer) not in BATCH_NORMS and not with_act:
        raise UserError(f"{name!r} is a {type(layer).__name__}, which may compute something else than BatchNorm")
    channels = layer.num_features
    if groups is None:
        groups = 1 if isinstance(layer, nn.BatchNorm1d) else DEFAULT_GROUPS
    divisor = math.gcd(groups, channels)
    if isinstance(layer, nn.BatchNorm1d) and divisor == channels:
        raise UserError(f"{name!r}: {divisor} groups of {channels} features leave one number each: use fewer groups")
    norm = (GroupNormAct if with_act else nn.GroupNorm)(divisor, channels, layer.eps, affine=False)
    norm.affine, norm.weight, norm.bias = layer.affine, layer.weight, layer.bias
    if with_act:
        norm.drop, norm.act = layer.drop, layer.act
    return norm.train(layer.training)
