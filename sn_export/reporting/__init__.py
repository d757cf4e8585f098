"""Reports to look at: the JSON of a report as one HTML page or as Markdown. It needs no torch."""

from .content import ReportView, as_content, read_report
from .html import inspection_to_html, to_html
from .markdown import to_markdown
from .writing import (
    INSPECTION_SUFFIXES,
    REPORT_SUFFIXES,
    collect_file_facts,
    require_report_path,
    save_inspection,
    save_report,
)

__all__ = [
    "INSPECTION_SUFFIXES",
    "REPORT_SUFFIXES",
    "ReportView",
    "as_content",
    "collect_file_facts",
    "inspection_to_html",
    "read_report",
    "require_report_path",
    "save_inspection",
    "save_report",
    "to_html",
    "to_markdown",
]
