"""Roster: the adapters of one model, by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from torch import nn

from adapterkit.acting import Active
from adapterkit.config import AdapterConfig
from adapterkit.errors import AdapterWarning, ConfigError, StateError, unknown
from adapterkit.host import Host
from adapterkit.merging import Merged
from adapterkit.record import AdapterRecord
from adapterkit.reports import Status
from adapterkit.sharded import as_wholes
from adapterkit.wrapped import check_can_grow, has_fsdp1, reshard


class Roster:
    """Which adapters there are; what the other parts of `Adapters` stand on."""

    def __init__(self, model: nn.Module) -> None:
        self._records: dict[str, AdapterRecord] = {}
        self._active = Active(self._records)
        self._merged = Merged()
        self._host: Host | None = Host(model)

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._live.model

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, in the order they were added."""
        return tuple(self._records)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act now; the first is the innermost."""
        return self._active.names

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        if self._host is None:
            return "<Adapters, detached>"
        return f"<Adapters of {type(self.model).__name__}: {', '.join(map(repr, self.names)) or 'none'}>"

    def config(self, name: str) -> AdapterConfig:
        """The config of an adapter."""
        return self._record(name).config

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters an adapter trains: its layers', its heads', its biases' and those that its layers share."""
        return (parameter for _, parameter in self.named_parameters(name))

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names: `<module path>.<parameter>`, or `<parameter>` of those that layers share."""
        record = self._record(name)
        reshard(self.model)  # FSDP2 leaves copies in place after a forward, which an optimizer must not get
        return record.named_parameters()

    def status(self) -> Status:
        """A table of the adapters; prints as one.

        `active` is what acts in this thread. `trainable` is what the parameters' own `requires_grad` say: where only
        some of an adapter's require gradients, it prints how many. Notes say where an adapter does not act any more,
        because the module there was replaced since, and where nothing called or read an adapted layer since its
        adapter was activated (compiled forwards are not seen).
        """
        reshard(self.model)
        part = ("FullyShardedDataParallel: the parameters are those of this process",) if has_fsdp1(self.model) else ()
        return Status(
            tuple(
                record.status(
                    active=name in self.active,
                    merged=name in self._merged.names,
                    notes=(
                        *part,
                        *(f"{path!r} {what} since" for path, what in self._live.changes(record).items()),
                        *self._never_ran(record),
                    ),
                )
                for name, record in self._records.items()
            )
        )

    def _never_ran(self, record: AdapterRecord) -> list[str]:
        """A note if nothing called or read some of the adapter's layers since it was activated, while others ran."""
        state = self._active.state
        if state.rows is not None or not state.plans or record.name not in {*state.names, *state.heads}:
            return []
        idle = [path for path, host in record.hosts.items() if id(host) not in state.plans]
        if not idle:
            return []
        return [
            f"{len(idle)} of its {len(record.hosts)} layers never ran since it was activated, such as {idle[0]!r}. If "
            "the model reads their weights instead of calling them, declare the module that does: ak.declare_reader"
        ]

    @property
    def _live(self) -> Host:
        if self._host is None:
            raise StateError("These adapters were detached; call ak.attach(model) for new ones.")
        return self._host

    def _check_live(self) -> None:
        _ = self._live

    def _record(self, name: str) -> AdapterRecord:
        self._check_live()
        if not isinstance(name, str) or name not in self._records:
            raise unknown("adapter", name, self._records)
        return self._records[name]

    def _check_new_name(self, name: object, *, grows: bool = True) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError(f"{name!r} cannot be an adapter's name: it must be text, not empty, without a dot.")
        self._check_live()
        if name in self._records:
            raise ConfigError(f"There is an adapter {name!r} already. Remove it first, or choose another name.")
        if grows:
            check_can_grow(self.model, name)

    def _as_wholes(self, records: Iterable[AdapterRecord], *, writing: bool = False) -> AbstractContextManager[None]:
        """See `as_wholes`, for everything that is these adapters'."""
        return as_wholes(self.model, (m for record in records for m in record.modules()), writing=writing)

    def _check_heads_not_merged(self, name: str) -> None:
        if name in self._merged.heads:
            raise StateError(
                f"Adapter {name!r} is merged, part of it into its own copy of a module, which its file must hold "
                "without that. Call unmerge() first."
            )

    def _check_not_merged(self, name: str) -> None:
        if name in self._merged.names:
            raise StateError(f"Adapter {name!r} is merged into the weights. Call unmerge() first.")

    def _check_present(self, call: str, *names: str) -> None:
        """Refuse a call for adapters whose modules are not the model's any more."""
        for name in names:
            changed = self._changed(name)
            if changed:
                raise StateError(
                    f"{call} is refused: {changed} Add it again: adapters.remove({name!r}), then add or load it on the "
                    f"model as it is now. adapters.save({name!r}, folder) keeps what was trained."
                )

    def _warn_if_changed(self, name: str, advice: str) -> None:
        changed = self._changed(name)
        if changed:
            warnings.warn(f"{changed} {advice}", AdapterWarning, stacklevel=3)

    def _changed(self, name: str) -> str:
        """What became of the modules of an adapter, as a sentence; empty if they are what they were."""
        changes = self._live.changes(self._record(name))
        if not changes:
            return ""
        (path, what), *more = changes.items()
        others = f" (and {len(more)} more: {', '.join(repr(p) for p, _ in more[:3])})" if more else ""
        return f"{path!r}{others} {what} since adapter {name!r} was added, so the adapter does not act there."

    def _check_not_per_sample(self, call: str) -> None:
        if self._active.state.rows is not None:
            raise StateError(
                f"{call} would change which adapters act, and per_sample has said that for each row. Leave its block "
                "first."
            )
