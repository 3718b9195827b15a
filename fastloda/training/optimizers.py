"""The optimizer of a private run and its learning-rate scheduler: those of the settings, or the user's own."""

import hashlib
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.refusals import check_optimizer
from fastloda.training.schedules import warmup_then
from fastloda.training.settings import OPTIMIZERS, PrivateTraining

OptimizerOrFactory = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
SchedulerOrFactory = LRScheduler | Callable[[Optimizer], LRScheduler]

OF_SETTINGS = "that of the settings"  # the description of what the settings determine, which are compared themselves
_OPTIMIZER_FIELDS = ("optimizer", "learning_rate", "weight_decay", "momentum", "betas")
_SCHEDULER_FIELDS = ("warmup", "schedule")


def make_optimizer(
    settings: PrivateTraining, parameters: Mapping[str, nn.Parameter], own: OptimizerOrFactory | None
) -> Optimizer:
    """Make the optimizer of the settings, or take the user's own, which replaces it.

    Raises:
        UserError: the user's own is no optimizer, has taken steps, or calls the loss itself; or the settings contradict it.
        PrivacyError: it does not move exactly `parameters`, or is LBFGS.
    """
    params = list(parameters.values())
    if own is None:
        return OPTIMIZERS[settings.optimizer](params, settings)
    _refuse_settings(settings, _OPTIMIZER_FIELDS, "optimizer")
    optimizer = own if isinstance(own, Optimizer) else own(params)
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"optimizer must be a torch.optim.Optimizer, or a function that makes one of a list of parameters; got {optimizer!r}"
        )
    check_optimizer(optimizer, parameters)
    if _needs_arguments(type(optimizer).step):
        raise UserError(
            f"{_name(optimizer)}.step() must be called with a closure of the loss, outside the private step"
        )
    if _has_moved(optimizer):
        raise UserError(
            "the optimizer has taken steps already, which may not have been private: give a new one, or a function that makes it"
        )
    return optimizer


def make_scheduler(settings: PrivateTraining, optimizer: Optimizer, own: SchedulerOrFactory | None) -> LRScheduler:
    """Make the scheduler of the settings, or take the user's own, which replaces it.

    Raises:
        UserError: the user's own is no scheduler, or one of another optimizer; or the settings contradict it.
        PrivacyError: it follows a metric, as ReduceLROnPlateau does.
    """
    if own is None:
        return warmup_then(optimizer, settings.schedule, settings.steps, settings.warmup)
    _refuse_settings(settings, _SCHEDULER_FIELDS, "scheduler")
    scheduler = own if isinstance(own, LRScheduler) else own(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise UserError(
            "scheduler must be a torch.optim.lr_scheduler.LRScheduler, or a function that makes one of an optimizer; "
            f"got {scheduler!r}"
        )
    if isinstance(scheduler, ReduceLROnPlateau) or _needs_arguments(type(scheduler).step):
        raise PrivacyError(
            f"{_name(scheduler)} follows a metric, by which the learning rate would depend on private records: use a scheduler "
            "that follows the number of steps alone"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UserError(
            "the scheduler is of another optimizer: give DPTrainer(optimizer=...) the one that it was made for"
        )
    return scheduler


def check_states(*made: Optimizer | LRScheduler) -> None:
    """Refuse an optimizer or scheduler that no checkpoint could hold, for states are read back without running code.

    Raises:
        UserError: names the class whose state_dict() holds other things than tensors and plain values.
    """
    for one in made:
        content = io.BytesIO()
        try:
            torch.save(one.state_dict(), content)
            torch.load(io.BytesIO(content.getvalue()), weights_only=True)
        except Exception as error:  # pickle raises nearly anything
            raise UserError(
                f"{_name(one)}.state_dict() can't be kept in a checkpoint, which holds tensors and plain values only "
                f"({str(error).partition(chr(10))[0]}): use another, or train without a checkpoint"
            ) from error


def describe_optimizer(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> str:
    """Describe the class, the settings and the order of the parameters, which must be the same when a run resumes."""
    names = {id(p): name for name, p in parameters.items()}
    order = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return f"{_name(optimizer)} {_plain(groups)} of {hashlib.sha256(repr(order).encode()).hexdigest()[:8]}"


def describe_scheduler(scheduler: LRScheduler) -> str:
    """Describe the class and the settings, which must be the same when a run resumes."""
    return f"{_name(scheduler)} {_plain(scheduler.state_dict())}"


def _refuse_settings(settings: PrivateTraining, names: tuple[str, ...], own: str) -> None:
    """Refuse settings that someone has set, and that the user's own optimizer or scheduler would leave without effect."""
    defaults = {field.name: field.default for field in fields(settings)}
    if unused := [name for name in names if getattr(settings, name) != defaults[name]]:
        raise UserError(
            f"settings.{unused[0]}={getattr(settings, unused[0])!r} has no effect beside DPTrainer({own}=...): leave it out"
        )


def _name(made: object) -> str:
    return f"{type(made).__module__}.{type(made).__qualname__}"


def _needs_arguments(method: Callable) -> bool:
    """Tell whether a class's method must be given arguments; an instance's may be wrapped, as a scheduler wraps `step`."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    _, *others = inspect.signature(method).parameters.values()
    return any(p.kind in named and p.default is p.empty for p in others)


def _has_moved(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer has taken steps: its state holds a tensor that is not constant, as a new one's (Adagrad's) is."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return any(t.numel() > 1 and bool((t != t.flatten()[0]).any()) for t in held)


def _plain(value: Any) -> Any:
    """Convert to plain values; items of 0, False or None are left out, for other versions of PyTorch may lack them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in sorted(value.items(), key=str) if not _is_nothing(held)}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _is_nothing(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) and not value
