"""Reports: records in, one self-contained page out, the paper's numbers beside the measured ones."""

from fasternet.report.page import create_report

__all__ = ["create_report"]
