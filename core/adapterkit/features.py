"""Features: pooled hidden states of a model as it is adapted now, whatever its head."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args, overload

import torch
from torch import Tensor, nn

from adapterkit.combining import working
from adapterkit.errors import ConfigError, SaveError, UnsupportedError
from adapterkit.files import as_bytes, local_path, umask
from adapterkit.forward import original_class
from adapterkit.model import inner_model

# The header stands before the data and holds the final size. The format allows blanks behind its JSON, so room is
# left for it and it is written last.
_HEADER_BYTES = 248
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


class TensorWriter:
    """A safetensors file with one tensor, whose number of rows is not known before the end.

    A context: the file appears under its name when the block ends, and not at all if it raises.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._rows, self._dtype = 0, torch.float32
        self._shape: tuple[int, ...] | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error}.") from error
        self._file, self._temporary = os.fdopen(handle, "wb"), Path(name)
        self._file.write(b" " * (8 + _HEADER_BYTES))
        return self

    def append(self, part: Tensor) -> None:
        """Write the next rows, `(rows, ...)`.

        Raises:
            ConfigError: rows of another shape than those before.
            SaveError: they cannot be written.
        """
        assert self._file is not None
        shape = tuple(part.shape[1:])
        if self._shape is None:
            self._shape, self._dtype = shape, part.dtype
        if shape != self._shape:
            raise ConfigError(
                f"Streaming needs rows of one shape; there are {self._shape} and {shape}. Pad every batch to one "
                "length (padding='max_length'), or pool."
            )
        try:
            self._file.write(as_bytes(part))
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error}.") from error
        self._rows += len(part)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._finish(self._file)
        except OSError as problem:
            raise SaveError(f"{self.path} cannot be written: {problem}.") from problem
        finally:
            self._file.close()
            with contextlib.suppress(FileNotFoundError):  # it has its name now
                self._temporary.unlink()

    def _finish(self, file: BinaryIO) -> None:
        if self._shape is None:
            raise ConfigError("There are no batches. A generator can be read only once.")
        end = file.tell() - 8 - _HEADER_BYTES
        entry = {"dtype": _DTYPES[self._dtype], "shape": [self._rows, *self._shape], "data_offsets": [0, end]}
        header = json.dumps({"__metadata__": {"format": "pt"}, self.key: entry}).encode()
        file.seek(0)
        file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        file.flush()
        os.fsync(file.fileno())
        self._temporary.chmod(0o666 & ~umask())
        self._temporary.replace(self.path)


Pooling = Literal["mean", "cls", "last"]


def check_pooling(pooling: object) -> None:
    """Raise `ConfigError` for a pooling that does not exist."""
    if pooling is not None and pooling not in get_args(Pooling):
        raise ConfigError(f"pooling = {pooling!r} must be one of {', '.join(map(repr, get_args(Pooling)))} or None.")


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling | None, number: int) -> Tensor:
    """Pool one batch.

    Args:
        hidden: `(rows, length, hidden)`, or a feature map `(rows, hidden, height, width)`.
        mask: `(rows, length)`, 0 where there is padding; `None`: there is none.
        number: the batch's, for messages.

    Returns:
        `(rows, hidden)`, or `(rows, length, hidden)` without pooling; on the CPU, float32 or float64.
    """
    if hidden.dim() == 4:
        if pooling in ("cls", "last"):
            raise ConfigError(f"pooling = {pooling!r} has no meaning for a feature map; take 'mean'.")
        hidden = hidden.flatten(2).transpose(1, 2)
    if hidden.dim() != 3:
        raise UnsupportedError(f"Hidden states of shape {tuple(hidden.shape)} are no sequence that can be pooled.")
    hidden = working(hidden)
    real = _real(hidden, mask, number)
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, real.int().argmax(1)].cpu()
    if pooling == "last":
        return hidden[rows, real.shape[1] - 1 - real.flip(1).int().argmax(1)].cpu()
    hidden = hidden.masked_fill(~real[..., None], 0.0)  # not a product: 0 times inf is nan
    return (hidden if pooling is None else hidden.sum(1) / real.sum(1, keepdim=True)).cpu()


def _real(hidden: Tensor, mask: Tensor | None, number: int) -> Tensor:
    """Which places are no padding, `(rows, length)`."""
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:2]:
        raise UnsupportedError(
            f"Batch {number}: the mask has shape {tuple(mask.shape)}, the hidden states {tuple(hidden.shape)}, so it "
            "is not known which of them are padding."
        )
    real = mask.to(hidden.device) != 0
    empty = (~real.any(1)).nonzero()
    if len(empty):
        raise ConfigError(f"Batch {number}: row {int(empty[0])} is all padding.")
    return real


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """The batches' `(rows, ..., length, hidden)` one under another; shorter ones are filled up with zeros."""
    if not parts:
        raise ConfigError("There are no batches. A generator can be read only once.")
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1 or parts[0].dim() < 3:
        return torch.cat(list(parts))
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts])


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
    check_pooling(pooling)
    layers = _layers(layer)
    inner = inner_model(model)
    parts = _pooled(_Body(inner, stack), batches, layers, pooling, progress)
    if isinstance(layer, int | str):
        parts = (part[:, 0] for part in parts)
    with _evaluating(inner):
        if out is None:
            return stack_rows(list(parts))
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
        pooled = [pool(state, mask, pooling, number) for state in states]
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
