"""The steps that a run may have released, written down before each release.

A run whose noise comes from a seeded stream repeats a step that a crash has cost it: the same release, paid for once. With noise
that can't be repeated a step done again is another release. So the count goes to the disk first, durably, in a file beside the
checkpoint; when the run goes on, it is charged for every step in it. A crash can over-count by one step, never under-count.
"""

import json
from pathlib import Path

from fastloda.checkpoint import CheckpointError
from fastloda.files import write_atomically


def intent_path(checkpoint: Path) -> Path:
    """The file beside a checkpoint; it holds public numbers only."""
    return checkpoint.with_name(f"{checkpoint.name}.spent")


def write_intent(checkpoint: Path, record: dict) -> None:
    """record: `PrivacyAccountant.state_dict()` as it will be after the step. On the disk when this returns."""
    write_atomically(intent_path(checkpoint), (json.dumps(record) + "\n").encode())


def read_intent(checkpoint: Path) -> dict | None:
    """The last record written; None if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = intent_path(checkpoint)
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or type(record.get("steps")) is not int:
        raise CheckpointError(f"{path} is damaged: it holds no privacy record")
    return record
