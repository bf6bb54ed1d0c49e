"""One HTML file that a person opens: photos, what the model attends to, and how true that is."""

from vision_attn.report.making import Reported, report_photos

__all__ = ["Reported", "report_photos"]
