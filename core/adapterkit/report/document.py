"""The report as an object: shown in a notebook, saved as one HTML file, printed as its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError, SaveError
from adapterkit.files import appearing, local_path
from adapterkit.report.curves import check_matplotlib
from adapterkit.report.findings import Findings, measure
from adapterkit.report.grid import Grid
from adapterkit.report.page import render
from adapterkit.report.sources import Source
from adapterkit.report.verdict import Verdict, verdicts


@dataclass(frozen=True)
class Report:
    """A report on one or several adapters. Prints as its verdicts; a notebook shows the page.

    Attributes:
        title: the page's.
        verdicts: which layers matter, which rank is enough, and for each pair whether it can be merged.
        findings: every number in it.
    """

    title: str
    verdicts: tuple[Verdict, ...]
    findings: Findings
    _grid: Grid

    @classmethod
    def of(cls, sources: Sequence[Source], title: str | None = None) -> Report:
        """Measure the sources. The page is drawn when it is asked for.

        Raises:
            ConfigError: no source, or two of one name.
            StateError: values that are not finite, or on the meta device.
            UnsupportedError: matplotlib is not installed.
        """
        check_matplotlib()
        names = [source.name for source in sources]
        if not names:
            raise ConfigError("A report needs at least one adapter.")
        if len(set(names)) < len(names):
            raise ConfigError(f"A report needs a name for each adapter, and two are alike: {names}. Give names=.")
        findings = measure(sources)
        grid = Grid.of(findings.paths)
        found = verdicts(findings, grid)
        return cls(title or _title(names), tuple(found), findings, grid)

    @cached_property
    def html(self) -> str:
        """The whole page: no script, nothing loaded from elsewhere."""
        return render(self.findings, self.verdicts, self._grid, self.title)

    def save(self, out: str | Path) -> Path:
        """Write the page; a file that is there is replaced in one step.

        Raises:
            SaveError: it cannot be written there; nothing has changed.
        """
        path = local_path(out)
        try:
            with appearing(path) as fresh:
                fresh.write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise SaveError(f"The report cannot be written to {path}: {error}.") from error
        return path

    def to_dict(self) -> dict[str, Any]:
        """The verdicts and the numbers behind them as plain values for JSON; without the spectra."""
        return {"verdicts": [asdict(verdict) for verdict in self.verdicts], **self.findings.to_dict()}

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.verdicts))

    def __repr__(self) -> str:
        names = ", ".join(repr(adapter.name) for adapter in self.findings.adapters)
        return f"<Report on {names}: print it for its verdicts, or save(path)>"

    def _repr_html_(self) -> str:
        # In a frame of its own: the page's styles would else be the notebook's.
        return (
            f'<iframe sandbox srcdoc="{escape(self.html)}" title="adapter report" '
            'style="width:100%;height:48rem;border:0"></iframe>'
        )


def _title(names: Sequence[str]) -> str:
    return f"Adapter {names[0]}" if len(names) == 1 else f"Adapters {', '.join(names[:-1])} and {names[-1]}"
