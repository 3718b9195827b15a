"""The folder of a run: each stage has a folder in it, with its results and with a record of what they were made from.

    config.yaml    the settings of the stage, written before its work begins; `fastloda STAGE --config` reads this file
    source.yaml    if the stage reads the user's own images: where they are; it must stay private
    inputs.json    the sha256 of each input file, if there are any
    done.json      written last: the duration of the work

If a stage is asked for twice, it works once; a killed stage continues; and results of different settings are never mixed.
"""

import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fastloda.errors import UserError
from fastloda.files import held, write_atomically
from fastloda.privacy.ranks import World
from fastloda.training.checkpoint import differences

logger = logging.getLogger("fastloda")

CONFIG, SOURCE, INPUTS, DONE, LOCK = "config.yaml", "source.yaml", "inputs.json", "done.json", ".lock"


class RunError(UserError):
    """The folder contains something else than was asked for; the message says what to do."""


@dataclass(frozen=True)
class Stage:
    """A stage and its folder.

    Attributes:
        folder: the folder of this stage only.
        settings: all settings that the results depend on, in the form of the command line; none is private, except a seed.
        source: further settings, which must stay private: where images are, and how they are read.
        inputs: files of other stages that it reads; never private data, since their hash would be a statistic of them.
        outputs: names of the files that it leaves in `folder`.
        private: whether it spends privacy budget; only the owner of the folder can then access it.
        world: the ranks that do its work together; all of them call `is_done` and `work`, and only rank 0 uses the folder.
    """

    folder: Path
    settings: Mapping
    inputs: tuple[Path, ...] = ()
    outputs: tuple[str, ...] = ()
    private: bool = False
    source: Mapping = field(default_factory=dict)
    world: World = World()

    def is_done(self) -> bool:
        """Tell whether the results are there, with these settings and inputs; nothing is changed.

        Raises:
            RunError: the folder contains results of other settings or inputs, finished or not, or some results are lost.
        """
        return self.world.from_first(self._is_done)

    def _is_done(self) -> bool:
        if (known := self._read(CONFIG, yaml.safe_load)) is None:
            if (self.folder / DONE).exists():
                raise RunError(f"{self.folder} was finished, but {CONFIG} is gone. {self.way_out}")
            return False
        asked = plain(self.settings)
        if (source := self._read(SOURCE, yaml.safe_load)) is not None:  # a published folder does not contain it
            known, asked = known | source, asked | plain(self.source)
        if different := differences(dict(_flatten(known)), dict(_flatten(asked))):
            raise RunError(f"{self.folder} was made with other settings: {different}. {self.way_out}")
        if (made_from := self._read(INPUTS, json.loads) if self.inputs else {}) is None:
            raise RunError(f"{self.folder} was begun, but {INPUTS} is gone. {self.way_out}")
        if changed := [str(path) for path in self.inputs if made_from.get(path.name) != digest(path)]:
            raise RunError(f"{self.folder} was made from another {', '.join(changed)}. {self.way_out}")
        if self._read(DONE, json.loads) is None:
            return False
        if lost := [name for name in self.outputs if not (self.folder / name).is_file()]:
            raise RunError(f"{self.folder} was finished, but {', '.join(lost)} is gone. {self.way_out}")
        return True

    @contextmanager
    def work(self) -> Iterator[None]:
        """Do the stage's work in the context; inputs and settings are written before it, the mark that it is done after it.

        Raises:
            RunError: the stage is private, and another process is doing its work, or has just finished it.
        """
        with ExitStack() as stack:
            self.world.from_first(lambda: stack.enter_context(self._work()))
            yield

    @contextmanager
    def _work(self) -> Iterator[None]:
        make_folder(self.folder, 0o700 if self.private else 0o777)
        with self._alone() if self.private else nullcontext():
            yield from self._settings_to_mark()

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

    def _settings_to_mark(self) -> Iterator[None]:
        began, resumed = time.monotonic(), (self.folder / CONFIG).exists()
        if self.inputs:
            write_json(self.folder / INPUTS, {path.name: digest(path) for path in self.inputs})
        self._write(CONFIG, "the settings of this stage", self.settings)
        if self.source:
            self._write(SOURCE, "where its images are; this file must stay private", self.source)
        yield
        done = {"seconds": round(time.monotonic() - began, 1), "resumed": resumed}
        write_json(self.folder / DONE, done)

    def _write(self, name: str, title: str, settings: Mapping) -> None:
        content = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / name, f"# fastloda {self.folder.name}: {title}\n{content}".encode())

    @property
    def way_out(self) -> str:
        """What to do with a folder that does not contain what was asked for."""
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


def reuse(stage: Stage) -> bool:
    """Tell whether the results of a stage are there already, as `Stage.is_done` does, and log it if so."""
    if done := stage.is_done():
        logger.info("%s: already there, with these settings", stage.folder)
    return done


def seconds_taken(folder: Path) -> float:
    """Read how many seconds the work of a finished stage took; if it was resumed, only its last part."""
    return read_json(folder / DONE)["seconds"]


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and its parents, unless they exist.

    Raises:
        OSError: the folder cannot be made, also because a file has its name; the message names it.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the folder {folder}: {os.strerror(error.errno)}") from error


def digest(path: Path) -> str:
    """Compute the sha256 of a file; of a folder, that of the names and contents of all files in it except hidden ones."""
    if path.is_dir():
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        seen = [(name, digest(path / name)) for name in names if not any(n.startswith(".") for n in Path(name).parts)]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file contains something else.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically; numbers that JSON does not have are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def plain(settings: Mapping) -> dict:
    """Convert settings to the form that YAML or JSON returns: tuples become lists, and paths strings."""
    return json.loads(json.dumps(settings, default=str))


def _flatten(settings: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
