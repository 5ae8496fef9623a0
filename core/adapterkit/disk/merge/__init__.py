"""Merging adapters into a checkpoint on disk, tensor by tensor."""

from adapterkit.disk.merge.checkpoint import merge_checkpoint
from adapterkit.disk.merge.report import MergeReport

__all__ = ["MergeReport", "merge_checkpoint"]
