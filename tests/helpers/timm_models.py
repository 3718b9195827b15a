"""Import timm even where torchvision is missing or built for another PyTorch: timm's models do not need it."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from functools import partial

import pytest


class Anything(type):
    """A class whose attributes are all classes of the same kind."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Placeholder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer that replaces torchvision while timm is imported.

    timm's image transforms, which models don't use, refer to classes of torchvision.
    """

    def find_spec(self, name, path=None, target=None):
        ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = partial(Anything.__getattr__, Anything("torchvision", (), {}))
        return module

    def exec_module(self, module):
        pass


def forget_torchvision():
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed: pip install fastloda[timm]", allow_module_level=True)
try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # built for another PyTorch: the operator torchvision::nms does not exist
    forget_torchvision()
    sys.meta_path.insert(0, placeholder := Placeholder())
    import timm

    sys.meta_path.remove(placeholder)
    forget_torchvision()
import timm  # noqa: E402, F401
from timm.layers import GroupNorm, GroupNormAct, ScaledStdConv2d, StdConv2d, StdConv2dSame  # noqa: E402, F401
from timm.models.resnet import BasicBlock, ResNet  # noqa: E402, F401
from timm.models.resnetv2 import ResNetV2  # noqa: E402, F401
