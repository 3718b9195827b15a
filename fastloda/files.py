"""Atomic writes: a file holds the old content or the new, never half of either, even after kill -9 or a power cut."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Error numbers of file systems without locks.
_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK))


def write_atomically(path: str | os.PathLike, content: bytes | Callable[[Path], None]) -> None:
    """Write the bytes `content`, or let `content(temporary_path)` write them, and move the file to `path` durably.

    Raises:
        OSError: the folder is missing or unwritable, or the disk is full. The message names `path`; the old file is untouched.
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
    """Make the folder of the private file `path`, for its owner only, and check that `write_atomically` can write there.

    Raises:
        OSError: the folder or a file in it can't be made; the message is that of `write_atomically`.
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
    """Create an empty temporary file beside `path`."""
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
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def held(file: IO, wait: bool = True) -> Generator[None]:
    """Hold an exclusive lock on an open file inside the context, if its file system has locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    _lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        _lock(file, fcntl.LOCK_UN)  # closing the file is not enough: forked children would keep the lock


def _lock(file: IO, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
