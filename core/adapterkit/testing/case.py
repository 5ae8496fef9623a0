"""What the checks use: small models of every layer kind, and the config under test on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import AdapterConfig, Method, default_registry
from adapterkit.errors import AdapterError, AdapterWarning, PluginError

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""How much two ways to compute one output may differ, as a share of its largest entry."""

TARGETS = ("up", "down")
ROWS, PLACES, WIDTH, HIDDEN = 3, 5, 16, 24


class Broken(Exception):
    """The contract does not hold; the message says where, what was expected and what was found."""


class NotApplicable(Exception):
    """The check says nothing about this config; the message says why."""


def expect(holds: bool, sentence: str) -> None:
    """Raise `Broken` with `sentence` unless `holds`."""
    if not holds:
        raise Broken(sentence)


def expect_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise `Broken` unless both have the same dtype, shape and bits."""
    expect(found.dtype == expected.dtype, f"{what}: expected dtype {expected.dtype}, found {found.dtype}.")
    _expect_shape(found, expected, what)
    if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
        raise Broken(f"{what}: expected the same bits; they differ by up to {_distance(found, expected):.3g}.")


def expect_close(found: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Raise `Broken` unless both have one shape and differ by no more than the dtype's tolerance."""
    tolerance = TOLERANCES[dtype or expected.dtype]
    _expect_shape(found, expected, what)
    odd = int((~torch.isfinite(found)).sum())
    expect(not odd, f"{what}: expected finite values, found {odd} that are not.")
    largest, apart = expected.abs().max().item(), _distance(found, expected)
    near = apart <= tolerance * max(largest, 1e-6)
    expect(near, f"{what}: expected equality within {tolerance:g} of {largest:.3g}; they differ by up to {apart:.3g}.")


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are apart by more than rounding."""
    return _distance(one, other) > 10 * TOLERANCES[one.dtype] * max(one.abs().max().item(), 1e-6)


def _expect_shape(found: Tensor, expected: Tensor, what: str) -> None:
    shapes = tuple(found.shape), tuple(expected.shape)
    expect(shapes[0] == shapes[1], f"{what}: expected shape {shapes[1]}, found {shapes[0]}.")


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


class ProbeModel(nn.Module):
    """`rest(down(tanh(up(x))))`; for embeddings, which read row numbers, `rest(up(x) + down(x))`.

    Of a block that returns a tuple, the first entry counts.
    """

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.reads_rows = isinstance(up, nn.Embedding)
        self.rest = nn.Linear(HIDDEN if self.reads_rows else WIDTH, 4)
        self.rest.bias.requires_grad_(False)
        self.channels_first = isinstance(up, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, ..., 4)`."""

        def call(module: nn.Module, x: Tensor) -> Tensor:
            out: Any = module(x)
            return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

        hidden = call(self.up, x) + call(self.down, x) if self.reads_rows else call(self.down, call(self.up, x).tanh())
        out: Tensor = self.rest(hidden.movedim(1, -1) if self.channels_first else hidden)
        return out


@dataclass(frozen=True)
class Probe:
    """One layer kind to try.

    Attributes:
        name: what messages call it.
        shape: of the input.
        layer: makes a layer from the numbers of its input and output channels.
        up, down: what else the two layers of the model take; without `down`, both take the same.
        channels: of the model's input, between its layers, and of its output.
    """

    name: str
    shape: tuple[int, ...]
    layer: Callable[..., nn.Module]
    up: Mapping[str, Any] | None = None
    down: Mapping[str, Any] | None = None
    channels: tuple[int, int, int] = (WIDTH, HIDDEN, WIDTH)

    def build(self, dtype: torch.dtype = torch.float32) -> ProbeModel:
        """The model in eval mode, with the same weights at each call, whatever the global random state."""
        first, middle, last = self.channels
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed takes longer than the model
            up = self.layer(first, middle, **(self.up or {}))
            down = self.layer(middle, last, **((self.up if self.down is None else self.down) or {}))
            return ProbeModel(up, down).to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same input at each call; row numbers for embeddings."""
        generator = torch.Generator().manual_seed(1)
        if self.name == "Embedding":
            return torch.randint(WIDTH, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


def transposed(in_features: int, out_features: int) -> nn.Module:
    """A `Conv1D` of transformers, which initialises its weight with smaller numbers."""
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(out_features, in_features)
    nn.init.normal_(layer.get_parameter("weight"), std=in_features**-0.5)
    nn.init.normal_(layer.get_parameter("bias"), std=0.1)
    return layer


class Block(nn.Module):
    """A module without a weight of its own, which returns a tuple: a linear layer, a nonlinearity, and its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(rows, out)` and the input."""
        return torch.relu(self.linear(x)), x


_IMAGE = (ROWS, WIDTH, 4, 4)
PROBES: Sequence[Probe] = (
    Probe("Linear", (ROWS, WIDTH), nn.Linear),
    Probe("Linear without bias", (ROWS, PLACES, WIDTH), nn.Linear, {"bias": False}),
    Probe("Conv1D (transformers)", (ROWS, PLACES, WIDTH), transposed),
    Probe(
        "Conv1d",
        (ROWS, WIDTH, PLACES),
        nn.Conv1d,
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "bias": False},
    ),
    Probe(
        "Conv2d",
        _IMAGE,
        nn.Conv2d,
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
    ),
    Probe(
        "Conv2d with groups",
        _IMAGE,
        nn.Conv2d,
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 1, "groups": 4},
    ),
    Probe("Conv3d", (ROWS, WIDTH, 2, 3, 3), nn.Conv3d, {"kernel_size": (1, 2, 2)}, {"kernel_size": 1}),
    # Both tables are read with the input.
    Probe(
        "Embedding", (ROWS, PLACES), lambda _, __, **more: nn.Embedding(WIDTH, HIDDEN, **more), {"padding_idx": 0}, {}
    ),
)
# For methods that take any module.
MODULES = (
    Probe("Sequential", (ROWS, WIDTH), lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Tanh())),
    Probe("Block", (ROWS, PLACES, WIDTH), Block),
)
# What people do to whole models is tried on these: a line, a window, a table and a block.
FEW = ("Linear", "Conv2d", "Embedding", "Block")


class Subject:
    """One probe model with adapters of the config under test.

    Attributes:
        plain: the bare model's output.
        before: the bare model's tensors, copied.
    """

    def __init__(self, config: AdapterConfig, probe: Probe, dtype: torch.dtype, *names: str) -> None:
        self.config, self.probe, self.dtype, self.names = config, probe, dtype, names
        self.model: nn.Module = probe.build(dtype)
        self.inputs = probe.inputs(dtype)
        self.before = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.plain = self.out()
        self.adapters = ak.attach(self.model)
        for name in names:
            self.adapters.add(name, config)

    def __str__(self) -> str:
        return f"{self.probe.name} layers in {str(self.dtype).removeprefix('torch.')}"

    def out(self, model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The model's output, without a graph."""
        with torch.no_grad():
            return (self.model if model is None else model)(self.inputs)

    def loss(self, seed: int = 0) -> Tensor:
        """A loss with a graph: the distance to a random target."""
        out = self.model(self.inputs)
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
        loss: Tensor = ((out - target) ** 2).float().mean()
        return loss

    def train(self, name: str | None = None, *, seed: int = 0, steps: int = 4) -> Subject:
        """Activate one adapter (the first) and train it for some steps, so that it changes the outputs."""
        name = name or self.names[0]
        self.adapters.activate(name)
        optimizer = torch.optim.Adam(list(self.adapters.parameters(name)), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)  # the method's own step and penalty are left out
            for _ in range(steps):
                optimizer.zero_grad()
                self.loss(seed).backward()
                optimizer.step()
        optimizer.zero_grad()
        return self

    @torch.no_grad()
    def shake(self) -> Subject:
        """Add random numbers to every parameter of the first adapter, which takes no forward."""
        generator = torch.Generator().manual_seed(2)
        for parameter in self.adapters.parameters(self.names[0]):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.2)
        return self

    def layer(self, path: str, name: str | None = None) -> Any:
        """The adapter layer at a target."""
        return self.model.get_submodule(f"{path}.adapters.{name or self.names[0]}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's tensors under the keys of its file."""
        return {key: tensor.clone() for key, tensor in self.adapters.state_dict(name).items()}

    def fresh(self) -> tuple[nn.Module, ak.Adapters]:
        """The same bare model anew, and its adapters."""
        model = self.probe.build(self.dtype)
        return model, ak.attach(model)


class Case:
    """A config under test.

    Attributes:
        given: the config as its author gave it.
        config: the same, with the probes' `up` and `down` as targets.
        now: the subject that is at work, for messages.
        results: what each check that was run raised.
        known: names of checks that are known to fail.
    """

    def __init__(self, given: AdapterConfig, known: frozenset[str] = frozenset()) -> None:
        self.given, self.known = given, known
        self.now: Subject | None = None
        self.results: dict[Callable[[Case], None], Exception | None] = {}
        self.config = given.replace(
            target_modules=TARGETS,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=None,
        )

    @property
    def method(self) -> Method:
        """The method under test."""
        return default_registry.method_of(self.given)

    def subjects(
        self, *dtypes: torch.dtype, names: tuple[str, ...] = ("a",), few: bool = False, additive: bool = False
    ) -> Iterator[Subject]:
        """The config on every layer kind that it takes, in each of the dtypes, float32 by default.

        Args:
            names: of the adapters that are added.
            few: on `FEW` of the kinds, or on the first that it takes.
            additive: on those alone where both layers are additive.

        Raises:
            AdapterError: it takes none.
            NotApplicable: none of the layers is additive.
        """
        refusal: AdapterError | None = None
        taken = yielded = False
        for dtype in dtypes or (torch.float32,):
            for probe in (*PROBES, *(MODULES if self.method.any_module else ())):
                if few and taken and probe.name not in FEW:
                    continue
                try:
                    self.now = Subject(self.config, probe, dtype, *names)
                except PluginError as error:
                    raise Broken(f"On {probe.name} layers: {error}") from error
                except AdapterError as error:
                    refusal = refusal or error
                    continue
                taken = True
                layers = (self.now.layer(path) for path in TARGETS)
                if not additive or all(isinstance(x, ak.LowRankLayer | ak.DenseLayer) for x in layers):
                    yielded = True
                    yield self.now
                self.now = None
        if refusal is not None and not taken:
            raise refusal
        if not yielded:
            raise NotApplicable("the method takes no layer that this check is about: it is for additive methods")


def changed_fields(config: AdapterConfig) -> list[str]:
    """The fields that are not at their defaults."""
    plain = type(config)()
    return [f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
