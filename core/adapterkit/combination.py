"""Combination: new adapters out of those there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapterkit.combine import Space
from adapterkit.combiners import MajoritySign
from adapterkit.merger import Merger
from adapterkit.mixture import Choices, Workspace, check_same_base, check_sources, mix
from adapterkit.reports import CombineReport


class Combination(Merger):
    """The part of `Adapters` that combines and converts."""

    @torch.inference_mode(False)
    def combine(  # noqa: PLR0913 - three independent choices and what they need
        self,
        name: str,
        sources: Mapping[str, float],
        *,
        method: str = "linear",
        space: Space = "delta",
        rank: int | None = None,
        energy: float | None = None,
        to: str = "lora",
        heads: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
        seed: int | None = None,
        isotropize: bool = False,
        same_base: bool = False,
    ) -> CombineReport:
        """Add an adapter that is a combination of others. It is not activated.

        With `method="linear"` in delta space the result is exactly `sum of w_i dW_i`, whatever the ranks and the
        (additive) methods of the sources. A target that only some sources have is combined from those.

        Args:
            name: of the new adapter.
            sources: the adapters and their weights; negative ones subtract.
            method: `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`, `"tsv"`, or what an
                extension adds.
            space: `"delta"` works on dW itself; `"core"` on its coordinates in the sources' common subspace (small
                matrices, no dense one); `"factors"` on A and B apart, which is what PEFT does.
            rank, energy: truncate the result optimally, to a rank or to a share of the squared singular
                values. A layer too small for the rank gets the largest that it can have; the report lists these.
                Neither: exact, ranks add up.
            to: the method of the result; one with the hook `from_factors`.
            heads: what becomes of the heads: an adapter's name, `"average"`, `"concat"` or `"drop"`.
            density, majority_sign_method, seed: for the methods that prune, elect signs and draw.
            isotropize: give the result's singular values their mean.
            same_base: combine even if the adapters' configs name different base models.

        Raises:
            ConfigError: arguments that make no sense; heads and no choice; adapters of different bases.
            UnknownNameError: no such adapter, method or space.
            UnsupportedError: an adapter whose change has no low-rank form.
            StateError: an adapter, or a result, with values that are not finite.
        """
        self._check_new_name(name)
        check_sources(sources)
        records = [self._record(source) for source in sources]
        self._check_present("combine", *sources)
        if not same_base:
            check_same_base(records)
        choices = Choices(
            method=method,
            space=space,
            rank=rank,
            energy=energy,
            to=to,
            heads=heads,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=seed,
            isotropize=isotropize,
        )
        weights = [float(weight) for weight in sources.values()]
        with self._as_wholes(records):
            record, report = mix(name, records, weights, choices, Workspace(self.model, self._active))
        self._install(record)
        return report

    def convert(
        self, source: str, *, to: str, name: str, rank: int | None = None, energy: float | None = None
    ) -> CombineReport:
        """Add the same adapter in another method's form: exact, unless `rank` or `energy` truncates it.

        LoHa becomes LoRA of rank `r * r`, VeRA LoRA of its own rank, so that what knows only LoRA can serve them.

        Raises:
            UnsupportedError: the source has no low-rank form, or `to` cannot be made from one.
        """
        heads = source if self._record(source).heads else None
        return self.combine(name, {source: 1.0}, to=to, rank=rank, energy=energy, heads=heads)
