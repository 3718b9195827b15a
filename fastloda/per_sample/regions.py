"""The regions of a model that torch.compile turned into one operation: which code they run, and whether it picks rows."""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, fx

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node

COMPILED = "CompiledFunctionBackward"

# Operations in a compiled backward that pick or place rows by an index, with the position of the dimension in their arguments.
BY_DIMENSION = {"gather": 1, "index_add": 1, "index_copy": 1, "index_select": 1, "scatter": 1, "scatter_add": 1}
BY_DIMENSION |= {"scatter_reduce": 1, "select_scatter": 2}
BY_INDICES = ("index", "index_put", "_unsafe_index", "_unsafe_index_put")
BY_INDICES += ("_unsafe_masked_index", "_unsafe_masked_index_put_accumulate")
BY_ANYTHING = ("masked_scatter", "masked_select", "put", "take", "sort", "embedding_bag")

_numbers: WeakKeyDictionary[type, int] = WeakKeyDictionary()
_picking: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
_next = count()


def code_number(region: Node) -> int:
    """Number the compiled code that a region runs: regions of the same code share a number, and no number is reused."""
    return _numbers.setdefault(type(region), next(_next))


def may_pick_rows(region: Node) -> bool:
    """Tell whether an index in the region's code may decide which sample a row belongs to, differently in each batch.

    The code of the backward pass is private to PyTorch; where it can't be read, the answer is yes.
    """
    kind = type(region)
    if kind not in _picking:
        code = _backward_code(kind)
        _picking[kind] = code is None or _picks_rows(code)
    return _picking[kind]


def _backward_code(kind: type) -> fx.Graph | None:
    info = getattr(getattr(kind, "_forward_cls", None), "_lazy_backward_info", None)
    module = getattr(info, "bw_module", None)
    if module is None and hasattr(info, "bw_module_fn"):  # from the cache of an earlier process
        module = info.bw_module_fn()
    return getattr(module, "graph", None)


def _picks_rows(code: fx.Graph) -> bool:
    given = [_value(node) for node in code.nodes if node.op == "placeholder" and "tangents" in str(node.target)]
    rows = [t.shape[0] for t in given if isinstance(t, Tensor) and t.dim()]
    return any(_picks(node, rows) for node in code.nodes if node.op == "call_function")


def _picks(node: fx.Node, rows: Collection[int]) -> bool:
    """Tell whether an operation picks along a dimension that may hold the batch; rows: the possible sizes of the batch."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in BY_ANYTHING:
        return True
    if name == "embedding_dense_backward":
        return _may_hold(node.args[2], rows)
    if name in BY_DIMENSION:
        dims = [node.args[BY_DIMENSION[name]]]
    elif name in BY_INDICES:
        indices = next(argument for argument in node.args if isinstance(argument, (list, tuple)))
        dims = [dim for dim, index in enumerate(indices) if index is not None]
    else:
        return False
    picked = _value(node.args[0])
    if not isinstance(picked, Tensor):  # the cache keeps no shapes
        return 0 in dims
    dims = {dim % picked.dim() if picked.dim() else 0 for dim in dims}
    if 0 not in dims and picked.dim() and _may_hold(picked.shape[0], rows):
        return False  # the batch comes first; that another dimension fits its size is chance
    return any(_may_hold(picked.shape[dim], rows) for dim in dims if picked.dim())


def _may_hold(size: Any, rows: Collection[Any]) -> bool:
    """Tell whether a dimension of this size may hold the batch or blocks of it; yes if a size is unknown."""
    size = _value(size)
    if not isinstance(size, int) or not rows:
        return True
    return any(isinstance(count, int) and (count <= 1 or size % count == 0) for count in rows)


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


@contextmanager
def may_run_again(regions: Collection[Node]) -> Generator[None]:
    """Let backward pass several times, inside the context, through `regions` that keep their saved tensors.

    PyTorch 2.13 mistakes a region compiled without donated buffers, whose list of them is None, for one that has some.

    Raises:
        PrivacyError: a region frees its saved tensors in its first backward pass ("donated buffers").
    """
    for region in regions:
        metadata = getattr(getattr(type(region), "_forward_cls", None), "metadata", None)
        if metadata is not None and getattr(metadata, "bw_donated_idxs", ()) is None:
            metadata.bw_donated_idxs = []
    try:
        yield
    except RuntimeError as error:
        if not regions or "donated" not in str(error):
            raise
        raise PrivacyError(
            "a part of the model that torch.compile compiled frees what it saved after one backward pass, and a private step "
            "may need several: compile that part by fastloda.compile instead"
        ) from error
