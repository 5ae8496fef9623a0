"""The same operations on files alone, without a model in memory: merge, combine, convert, extract, inspect, diff.

In: adapter folders and checkpoints. Out: new folders and checkpoints, and reports of what files hold.
Uses: errors, door, results, tensors, kinds, contract, forward, model, formats, files, merging, combining.
"""

from adapterkit.disk.adapter_file import AdapterFile, names_of
from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.combination import combine_files
from adapterkit.disk.conversion import convert_file
from adapterkit.disk.difference import AdapterDiff, diff_adapters
from adapterkit.disk.extraction import extract_files
from adapterkit.disk.inspection import AdapterInspection, LayerInspection, inspect_adapter
from adapterkit.disk.merge import MergeReport, merge_checkpoint
from adapterkit.disk.model import Base, skeleton
