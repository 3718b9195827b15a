"""The table of results: one list of rows, shown as Markdown, in the terminal, or in the HTML page."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One method's test accuracy.

    Attributes:
        method: its name.
        epsilon: upper bound on what it spent; 0 if it saw no private record, infinity without privacy.
        trained_on: what its classifier was trained on.
        accuracies: one a seed, 0 .. 1.
    """

    method: str
    epsilon: float
    trained_on: str
    accuracies: tuple[float, ...]

    def __post_init__(self):
        if not self.accuracies or not all(0 <= a <= 1 for a in self.accuracies):
            raise ValueError(f"accuracies must be numbers in [0, 1], at least one; got {self.accuracies}")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def cells(self) -> tuple[str, str, str, str]:
        """The row as text, by COLUMNS; accuracy in percent."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return self.method, rounded_up(self.epsilon), self.trained_on, f"{100 * self.mean:.1f}{spread}"


def rounded_up(epsilon: float) -> str:
    """Two decimals; an upper bound stays one."""
    if epsilon == 0:
        return "0"
    return "∞" if math.isinf(epsilon) else f"{math.ceil(100 * epsilon - 1e-6) / 100:.2f}"


COLUMNS = ("Method", "Epsilon", "Classifier trained on", "Accuracy %")
NUMERIC = frozenset({"Epsilon", "Accuracy %"})


def markdown(results: Sequence[Result]) -> str:
    """A GitHub table."""
    rule = ["---:" if name in NUMERIC else "---" for name in COLUMNS]
    rows = [COLUMNS, rule, *([cell.replace("|", r"\|") for cell in result.cells()] for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def terminal_table(results: Sequence[Result], title: str | None = None) -> Table:
    """For `rich.print`."""
    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMERIC else "left")
    for result in results:
        table.add_row(*result.cells())
    return table
