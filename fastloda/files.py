"""Files that are either the old or the new one, never half of either, also after kill -9 or a power cut."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What file systems without locks say.
_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK))


def write_atomically(path: str | os.PathLike, content: bytes | Callable[[Path], None]) -> None:
    """Write bytes, or let `content(temporary_path)` write, then move into place durably.

    Raises:
        OSError: naming `path`, when the folder is missing or unwritable, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        temporary.chmod(0o666 & ~_umask())
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_place(path: str | os.PathLike) -> None:
    """Make the folder that a private file is to be written into, for its owner only, and see that `write_atomically` can.

    Raises:
        OSError: it can't, and what it would say.
    """
    path = Path(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    _temporary(path).unlink()


def _temporary(path: Path) -> Path:
    """An empty file beside it."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def held(file: IO, wait: bool = True) -> Iterator[None]:
    """Hold an open file inside, which no two processes do at a time, as far as its file system has locks.

    Raises:
        BlockingIOError: another process holds it, and wait is False.
    """
    _lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        _lock(file, fcntl.LOCK_UN)  # closing it would leave it to forked children


def _lock(file: IO, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
