"""Features: pooled hidden states of a model as it is adapted now, whatever its head."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from adapterkit import pooling as pool
from adapterkit.adapted import original_class
from adapterkit.adapters import inner_model
from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.files import local_path
from adapterkit.pooling import Pooling
from adapterkit.streaming import TensorWriter

Stack = Literal["encoder", "decoder"]
Layer = int | Literal["last"]
Batches = Iterable[Mapping[str, Any]]
KEY = "features"
LAST = "last"
# transformers 5 records hidden states by hooks that it leaves on the model, and marks the model that has them.
_CAPTURING = "_output_capturing_hooks_installed"


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
    """Hidden states of a transformers model, with the adapters that are active or merged now, and no head.

    Runs in eval mode without gradients; every module's mode is given back. What `attention_mask` is 0 for is never
    pooled. A decoder's rows may be padded left or right, with the same result.

    Args:
        batches: mappings of tensors, as the model takes them; labels and the like are left out.
        layer: `"last"`: the body's output, `last_hidden_state`. A number: the index into the `hidden_states` that
            transformers gives; `0` is the embeddings, and `-1` the output of the last layer, which many models (ViT,
            CLIP, Whisper) give before their last norm. A list: several.
        pooling: over the places that are no padding: `"mean"`; `"cls"`, the first; `"last"`, the last; or `None`: every
            place as it is, zeros where there is padding. Images have all their places, a class token included; of
            feature maps `(channels, height, width)` each pixel is one.
        stack: of an encoder-decoder. `"encoder"` runs that alone; `"decoder"` needs `decoder_input_ids` and counts
            `decoder_attention_mask`.
        out: a safetensors file to stream to, for what would not fit in memory; it appears when it is complete.

    Returns:
        On the CPU, float32 (float64 of a float64 model), rows in the order of the batches: `(rows, hidden)`;
        with a list `(rows, layers, hidden)`; without pooling `(rows, length, hidden)` or `(rows, layers, length,
        hidden)`, shorter batches filled up with zeros on the right. With `out` the path of the file, whose one
        tensor, `"features"`, is that.

    Raises:
        ConfigError: no batches, a layer or a pooling that does not exist, a row that is all padding.
        UnsupportedError: a model without a sequence of hidden states.
    """
    pool.check(pooling)
    layers = _layers(layer)
    inner = inner_model(model)
    parts = _pooled(_Body(inner, stack), batches, layers, pooling, progress)
    if isinstance(layer, int | str):
        parts = (part[:, 0] for part in parts)
    with _evaluating(inner):
        if out is None:
            return pool.stack_rows(list(parts))
        with TensorWriter(local_path(out), KEY) as writer:
            for part in parts:
                writer.append(part)
        return writer.path


def _layers(layer: Layer | Sequence[Layer]) -> tuple[Layer, ...]:
    layers = (layer,) if isinstance(layer, int | str) else tuple(layer)
    if not layers or any(n != LAST and (isinstance(n, bool) or not isinstance(n, int)) for n in layers):
        raise ConfigError(f"layer = {layer!r} must be {LAST!r}, a layer's number, such as -1, or a list of them.")
    return layers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the length of the block; afterwards each module has its own mode and hooks again."""
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
    body: _Body, batches: Batches, layers: tuple[Layer, ...], pooling: Pooling | None, progress: bool
) -> Iterator[Tensor]:
    """`(rows, layers, ...)` of each batch."""
    from tqdm import tqdm

    for number, batch in enumerate(tqdm(batches, desc="features", unit="batch", disable=not progress)):
        if not isinstance(batch, Mapping):
            raise ConfigError(f"Batch {number} is a {type(batch).__name__}; it must be a mapping of tensors by name.")
        states, mask = body.run(batch, layers)
        pooled = [pool.pool(state, mask, pooling, number) for state in states]
        if len({tuple(p.shape) for p in pooled}) > 1:
            shapes = ", ".join(f"{n}: {tuple(p.shape[1:])}" for n, p in zip(layers, pooled, strict=True))
            raise ConfigError(f"The layers have different sizes ({shapes}); ask for them one by one.")
        yield torch.stack(pooled, dim=1)


class _Body:
    """The part of a model that makes hidden states, and what it is given."""

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        if stack not in ("encoder", "decoder"):
            raise ConfigError(f"stack = {stack!r} must be 'encoder' or 'decoder'.")
        config = getattr(model, "config", None)
        body: Any = getattr(model, "base_model", model)
        if getattr(model, "main_input_name", None) not in {None, *_parameters(body)}:
            body = model  # what is called its base is a stack of layers, without the embeddings
        both = bool(getattr(config, "is_encoder_decoder", False)) and callable(getattr(body, "get_encoder", None))
        self.decoder = both and stack == "decoder"
        self.module: nn.Module = body if self.decoder or not both else body.get_encoder()
        self.takes = _parameters(self.module)
        self.left_out = (_parameters(model) | _parameters(body)) - self.takes
        # A causal model counts its positions from the first place, padding or not, if it is not told otherwise.
        causal = any(getattr(module, "is_causal", False) is True for module in self.module.modules())
        self.positions = causal and not both and "position_ids" in self.takes
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(self, batch: Mapping[str, Any], layers: tuple[Layer, ...]) -> tuple[list[Tensor], Tensor | None]:
        """The hidden states of these layers, `(rows, length, hidden)`, and the mask `(rows, length)`."""
        values = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        values = {k: v for k, v in values.items() if k not in self.left_out}
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
        # T5 with its output layer tells the decoder's states only; the last of them is behind the last norm.
        last: Any = getattr(output, "last_hidden_state", found[-1] if self.decoder and found else None)
        if LAST in layers and not isinstance(last, Tensor):
            raise UnsupportedError(
                f"A {type(self.module).__name__} gives no last_hidden_state, so it has no features. Give the part "
                "of the model that does, such as model.vision_model."
            )
        numbers = [n for n in layers if isinstance(n, int)]
        if numbers and not all(isinstance(state, Tensor) for state in found or (None,)):
            raise self._none(name)
        wrong = [n for n in numbers if not -len(found) <= n < len(found)]
        if wrong:
            raise ConfigError(f"layer = {wrong[0]} does not exist: there are -{len(found)} (embeddings) to -1.")
        return [found[n] if isinstance(n, int) else last for n in layers]

    def _none(self, name: str) -> UnsupportedError:
        return UnsupportedError(f"A {type(self.module).__name__} gives no {name}: take layer={LAST!r}.")


def _parameters(module: nn.Module) -> set[str]:
    """Names of the arguments of the module's own forward."""
    return set(inspect.signature(original_class(module).forward).parameters) - {"self", "args", "kwargs"}
