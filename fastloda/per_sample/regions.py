"""Regions of the graph that torch.compile made one operation of: which code they run, and whether it may run again."""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from itertools import count
from weakref import WeakKeyDictionary

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node

COMPILED = "CompiledFunctionBackward"

_numbers: WeakKeyDictionary[type, int] = WeakKeyDictionary()
_next = count()


def code_number(region: Node) -> int:
    """Equal for runs of the same compiled code, and never given again: the graph does not show what happens inside."""
    return _numbers.setdefault(type(region), next(_next))


@contextmanager
def may_run_again(regions: Collection[Node]) -> Generator[None]:
    """Backward inside, with the graph kept, must not find that a region gave away the memory of what it saved.

    PyTorch 2.13 takes a region compiled without donated buffers, whose list of them is None, for one that has some.

    Raises:
        PrivacyError: a region did donate.
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
