"""What a sparse model does and what that costs, as one HTML file."""

from .page import html_report

__all__ = ["html_report"]
