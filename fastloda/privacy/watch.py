"""The watch over a model, in which nothing may change with the records except by the noisy update.

A forward or backward pass that writes to a buffer (running statistics, the largest gradient that FP8 scaling stores), to a
frozen parameter, or to a trainable one (`F.embedding` with max_norm) would release what it wrote without noise. So a model is
watched from the end of one update to the noise of the next.
"""

from collections.abc import Iterable
from functools import cache
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastloda.errors import PrivacyError
from fastloda.per_sample.members import Members

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Watch:
    """The state of all parameters and buffers of a model when the watch was made.

    PyTorch counts the writes to each tensor, except through `.data` or NumPy. So the values of trainable parameters and buffers
    are compared too. Trainable parameters may be written to if they get their old values back, as when an average is swapped in
    for an evaluation and out again.
    """

    def __init__(self, members: Members):
        self._seen, self._places = _versions(members), _places(members)
        self._trainable = {name: p for name, p in members.parameters.items() if p.requires_grad}
        self._buffers = [b for b in members.buffers.values() if type(b) is Tensor and b.layout == torch.strided]
        self._bits = self._held()

    def _held(self) -> Tensor:
        return bits([*self._trainable.values(), *self._buffers])

    def check(self, members: Members, thorough: bool = True) -> None:
        """Refuse the members of the same model if they have changed since the watch was made.

        thorough: whether to compare values even if no write was counted, which waits for the GPU.

        Raises:
            PrivacyError: a parameter or buffer changed; the message names one if its writes were counted.
        """
        if _places(members) != self._places:  # the user moved or cast the model, which does not depend on records
            self.__init__(members)
            return
        rewritten = False
        for name, (tensor, version) in _versions(members).items():
            seen, seen_version = self._seen.get(name, (tensor, version))
            if tensor is seen and version == seen_version:
                continue
            if name not in self._trainable:
                raise PrivacyError(
                    f"{name!r} changed since the last step: it would release private statistics, or how many batches there were, "
                    "unnoised. What only the weights determine (spectral_norm) stays as it is if that part is in eval mode. "
                    f"{OWN_CHANGES}"
                )
            rewritten = rewritten or name
        if (thorough or rewritten) and bool(self._held() != self._bits):
            raise PrivacyError(
                f"{rewritten or 'a parameter or buffer'!r} changed outside the private step: a forward or backward pass that "
                f"writes to a parameter or buffer releases private values, unnoised. {OWN_CHANGES}"
            )


OWN_CHANGES = (
    "(Make changes of your own, which must not depend on records, in optimizer.register_step_post_hook, or before a call of "
    "fastloda.privacy.watch.accept_changes(model))"
)


class Watcher(Protocol):
    """The protocol of an object that watches a model from step to step.

    Attributes:
        parameters: the parameters that an update moves, by name.
    """

    parameters: dict[str, nn.Parameter]

    def watch(self) -> None:
        """Accept the model's present state."""


_watchers: WeakKeyDictionary[nn.Module, WeakSet[Watcher]] = WeakKeyDictionary()


def add_watcher(model: nn.Module, watcher: Watcher) -> None:
    """Register a watcher of the model, so that `accept_changes` reaches it."""
    _watchers.setdefault(model, WeakSet()).add(watcher)


_awaiting_update: WeakSet[Watcher] = WeakSet()


def resume_after_update(watcher: Watcher) -> None:
    """Let a watcher accept the model's state as soon as a PyTorch optimizer has updated the parameters."""
    _awaiting_update.add(watcher)
    _follow_optimizers()


def end_update(watcher: Watcher) -> None:
    """Let a watcher accept the model's present state, unless it has done so since the noise was added."""
    if watcher in _awaiting_update:
        _awaiting_update.discard(watcher)
        watcher.watch()


@cache
def _follow_optimizers() -> None:
    """Hook into PyTorch's optimizers, once in a process."""

    def after_step(optimizer: torch.optim.Optimizer, *_) -> None:
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for watcher in list(_awaiting_update):
            if any(id(p) in moved for p in watcher.parameters.values()):
                end_update(watcher)

    register_optimizer_step_post_hook(after_step)


def accept_changes(model: nn.Module) -> None:
    """Accept a model's present state, whatever was done to it since its last private step: weights loaded or clamped, say.

    These changes must not depend on private records.
    """
    for watcher in _watchers.get(model, ()):
        _awaiting_update.discard(watcher)
        watcher.watch()


def bits(parameters: Iterable[Tensor]) -> Tensor:
    """Sum the bits of all tensors, read as integers, in one pass; the int64 sum is on the device of the first tensor."""
    alike: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        p = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
        alike.setdefault((p.device, p.dtype), []).append(p.reshape(-1))
    flat = [torch.cat(tensors).contiguous() for tensors in alike.values()]
    totals = [t.view(INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in flat]
    return torch.stack([total.to(totals[0].device) for total in totals]).sum() if totals else torch.zeros(())


def _places(members: Members) -> list[tuple[torch.dtype, torch.device]]:
    return [(t.dtype, t.device) for t in (*members.parameters.values(), *members.buffers.values())]


def _versions(members: Members) -> dict[str, tuple[Tensor, int]]:
    """Map names to tensors and their counts of writes; not to ids, since a new tensor may get the id of a freed one."""
    return {name: (t, t._version) for name, t in (members.parameters | members.buffers).items()}
