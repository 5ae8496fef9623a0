"""Equality with PEFT's own class of a method."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import adapterkit as ak
from adapterkit.contract import AdapterConfig
from adapterkit.errors import AdapterWarning, UnsupportedError
from adapterkit.testing.case import PROBES, TARGETS, Broken, expect
from adapterkit.testing.kit import CheckFailure, describe


def check_peft(
    config: AdapterConfig,
    peft_config: Any,
    *,
    model: Callable[[], nn.Module] | None = None,
    inputs: Tensor | Mapping[str, Any] | None = None,
) -> None:
    """Check that a method is PEFT's: each reads the other's files, and they merge and train alike.

    PEFT makes an adapter from `peft_config` on a small model, with random numbers added to its parameters. Its file is
    loaded here and gives its outputs within 1e-5 of the largest. Saved here, PEFT reads it back with those outputs.
    Merged here, the outputs stay. Three steps of AdamW on equal batches leave both within 1e-4. `config` is added as
    well and must have as many parameters as PEFT's adapter.

    Args:
        config: the method's config. Its `target_modules` count with `model`; without, both layers are adapted.
        peft_config: a config of PEFT's own class, with the same fields.
        model: makes the model; two linear layers of 16 and 24 features, `up` and `down`, if `None`.
        inputs: what it is called with, a tensor or keyword arguments; needed with `model`. Of an output of
            transformers, `logits` or the first tensor counts.

    Raises:
        CheckFailure: says what differs, and by how much.
        ImportError: PEFT is not installed.
    """
    peft_config = copy.deepcopy(peft_config)
    if model is None:
        model, inputs = PROBES[0].build, PROBES[0].inputs()
        config, peft_config.target_modules = config.replace(target_modules=TARGETS, modules_to_save=None), set(TARGETS)
    assert inputs is not None, "check_peft needs inputs= beside model="
    try:
        with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
            torch.manual_seed(0)
            _compare(config, peft_config, model, inputs, Path(folder))
    except Broken as error:
        raise CheckFailure(f"check_peft failed for {describe(config)}: {error}") from error.__cause__


def _compare(  # noqa: PLR0915 - one comparison after the other
    config: AdapterConfig, peft_config: Any, make: Callable[[], nn.Module], inputs: Any, folder: Path
) -> None:
    import peft

    def call(model: nn.Module) -> Tensor:
        found: Any = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        found = getattr(found, "logits", found)
        return found if isinstance(found, Tensor) else next(t for t in tree_leaves(found) if isinstance(t, Tensor))

    def out(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return call(model)

    theirs: Any = peft.get_peft_model(make(), peft_config).eval()
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wanted = out(theirs)
    bare = out(make().eval())
    changes = bare.shape != wanted.shape or _apart(bare, wanted) > 1e-3
    expect(changes, "PEFT's adapter changes no output, so nothing could be compared.")
    theirs.save_pretrained(folder / "theirs")

    ours = make().eval()
    adapters = ak.attach(ours)
    report = adapters.load(folder / "theirs", name="a", trainable=True)
    expect(report.ok, f"expected PEFT's file to fit; {report}.")
    _near(out(ours), wanted, 1e-5, "PEFT's file loaded here")
    adapters.save("a", folder / "ours")
    again: Any = peft.PeftModel.from_pretrained(make(), folder / "ours").eval()
    _near(out(again), wanted, 1e-5, "the file saved here, loaded by PEFT")
    with contextlib.suppress(UnsupportedError):
        adapters.merge("a")
        _near(out(ours), wanted, 1e-5, "the outputs after merging here")
        adapters.unmerge()
        adapters.activate("a")

    fresh = ak.attach(make())
    fresh.add("a", config)
    own, numbers = (sum(p.numel() for p in parameters) for parameters in (fresh.parameters("a"), trained))
    expect(own == numbers, f"expected {numbers} trained numbers, as PEFT has; {describe(config)} has {own}.")
    target = torch.randn(wanted.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # the method's own step and penalty are left out
        for model, parameters in ((theirs, trained), (ours, list(adapters.parameters("a")))):
            optimizer = torch.optim.AdamW(parameters, lr=1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                ((call(model) - target) ** 2).mean().backward()
                optimizer.step()
    _near(out(ours), out(theirs), 1e-4, "the outputs after three steps of training")


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def _near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    expect(found.shape == wanted.shape, f"{what}: expected shape {tuple(wanted.shape)}, found {tuple(found.shape)}.")
    apart = _apart(found, wanted)
    expect(apart <= tolerance, f"{what}: expected PEFT's within {tolerance:g}; they differ by {apart:.3g}.")
