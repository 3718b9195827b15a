"""Reports of runs: figures, tables, and one HTML page with all of them."""

from fastloda.synthesis.report.html import Figure, Page, render
from fastloda.synthesis.report.plots import accuracy_plot, epsilon_plot, sample_grid
from fastloda.synthesis.report.tables import Result, Table, result_table

__all__ = [
    "Figure",
    "Page",
    "Result",
    "Table",
    "accuracy_plot",
    "epsilon_plot",
    "render",
    "result_table",
    "sample_grid",
]
