"""The result file bench/results/<machine>-<date>.json: what was measured, and on what.

Written after every case, so that a stopped run keeps what it measured.
"""

import datetime
import json
import os
from pathlib import Path

import machine
from tables import FORMAT

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("steps", "growth", "kernels")


class Results:
    """The results of this run, added to those in the file if scale and versions are the same; path None writes nothing."""

    def __init__(self, scale: str, path: Path | None):
        self.path = path
        self.document = {
            "format": FORMAT,
            "machine": machine.name(),
            "date": f"{datetime.date.today()}",
            "scale": scale,
            "versions": machine.versions(),
            **{section: [] for section in SECTIONS},
        }
        if path is not None and path.exists():
            self._continue(json.loads(path.read_text()))

    @classmethod
    def at_scale(cls, scale: str) -> "Results":
        """Open the results of a scale; those of smoke, which only tries whether the code runs, are not written."""
        name = f"{machine.name()}-{datetime.date.today()}.json"
        return cls(scale, None if scale == "smoke" else RESULTS / name)

    def _continue(self, earlier: dict) -> None:
        if all(earlier.get(key) == self.document[key] for key in ("format", "scale", "versions")):
            self.document = earlier

    def set_peaks(self, peaks: machine.Peaks) -> None:
        self.document["peaks"] = {
            "copy_bytes_per_second": peaks.copy,
            "matmul_flops_per_second": {str(dtype)[6:]: value for dtype, value in peaks.matmul.items()},
        }

    def add(self, section: str, row: dict) -> None:
        """Add the row, in place of an earlier one of the same case."""
        rows = self.document[section]
        rows[:] = [known for known in rows if known["case"] != row["case"]] + [row]
        self.save()

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.document, indent=1) + "\n")
            os.replace(temporary, self.path)

    @property
    def measured(self) -> bool:
        return any(self.document[section] for section in SECTIONS)
