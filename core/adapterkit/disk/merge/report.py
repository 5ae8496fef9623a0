"""What a merge on disk reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` wrote.

    Attributes:
        out: the folder.
        adapters: the name of each adapter with its weight.
        merged: the tensors that were changed, by the file they are in; a file with none was copied as it is.
        heads: modules that were taken over from an adapter.
        added: tensors that the base had not: of heads, and of weights that were tied.
        absent: tensors of the model that no file holds, and that `from_pretrained` will initialise.
        not_copied: files of the base that are not in the output.
        nbytes: size of the weights.
        resumed: files that an earlier run had finished.
    """

    out: Path
    adapters: Mapping[str, float]
    merged: Mapping[str, int]
    heads: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    not_copied: tuple[str, ...] = ()
    nbytes: int = 0
    resumed: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in self.adapters.items())
        files = f"{len(self.merged)} file" + "s" * (len(self.merged) != 1)
        lines = [f"{self.out}: {sum(self.merged.values())} tensors merged ({names}), {self.nbytes:,} bytes in {files}"]
        lines += [f"  taken over in full: {path}" for path in self.heads]
        lines += [f"  {what}: {', '.join(found)}" for what, found in self._lists() if found]
        return "\n".join(lines)

    def _lists(self) -> list[tuple[str, tuple[str, ...]]]:
        return [
            ("added", self.added),
            ("in no file", self.absent),
            ("not copied", self.not_copied),
            ("finished by an earlier run", self.resumed),
        ]
