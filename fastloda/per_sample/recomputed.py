"""Saved tensors under activation checkpointing, for a rule to read before autograd does.

Non-reentrant checkpointing (torch.utils.checkpoint) recomputes what an operation saved when it is first read, and forgets each
tensor as it is read, so that it can be freed early. A rule's read comes before the operation's own.
"""

from contextlib import nullcontext
from functools import cache

import torch.utils.checkpoint

from fastloda.per_sample.node import Node

# `with one_recomputation():` what is read after backward costs no recomputation of its own. Older PyTorch has no such thing.
one_recomputation = getattr(torch.utils.checkpoint, "GraphExecGroup", nullcontext)


def let_rule_read_first(node: Node) -> None:
    """The next read of each tensor that checkpointing recomputes for this operation leaves it for one more.

    The handles are private to PyTorch. Where it keeps them otherwise nothing is done, and the second read raises CheckpointError.
    """
    for name in _raw_saved(type(node)):
        holder = getattr(getattr(node, name), "data", None)
        handles = getattr(holder, "handles", None)
        if type(handles) is dict:
            holder.handles = _KeptForOneMore(handles)


class _KeptForOneMore(dict):
    """Backward pass -> handle of the recomputed tensor, set to None as it is read: from the second time on."""

    def __init__(self, handles: dict):
        super().__init__(handles)
        self._read = set()

    def __setitem__(self, backward: int, handle) -> None:
        if handle is None and backward not in self._read:
            self._read.add(backward)
        else:
            super().__setitem__(backward, handle)


@cache
def _raw_saved(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
