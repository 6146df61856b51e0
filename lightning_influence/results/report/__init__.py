"""Reports: results as one HTML file that opens without a network, for people to look through."""

from lightning_influence.results.report.material import Material, Renderer, ReportOptions
from lightning_influence.results.report.page import read_options, render_page, write_page

__all__ = ["Material", "Renderer", "ReportOptions", "read_options", "render_page", "write_page"]
