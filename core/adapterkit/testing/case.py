"""What checks work with: a config under test, and models that it has been put on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import AdapterConfig, AdapterLayer, Method, default_registry
from adapterkit.errors import AdapterError, PluginError
from adapterkit.testing.probes import PROBES, TARGETS, Probe

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""How far two ways to compute one output may be apart, as a share of its largest entry."""


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
    expect(found.shape == expected.shape, f"{what}: expected shape {_size(expected)}, found {_size(found)}.")
    same = torch.equal(found.nan_to_num(), expected.nan_to_num())
    expect(same, f"{what}: expected the same bits; {_apart(found, expected)}.")


def expect_close(found: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Raise `Broken` unless both have one shape and differ by no more than the dtype's tolerance."""
    tolerance = TOLERANCES[dtype or expected.dtype]
    expect(found.shape == expected.shape, f"{what}: expected shape {_size(expected)}, found {_size(found)}.")
    finite = bool(torch.isfinite(found).all())
    expect(finite, f"{what}: expected finite values, found {(~torch.isfinite(found)).sum().item()} that are not.")
    largest = expected.abs().max().item()
    near = _distance(found, expected) <= tolerance * max(largest, 1e-6)
    expect(near, f"{what}: expected equality within {tolerance:g} of {largest:.3g}; {_apart(found, expected)}.")


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are apart by more than rounding."""
    return _distance(one, other) > 10 * TOLERANCES[one.dtype] * max(one.abs().max().item(), 1e-6)


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def _apart(one: Tensor, other: Tensor) -> str:
    return f"they differ by up to {_distance(one, other):.3g}"


def _size(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


class Subject:
    """One probe model with adapters of the config under test.

    Attributes:
        plain: the bare model's output.
        before: the bare model's tensors, copied.
    """

    def __init__(self, config: AdapterConfig, probe: Probe, dtype: torch.dtype, names: tuple[str, ...]) -> None:
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
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(seed).backward()
            optimizer.step()
        optimizer.zero_grad()
        return self

    def layer(self, path: str, name: str | None = None) -> AdapterLayer:
        """The adapter layer at a target."""
        found = self.model.get_submodule(f"{path}.adapters.{name or self.names[0]}")
        assert isinstance(found, AdapterLayer)
        return found

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
        config: as its author gave it, but for the targets, which are the probes' `up` and `down`.
        now: the subject that is at work, for messages.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.given = config
        self.config = self._on(TARGETS)
        self.now: Subject | None = None

    @property
    def method(self) -> Method:
        """The method under test."""
        return default_registry.method_of(self.config)

    def subject(self, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("a",)) -> Subject:
        """The config on the first layer kind that it takes: linear layers, for most methods."""
        return next(self.subjects(dtype, names))

    def subjects(
        self,
        dtype: torch.dtype = torch.float32,
        names: tuple[str, ...] = ("a",),
        *,
        where: Callable[[Subject], bool] = lambda subject: True,
        faults: bool = False,
    ) -> Iterator[Subject]:
        """The config on every layer kind that it takes.

        Args:
            where: which of them, by their first layers.
            faults: raise if the plugin fails at one of them; else that kind is left out, since the check for
                layer kinds says so.

        Raises:
            AdapterError: it takes none.
            NotApplicable: none is as `where` says.
        """
        refusal: AdapterError | None = None
        taken = yielded = False
        for probe in PROBES:
            try:
                subject = Subject(self.config, probe, dtype, names)
            except AdapterError as error:
                if faults and isinstance(error, PluginError):
                    raise Broken(f"On {probe.name} layers: {error}") from error
                refusal = refusal or error
                continue
            taken = True
            if where(subject):
                yielded = True
                self.now = subject
                yield subject
                self.now = None
        if not taken and refusal is not None:
            raise refusal
        if not yielded:
            raise NotApplicable(
                "the method takes no layer that this check is about (it may be for additive methods only)"
            )

    def additive(self, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("a",)) -> Iterator[Subject]:
        """`subjects` where the adapter layers are additive."""
        return self.subjects(dtype, names, where=lambda s: all(s.layer(path).additive for path in TARGETS))

    def _on(self, targets: tuple[str, ...]) -> AdapterConfig:
        return self.given.replace(
            target_modules=targets,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=None,
        )

    def at(self, path: str, dtype: torch.dtype = torch.float32) -> Subject:
        """As `subject`, with one of the two targets alone."""
        probe = self.subject(dtype).probe
        subject = Subject(self._on((path,)), probe, dtype, ("a",))
        self.now = subject
        return subject

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that is gone afterwards."""
        with TemporaryDirectory(prefix="adapterkit-check-") as path:
            yield Path(path) / "adapter"
