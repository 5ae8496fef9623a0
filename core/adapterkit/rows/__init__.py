"""Rows."""

from adapterkit.rows.batch import Batch, Entries, check_paths
from adapterkit.rows.per_row import RowState
from adapterkit.rows.rows import Rows

__all__ = ["Batch", "Entries", "RowState", "Rows", "check_paths"]
