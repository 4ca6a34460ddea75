"""The run report: one HTML file that opens offline."""

from softgrpo.report.build import build_report

__all__ = ["build_report"]
