"""Releases about the private images that come before a stage: what they cost counts, and none is made twice."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from fastloda.synthesis.account import read_statement, united
from fastloda.synthesis.bases import Base
from fastloda.synthesis.budget import MECHANISM, STATEMENT
from fastloda.synthesis.runs import CONFIG, DONE, RunError, Stage

from .layout import CHOSEN, LABELS, LAYERS, PRIVATE, PUBLIC, SUMS


def public_folder(run: Path, model: Path | None) -> Path:
    """Find the public model's folder; RunError if `choose` was begun and not finished, since its model may be meant."""
    if model is not None:
        return Path(model)
    chosen, public = Path(run) / CHOSEN, Path(run) / PUBLIC
    if (chosen / DONE).is_file():
        return chosen
    if (chosen / CONFIG).exists():
        raise RunError(
            f"{chosen} is not finished: the same `fastloda choose` continues it; or give --model {shlex.quote(str(public))}, "
            "to do without its model (what it has released counts all the same)"
        )
    return public


def released_before(run: Path, base: Base) -> list[dict]:
    """Read the statements of earlier releases about the private records, for the adapted model or in this run.

    Some releases are in several of them: what `choose` released is in the later statements too.
    """
    chosen, labels, folders = Path(run) / CHOSEN, Path(run) / LABELS, []
    if base.chosen_privately:
        folders.append(base.file.parent)
    if (chosen / SUMS).exists() and chosen.resolve() not in [folder.resolve() for folder in folders]:
        if not (chosen / STATEMENT).exists():
            raise RunError(
                f"{chosen} has released something and is not finished: the same `fastloda choose` continues it"
            )
        folders.append(chosen)
    if (labels / CONFIG).exists() and not (labels / DONE).is_file():
        raise RunError(
            f"{labels} is not finished: the same `fastloda label` continues it; or delete it, if nothing of it was released"
        )
    folders += [folder for folder in (labels, Path(run) / LAYERS) if (folder / STATEMENT).exists()]
    return [read_statement(folder) for folder in folders]


def all_releases(statements: Sequence[dict]) -> list[tuple]:
    """List the releases of all statements, each once, as `compose_epsilon` takes them."""
    return [tuple(release[name] for name in MECHANISM) for release in united(statements)]


def statement_of_public(base: Base) -> dict | None:
    """Read the statement of the public model, if private images had an influence on it."""
    return read_statement(base.file.parent) if base.chosen_privately else None


def check_goes_on(stage: Stage, kept: str) -> None:
    """Refuse, with a RunError, a private stage that has released something but would start again, because `kept` is gone.

    Its releases would be made a second time, and its new statement would count only the second.
    """
    if (stage.folder / STATEMENT).exists() and not (stage.folder / kept).exists():
        raise RunError(
            f"{stage.folder / STATEMENT} says what was released, but {stage.folder / kept} is gone. {stage.way_out}"
        )


def check_comes_first(stage: Stage, kept: str) -> None:
    """Refuse, with a RunError, to release if adapters were trained already: their statement could not count the release.

    `kept` is a file that the stage has made if it released something, or began to, before the adapters were trained.
    """
    private = stage.folder.parent / PRIVATE
    if (private / CONFIG).exists() and not (stage.folder / kept).exists():
        raise RunError(
            f"{private} was fine-tuned already, and its {STATEMENT} would not count what {stage.folder} releases: make it in "
            "another --run, from the same public model, and fine-tune there; `fastloda account --composition` then says what "
            "both cost together"
        )
