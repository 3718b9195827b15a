"""A tape in place of a CUDA graph: it repeats operations on the memory that they had, and nothing of Python.

As in a capture, no operation may hand a number to Python, and what was computed while recording is not there until a replay.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastloda.per_sample import gradient, reductions
from fastloda.privacy import captured

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2")


class Tape(TorchDispatchMode):
    """The operations of a run, in order, with their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def spoil(self) -> None:
        """Overwrite all that was made, for a capture computes nothing."""
        before = {t.untyped_storage()._cdata for t in _tensors(self._outside())}
        for _, _, _, out in self.calls:
            for t in _tensors(out):
                if t.untyped_storage()._cdata not in before and t.is_floating_point():
                    t.detach().fill_(float("nan"))

    def _outside(self) -> list:
        made, outside = set(), []
        for _, args, kwargs, out in self.calls:
            outside += [t for t in _tensors((args, kwargs)) if t.untyped_storage()._cdata not in made]
            known = {t.untyped_storage()._cdata for t in outside}
            made |= {t.untyped_storage()._cdata for t in _tensors(out)} - known
        return outside

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(out), _tensors(again)):
                    if old is not new and old.numel() and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


def _tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def record(run, generators, device):
    """Stand in for `captured.record_cuda`."""
    first = run()
    with Tape() as tape:
        outcome = run()._replace(looks=first.looks)  # beside a mode PyTorch makes other nodes of reshape
    tape.spoil()

    def replay():
        tape.replay()
        return outcome

    return replay, outcome


def use(monkeypatch) -> None:
    """Let steps on the CPU be captured, and computed as on a GPU, where no number is read."""
    monkeypatch.setitem(captured.RECORDERS, "cpu", record)
    for module in (gradient, reductions):
        monkeypatch.setattr(module, "waits", lambda t: True)
