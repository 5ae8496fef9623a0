"""Reports on adapters that one can look at: which layers matter, which rank is enough, what can be merged."""

from adapterkit.report.document import Report
from adapterkit.report.stored import write_report

__all__ = ["Report", "write_report"]
