"""A check that the gradients of a backward pass reach each operation unchanged from the operations before it.

A graph that keeps the samples apart promises nothing if a gradient hook rewrites what passes between its operations: one that
divides by the norm of the whole gradient couples all samples. PyTorch does not tell which hooks a graph has. So each
operation of a private loss gets a hook of ours, before its other hooks, which sees the gradients that arrive after all
others' hooks and those that the operation computes before them. A single gradient is passed on as the same tensor, so that
comparing it costs nothing; several are added up. Hooks that only look (retain_grad, logging) pass.

It promises nothing either if `saved_tensors_hooks` alter what an operation saved for its backward pass.
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
    """A backward pass from which gradients may be taken only where no hook has changed them.

    Args:
        roots: edges of the graph that the pass starts from.
        grads: gradients that the roots start with.
    """

    def __init__(self, roots: Sequence[tuple[Node | None, int]], grads: Grads):
        self._left: dict[tuple[Node, int], list[tuple[Tensor, int]]] = defaultdict(list)
        self._leave(roots, grads)

    def watch(self, below: Mapping[Node, Edges]) -> list[RemovableHandle]:
        """Hook all operations of `below`; removing the returned handles ends it."""
        return [_first_hook(node, partial(self._passed, node, edges)) for node, edges in below.items()]

    def _passed(self, node: Node, edges: Edges, left: Grads, arrived: Grads) -> None:
        self.check(node, arrived)
        self._leave(edges, left)

    def _leave(self, edges: Sequence[tuple[Node | None, int]], grads: Grads) -> None:
        for edge, grad in zip(edges, grads):
            if grad is not None:
                self._left[edge].append((grad, grad._version))

    def check(self, node: Node, arrived: Grads) -> None:
        """Refuse gradients that are not what the operations above `node` computed.

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
    """Refuse operations whose saved values a user's hooks hand back; PyTorch's own, of checkpoints and offloading, are exact.

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
    """Call `hook` with the gradients that the operation makes and those that it got, before any other hook on them."""
    handle = node.register_hook(hook)
    hooks = handle.hooks_dict_ref()
    if len(hooks) > 1:  # PyTorch calls hooks in the order in which they were added, whatever move_to_end says
        others = {key: other for key, other in hooks.items() if key != handle.id}
        hooks.clear()
        hooks.update({handle.id: hook, **others})
    return handle


def _is_sum(grad: Tensor | None, parts: Sequence[tuple[Tensor, int]]) -> bool:
    """Tell whether `grad` is the sum of `parts`, (gradient, version) each, of which none was written to since."""
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
