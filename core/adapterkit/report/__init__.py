"""Reports on adapters: which layers matter, which rank is enough, what can be merged.

In: adapters on a model or in folders. Out: a page for a notebook or a self-contained HTML file.
Uses: errors, tensors, kinds, contract, model, files, merging, combining, disk.
"""

from adapterkit.report.document import Report
from adapterkit.report.live import live_sources
from adapterkit.report.stored import write_report

__all__ = ["Report", "live_sources", "write_report"]
