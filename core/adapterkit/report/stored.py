"""Reports on adapters by their files alone: `ak.write_report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from adapterkit.disk import Base, names_of, open_adapter, stand_in
from adapterkit.errors import ConfigError
from adapterkit.files import local_path
from adapterkit.report.document import Report
from adapterkit.report.live import norm_of
from adapterkit.report.sources import Source, of_adapter


@torch.no_grad()
def write_report(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Report:
    """Write a page to look at, by adapters' files alone: what each changes, and whether they can be merged.

    The page is one HTML file without script that loads nothing. The result prints as its verdicts. Factors are made
    from the files' tensors, layer by layer, and no dense matrix is.

    Args:
        sources: adapter folders, hub ids, or files of other programs.
        out: the file to write; one that is there is replaced.
        base: the model's folder, hub id, or the model itself. Where its weights are at hand (a folder with
            safetensors, or a model in memory), sizes are relative to them; each target's weight is then read once.
            Needed where the files do not tell the sizes of the layers.
        names: what the adapters are called; by default their folders' names.
        title: the page's.

    Raises:
        ConfigError: no source, or names that are not one for each.
        CheckpointError: something is no adapter, or damaged, or does not tell the sizes of its layers.
        StateError: values that are not finite.
        UnsupportedError: matplotlib is not installed (the extra `report`).
        SaveError: the page cannot be written.
    """
    if isinstance(sources, str | Path):
        raise ConfigError(f"write_report takes a list of adapters, [{str(sources)!r}], not one.")
    called = names_of(sources) if names is None else list(names)
    if len(called) != len(sources):
        raise ConfigError(f"names= has {len(called)} names for {len(sources)} adapters; give one for each.")
    local_path(out)  # what is no path is refused before the work
    known = Base.of(base)
    norms = _norms(known)
    report = Report.of([_stored(s, name, known, norms) for s, name in zip(sources, called, strict=True)], title)
    report.save(out)
    return report


def _stored(place: str | Path, name: str, base: Base | None, norms: Callable[[str], float | None]) -> Source:
    opened = open_adapter(place, name, base=base, keep_names=True)
    adapter, _ = opened.adapter(stand_in([opened]))
    return dataclasses.replace(of_adapter(adapter, norms, str(opened.files.folder)), config=opened.config)


def _norms(base: Base | None) -> Callable[[str], float | None]:
    """The norm of the base's weight at a path, each worked out once."""

    @cache
    def found(path: str) -> float | None:
        weight = None if base is None else base.parameter(path, "weight")
        return None if weight is None else norm_of(weight)

    return found
