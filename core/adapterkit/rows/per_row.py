"""The forward of an adapted module while each row of the batch has an adapter of its own.

What additive adapters add is worked out for their rows and added; the module itself runs once, on the whole
batch. An adapter that is not additive changes what the module is given, so the module then runs on the rows of one
adapter after another. So do heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.contract import BIASES, HEADS, LAYERS, AdapterLayer, LowRankLayer
from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.forward import (
    ACTIVE,
    BiasLayer,
    Call,
    Plan,
    State,
    Strength,
    callable_head,
    delta,
    drops,
    is_checked,
    of_input,
    run,
    run_layers,
    summable,
    tensor_parallel,
)
from adapterkit.rows.batch import Batch
from adapterkit.rows.rows import Rows
from adapterkit.tensors import offload

OfInput = Callable[[Any], Any]

# Rows for each adapter up to which they are stacked. Measured by benchmarks/per_sample.py.
STACKED = 8


class RowState(State):
    """The state in which each row of the batch has an adapter of its own.

    Attributes:
        defaults: the merged adapters whose heads act on rows that have no other.
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
        trains: Collection[str],
        strengths: Mapping[str, Strength],
    ) -> None:
        trained = tuple(name for name in rows.adapters if name in trains)
        constants = tuple(name for name in rows.adapters if name not in trains)
        super().__init__(rows.adapters, heads, trained, constants=constants, strengths=strengths)
        self.rows, self.batch, self.defaults = rows, batch, defaults

    def replace(self, old: str, *new: str) -> None:
        """See `State.replace`: without a new name, rows of the old one have none."""
        super().replace(old, *new)
        names = [next(iter(new), None) if name == old else name for name in self.rows.names]
        self.rows = Rows(names, trusted=self.rows.trusted)

    def see_merged(self, merged: tuple[str, ...], heads: tuple[str, ...]) -> None:
        """See `State.see_merged`: the merged adapters' heads act on rows that have no other."""
        super().see_merged(merged, heads)
        self.defaults = heads

    def make_plan(self, module: nn.Module) -> Plan:
        """See `State.make_plan`."""
        return Plan(module, self) if self.rows.uniform else RowPlan(module, self)

    @contextmanager
    def lacking(self, module: nn.Module, adapters: tuple[str, ...], rest: RowState | None) -> Iterator[RowState]:
        """While `module` runs on the rows that have none of these adapters, in the state `rest`, made if need be."""
        if rest is None:
            rows = Rows([self.rows.names[i] for i in self.rows.lacking(adapters)], trusted=self.rows.trusted)
            how: Any = {"trains": self.trains, "strengths": self.strengths}
            rest = RowState(rows, self.batch, self.defaults, self.defaults, **how)
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
        heads, parts, shifts, strengths: the heads, adapter layers and trained biases at the module, and the strengths
            of the latter two, by adapter.
        default: the head that replaces the module for rows without a head of their own.
        groups: the layers of each class, and whether they may be stacked.
        min_dims: dimensions of the smallest input without a batch.
        rest: the state in which the module runs on rows without a head of their own.
    """

    def __init__(self, module: nn.Module, state: RowState) -> None:
        self.module, self.state, names = module, state, state.names
        self.rest: RowState | None = None
        heads, layers, biases = (state.parts(module, container, names) for container in (HEADS, LAYERS, BIASES))
        self.heads: dict[str, Any] = {name: callable_head(head, module) for head, _, name in heads}
        self.parts: dict[str, AdapterLayer] = {name: layer for layer, _, name in layers}
        self.shifts: dict[str, Any] = {name: bias for bias, _, name in biases}
        self.strengths = {name: strength for _, strength, name in (*layers, *biases)}
        defaults = state.parts(module, HEADS, state.defaults[::-1])
        self.default = callable_head(defaults[0][0], module) if defaults else None
        self.kinds = [layer.kind for layer in self.parts.values()]
        self.checked = is_checked(module, self.kinds)
        if (self.parts or self.shifts) and tensor_parallel.mesh_of(module) is not None:
            raise UnsupportedError(
                f"Tensor parallelism splits a {type(module).__name__} between processes, and per_sample has adapters "
                "there. Run the rows of one adapter at a time."
            )
        self.additive = all(layer.summed for layer in self.parts.values())
        self.min_dims = max([0, *(kind.sample_dims for kind in self.kinds)])
        self.groups: list[tuple[dict[str, AdapterLayer], bool]] = []
        for cls in dict.fromkeys(map(type, self.parts.values())):
            alike = {name: layer for name, layer in self.parts.items() if type(layer) is cls}
            factored = issubclass(cls, LowRankLayer) or all(
                getattr(x, "rank", None) is not None for x in alike.values()
            )
            few = state.rows.count <= STACKED * len(alike)
            self.groups.append((alike, few and factored and all(layer.kind.is_plain for layer in alike.values())))

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Plan.run`; each row with the parts of its adapter."""
        if self.default is not None and not self.heads:
            return self.default(*args, **kwargs)
        if not (self.heads or self.parts or self.shifts) or not (args or kwargs):
            return original(*args, **kwargs)
        call, x = of_input(self.module, original, args, kwargs)
        self._check(x, [value for value in (*args, *kwargs.values()) if value is not x])
        hooked = "_hf_hook" in self.module.__dict__
        with offload.fetched(*self.parts.values(), *self.shifts.values()) if hooked else nullcontext():
            if self.heads:
                heads = {n: of_input(self.module, head, args, kwargs)[0] for n, head in self.heads.items()}
                return self._by_heads(call, heads, x)
            return self._changed_rows(call, x)

    def read(self) -> tuple[nn.Module, list[tuple[Any, float]], list[tuple[BiasLayer, float]]]:
        """See `Plan.read`; the rows do not share one weight."""
        if self.default is not None or self.heads or self.parts or self.shifts:
            raise UnsupportedError(
                f"The model reads the weight of a {type(self.module).__name__} instead of calling it, and per_sample "
                "has adapters there that differ from row to row. Leave this layer out of the adapters "
                "(exclude_modules, modules_to_save), or run the rows of one adapter at a time."
            )
        return self.module, [], []

    def _check(self, x: Any, others: Sequence[Any]) -> None:
        rows, cls = self.state.rows, type(self.module).__name__
        whole = any(layer.any_module for layer in self.parts.values())  # such a layer may use them for all rows
        unsplit = others if whole else [other for other in others if isinstance(other, Tensor)]
        if not isinstance(x, Tensor) or x.is_nested or x.dim() <= self.min_dims or unsplit:
            raise UnsupportedError(
                f"A {cls} is not called with one tensor{' alone' * whole} that has a batch dimension, so per_sample "
                "cannot split its input. Leave it out of the adapters (exclude_modules, modules_to_save)."
            )
        if not rows.trusted:
            self.state.batch.check(self.module, x.shape[0], rows.count)
        elif x.shape[0] % rows.count:
            raise ConfigError(
                f"per_sample names {rows.count} rows; a {cls} of the model gets {x.shape[0]}, which is not a "
                "multiple of that."
            )

    def _by_heads(self, base: OfInput, heads: Mapping[str, OfInput], x: Tensor) -> Tensor:
        """Each head on the rows of its adapter, the module itself on the others'."""
        rows, done = self.state.rows, []
        for name, head in heads.items():
            own = rows.having(name)
            done.append((repr(name), own, summable(self.module, self._one(name, head, rows.pick(x, own)))))
        rest = rows.lacking(heads)
        if rest:
            with self.state.lacking(self.module, tuple(heads), self.rest) as self.rest:
                out = run(self.module, base, (rows.pick(x, rest),), {})
            done.append(("the others", rest, summable(self.module, out)))
        shapes = {tuple(out.shape[1:]): name for name, _, out in done}
        if len(shapes) > 1:
            listed = ", ".join(f"{shape} for rows of {name}" for shape, name in shapes.items())
            raise ConfigError(
                f"The heads of these rows give outputs of different shapes, {listed}, which cannot be one batch. Run "
                "those of each shape by themselves."
            )
        return rows.join([(own, out) for _, own, out in done])

    def _one(self, name: str, base: OfInput, x: Tensor) -> Tensor:
        """`base(x)` with the parts of one adapter."""
        layer, bias = self.parts.get(name), self.shifts.get(name)
        layers = [] if layer is None else [(layer, self.strengths[name])]
        whole = layer is not None and layer.any_module
        out = Call(self.module, base, layers, ())(x) if whole else run_layers(self.module, layers, base, x)
        out = summable(self.module, out)
        return out if bias is None else (out + self.strengths[name] * bias.change(self.module.bias, out)).to(out.dtype)

    def _changed_rows(self, base: OfInput, x: Tensor) -> Tensor:
        """`base(x)`, each row with the layer and the bias of its adapter."""
        rows = self.state.rows
        if not self.additive:
            owns = [(name, rows.having(name)) for name in dict.fromkeys((*self.parts, *self.shifts))]
            done = [(own, self._one(name, base, rows.pick(x, own))) for name, own in owns]
            rest = rows.lacking((*self.parts, *self.shifts))
            return rows.join([*done, (rest, base(rows.pick(x, rest)))] if rest else done)
        out = summable(self.module, base(x))
        dtype = out.dtype
        apart: list[tuple[list[int], Tensor]] = []
        for parts, may_stack in self.groups:
            strengths = [self.strengths[name] for name in parts]
            change = stacked(rows, parts, x, strengths) if may_stack else None
            if change is not None:
                out = out + change
                continue
            for (name, layer), strength in zip(parts.items(), strengths, strict=True):
                own = rows.having(name)
                apart.append((own, strength * delta(layer, rows.pick(x, own))))
        for name, bias in self.shifts.items():
            own, shift = rows.having(name), self.strengths[name] * bias.change(self.module.bias, out)
            apart.append((own, shift.expand(len(own) * (out.shape[0] // rows.count), *out.shape[1:])))
        return (rows.add(out, apart) if apart else out).to(dtype)


def stacked(rows: Rows, parts: Mapping[str, AdapterLayer], x: Tensor, strengths: Sequence[float]) -> Tensor | None:
    """What the layers, each times its strength, add to all rows; `None`: they are called one by one.

    The cost rule: stacked, each adapter's numbers are copied once, and there are a few kernels whatever the number of
    adapters; one after another, nothing is copied, and each adapter has kernels of its own. With up to `STACKED` rows
    for each adapter the stack is the faster one, or as fast, unless one adapter has so many that the others' would be
    filled up to more than twice the batch. The stack is made in each forward: one that is kept would miss what is
    written to the parameters behind torch's back. Compiled, each row has a copy of its adapter's numbers, so that one
    graph serves every assignment.
    """
    layers, names = list(parts.values()), tuple(parts)
    if any(map(drops, layers)):
        return None
    each = x.reshape(rows.count, -1, x.shape[-1])
    if torch.compiler.is_compiling():
        change = by_row(layers, strengths, rows.slots(names, x.device), each)
    else:
        order, places = rows.groups(names, x.device)
        if len(order) > 2 * len(each):
            return None
        change = by_row(layers, strengths, None, each.index_select(0, order).reshape(len(layers), -1, x.shape[-1]))
        change = change.reshape(len(order), -1, change.shape[-1]).index_select(0, places)
    mask = rows.mask(names, x.device)
    if mask is not None:
        change = torch.where(mask, change, 0)
    return change.reshape(*x.shape[:-1], change.shape[-1])


def by_row(layers: Sequence[Any], strengths: Sequence[float], slots: Tensor | None, x: Tensor) -> Tensor:
    """`scale_i * (x[i] down_i^T * mid_i) up_i^T (+ scale_i bias_i)` for each row `i`, with the factors of its layer.

    `x (rows, tokens, in)` gives `(rows, tokens, out)`, in the widest dtype of the factors. Ranks may differ: lower ones
    are padded with zeros. It makes `rows * r * (in + out)` numbers; but layers with the same matrices in memory (VeRA's
    A and B) use them as they are, and have only their vectors by row.

    Args:
        layers: one for each adapter, all at one module.
        strengths: what each layer's scale is multiplied by.
        slots: `(rows,)`, which of them each row has; `None`: the rows have one each, in this order.
    """

    def stack(tensors: list[Any]) -> Tensor:
        found = torch.stack(tensors)
        return found if slots is None else found.index_select(0, slots)

    def padded(matrix: Tensor) -> Tensor:
        missing = rank - matrix.shape[0]
        return F.pad(matrix.to(dtype), (0, 0, 0, missing)) if missing else matrix.to(dtype)

    factors = [layer.factors().flat() for layer in layers]
    factors = [f if s == 1.0 else f._replace(scale=f.scale * s) for f, s in zip(factors, strengths, strict=True)]

    def matrices(f: Any) -> tuple[Any, ...]:
        return f.up.data_ptr(), f.up.shape, f.down.data_ptr(), f.down.shape, f.mid is None, type(f.scale)

    known = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    if known and all(f.bias is None and matrices(f) == matrices(factors[0]) for f in factors):
        up, down, _, _, mid = factors[0]
        hidden = x.to(down.dtype) @ down.t()
        if mid is not None:
            hidden = hidden * stack([f.mid for f in factors])[:, None]
        scales = [f.scale if isinstance(f.scale, Tensor) else up.new_full((1,), f.scale) for f in factors]
        out: Tensor = hidden @ up.t() * stack(scales)[:, None]
        return out
    factors = [f.folded() for f in factors]
    rank, dtype = max(f.rank for f in factors), reduce(torch.promote_types, (f.up.dtype for f in factors))
    # Measured: these two layouts are the ones in which a product with few tokens runs over rows of memory.
    downs, ups = stack([padded(f.down) for f in factors]), stack([padded(f.up.t()) for f in factors])
    hidden = torch.bmm(x.to(dtype), downs.mT)
    if all(f.bias is None for f in factors):
        return torch.bmm(hidden, ups)
    none = ups.new_zeros(ups.shape[2])
    biases = stack([none if f.bias is None else f.bias.to(dtype) for f in factors])
    return torch.baddbmm(biases[:, None], hidden, ups)
