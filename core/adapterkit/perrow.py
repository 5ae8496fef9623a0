"""The forward of an adapted module while each row of the batch has an adapter of its own.

What additive adapters add is worked out for their rows and added; the module itself runs once, on the whole
batch. An adapter that is not additive changes what the module is given, so the module then runs on the rows of one
adapter after another. So do heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit import offload
from adapterkit.batch import Batch
from adapterkit.biases import BiasLayer
from adapterkit.dispatch import Inner, Plan, State, by_keyword, parts_of, run, summable
from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.keys import BIASES, HEADS, LAYERS
from adapterkit.layer import AdapterLayer
from adapterkit.rows import Rows
from adapterkit.watched import Watched

Stack = Callable[[Tensor], Tensor]
Base = Callable[[Tensor], Any]

# Rows for each adapter up to which they are stacked. Measured by benchmarks/per_sample.py.
STACKED = 4


class RowState(State):
    """The state in which each row of the batch has an adapter of its own.

    Attributes:
        rows: which.
        defaults: whose heads act on rows that have none by their adapter: those of merged adapters.
        batch: the model's.
    """

    rows: Rows

    def __init__(self, rows: Rows, batch: Batch, heads: tuple[str, ...], defaults: tuple[str, ...]) -> None:
        super().__init__(rows.adapters, heads)
        self.rows, self.batch, self.defaults = rows, batch, defaults
        self._rest: dict[tuple[str, ...], RowState] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RowState, (self.rows, self.batch, self.heads, self.defaults)

    def make_plan(self, module: nn.Module) -> Plan:
        """See `State.make_plan`."""
        return Plan(module, self) if self.rows.uniform else RowPlan(module, self)

    @contextmanager
    def without(self, adapters: tuple[str, ...]) -> Iterator[None]:
        """While a module runs on the rows that have none of these adapters."""
        rest = self._rest.get(adapters)
        if rest is None:
            rows = Rows([self.rows.names[i] for i in self.rows.lacking(adapters)], trusted=self.rows.trusted)
            rest = RowState(rows, self.batch, self.defaults, self.defaults)
            if not torch.compiler.is_compiling():
                self._rest[adapters] = rest
        active, size = self.batch.active, self.batch.size
        active.state = rest
        if size is not None:
            self.batch.size = size // self.rows.count * rest.rows.count
        try:
            yield
        finally:
            active.state, self.batch.size = self, size


class RowPlan(Plan):
    """What acts at one module on which rows.

    Attributes:
        heads, parts, shifts: the heads, adapter layers and trained biases at the module, by adapter.
        default: the head that stands in place of the module for rows without one of their own.
        stacks: what was made of the parameters of all layers of one class, and from which.
    """

    __slots__ = ("default", "heads", "parts", "shifts", "stacks", "state")

    def __init__(self, module: nn.Module, state: RowState) -> None:
        slots, names = module._modules, state.names
        self.module, self.state = module, state
        self.heads: dict[str, Any] = {name: head for head, name in parts_of(slots.get(HEADS), names)}
        self.parts: dict[str, AdapterLayer] = {name: layer for layer, name in parts_of(slots.get(LAYERS), names)}
        self.shifts: dict[str, BiasLayer] = {name: bias for bias, name in parts_of(slots.get(BIASES), names)}
        self.default = next((head for head, _ in parts_of(slots.get(HEADS), state.defaults[::-1])), None)
        self.stacks: dict[type[AdapterLayer], tuple[Watched, Stack | None]] = {}

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Plan.run`; each row with the parts of its adapter."""
        if self.default is not None and not self.heads:
            return self.default(*args, **kwargs)
        if not (self.heads or self.parts or self.shifts) or not (args or kwargs):
            return original(*args, **kwargs)
        if not args:
            original, x = by_keyword(original, kwargs)
            args = (x,)
        self._check(args, kwargs)
        inner, hooked = Inner(original, args[1:], kwargs), "_hf_hook" in self.module.__dict__
        with offload.fetched(*self.parts.values(), *self.shifts.values()) if hooked else nullcontext():
            return self._by_heads(inner, args[0]) if self.heads else self._changed_rows(inner, args[0])

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, (x, *others) = self.state.rows, args
        least = max([0, *(layer.kind.sample_dims for layer in self.parts.values())])
        several = any(isinstance(other, Tensor) for other in (*others, *kwargs.values()))
        if several or not isinstance(x, Tensor) or x.dim() <= least:
            raise UnsupportedError(
                f"A {type(self.module).__name__} is not called with one tensor that has a batch dimension, "
                "so per_sample cannot split its input. Leave it out of the adapters (exclude_modules, modules_to_save)."
            )
        if not rows.trusted:
            self.state.batch.check(self.module, x.shape[0], rows.count)
        elif x.shape[0] % rows.count:
            raise ConfigError(
                f"per_sample names {rows.count} rows; a {type(self.module).__name__} of the model gets {x.shape[0]}, "
                "which is no multiple of that."
            )

    def _by_heads(self, base: Inner, x: Tensor) -> Tensor:
        """Each head on the rows of its adapter, the module itself on the others'."""
        rows, done = self.state.rows, []
        for name, head in self.heads.items():
            own = rows.having((name,))
            out = self._one(name, Inner(head, base.args, base.kwargs), rows.pick(x, own))
            done.append((repr(name), own, summable(self.module, out)))
        rest = rows.lacking(self.heads)
        if rest:
            with self.state.without(tuple(self.heads)):
                out = run(self.module, base.call, (rows.pick(x, rest), *base.args), base.kwargs)
            done.append(("the others", rest, summable(self.module, out)))
        shapes = {tuple(out.shape[1:]): name for name, _, out in done}
        if len(shapes) > 1:
            listed = ", ".join(f"{shape} for rows of {name}" for shape, name in shapes.items())
            raise ConfigError(
                f"The heads of these rows give outputs of different shapes, {listed}, which are no one batch. Run "
                "those of each shape by themselves."
            )
        return rows.join([(own, out) for _, own, out in done])

    def _one(self, name: str, base: Base, x: Tensor) -> Tensor:
        """`base(x)` with the parts of one adapter."""
        layer, bias = self.parts.get(name), self.shifts.get(name)
        out: Tensor = base(x) if layer is None else layer(x, base)
        return out if bias is None else (out + bias.change(self._bias(), out)).to(out.dtype)

    def _changed_rows(self, base: Base, x: Tensor) -> Tensor:
        rows = self.state.rows
        if not all(layer.additive for layer in self.parts.values()):
            done = [(own, self._one(name, base, rows.pick(x, own))) for name, own in self._with_rows()]
            rest = rows.lacking((*self.parts, *self.shifts))
            return rows.join([*done, (rest, base(rows.pick(x, rest)))] if rest else done)
        out = summable(self.module, base(x))
        dtype = out.dtype
        out = self._added(out, x)
        if self.shifts:
            length = out.shape[0] // rows.count
            changes = [
                (own, bias.change(self._bias(), out).expand(len(own) * length, *out.shape[1:]))
                for own, bias in [(rows.having((name,)), bias) for name, bias in self.shifts.items()]
            ]
            out = rows.add(out, changes)
        return out if out.dtype == dtype else out.to(dtype)

    def _bias(self) -> Tensor:
        bias: Any = self.module.bias
        return bias  # type: ignore[no-any-return]

    def _with_rows(self) -> list[tuple[str, list[int]]]:
        return [(name, self.state.rows.having((name,))) for name in dict.fromkeys((*self.parts, *self.shifts))]

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` with what the layers add to the rows of their adapters."""
        rows = self.state.rows
        sorts: dict[type[AdapterLayer], list[str]] = {}
        for name, layer in self.parts.items():
            sorts.setdefault(type(layer), []).append(name)
        apart: list[tuple[list[int], Tensor]] = []
        for cls, names in sorts.items():
            stack = self._stack(cls, tuple(names), x.device)
            if stack is None:
                picked = [(rows.having((name,)), self.parts[name]) for name in names]
                apart += [(own, layer.delta(rows.pick(x, own))) for own, layer in picked]
                continue
            change = stack(x.reshape(rows.count, -1, x.shape[-1]))
            mask = rows.mask(names, x.device)
            if mask is not None:
                change = torch.where(mask, change, 0)
            out = out + change.reshape(out.shape)
        return rows.add(out, apart) if apart else out

    def _stack(self, cls: type[AdapterLayer], names: tuple[str, ...], device: torch.device) -> Stack | None:
        """One function for what these layers add to all rows; `None`: they are called one after another.

        The cost rule: stacked, each row has a copy of its adapter's numbers, and there are two or three kernels
        whatever the number of adapters; one after another, nothing is copied, and each adapter has kernels of its
        own. With up to `STACKED` rows for each adapter the stack is the faster one, and it takes at most that many
        times the memory of the adapters themselves; with more, the rows of one adapter fill its kernels.

        A stack is kept while its layers are as they were and get no gradient.
        """
        layers, rows = [self.parts[name] for name in names], self.state.rows
        if rows.count > STACKED * len(names) or not all(layer.kind.is_plain for layer in layers):
            return None
        if torch.compiler.is_compiling():
            return cls.stacked(layers, rows.slots(names, device))
        kept = self.stacks.get(cls)
        watched = Watched(layers) if kept is None or not kept[0].unchanged() else kept[0]
        if torch.is_grad_enabled() and watched.learns:
            return cls.stacked(layers, rows.slots(names, device))
        if kept is None or watched is not kept[0]:
            with torch.inference_mode(False), torch.no_grad():
                kept = self.stacks[cls] = watched, cls.stacked(layers, rows.slots(names, device))
        return kept[1]
