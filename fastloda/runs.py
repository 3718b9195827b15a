"""A run's folder: every stage has one inside it, with its results and with what they were made from.

    config.yaml    the stage's settings, written before its work begins; `fastloda STAGE --config` takes the file
    done.json      written last: the sha256 of each input file, and how long the work took

So a stage that is asked for twice works once, a killed one continues, and results of different settings never mix.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import yaml

from fastloda.files import held, write_atomically

CONFIG, DONE, LOCK = "config.yaml", "done.json", ".lock"


class RunError(ValueError):
    """The folder holds something else than what was asked for; the message says what to do."""


@dataclass(frozen=True)
class Stage:
    """One stage's folder.

    Attributes:
        folder: of this stage alone.
        settings: everything that its results depend on, as the command line takes it.
        inputs: the files of other stages that it reads. Never private data: its hash would be a statistic of it.
        outputs: names of the files that it leaves in `folder`.
        private: whether it spends a privacy budget; the folder is then its owner's alone.
    """

    folder: Path
    settings: Mapping
    inputs: tuple[Path, ...] = ()
    outputs: tuple[str, ...] = ()
    private: bool = False

    def is_done(self) -> bool:
        """Whether the results are there, of these settings and these inputs; nothing is changed.

        Raises:
            RunError: the folder holds those of others, finished or half done, or has lost some.
        """
        if (known := self._read(CONFIG, yaml.safe_load)) is None:
            if (self.folder / DONE).exists():
                raise RunError(f"{self.folder} was finished, but {CONFIG} is gone. {self.way_out}")
            return False
        if different := _differences(known, plain(self.settings)):
            raise RunError(f"{self.folder} was made with other settings: {different}. {self.way_out}")
        if (done := self._read(DONE, json.loads)) is None:
            return False
        if changed := [str(path) for path in self.inputs if done.get("inputs", {}).get(path.name) != digest(path)]:
            raise RunError(f"{self.folder} was made from another {', '.join(changed)}. {self.way_out}")
        if lost := [name for name in self.outputs if not (self.folder / name).is_file()]:
            raise RunError(f"{self.folder} was finished, but {', '.join(lost)} is gone. {self.way_out}")
        return True

    @contextmanager
    def work(self) -> Iterator[None]:
        """Do the stage's work inside: the settings are written before it, and the mark that it is done after it.

        Raises:
            RunError: it is private, and another process does its work, or has done it since it was asked.
        """
        make_folder(self.folder, 0o700 if self.private else 0o777)
        with self._alone() if self.private else nullcontext():
            yield from self._work()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as file:
            try:
                with held(file, wait=False):
                    if (self.folder / DONE).exists():
                        raise RunError(
                            f"{self.folder} was finished by another process just now: the same command shows it"
                        )
                    yield
            except BlockingIOError as error:
                raise RunError(f"another process works in {self.folder}: wait for it, or use another --run") from error

    def _work(self) -> Iterator[None]:
        began, resumed = time.monotonic(), (self.folder / CONFIG).exists()
        text = f"# fastloda {self.folder.name}: the settings of this stage\n" + yaml.safe_dump(
            plain(self.settings), sort_keys=False
        )
        write_atomically(self.folder / CONFIG, text.encode())
        yield
        inputs = {path.name: digest(path) for path in self.inputs}
        done = {"inputs": inputs, "seconds": round(time.monotonic() - began, 1), "resumed": resumed}
        write_json(self.folder / DONE, done)

    @property
    def way_out(self) -> str:
        """What to do with a folder that does not hold what was asked for."""
        spent = ", but what was released from it still counts" if self.private else ""
        return f"Use those, another --run, or delete it (rm -r {shlex.quote(str(self.folder))}{spent})"

    def _read(self, name: str, parse) -> dict | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content = parse(path.read_text())
        except (ValueError, yaml.YAMLError) as error:
            raise RunError(f"{path} is damaged: {error}. {self.way_out}") from error
        if not isinstance(content, dict):
            raise RunError(f"{path} is damaged. {self.way_out}")
        return content


def seconds_taken(folder: Path) -> float:
    """How long a finished stage's work took; of a resumed one, its last part."""
    return read_json(folder / DONE)["seconds"]


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and its parents, if it is not there.

    Raises:
        OSError: naming it; also where a file of that name is.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the folder {folder}: {os.strerror(error.errno)}") from error


def digest(path: Path) -> str:
    """A file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def write_json(path: Path, value: object) -> None:
    """Atomically, indented; numbers that JSON lacks are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def plain(settings: Mapping) -> dict:
    """As it comes back from YAML or JSON: tuples are lists, paths strings."""
    return json.loads(json.dumps(settings, default=str))


def _differences(there: Mapping, here: Mapping) -> str:
    there, here = dict(_flatten(there)), dict(_flatten(here))
    changed = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in changed)


def _flatten(settings: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
