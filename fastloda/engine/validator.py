"""Opacus's `ModuleValidator`: it finds the layers that keep a model from private training, and makes a copy without them.

>>> model = ModuleValidator.fix(torchvision.models.resnet18(num_classes=10))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)     # of the copy's parameters
"""

import copy

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from fastloda.engine.group_norm import replace_batch_norm
from fastloda.errors import PrivacyError
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import check_layers


class ModuleValidator:
    """The validator that finds the layers that mix samples, and replaces those that have a counterpart which does not."""

    @staticmethod
    def validate(module: nn.Module, *, strict: bool = False) -> list[PrivacyError]:
        """List the errors of all layers, except those that only the first step finds (no rule for a layer, mixed samples).

        Raises:
            PrivacyError: `strict` is True, and there are errors.
        """
        errors = []
        for name, layer in Members.of(module).modules.items():
            try:
                check_layers(Members({name: layer}, {}, {}))
            except PrivacyError as error:
                errors.append(error)
        if strict and errors:
            raise PrivacyError("; ".join(map(str, errors)))
        return errors

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        """Tell whether `validate` finds nothing."""
        return not cls.validate(module)

    @staticmethod
    def fix(module: nn.Module) -> nn.Module:
        """Copy a module with GroupNorm for BatchNorm (`replace_batch_norm`), and InstanceNorm without running statistics.

        All other layers, LSTM and MultiheadAttention too, train unchanged. Raises ValueError if a BatchNorm can't be replaced.
        """
        module = copy.deepcopy(module)
        replace_batch_norm(module)
        for layer in module.modules():
            if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        return module

    @classmethod
    def fix_and_validate(cls, module: nn.Module) -> nn.Module:
        """Copy a module by `fix`, and raise a PrivacyError for what is still wrong."""
        module = cls.fix(module)
        cls.validate(module, strict=True)
        return module
