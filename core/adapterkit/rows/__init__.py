"""A different adapter for each row of a batch.

In: an adapter's name for each row, and the batches that enter the model. Out: each row's output with its own adapter.
Uses: errors, tensors, contract, forward.
"""

from adapterkit.rows.batch import Batch, Entries
from adapterkit.rows.per_row import RowState
from adapterkit.rows.rows import Rows
