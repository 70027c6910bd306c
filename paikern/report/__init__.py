"""What came out of a run, for people: tables, plots, one self-contained page."""

from paikern.report.files import write_atomically, write_json
from paikern.report.html import write_report
from paikern.report.summary import summarize
from paikern.report.tables import Column, Table, layer_table, provenance_table

__all__ = [
    "Column",
    "Table",
    "layer_table",
    "provenance_table",
    "summarize",
    "write_atomically",
    "write_json",
    "write_report",
]
