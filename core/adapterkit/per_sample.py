"""PerSample: a different adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from adapterkit.activation import Activation
from adapterkit.batch import Batch, check_paths
from adapterkit.errors import ConfigError
from adapterkit.perrow import RowState
from adapterkit.rows import Rows


class PerSample(Activation):
    """The part of `Adapters` that tells the rows of a batch apart."""

    @contextmanager
    def per_sample(
        self, names: Sequence[str | None], *, trainable: bool = False, batch_first: bool = False
    ) -> Iterator[None]:
        """A different adapter, or none, for each row of a batch, for the length of a `with` block.

        Equal to running each row by itself with its adapter; heads and trained biases go with their rows, and rows of
        `None` are the bare model's. Additive adapters whose method has `AdapterLayer.stacked` cost the same however
        many there are; with other methods the adapted layers run on the rows of one adapter after another. A batch
        may have each row several times, one after another, as `generate` makes it for beams. Adapters that are merged
        act on all rows. The block is its thread's, and a `backward` may come after it (see `activated`).

        Args:
            names: an adapter or `None` for each row.
            trainable: whether their parameters require gradients; else they act as constants.
            batch_first: vouch that the first dimension of every adapted layer's input is the batch, each row's
                entries together; else this is proven for each layer (see `adapterkit.batch.Batch`), or refused.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: no rows; in a forward: a batch of another size, or heads whose outputs differ in shape.
            StateError: an adapter that is merged; in the block or in a forward: rows that cannot be told apart.
        """
        rows = self._rows(names, trusted=batch_first)
        self._check_present("per_sample", *rows.adapters)
        records = [self._records[name] for name in rows.adapters]
        merged = tuple(n for n in self._active.heads if n in self._merged.names)
        heads = merged + tuple(record.name for record in records if record.heads)
        batch = Batch(self._live.watch(self._active))
        state = RowState(rows, batch, heads, merged, trainable=trainable, still=not trainable)
        with self._block(state, records if trainable else ()):
            yield

    def _rows(self, names: Sequence[str | None], *, trusted: bool) -> Rows:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ConfigError(f"per_sample needs an adapter's name or None for each row of the batch, not {names!r}.")
        rows = Rows([None if name is None else self._record(name).name for name in names], trusted=trusted)
        for name in rows.adapters:
            self._check_not_merged(name)
        if not (trusted or rows.uniform):
            self._live.watch(self._active).check_order()
            for name in rows.adapters:
                check_paths(name, self._record(name).layers)
        return rows
