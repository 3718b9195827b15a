"""Tables: one list of rows, shown as Markdown, in the terminal, or in an HTML page."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table as RichTable

from fastloda.errors import UserError


@dataclass(frozen=True)
class Table:
    """A table of text under column names; the first `left` columns are words, the others numbers. Notes follow below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    notes: Sequence[str] = ()

    def to_markdown(self) -> str:
        rule = ["---" if i < self.left else "---:" for i in range(len(self.columns))]
        lines = [self.columns, rule, *([cell.replace("|", r"\|") for cell in row] for row in self.rows)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return table + "".join(f"\n{note}\n" for note in self.notes)

    def for_terminal(self) -> RichTable:
        table = RichTable(
            title=self.title or None, caption="\n".join(self.notes) or None, caption_justify="left", box=SIMPLE
        )
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="left" if i < self.left else "right", no_wrap=i >= self.left)
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Result:
    """The test accuracy of one method.

    Attributes:
        method: name of the method.
        epsilon: upper bound on the epsilon spent; 0 if it saw no private record, infinity without privacy.
        trained_on: training data of its classifier.
        accuracies: accuracy for each seed, 0 .. 1.
    """

    method: str
    epsilon: float
    trained_on: str
    accuracies: tuple[float, ...]

    def __post_init__(self):
        if not self.accuracies or not all(0 <= a <= 1 for a in self.accuracies):
            raise UserError(f"accuracies must be numbers in [0, 1], at least one; got {self.accuracies}")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """The standard deviation over the seeds (n - 1); None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def cells(self) -> tuple[str, str, str, str]:
        """Write the row as text: method, training data of its classifier, epsilon, accuracy in percent."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return self.method, self.trained_on, rounded_up(self.epsilon), f"{100 * self.mean:.1f}{spread}"


def rounded_up(epsilon: float) -> str:
    """Write epsilon with two decimals, rounded up, so that an upper bound remains one."""
    if epsilon == 0:
        return "0"
    return "∞" if math.isinf(epsilon) else f"{math.ceil(100 * epsilon - 1e-6) / 100:.2f}"


def result_table(results: Sequence[Result], title: str = "") -> Table:
    """Make a table with a row for each method and budget."""
    columns = ("Method", "Classifier trained on", "Epsilon", "Accuracy %")
    return Table(title, columns, [result.cells() for result in results], left=2)


def settings_table(settings: Mapping[str, tuple[object, str]]) -> Table:
    """Make a table of settings: name -> (value, how it was chosen)."""
    rows = [
        (name, f"{value:.6g}" if isinstance(value, float) else str(value), how)
        for name, (value, how) in settings.items()
    ]
    return Table("", ("Setting", "Value", "How it was chosen"), rows, left=3)


def times_table(seconds: Mapping[str, float]) -> Table:
    """Make a table of the time that each stage took."""
    return Table("", ("Stage", "Seconds"), [(stage, f"{time:.0f}") for stage, time in seconds.items()])
