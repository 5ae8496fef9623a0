"""Reports on adapters: which layers change, which rank is enough, which adapters can be merged.

In: adapters on a model or in files. Out: a `Report`, which prints as its verdicts and saves as one HTML page.
Uses: errors, results, tensors, kinds, contract, model, files, merging, combining, disk.
"""

from adapterkit.report.report import Report, write_report
from adapterkit.report.sources import live_sources
