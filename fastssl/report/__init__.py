"""Run folders in, one self-contained HTML page out."""

from fastssl.report.page import write_report

__all__ = ["write_report"]
