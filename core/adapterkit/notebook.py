"""Notebooks: records that are shown as a sentence and tables. One mechanism for all of them; every text is escaped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# A model may have thousands of layers; a cell of a notebook shows so many rows of a table.
_MOST_ROWS = 200
_CELL = 'style="text-align:left;vertical-align:top"'


@dataclass(frozen=True)
class Table:
    """Rows under column names. A table without rows is not shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


class Shown(ABC):
    """A record that a notebook shows; elsewhere it prints as text."""

    @abstractmethod
    def _shown(self) -> tuple[str, Sequence[Table]]:
        """A sentence, and the tables under it."""

    def _repr_html_(self) -> str:
        sentence, tables = self._shown()
        return f"<p>{escape(sentence)}</p>" + "".join(_table(table) for table in tables if table.rows)


def _table(table: Table) -> str:
    title = f"<p><b>{escape(table.title)}</b></p>" if table.title else ""
    head = "".join(f"<th {_CELL}>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td {_CELL}>{escape(str(value))}</td>" for value in row) + "</tr>"
        for row in table.rows[:_MOST_ROWS]
    )
    left = len(table.rows) - _MOST_ROWS
    more = f"<p>… and {left} more</p>" if left > 0 else ""
    return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"
