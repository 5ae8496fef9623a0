"""The report as an object, and `ak.write_report`, which makes one from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

from torch import nn

from adapterkit.disk import names_of
from adapterkit.errors import SaveError, UsageError, usage
from adapterkit.files import appearing, local_path
from adapterkit.report.heatmaps import Places, places_of
from adapterkit.report.measuring import AdapterFinding, Findings, measure
from adapterkit.report.page import render
from adapterkit.report.sources import stored_sources
from adapterkit.report.verdicts import Verdict, verdicts

_BEGINS = b"<!doctype html>"


@dataclass(frozen=True)
class Report:
    """A report on one or several adapters. It prints as its verdicts; a notebook shows the page.

    Attributes:
        title: the title of the page.
        verdicts: for each adapter which layers matter and which rank is enough; for each pair whether to merge it.
        findings: every number of the report.
    """

    title: str
    verdicts: tuple[Verdict, ...]
    findings: Findings
    _places: Places

    @classmethod
    def of(cls, sources: Sequence[AdapterFinding], title: str | None = None) -> Report:
        """Measure the sources; the errors are those of `write_report`. The page is drawn when it is first asked for."""
        names = [source.name for source in sources]
        if not names:
            raise UsageError("A report needs at least one adapter.")
        if len(set(names)) < len(names):
            raise UsageError(f"Two adapters have one name: {names}. Give each its own with names=.")
        if title is None:
            title = f"Adapter {names[0]}" if len(names) == 1 else f"Adapters {', '.join(names[:-1])} and {names[-1]}"
        findings = measure(sources)
        places = places_of(path for adapter in findings.adapters for path in adapter.layers)
        return cls(title, tuple(verdicts(findings, places)), findings, places)

    @cached_property
    def html(self) -> str:
        """The whole page. It has no script and loads nothing from elsewhere."""
        return render(self.findings, self.verdicts, self._places, self.title)

    @usage("report.save('report.html')")
    def save(self, out: str | Path) -> Path:
        """Write the page to a file. An existing page is replaced in one step; a device or a pipe gets the page.

        Raises:
            SaveError: there is a file that is not a page, or it cannot be written; nothing has changed.
        """
        path = local_path(out)
        try:
            if path.is_file() and path.stat().st_size:
                with path.open("rb") as old:
                    if not old.read(len(_BEGINS)).lower() == _BEGINS:
                        raise SaveError(f"{path} is there, and not a page. Choose another name, or delete it.")
            with appearing(path, follow=True) as fresh:
                fresh.write_text(self.html, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a path with NUL
            if isinstance(error, SaveError):
                raise
            raise SaveError(f"The report cannot be written to {path}: {error}.") from error
        return path

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.verdicts))

    def __repr__(self) -> str:
        names = ", ".join(repr(adapter.name) for adapter in self.findings.adapters)
        return f"<Report on {names}: print it to see its verdicts, or save(path)>"

    def _repr_html_(self) -> str:
        # In a frame of its own: otherwise the page's styles would apply to the whole notebook.
        return (
            f'<iframe sandbox srcdoc="{escape(self.html)}" title="adapter report" '
            'style="width:100%;height:48rem;border:0"></iframe>'
        )


@usage()
def write_report(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Report:
    """Write a page about adapters from their files alone: what each one changes, and which can be merged.

    The page is one HTML file without scripts that loads nothing. The result prints as its verdicts. Factors are made
    from the files' tensors, layer by layer; no dense matrix is made.

    Args:
        sources: adapter folders, hub ids, or files of other programs.
        out: the file to write; an existing page is replaced.
        base: the model's folder or hub id, or the model itself. If its weights are available (a folder with
            safetensors, or a model in memory), sizes are relative to them; each target's weight is then read once.
            Required if the files do not tell the sizes of the layers.
        names: the adapters' names in the report; by default the names of their folders.
        title: the title of the page.

    Raises:
        ConfigError: there is no source, two have one name, or there are more or fewer names than adapters.
        CheckpointError: a source is not an adapter, is damaged, or does not tell the sizes of its layers.
        StateError: a source has values that are not finite, or that are on the meta device.
        SaveError: there is a file that is not a page, or the page cannot be written.
    """
    if isinstance(sources, str | Path):
        raise UsageError(f"write_report takes a list of adapters, such as [{str(sources)!r}], not a single one.")
    names = names_of(sources) if names is None else list(map(str, names))
    if len(names) != len(sources):
        raise UsageError(f"names= has {len(names)} names for {len(sources)} adapters. Give one name for each adapter.")
    local_path(out)  # refuse what is not a path before the work
    report = Report.of(stored_sources(sources, names, base), title)
    report.save(out)
    return report
