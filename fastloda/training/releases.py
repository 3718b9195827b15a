"""The list of a run's releases, each written to disk before it is made.

A step repeated after a crash is the same release, paid for once, if its sum is the same: then it gets the same noise. If its
sum differs (other losses, other data, noise that can't be repeated), it is another release, and the lost one stays paid for.
So each release is first written durably to a file beside the checkpoint: its number, and a keyed hash of its sum, which says
nothing without the key in the checkpoint. A crash can over-count by one step, never under-count.
"""

import errno
import json
import os
from pathlib import Path
from typing import BinaryIO

from fastloda.errors import PrivacyError
from fastloda.files import held, sync
from fastloda.training.checkpoint import CheckpointError


def intent_path(checkpoint: Path) -> Path:
    """Return the path of the file beside a checkpoint that lists releases; without the key it says nothing about records."""
    return checkpoint.with_name(f"{checkpoint.name}.spent")


class Releases:
    """The numbers of a run's releases and the hashes of their sums, in the file beside a checkpoint, or in memory only.

    Attributes:
        account: state of the `PrivacyAccountant` with the last release counted; None before the first.
        sums: mapping from number to hash; "" for a release whose noise can't be repeated.
    """

    def __init__(self, checkpoint: Path | None = None):
        """Read the file, if there is one.

        Raises:
            CheckpointError: the file is damaged.
        """
        self.path = checkpoint and intent_path(checkpoint)
        self.account: dict | None = None
        self.sums: dict[int, str] = {}
        self._size = 0
        if self.path and self.path.exists():
            with self.path.open("r+b") as file, held(file):
                self._read(file, self.path)

    @property
    def last(self) -> int:
        """The number of the last release; 0 before the first."""
        return self.account["steps"] if self.account else 0

    def check_alone(self) -> None:
        """Raise PrivacyError if another process has written to the file since this one has."""
        if self.path and self.path.exists():
            self._check_size(self.path.stat().st_size)

    def _check_size(self, found: int) -> None:
        if found != self._size:
            raise PrivacyError(
                f"another process has written to {self.path}: two runs with one checkpoint would each count their own releases "
                "only; give each a checkpoint of its own"
            )

    def add(self, account: dict, hashed: str) -> None:
        """Add a release, counted in `account`, with its sum's hash `hashed`; it is on the disk when this returns.

        Raises:
            OSError: the release could not be written, and is not counted.
            PrivacyError: another process writes to the file.
        """
        entry = {"steps": account["steps"], "sum": hashed}
        if self.path:
            self._write(self.path, entry if self.account else account | entry)
        self.account = account
        self.sums[account["steps"]] = hashed

    def _write(self, path: Path, entry: dict) -> None:
        """Append a line to the file under a lock; the first line makes the file."""
        line = (json.dumps(entry) + "\n").encode()
        try:
            handle = os.open(path, os.O_RDWR | os.O_APPEND | (0 if self._size else os.O_CREAT), 0o666)
            with os.fdopen(handle, "r+b", buffering=0) as file, held(file):
                self._check_size(os.fstat(handle).st_size)
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(handle)
                    if not self._size:
                        sync(path.parent)
                except OSError:
                    os.ftruncate(handle, self._size)
                    raise
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
        self._size += len(line)

    def _read(self, file: BinaryIO, path: Path) -> None:
        """Read the account and the sums. The first line holds the account; an unfinished last line was never released."""
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            file.truncate(sum(map(len, lines)))
        self._size = sum(map(len, lines))
        if not lines:
            return
        try:
            entries = [json.loads(line) for line in lines]
            self.sums = {entry["steps"]: entry.get("sum", "") for entry in entries}
            account = {key: value for key, value in entries[0].items() if key != "sum"}
            self.account = account | {"steps": entries[-1]["steps"]}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from error
        if not all(type(number) is int and type(hashed) is str for number, hashed in self.sums.items()):
            raise CheckpointError(f"{path} is damaged: it holds no privacy record")


def read_intent(checkpoint: Path) -> dict | None:
    """Read the account after the last release in the file; None if there is none. Raises CheckpointError if it is damaged."""
    return Releases(checkpoint).account
