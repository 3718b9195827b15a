"""Reports of runs: figures, tables, and one HTML page with all of them."""

from fastloda.synthesis.report.html import Blanks, Bullets, Facts, Figure, Page, Section, Text, render
from fastloda.synthesis.report.plots import accuracy_plot, epsilon_plot, sample_grid
from fastloda.synthesis.report.tables import Result, Table, result_table

__all__ = [
    "Blanks",
    "Bullets",
    "Facts",
    "Figure",
    "Page",
    "Result",
    "Section",
    "Table",
    "Text",
    "accuracy_plot",
    "epsilon_plot",
    "render",
    "result_table",
    "sample_grid",
]
