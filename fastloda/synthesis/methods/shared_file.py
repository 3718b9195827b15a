"""A file that several processes want and one makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One process at a time is inside for this path, whose folder is made; the others wait. A killed one lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield
