"""The forward of an adapted module while each row of the batch has an adapter of its own.

What additive adapters add is worked out for their rows and added; the module itself runs once, on the whole
batch. An adapter that is not additive changes what the module is given, so the module then runs on the rows of one
adapter after another. So do heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import BIASES, HEADS, LAYERS, AdapterLayer, LowRankLayer
from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.forward import (
    ACTIVE,
    BiasLayer,
    Inner,
    Plan,
    State,
    by_keyword,
    callable_head,
    checks,
    delta,
    drops,
    readers,
    run,
    run_layers,
    summable,
)
from adapterkit.rows.batch import Batch
from adapterkit.rows.rows import Rows
from adapterkit.rows.stack import FactorStack
from adapterkit.tensors import offload

Base = Callable[[Tensor], Any]

# Rows for each adapter up to which they are stacked. Measured by benchmarks/per_sample.py.
STACKED = 8


class RowState(State):
    """The state in which each row of the batch has an adapter of its own.

    Attributes:
        given: the adapter of each row, as it was asked for.
        rows: the same without those that are merged or gone.
        defaults: whose heads act on rows that have none by their adapter: those of merged adapters.
        batch: what is known of the batch that runs in this state.
    """

    rows: Rows

    def __init__(
        self,
        rows: Rows,
        batch: Batch,
        heads: tuple[str, ...],
        defaults: tuple[str, ...],
        *,
        trainable: bool = False,
        constant: bool = False,
    ) -> None:
        super().__init__(rows.adapters, heads, rows.adapters if trainable else (), constant=constant)
        self.given, self.rows, self.batch, self.defaults = rows.names, rows, batch, defaults

    def replace(self, old: str, *new: str) -> None:
        """See `State.replace`: without a new name, rows of the old one have none."""
        super().replace(old, *new)
        self.given = tuple(next(iter(new), None) if name == old else name for name in self.given)
        self._choose_rows()

    def see_merged(self, merged: tuple[str, ...], heads: tuple[str, ...]) -> None:
        """See `State.see_merged`: a merged adapter acts on all rows."""
        super().see_merged(merged, heads)
        self.defaults = heads
        self._choose_rows()

    def _choose_rows(self) -> None:
        names = [name if name in self.names else None for name in self.given]
        self.rows = Rows(names, trusted=self.rows.trusted)

    def make_plan(self, module: nn.Module) -> Plan:
        """See `State.make_plan`."""
        return Plan(module, self) if self.rows.uniform else RowPlan(module, self)

    @contextmanager
    def lacking(self, module: nn.Module, adapters: tuple[str, ...], rest: RowState | None) -> Iterator[RowState]:
        """While `module` runs on the rows that have none of these adapters, in the state `rest`, made if need be."""
        if rest is None:
            rows = Rows([self.rows.names[i] for i in self.rows.lacking(adapters)], trusted=self.rows.trusted)
            rest = RowState(rows, self.batch, self.defaults, self.defaults, constant=self.constant)
        thread, size = module.__dict__[ACTIVE].here.thread, self.batch.size
        thread.state = rest
        if size is not None:
            self.batch.size = size // self.rows.count * rest.rows.count
        try:
            yield rest
        finally:
            thread.state, self.batch.size = self, size


class RowPlan(Plan):
    """What acts at one module on which rows.

    Attributes:
        heads, parts, shifts: the heads, adapter layers and trained biases at the module, by adapter.
        default: the head that stands in place of the module for rows without one of their own.
        groups: the layers of each class.
        least: dimensions of the smallest input without a batch.
    """

    __slots__ = ("additive", "default", "groups", "heads", "least", "parts", "rest", "shifts", "state")

    def __init__(self, module: nn.Module, state: RowState) -> None:
        self.module, self.state, names = module, state, state.names
        self.rest: RowState | None = None
        self.heads: dict[str, Any] = {
            name: callable_head(head, module) for head, name in state.parts(module, HEADS, names)
        }
        self.parts: dict[str, AdapterLayer] = {name: layer for layer, name in state.parts(module, LAYERS, names)}
        self.shifts: dict[str, BiasLayer] = {name: bias for bias, name in state.parts(module, BIASES, names)}
        self.default = next(
            (callable_head(head, module) for head, _ in state.parts(module, HEADS, state.defaults[::-1])), None
        )
        self.check = checks(module, self.parts.values())
        self.additive = all(layer.summed for layer in self.parts.values())
        self.least = max([0, *(layer.kind.sample_dims for layer in self.parts.values())])
        classes = dict.fromkeys(map(type, self.parts.values()))
        alike = [{name: layer for name, layer in self.parts.items() if type(layer) is cls} for cls in classes]
        self.groups = [LayerGroup(state.rows, parts) for parts in alike]

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Plan.run`; each row with the parts of its adapter."""
        if self.default is not None and not self.heads:
            return self.default(*args, **kwargs)
        if not (self.heads or self.parts or self.shifts) or not (args or kwargs):
            return original(*args, **kwargs)
        if not args:
            original, x = by_keyword(self.module, original, kwargs)
            args = (x,)
        self._check(args, kwargs)
        inner, hooked = Inner(original, args[1:], kwargs), "_hf_hook" in self.module.__dict__
        act = self._by_heads if self.heads else self._changed_rows
        if not hooked:
            return act(inner, args[0])
        with offload.fetched(*self.parts.values(), *self.shifts.values()):
            return act(inner, args[0])

    def stand_in(self) -> nn.Module | None:
        """See `Plan.stand_in`; the rows do not share one weight."""
        if self.default is not None or self.heads or self.parts or self.shifts:
            raise UnsupportedError(
                f"The model reads the weight of a {type(self.module).__name__} instead of calling it, and per_sample "
                "has adapters there that differ from row to row. Leave this layer out of the adapters "
                "(exclude_modules, modules_to_save), or run the rows of one adapter at a time."
            )
        return None

    def parameter(self, name: str) -> Tensor | None:
        """See `Plan.parameter`."""
        self.stand_in()
        own: Tensor | None = readers.own(self.module, name)
        return own

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, (x, *others) = self.state.rows, args
        several = bool(others or kwargs) and any(isinstance(other, Tensor) for other in (*others, *kwargs.values()))
        if several or not isinstance(x, Tensor) or x.dim() <= self.least:
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
            with self.state.lacking(self.module, tuple(self.heads), self.rest) as self.rest:
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
        out: Tensor = run_layers(self.module, [] if layer is None else [layer], base, x)
        return out if bias is None else (out + bias.change(self._bias(), out)).to(out.dtype)

    def _changed_rows(self, base: Base, x: Tensor) -> Tensor:
        rows = self.state.rows
        if not self.additive:
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
        apart: list[tuple[list[int], Tensor]] = []
        for group in self.groups:
            change = group.stacked(x)
            if change is None:
                apart += group.apart(x)
            else:
                out = out + change
        return self.state.rows.add(out, apart) if apart else out


class LayerGroup:
    """The layers of one class at one module, and what they add to all rows."""

    __slots__ = ("layers", "names", "rows", "stackable")

    def __init__(self, rows: Rows, parts: dict[str, AdapterLayer]) -> None:
        self.rows, self.names, self.layers = rows, tuple(parts), list(parts.values())
        few = rows.count <= STACKED * len(self.layers)
        self.stackable = few and all(layer.kind.is_plain and _has_factors(layer) for layer in self.layers)

    def apart(self, x: Tensor) -> list[tuple[list[int], Tensor]]:
        """What each layer adds to the rows of its adapter."""
        owns = [self.rows.having((name,)) for name in self.names]
        return [(own, delta(layer, self.rows.pick(x, own))) for own, layer in zip(owns, self.layers, strict=True)]

    def stacked(self, x: Tensor) -> Tensor | None:
        """What the layers add to all rows, by one function of all of them; `None`: they are called one by one.

        The cost rule: stacked, each adapter's numbers are copied once, and there are a few kernels whatever the number
        of adapters; one after another, nothing is copied, and each adapter has kernels of its own. With up to `STACKED`
        rows for each adapter the stack is the faster one, or as fast, unless one adapter has so many that the others'
        would be filled up to more than twice the batch. The stack is made in each forward: one that is kept would miss
        what is written to the parameters behind torch's back. Compiled, each row has a copy of its adapter's numbers,
        so that one graph serves every assignment.
        """
        if not self.stackable or any(layer.training and drops(layer) for layer in self.layers):
            return None
        rows = x.reshape(self.rows.count, -1, x.shape[-1])
        if torch.compiler.is_compiling():
            change = FactorStack(self.layers, self.rows.slots(self.names, x.device))(rows)
        else:
            order, places = self.rows.groups(self.names, x.device)
            if len(order) > 2 * len(rows):
                return None
            grouped = rows.index_select(0, order).reshape(len(self.layers), -1, x.shape[-1])
            change = FactorStack(self.layers, None)(grouped)
            change = change.reshape(len(order), -1, change.shape[-1]).index_select(0, places)
        mask = self.rows.mask(self.names, x.device)
        if mask is not None:
            change = torch.where(mask, change, 0)
        return change.reshape(*x.shape[:-1], change.shape[-1])


def _has_factors(layer: AdapterLayer) -> bool:
    return isinstance(layer, LowRankLayer) or getattr(layer, "rank", None) is not None
