"""What a run is shown as: figures, tables, and one HTML page with all of it."""

from fastloda.report.html import Figure, Page, render
from fastloda.report.plots import accuracy_plot, epsilon_plot, sample_grid
from fastloda.report.tables import Result, markdown, terminal_table

__all__ = [
    "Figure",
    "Page",
    "Result",
    "accuracy_plot",
    "epsilon_plot",
    "markdown",
    "render",
    "sample_grid",
    "terminal_table",
]
