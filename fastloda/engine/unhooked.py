"""A check that the gradients of a backward pass reach each operation unchanged from the operations before it.

A graph that keeps the samples apart guarantees nothing if a gradient hook changes the gradients between its operations: a hook
that divides by the norm of the whole gradient couples all samples. PyTorch does not report which hooks a graph has. So each
operation of a private loss gets a hook of ours, which is called before its other hooks: it sees the gradients that arrive at
the operation, after the other hooks on their way, and those that the operation computes, before other hooks on these. A single
gradient is passed on as the same tensor, so that comparing it costs nothing; several are added up. Hooks that change nothing
(retain_grad, logging) are allowed.

Such a graph guarantees nothing either if `saved_tensors_hooks` change what an operation saved for its backward pass.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, reduce

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Edges, Node

Grads = Sequence[Tensor | None]


class UnhookedPass:
    """The check of one backward pass that no hook changes its gradients.

    Args:
        roots: edges of the graph that the pass starts from.
        grads: gradients that the roots start with.
    """

    def __init__(self, roots: Sequence[tuple[Node | None, int]], grads: Grads):
        self._left: dict[tuple[Node, int], list[tuple[Tensor, int]]] = defaultdict(list)
        self._leave(roots, grads)

    def watch(self, below: Mapping[Node, Edges]) -> list[RemovableHandle]:
        """Register a hook on every operation in `below`; return the handles that remove the hooks."""
        return [_first_hook(node, partial(self._passed, node, edges)) for node, edges in below.items()]

    def _passed(self, node: Node, edges: Edges, left: Grads, arrived: Grads) -> None:
        self.check(node, arrived)
        self._leave(edges, left)

    def _leave(self, edges: Sequence[tuple[Node | None, int]], grads: Grads) -> None:
        for edge, grad in zip(edges, grads):
            if grad is not None:
                self._left[edge].append((grad, grad._version))

    def check(self, node: Node, arrived: Grads) -> None:
        """Refuse gradients that arrive at `node` if they are not what the operations above it computed.

        Raises:
            PrivacyError: a hook has changed a gradient; the message says what to do.
        """
        for number, grad in enumerate(arrived):
            if not _is_sum(grad, self._left.pop((node, number), ())):
                raise PrivacyError(
                    "a gradient hook between the private module's outputs and the loss (register_hook, or a module's backward "
                    f"hook) has changed a gradient, above {node.name()}: it may have scaled each sample's gradient by all of "
                    "them. Put it onto the features inside the module, where what it does is looked at"
                )


def check_saved(nodes: Iterable[Node]) -> None:
    """Refuse operations whose saved tensors pass through a user's hooks; PyTorch's own (checkpoints, offloading) are exact.

    Raises:
        PrivacyError: an operation has such hooks; the message says what to do.
    """
    for node in nodes:
        for name in _saved_names(type(node)):
            saved = getattr(node, name)
            for value in saved if isinstance(saved, tuple) else (saved,):
                hook = getattr(value, "unpack_hook", None)
                if hook is not None and not str(getattr(hook, "__module__", None)).startswith("torch."):
                    raise PrivacyError(
                        f"what {node.name()} saved in the loss comes back through saved_tensors_hooks, which may alter each "
                        "sample's values by all of them: compute the loss outside of their context, with the model inside"
                    )


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _first_hook(node: Node, hook: Callable[[Grads, Grads], None]) -> RemovableHandle:
    """Register `hook` before the node's other hooks; it gets the gradients that the operation computed and received."""
    handle = node.register_hook(hook)
    hooks = handle.hooks_dict_ref()
    if len(hooks) > 1:  # PyTorch calls hooks in the order in which they were added, whatever move_to_end says
        others = {key: other for key, other in hooks.items() if key != handle.id}
        hooks.clear()
        hooks.update({handle.id: hook, **others})
    return handle


def _is_sum(grad: Tensor | None, parts: Sequence[tuple[Tensor, int]]) -> bool:
    """Tell whether `grad` is the sum of `parts`, pairs (gradient, version), none of which was written to since its version."""
    if grad is None or not parts:
        return grad is None and not parts
    if any(part._version != version for part, version in parts):
        return False
    if len(parts) == 1 and grad is parts[0][0]:
        return True
    with torch.no_grad():
        whole = reduce(torch.add, [part for part, _ in parts])
        return torch.equal(whole, grad) or _is_close(whole, grad, [part for part, _ in parts])


def _is_close(whole: Tensor, grad: Tensor, parts: Sequence[Tensor]) -> bool:
    """Tell whether `parts`, added up in another order, may give `grad`, with NaN equal to NaN."""
    if whole.shape != grad.shape:
        return False
    sizes = torch.stack([part.abs() for part in parts]).sum(0).nan_to_num(0, 0, 0)
    allowed = 4 * torch.finfo(grad.dtype).eps * sizes.amax().item() if grad.numel() else 0.0
    return torch.allclose(grad, whole.to(grad), rtol=0, atol=allowed, equal_nan=True)
