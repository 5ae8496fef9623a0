"""Host: what the adapters change on the model as a whole, and how it was before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from adapterkit.contract import SHARED
from adapterkit.forward import Active, PerAdapter, checkpointing
from adapterkit.model.adapter import Adapter, SharedTensors
from adapterkit.model.labels import LabelSet
from adapterkit.model.modules import BaseModules, base_parameters
from adapterkit.model.presence import Presence
from adapterkit.model.vocabulary import resized_tables
from adapterkit.rows import Entries
from adapterkit.tensors import size_of

if TYPE_CHECKING:
    from adapterkit.merging import Parting

_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Host:
    """The model and what is restored by `detach`.

    Attributes:
        labels_of: the adapter whose label set the model's config follows now; `None`: its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._labels = LabelSet.of(model)
        self.labels_of: str | None = None
        self.size = 0
        self._trained: list[str] | None = None
        self._entries: Entries | None = None
        self._parted: list[Parting] = []
        self._presence: dict[str, Presence] = {}

    @property
    def labels(self) -> LabelSet | None:
        """The model's own label set; its user may change it as long as no adapter's is followed."""
        if self.labels_of is None:
            self._labels = LabelSet.of(self.model)
        return self._labels

    def freeze(self) -> None:
        """Freeze the base, once, and remember what was not frozen."""
        if self._trained is not None:
            return
        parameters = list(base_parameters(self.model))
        self._trained = [name for name, p in parameters if p.requires_grad]
        self.size = size_of({p for _, p in parameters})
        for _, parameter in parameters:
            parameter.requires_grad_(False)
        checkpointing.wrap()

    def join(self, adapter: Adapter) -> None:
        """Let an adapter use another one's shared tensors if they are equal. Torch moves a module of two names once."""
        if adapter.shared is not None:
            adapter.shared.join(self._shared().values())

    def remember(self, adapter: Adapter) -> None:
        """Register an adapter's shared tensors, and where in the model it is."""
        self._presence[adapter.name] = Presence(adapter, self.model)
        if adapter.shared is not None:
            slots = self.model._modules.get(SHARED)
            if slots is None:
                slots = self.model._modules[SHARED] = PerAdapter()
            slots._modules[adapter.name] = adapter.shared.module

    def _shared(self) -> dict[str, SharedTensors]:
        slots = self.model._modules.get(SHARED)
        found = {} if slots is None else slots._modules
        return {name: module for name, module in found.items() if isinstance(module, SharedTensors)}

    @contextmanager
    def writing(self, adapter: Adapter) -> Iterator[None]:
        """While an adapter's tensors are written to, others that use the same shared tensors keep theirs."""
        if adapter.shared is None:
            yield
            return
        if any(module is adapter.shared.module for name, module in self._shared().items() if name != adapter.name):
            adapter.shared.part()
        try:
            yield
        finally:
            self.join(adapter)
            self.remember(adapter)

    def forget(self, adapter: Adapter) -> None:
        """Undo `remember`."""
        del self._presence[adapter.name]
        slots = self.model._modules.get(SHARED)
        if adapter.shared is not None and slots is not None:
            del slots._modules[adapter.name]
            if not slots._modules:
                del self.model._modules[SHARED]

    def changes(self, adapter: Adapter) -> dict[str, str]:
        """See `Presence.changes`."""
        return self._presence[adapter.name].changes()

    def restore(self) -> None:
        """Give the model back what `freeze` took."""
        parameters = dict(base_parameters(self.model))
        for name in self._trained or ():
            if name in parameters:
                parameters[name].requires_grad_(True)
        if self._entries is not None:
            self._entries.remove()
            self._entries = None

    def watch(self, active: Active) -> Entries:
        """What sees the model's batches, from the first call on."""
        if self._entries is None:
            self._entries = Entries(active, self.model)
        return self._entries

    def part(self, parting: Parting) -> None:
        """Tell transformers which of its tied weights are apart now."""
        self._parted.append(parting)
        parting.tell()

    def tie(self, parting: Parting | None = None) -> None:
        """Undo one `part`, or every one."""
        for done in [p for p in reversed(self._parted) if parting in (None, p)]:
            done.take_back()
            self._parted.remove(done)

    def keep_labels(self) -> None:
        """The label set that the model's config follows now becomes the model's own."""
        self.labels_of = None

    def follow_labels(self, adapters: Mapping[str, Adapter], heads: tuple[str, ...]) -> None:
        """Make the model's config follow the label set of the head that acts."""
        base = self.labels
        if base is None:
            return
        owner = next((name for name in reversed(heads) if adapters[name].labels is not None), None)
        if owner == self.labels_of:
            return
        before = adapters.get(self.labels_of) if self.labels_of is not None else None
        if before is not None and before.labels is not None:
            before.labels = before.labels.seen(self.model)
        wanted = base if owner is None else adapters[owner].labels
        assert wanted is not None
        wanted.apply(self.model)
        self.labels_of = owner

    def renew_labels(self, adapter: Adapter) -> None:
        """The adapter has another label set: the model's config follows it if it followed the old one."""
        if adapter.labels is not None and self.labels_of == adapter.name:
            adapter.labels.apply(self.model)

    def notes(self, adapter: Adapter, modules: BaseModules) -> list[str]:
        """What whoever adds an adapter to this model should know."""
        norms = [
            paths[0]
            for module, paths in modules.paths_of.items()
            if isinstance(module, _NORMS)
            and module.track_running_stats
            and not any(paths[0] == head or paths[0].startswith(head + ".") for head in adapter.heads)
        ]
        resized = resized_tables(modules, adapter.heads)
        notes = [
            f"the vocabulary was resized, so the adapter's file will hold {path!r} too (save(embeddings=False) leaves "
            "it out)"
            for path in resized
        ]
        if not norms:
            return notes
        return [
            *notes,
            f"{len(norms)} batch norms, such as {norms[0]!r}, update their running statistics in training mode. These "
            "are the base's and are not saved with the adapter: keep the batch norms in eval mode, or name them in "
            "modules_to_save.",
        ]
