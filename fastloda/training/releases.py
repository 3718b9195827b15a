"""The releases of a run, each written down before it is made.

A step taken again after a crash is the same release, paid for once, if it sums the same: then it gets the same noise. If its
sum is another (other losses, other data, noise that can't be repeated), it is another release, and the lost one stays paid for.
So each release goes to the disk first, durably, into a file beside the checkpoint: its number, and a keyed hash of its sum, which
tells nothing without the key in the checkpoint. A crash can over-count by one step, never under-count.
"""

import json
import os
from pathlib import Path

from fastloda.errors import PrivacyError
from fastloda.files import write_atomically
from fastloda.training.checkpoint import CheckpointError


def intent_path(checkpoint: Path) -> Path:
    """The file beside a checkpoint: a line for each release. Nothing in it tells of the records without the key."""
    return checkpoint.with_name(f"{checkpoint.name}.spent")


class Releases:
    """The numbers of a run's releases and the hashes of their sums, in the file beside a checkpoint, or here only.

    Attributes:
        account: `PrivacyAccountant.state_dict()` with the last release counted; None before the first.
        sums: number -> hash; "" for a release whose noise can't be repeated.
    """

    def __init__(self, checkpoint: Path | None = None):
        """Read what is there.

        Raises:
            CheckpointError: the file is damaged.
        """
        self.path = checkpoint and intent_path(checkpoint)
        self.account: dict | None = None
        self.sums: dict[int, str] = {}
        self._size = 0
        if self.path and self.path.exists():
            self._read(self.path)

    @property
    def last(self) -> int:
        """The number of the last release; 0 before the first."""
        return self.account["steps"] if self.account else 0

    def check_alone(self) -> None:
        """Raise PrivacyError if another process has written to the file since this one has."""
        if self.path and self.path.exists() and self.path.stat().st_size != self._size:
            raise PrivacyError(
                f"another process has written to {self.path}: two runs with one checkpoint would each count their own releases "
                "only; give each a checkpoint of its own"
            )

    def add(self, account: dict, hashed: str) -> None:
        """One more, counted in account. On the disk when this returns.

        Raises:
            OSError: it could not be written, and is not counted.
            PrivacyError: another process writes to the file.
        """
        entry = {"steps": account["steps"], "sum": hashed}
        if self.path:
            self._write(self.path, entry if self.account else account | entry)
        self.account = account
        self.sums[account["steps"]] = hashed

    def _write(self, path: Path, entry: dict) -> None:
        line = (json.dumps(entry) + "\n").encode()
        if not self._size and not path.exists():
            write_atomically(path, line)
        else:
            self._append(path, line)
        self._size += len(line)

    def _append(self, path: Path, line: bytes) -> None:
        try:
            with path.open("r+b") as file:
                self.check_alone()
                file.seek(0, os.SEEK_END)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(path, self._size)
                    raise
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        """The first line holds the account. A last one that a power cut left unfinished was never released."""
        content = path.read_bytes()
        lines = content.splitlines(keepends=True)
        if len(lines) > 1 and not lines[-1].endswith(b"\n"):
            os.truncate(path, len(content) - len(lines.pop()))
        try:
            entries = [json.loads(line) for line in lines]
            self.sums = {entry["steps"]: entry.get("sum", "") for entry in entries}
            account = {key: value for key, value in entries[0].items() if key != "sum"}
            self.account = account | {"steps": entries[-1]["steps"]}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from error
        if not all(type(number) is int and type(hashed) is str for number, hashed in self.sums.items()):
            raise CheckpointError(f"{path} is damaged: it holds no privacy record")
        self._size = sum(map(len, lines))


def read_intent(checkpoint: Path) -> dict | None:
    """The account after the last release on record; None if there is none. Raises CheckpointError if the file is damaged."""
    return Releases(checkpoint).account
