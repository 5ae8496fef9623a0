"""Batch: how many rows the model's present batch has, and which layers have them in their first dimension."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.errors import ConfigError, StateError
from adapterkit.forward import input_name

if TYPE_CHECKING:
    from adapterkit.forward import Active

# Where a model says what its input is: the first of these that is given counts, else the first tensor.
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_INPUTS = (*_TOKENS, "pixel_values")
# What the config of a model has that puts images or sounds into the rows' tokens, wherever these ask for them.
_PLACED = re.compile(r"(image|video|audio)_token_(id|index)")


class Entries:
    """Hooks where the model, and the transformers models inside it, are entered: they tell a state what its batch is.

    Attributes:
        proven: modules whose first dimension has been seen to be the batch.
        unordered: modules that say that they have the batch elsewhere.
        places: whether the model puts images or sounds into the rows' tokens.
        inputs: what each of these models calls its first input.
    """

    def __init__(self, active: Active, model: nn.Module) -> None:
        self.active, self.model = active, model
        self.proven: set[nn.Module] = set()
        self.unordered = [(p, m) for p, m in model.named_modules() if getattr(m, "batch_first", True) is False]
        # `generate` calls an encoder by itself.
        entries = [m for m in model.modules() if m is model or hasattr(m, "base_model_prefix")]
        self.inputs = {module: input_name(module.forward) or "" for module in entries}
        self._handles = [module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in entries]
        self._handles += [module.register_forward_hook(self._leave) for module in entries]
        self.places = any(_PLACED.fullmatch(name) for m in entries for name in dir(getattr(m, "config", None)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def check(self, targets: Mapping[str, Iterable[str]]) -> None:
        """Raise `StateError` if some layers surely do not have the batch first.

        Args:
            targets: the paths of each adapter's layers.
        """
        for path, module in self.unordered:
            raise StateError(
                f"{path or 'the model'!r} is a {type(module).__name__} with batch_first=False, so rows of the batch "
                "may not be the first dimension around it. Make it with batch_first=True, or say "
                "per_sample(..., batch_first=True) if every adapted layer gets the rows first all the same."
            )
        for name, path in ((name, path) for name, paths in targets.items() for path in paths):
            if "experts" in path.split("."):
                raise StateError(
                    f"Adapter {name!r} changes {path!r}, an expert that is given tokens of several rows in an order of "
                    "its own, so per_sample cannot tell whose they are. Leave the experts out with exclude_modules."
                )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        state: Any = self.active.state
        if state.rows is None or repeats():
            return
        if getattr(module, "_is_replica", False):
            raise StateError(
                "per_sample names the rows of one batch, and nn.DataParallel splits it among its replicas. Call the "
                "model inside it, or use a process for each device (DistributedDataParallel)."
            )
        given = [(name, kwargs.get(name)) for name in _INPUTS] + [("", arg) for arg in args]
        given += [("", kwargs.get(self.inputs.get(module, ""))), *kwargs.items()]
        tensors = [(name, t) for name, t in given if isinstance(t, Tensor) and t.dim()]
        if tensors:
            name, x = next((found for found in tensors if found[1].dim() > 1), tensors[0])
            placed = self.places and module is not self.model and name not in _TOKENS and x.is_floating_point()
            state.batch.enter(module, x, state.rows.count, placed)

    def _leave(self, module: nn.Module, *_: object) -> None:
        state: Any = self.active.state
        if state.rows is not None and module is state.batch.outer:
            state.batch.outer = None


class Batch:
    """What is known of the batches that run in one block of `per_sample`.

    `per_sample` splits a layer's input along its first dimension. For each layer it proves that this is the batch:

    - The size is the batch's, read where the model was entered, or batch times length (tokens flattened row by row).
    - If the batch is as long as the sequences, sizes say nothing: the layer must be known from another batch.
    - No module has `batch_first=False`, and the layer is not an expert's, which gets tokens in another order.
    - The layer is not in a model inside that is given something else, such as images, any number for each row.

    What gradient checkpointing repeats in a backward was proven when it ran first.

    Attributes:
        size: rows of the latest batch; `None` before there was one.
        length: its second dimension, if its inputs are sequences.
        foreign: the model inside that was entered last, if its input is not the batch (images, patches).
        outer: the model that runs, with the models inside it.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.size: int | None = None
        self.length: int | None = None
        self.foreign: nn.Module | None = None
        self.outer: nn.Module | None = None
        self._sizes: tuple[int, ...] = ()

    def enter(self, module: nn.Module, x: Tensor, count: int, placed: bool) -> None:
        """The model, or one inside it, is called.

        Args:
            x: the input that says how large the batch is.
            count: rows that `per_sample` names.
            placed: these are images or sounds for tokens of the rows, wherever these ask for them.

        Raises:
            ConfigError: the batch is not one row, or the same number of rows, for each that `per_sample` names.
        """
        size = x.shape[0]
        if self.outer is None or module is self.outer:  # called again: the last call raised
            if size % count:
                raise ConfigError(
                    f"per_sample names {count} rows, and the batch has {size}. Name one adapter (or None) for each "
                    "row; a batch may have each row several times, one after another, as beam search does."
                )
            self.outer, self.foreign = module, module if placed else None
            # Entries for each row, and those of a row's choices or frames, which models inside are given by themselves.
            each = size // count
            self._sizes = (each, each * x.shape[1]) if x.dim() in (3, 5) else (each,)
        else:
            # In a part that runs on some of the rows, the batch is as many times smaller.
            fits = size in [each * count for each in self._sizes]
            self.foreign = None if fits and not placed else module
            if self.foreign is not None:
                return
        sequences = x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())
        self.size, self.length = size, x.shape[1] if sequences else None

    def check(self, module: nn.Module, size: int, count: int) -> None:
        """Raise `StateError` unless the first dimension of the module's input, of this size, is proven the batch.

        Args:
            count: rows that `per_sample` names.
        """
        if repeats():
            return
        if self.foreign is not None:
            raise StateError(
                f"A {type(module).__name__} of the model is in or behind a {type(self.foreign).__name__} that is given "
                "something else than the batch, such as images or patches of which a row may have any number, so it is "
                "not known which rows are whose. Leave this layer out with exclude_modules, or say "
                "per_sample(..., batch_first=True) if each row has as many, in order."
            )
        if self.size is None and size % count == 0:  # a part of the model is called by itself
            self.size = size
        batch, proven = self.size, self.entries.proven
        if size == batch and size != self.length:
            if not torch.compiler.is_compiling():
                proven.add(module)
            return
        flattened = batch is not None and self.length is not None and size == batch * self.length != batch
        if flattened or (size == batch and module in proven):
            return
        what = f"A {type(module).__name__} of the model gets an input whose first dimension is {size}"
        if size == batch:
            raise StateError(
                f"{what}, and there are as many rows in the batch as places in each, so it cannot be told which it is. "
                "Run a batch of another length first, or say per_sample(..., batch_first=True) if it is the rows."
            )
        raise StateError(
            f"{what}, and the batch has {batch} rows, so it is not known which rows are whose. Leave this layer "
            "out with exclude_modules, or say per_sample(..., batch_first=True) if they are in order."
        )


def repeats() -> bool:
    """Whether this is a backward, in which gradient checkpointing computes forwards again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
