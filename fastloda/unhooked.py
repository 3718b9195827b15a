"""Whether the gradients of a backward pass reach each operation as the ones before it left them.

A graph that keeps the samples apart promises nothing if a gradient hook rewrites what passes between its operations: one that
divides by the norm of the whole gradient couples all samples. PyTorch does not tell which hooks a graph has. So each operation
of a private loss gets a hook of ours, first of its hooks, which sees what arrived after all others' hooks, and what it leaves
before them. One gradient is passed on as the same tensor, so that nothing is computed to compare it; several are added up.
Hooks that only look (retain_grad, logging) pass.

Nor does it promise anything if what an operation saved for its backward pass is altered by `saved_tensors_hooks` on the way.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, reduce

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from fastloda.errors import PrivacyError
from fastloda.layout import Edges

Grads = Sequence[Tensor | None]


class UnhookedPass:
    """One backward pass, from which gradients may be taken only where no hook has changed them.

    Args:
        roots: what the pass starts from.
        grads: the gradient that each of them starts with.
    """

    def __init__(self, roots: Edges, grads: Grads):
        self._left: dict[tuple[Node, int], list[tuple[Tensor, int]]] = defaultdict(list)
        self._leave(roots, grads)

    def watch(self, below: Mapping[Node, Edges]) -> list[RemovableHandle]:
        """Look at all operations of `below`; the handles end that."""
        return [_first_hook(node, partial(self._passed, node, edges)) for node, edges in below.items()]

    def _passed(self, node: Node, edges: Edges, left: Grads, arrived: Grads) -> None:
        self.check(node, arrived)
        self._leave(edges, left)

    def _leave(self, edges: Edges, grads: Grads) -> None:
        for edge, grad in zip(edges, grads):
            if grad is not None:
                self._left[edge].append((grad, grad._version))

    def check(self, node: Node, arrived: Grads) -> None:
        """Refuse gradients that are not what the operations above `node` left.

        Raises:
            PrivacyError: with what to do.
        """
        for number, grad in enumerate(arrived):
            if not _is_sum(grad, self._left.pop((node, number), ())):
                raise PrivacyError(
                    "a gradient hook between the private module's outputs and the loss (register_hook, or a module's backward "
                    f"hook) has changed a gradient, above {node.name()}: it may have scaled each sample's gradient by all of "
                    "them. Put it onto the features inside the module, where what it does is looked at"
                )


def check_saved(nodes: Iterable[Node]) -> None:
    """Refuse operations whose saved values somebody's hooks hand back; PyTorch's own, of checkpoints and offloading, are exact.

    Raises:
        PrivacyError: with what to do.
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
    """Call it with what the operation makes and what it got, before any other hook on what it makes."""
    handle = node.register_hook(hook)
    hooks = handle.hooks_dict_ref()
    if len(hooks) > 1:  # PyTorch calls them in the order in which they came, whatever move_to_end says
        others = {key: other for key, other in hooks.items() if key != handle.id}
        hooks.clear()
        hooks.update({handle.id: hook, **others})
    return handle


def _is_sum(grad: Tensor | None, parts: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether the gradient is the sum of what was left, of which nothing was written to since."""
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
    """Whether the parts, added up in another order, may give the gradient; or NaN does not equal itself."""
    if whole.shape != grad.shape:
        return False
    sizes = sum(part.abs() for part in parts).nan_to_num(0, 0, 0)
    allowed = 4 * torch.finfo(grad.dtype).eps * sizes.amax().item() if grad.numel() else 0.0
    return torch.allclose(grad, whole.to(grad), rtol=0, atol=allowed, equal_nan=True)
