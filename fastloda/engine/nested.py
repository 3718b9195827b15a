"""Search for tensors in a model's output: in tuples, lists and dicts, and in the attributes of objects."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CONTAINERS = (tuple, list, dict, set, frozenset)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply `change` to every tensor in `value`, always in the same order; objects whose attributes change are copied.

    Distributions, dataclasses and transformers' caches are searched too; modules, classes and functions are not.

    Raises:
        TypeError: `value` holds a container, or an object with slots, that can't be searched.
    """
    made: dict[int, Any] = {}

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, CONTAINERS) or hasattr(leaf, "__slots__") and not hasattr(leaf, "__dict__"):
            raise TypeError(
                f"the model returned a {type(leaf).__name__}, which can't be looked into: return tensors, or tuples, lists, "
                "dicts or dataclasses of them"
            )
        if not hasattr(leaf, "__dict__") or isinstance(leaf, (type, nn.Module)):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf  # in case the object holds itself
            old, structure = tree_flatten(vars(leaf))
            new = [changed(held) for held in old]
            if any(a is not b for a, b in zip(old, new)):
                made[id(leaf)] = copied = copy.copy(leaf)
                vars(copied).update(tree_unflatten(new, structure))
        return made[id(leaf)]

    return tree_map(changed, value)


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors that `map_tensors` would change, in its order."""
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found
