"""Names of layers in the bare model, whatever the model or a part of it is wrapped in."""

from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

# The attributes in which wrappers hold their only module: make_private and Opacus, torch.compile, FSDP, checkpoint_wrapper.
HIDDEN = frozenset(("_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
OPEN = "module"  # the attribute of the wrappers below; other models may give a layer this name
OPEN_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every module, under all its names; a wrapper and what it wraps have one name, the wrapper first."""
    yield "", model
    for key, child in model._modules.items():
        if child is not None:
            own = [] if _wraps(model, key) else [key]
            for name, module in bare_modules(child):
                yield ".".join([*own, *([name] if name else [])]), module


def without_wrappers(name: str) -> str:
    """Drop from a name every part that may be a wrapper's attribute, as names in files of older versions have them."""
    return ".".join(part for part in name.split(".") if part not in HIDDEN and part != OPEN)


def _wraps(parent: nn.Module, key: str) -> bool:
    if len(parent._modules) > 1:
        return False
    return key in HIDDEN or (key == OPEN and isinstance(parent, OPEN_WRAPPERS))
