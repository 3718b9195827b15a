"""A lock for a file that several processes need and one of them makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Admit one process at a time to the context for `path`, whose folder is made; the lock of a killed process is freed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield
