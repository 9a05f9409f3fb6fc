"""Reports: one self-contained offline HTML page per run, and the figures in it."""

from medfusion.report.figures import comparison_figure, grey_window, slice_figure, slice_position
from medfusion.report.page import Details, Figure, KeyValues, Section, Table, run_section, write_report

__all__ = [
    "Details",
    "Figure",
    "KeyValues",
    "Section",
    "Table",
    "comparison_figure",
    "grey_window",
    "run_section",
    "slice_figure",
    "slice_position",
    "write_report",
]
