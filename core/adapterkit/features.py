"""`ak.features`: pooled hidden states of a model with its adapters, without its head."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from adapterkit.combining import working
from adapterkit.errors import ConfigError, SaveError, UnsupportedError, nearest, usage
from adapterkit.files import Entry, appearing, as_bytes, dtype_name, local_path, write_header
from adapterkit.forward import original_class
from adapterkit.model import inner_model
from adapterkit.tensors import execution_device

Pooling = Literal["mean", "cls", "last"]
Stack = Literal["encoder", "decoder"]
Layer = int | str
Batch = Mapping[str, Any] | Tensor | tuple[Any, ...] | list[Any]
Batches = Iterable[Batch]

LAST = "last"
# transformers 5 records hidden states by hooks that it leaves on the model, and marks the model that has them.
_CAPTURING = "_output_capturing_hooks_installed"
# The header of a streamed file holds the final size. The file starts with room for it, and it is written last.
_HEADER_BYTES = 256
_LAYERS = f"{LAST!r}, the number of a layer, such as -1, or the path of a module"
_NO_BATCHES = "There are no batches. A generator can be read only once."


@overload
def features(
    model: nn.Module,
    batches: Batches,
    *,
    layer: Layer | Sequence[Layer] = "last",
    pooling: Pooling | None = "mean",
    stack: Stack = "encoder",
    progress: bool = True,
    out: None = None,
) -> Tensor: ...


@overload
def features(
    model: nn.Module,
    batches: Batches,
    *,
    layer: Layer | Sequence[Layer] = "last",
    pooling: Pooling | None = "mean",
    stack: Stack = "encoder",
    progress: bool = True,
    out: str | Path,
) -> Path: ...


@usage()
@torch.no_grad()
def features(
    model: nn.Module,
    batches: Batches,
    *,
    layer: Layer | Sequence[Layer] = "last",
    pooling: Pooling | None = "mean",
    stack: Stack = "encoder",
    progress: bool = True,
    out: str | Path | None = None,
) -> Tensor | Path:
    """Hidden states of a transformers model without its head, or outputs of a layer of any model.

    The model computes with its active or merged adapters.

    Runs in eval mode without gradients, and restores the mode of every module. Positions where `attention_mask` is 0
    are never pooled. The rows of a decoder may be padded on the left or on the right, with the same result.

    Args:
        batches: mappings of tensors, as the model takes them; labels and the like are left out. With a layer's path
            also tensors, or tuples of them, for a model that takes such.
        layer: `"last"` is the output of the body, `last_hidden_state`. A number is the index into the `hidden_states`
            of transformers: `0` is the embeddings, `-1` the output of the last layer, which many models (ViT, CLIP,
            Whisper) return before their last norm. Other text is the path of a module of the model, of any kind, such
            as `"stages.3"`: its output, or the first tensor of that. A list selects several.
        pooling: over the positions without padding: `"mean"`; `"cls"`, the first; `"last"`, the last; or `None`, which
            returns every position, with zeros for padding. Images have no padding, and a class token counts as a
            position; in feature maps `(channels, height, width)` each pixel is one. A module's output
            `(rows, features)` has no positions and is taken as it is.
        stack: for encoder-decoders. `"encoder"` runs the encoder alone; `"decoder"` needs `decoder_input_ids` and
            uses `decoder_attention_mask`.
        progress: show a progress bar.
        out: a safetensors file to stream to, for features that do not fit in memory; it appears when it is complete.

    Returns:
        A tensor on the CPU in float32 (float64 for a float64 model), with rows in the order of the batches:
        `(rows, hidden)`; for a list of layers `(rows, layers, hidden)`; without pooling `(rows, length, hidden)` or
        `(rows, layers, length, hidden)`, where shorter batches are padded with zeros on the right. With `out`, the
        path of the file, which holds this tensor as `"features"`.

    Raises:
        ConfigError: there are no batches, a layer or a pooling does not exist, or a row is all padding.
        UnsupportedError: the model has no sequence of hidden states.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ConfigError(f"pooling = {pooling!r} must be one of {', '.join(map(repr, get_args(Pooling)))} or None.")
    layers = (layer,) if isinstance(layer, int | str) else tuple(layer)
    if not layers or any(isinstance(n, bool) or not isinstance(n, int | str) for n in layers):
        raise ConfigError(f"layer = {layer!r} must be {_LAYERS}, or a list of them.")
    if isinstance(batches, Mapping | Tensor):
        raise ConfigError(f"batches is one {type(batches).__name__}. Put it into a list: features(model, [batch]).")
    inner, named = inner_model(model), [n for n in layers if isinstance(n, str) and n != LAST]
    if named and len(named) < len(layers):
        raise ConfigError(f"layer = {layer!r} mixes paths of modules with hidden states. Request them one by one.")
    source = _Modules(inner, named) if named else _Body(inner, stack)
    parts = _pooled(source, batches, layers, pooling, progress)
    if isinstance(layer, int | str):
        parts = (part[:, 0] for part in parts)
    with _evaluating(inner):
        return _stacked(list(parts)) if out is None else _streamed(parts, local_path(out))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module has its own mode and hooks again."""
    before = [(module, module.training, set(module._forward_hooks)) for module in model.modules()]
    capturing = [module for module, *_ in before if _CAPTURING in module.__dict__]
    model.eval()
    try:
        yield
    finally:
        for module, training, hooks in before:
            module.training = training
            for number in set(module._forward_hooks) - hooks:
                del module._forward_hooks[number]
            if module not in capturing:
                module.__dict__.pop(_CAPTURING, None)


def _pooled(
    source: _Body | _Modules, batches: Batches, layers: tuple[Layer, ...], pooling: Pooling | None, progress: bool
) -> Iterator[Tensor]:
    """`(rows, layers, ...)` of each batch."""
    from tqdm import tqdm

    parameters = ((module, p) for module in source.model.modules() for p in module._parameters.values())
    device = next((execution_device(module, p) for module, p in parameters if p is not None), torch.device("cpu"))
    for number, batch in enumerate(tqdm(batches, desc="features", unit="batch", disable=not progress)):
        if not isinstance(batch, source.batches):
            other = " For plain tensors name a module: layer='encoder'." * isinstance(batch, Tensor)
            raise ConfigError(
                f"Batch {number} is a {type(batch).__name__}; it must be a mapping of tensors by name.{other}"
            )
        given: Any = dict(batch) if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
        if not any(isinstance(value, Tensor) for value in tree_leaves(given)):
            raise ConfigError(f"Batch {number} holds no tensors. Call the tokenizer with return_tensors='pt'.")
        states, mask = source.run(tree_map_only(Tensor, lambda t: t.to(device), given), layers)
        rows = [isinstance(source, _Modules) and state.dim() == 2 for state in states]
        pooled = [
            working(state).cpu() if alone else _pool(state, mask, pooling, number)
            for state, alone in zip(states, rows, strict=True)
        ]
        if len({tuple(p.shape) for p in pooled}) > 1:
            shapes = ", ".join(f"{n}: {tuple(p.shape[1:])}" for n, p in zip(layers, pooled, strict=True))
            raise ConfigError(f"The layers have different sizes ({shapes}). Request them one by one.")
        yield torch.stack(pooled, dim=1)


def _pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling | None, number: int) -> Tensor:
    """Pool batch `number`.

    Args:
        hidden: `(rows, length, hidden)`, or a feature map `(rows, hidden, height, width)`.
        mask: `(rows, length)`, 0 for padding; `None` if there is no padding.

    Returns:
        `(rows, hidden)`, or `(rows, length, hidden)` without pooling; on the CPU, float32 or float64.
    """
    if hidden.dim() == 4:
        if pooling in ("cls", "last"):
            raise ConfigError(f"pooling = {pooling!r} has no meaning for a feature map. Use 'mean'.")
        hidden = hidden.flatten(2).transpose(1, 2)
    if hidden.dim() != 3:
        raise UnsupportedError(f"Hidden states of shape {tuple(hidden.shape)} are not a sequence that can be pooled.")
    hidden = working(hidden)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    elif mask.shape != hidden.shape[:2]:
        raise UnsupportedError(
            f"Batch {number}: the mask has shape {tuple(mask.shape)}, but the hidden states have shape "
            f"{tuple(hidden.shape)}. The mask does not tell which of them are padding."
        )
    real = mask.to(hidden.device) != 0
    empty = (~real.any(1)).nonzero()
    if len(empty):
        raise ConfigError(f"Batch {number}: row {int(empty[0])} is all padding.")
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, real.int().argmax(1)].cpu()
    if pooling == "last":
        return hidden[rows, real.shape[1] - 1 - real.flip(1).int().argmax(1)].cpu()
    hidden = hidden.masked_fill(~real[..., None], 0.0)  # not a product: 0 times inf is nan
    return (hidden if pooling is None else hidden.sum(1) / real.sum(1, keepdim=True)).cpu()


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """The rows `(rows, ..., length, hidden)` of all batches; shorter ones are padded with zeros."""
    if not parts:
        raise ConfigError(_NO_BATCHES)
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts])


def _streamed(parts: Iterable[Tensor], path: Path) -> Path:
    """Write the rows of all batches to a safetensors file, which appears when it is complete."""
    rows, first = 0, None
    with ExitStack() as stack:
        with _saving(path):
            file = stack.enter_context(stack.enter_context(appearing(path, follow=True)).open("wb"))
            file.write(b" " * _HEADER_BYTES)
        for part in parts:  # an error of the caller's data is not an error of saving
            first = part[:0] if first is None else first
            if part.shape[1:] != first.shape[1:]:
                raise ConfigError(
                    f"Streaming needs rows of one shape, but there are {tuple(first.shape[1:])} and "
                    f"{tuple(part.shape[1:])}. Pad every batch to one length (padding='max_length'), or use pooling."
                )
            with _saving(path):
                file.write(as_bytes(part))
            rows += len(part)
        if first is None:
            raise ConfigError(_NO_BATCHES)
        with _saving(path):
            shape, end = (rows, *first.shape[1:]), file.tell() - _HEADER_BYTES
            entry = Entry("features", dtype_name(first.dtype), shape, path, 0, end)
            file.seek(0)
            file.write(write_header([entry], {"format": "pt"}, _HEADER_BYTES))
            stack.close()
    return path


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error}.") from error


class _Modules:
    """Modules of a model by their paths, whose outputs are recorded while the whole model runs."""

    batches: Any = (Mapping, Tensor, tuple, list)

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        known = dict(model.named_modules())
        for path in paths:
            if path not in known:
                close = ", ".join(map(repr, nearest(path, known))) or f"{[*known][1:4]}"
                raise ConfigError(f"layer = {path!r} must be {_LAYERS}. Nearest: {close}.")
        self.model, self.modules = model, [known[path] for path in paths]

    def run(self, batch: Any, layers: tuple[Layer, ...]) -> tuple[list[Tensor], Tensor | None]:
        """The outputs of the modules, and the mask if the batch has one."""
        found: dict[nn.Module, list[Tensor | None]] = {module: [] for module in self.modules}

        def record(module: nn.Module, args: object, output: Any) -> None:
            values = output.values() if isinstance(output, Mapping) else output
            tensors = [output] if isinstance(output, Tensor) else [v for v in values if isinstance(v, Tensor)]
            found[module].append(tensors[0] if tensors else None)

        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        with ExitStack() as stack:
            for module in found:
                stack.enter_context(module.register_forward_hook(record))
            if isinstance(batch, Mapping):
                self.model(**{k: v for k, v in batch.items() if k not in ("labels", "label_ids")})
            else:
                self.model(*batch)
        states: list[Tensor] = []
        for path, module in zip(layers, self.modules, strict=True):
            tensor = found[module][0] if len(found[module]) == 1 else None
            if tensor is None:
                what = "gives no tensor" if len(found[module]) == 1 else f"ran {len(found[module])} times"
                raise UnsupportedError(f"The module {path!r} {what} in one forward, so it has no features.")
            states.append(tensor)
        return states, mask if all(mask is not None and mask.shape == state.shape[:-1] for state in states) else None


class _Body:
    """The part of a model that returns hidden states, and what it takes."""

    batches: Any = Mapping

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        if stack not in ("encoder", "decoder"):
            raise ConfigError(f"stack = {stack!r} must be 'encoder' or 'decoder'.")
        self.model, config = model, getattr(model, "config", None)
        body: Any = getattr(model, "base_model", model)
        if getattr(model, "main_input_name", None) not in {None, *_parameters(body)}:
            body = model  # its `base_model` is a stack of layers, without the embeddings
        both = bool(getattr(config, "is_encoder_decoder", False)) and callable(getattr(body, "get_encoder", None))
        self.decoder = both and stack == "decoder"
        self.module: nn.Module = body if self.decoder or not both else body.get_encoder()
        self.takes = _parameters(self.module)
        self.left_out = (_parameters(model) | _parameters(body)) - self.takes
        # Without position_ids a causal model counts positions from the first one, even if that is padding.
        causal = any(getattr(module, "is_causal", False) is True for module in self.module.modules())
        self.positions = causal and not both and "position_ids" in self.takes

    def run(self, batch: Mapping[str, Any], layers: tuple[Layer, ...]) -> tuple[list[Tensor], Tensor | None]:
        """The hidden states of these layers, `(rows, length, hidden)`, and the mask `(rows, length)`."""
        values = {k: v for k, v in batch.items() if k not in self.left_out}
        mask = values.get("attention_mask")
        if self.decoder:
            if "decoder_input_ids" not in values:
                raise ConfigError("stack='decoder' needs decoder_input_ids in each batch.")
            mask = values.get("decoder_attention_mask")
        if self.positions and mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all()):
            values.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
        if "use_cache" in self.takes:
            values["use_cache"] = False
        if set(layers) != {LAST} or self.decoder:
            named = inspect.signature(original_class(self.module).forward).parameters
            if "output_hidden_states" not in named and not any(p.kind is p.VAR_KEYWORD for p in named.values()):
                raise self._none("hidden_states")
            values["output_hidden_states"] = True
        return self._states(self.module(**values), layers), mask

    def _states(self, output: Any, layers: tuple[Layer, ...]) -> list[Tensor]:
        name = "decoder_hidden_states" if self.decoder else "hidden_states"
        found: tuple[Any, ...] = getattr(output, name, None) or ()
        # T5 with its output layer returns the decoder's states only; the last one comes after the last norm.
        last: Any = getattr(output, "last_hidden_state", found[-1] if self.decoder and found else None)
        if LAST in layers and not isinstance(last, Tensor):
            raise UnsupportedError(
                f"A {type(self.module).__name__} returns no last_hidden_state, so it has no features. Pass the part "
                "of the model that returns one, such as model.vision_model."
            )
        numbers = [n for n in layers if isinstance(n, int)]
        if numbers and not all(isinstance(state, Tensor) for state in found or (None,)):
            raise self._none(name)
        wrong = [n for n in numbers if not -len(found) <= n < len(found)]
        if wrong:
            raise ConfigError(f"layer = {wrong[0]} does not exist. Available: -{len(found)} (embeddings) to -1.")
        return [found[n] if isinstance(n, int) else last for n in layers]

    def _none(self, name: str) -> UnsupportedError:
        return UnsupportedError(f"A {type(self.module).__name__} returns no {name}. Use layer={LAST!r}.")


def _parameters(module: nn.Module) -> set[str]:
    """Names of the arguments of the module's own forward."""
    return set(inspect.signature(original_class(module).forward).parameters) - {"self", "args", "kwargs"}
