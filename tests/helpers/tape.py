"""A tape that stands in for a CUDA graph: it repeats recorded operations in the memory that they used, and no Python code.

As in a capture, no operation may return a number to Python, and results exist only after the first replay.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastloda.per_sample import gradient, reductions
from fastloda.privacy import captured

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2")


class Tape(TorchDispatchMode):
    """The recorded operations of a run, in order, with their tensors."""

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
        """Overwrite all results with NaN, because a capture computes nothing."""
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
    """Record `run` on a tape; this replaces `captured.record_cuda`."""
    first = run()
    with Tape() as tape:
        outcome = run()._replace(looks=first.looks)  # under a dispatch mode PyTorch makes other graph nodes for reshape
    tape.spoil()

    def replay():
        tape.replay()
        return outcome

    return replay, outcome


def use(monkeypatch) -> None:
    """Let steps on the CPU be captured, and computed as on a GPU, where no tensor's value is read by Python."""
    monkeypatch.setitem(captured.RECORDERS, "cpu", record)
    for module in (gradient, reductions):
        monkeypatch.setattr(module, "waits", lambda t: True)
