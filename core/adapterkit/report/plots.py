"""Plots of spectra as inline SVG in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import torch
from torch import Tensor

from adapterkit.errors import plain

# In pixels: the picture, and the rectangle in it that the curves fill.
_WIDTH, _HEIGHT = 240, 163
_LEFT, _RIGHT, _TOP, _BOTTOM = 26, 234, 6, 142
# The axis of values ends a little above 1, so that no line is cut.
_HIGHEST = 1.03
_MOST_TICKS = 5


def spectra(name: str, values: Sequence[Tensor], ranks: tuple[int, int]) -> str:
    """Normalised singular values `s_i / s_1` over `i`: the range of all layers, the middle half, and the median.

    Args:
        name: the adapter and the module, for screen readers.
        values: the singular values of each layer, descending.
        ranks: where the median layer reaches 90 % and 99 % of the energy; marked by vertical lines.
    """
    longest = max(map(len, values))
    curves = torch.stack([torch.nn.functional.pad(v.double() / v[0], (0, longest - len(v))) for v in values])
    low, quarter, median, three_quarters, high = (curves.quantile(q, 0).tolist() for q in (0.0, 0.25, 0.5, 0.75, 1.0))
    first, last = (1.0, float(longest)) if longest > 1 else (0.5, 1.5)

    def points(values: Iterable[float], indices: Iterable[int]) -> str:
        return " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in zip(indices, values, strict=False))

    def x(index: float) -> float:
        return _LEFT + (index - first) / (last - first) * (_RIGHT - _LEFT)

    def y(value: float) -> float:
        return _BOTTOM - value / _HIGHEST * (_BOTTOM - _TOP)

    def area(lower: list[float], upper: list[float], opacity: float) -> str:
        edge = f"{points(upper, range(1, longest + 1))} {points(reversed(lower), range(longest, 0, -1))}"
        return f'<polygon points="{edge}" fill="var(--line)" fill-opacity="{opacity}"/>'

    def mark(rank: int, dashes: str) -> str:
        line = f'x1="{x(rank):.1f}" x2="{x(rank):.1f}" y1="{_TOP}" y2="{_BOTTOM}"'
        return f'<line {line} stroke="var(--second)" stroke-dasharray="{dashes}"/>'

    label = f"{name}: normalised singular values of {len(curves)} layers; 90 % of the energy at {ranks[0]}, 99 % at"
    parts = [
        f'<svg role="img" aria-label="{escape(plain(f"{label} {ranks[1]} in the median layer"))}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" xmlns="http://www.w3.org/2000/svg">',
        area(low, high, 0.18),
        area(quarter, three_quarters, 0.35),
        f'<polyline points="{points(median, range(1, longest + 1))}" fill="none" stroke="var(--line)" '
        'stroke-width="1.9"/>',
        mark(ranks[0], "1.3 2.2"),
        mark(ranks[1], "5 2"),
        *_axes([(x(tick), str(tick)) for tick in _ticks(longest)], [(y(v), f"{v:.1f}") for v in (0.0, 0.5, 1.0)]),
        "</svg>",
    ]
    return "\n".join(parts)


def _ticks(longest: int) -> list[int]:
    """Round numbers up to `longest`, few enough to stand beside each other; 1 if none is that small."""
    power = 10 ** max(0, math.floor(math.log10(longest / _MOST_TICKS)))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit * _MOST_TICKS >= longest)
    return list(range(step, longest + 1, step)) if step <= longest else [1]


def _axes(across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> list[str]:
    """Both axes, with a stroke and a number at each of these places."""
    strokes = "".join(f"M{place:.1f} {_BOTTOM}v4" for place, _ in across)
    strokes += "".join(f"M{_LEFT} {place:.1f}h-4" for place, _ in up)
    texts = [f'<text x="{place:.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{tick}</text>' for place, tick in across]
    texts += [f'<text x="{_LEFT - 6}" y="{place + 3.5:.1f}" text-anchor="end">{tick}</text>' for place, tick in up]
    return [
        f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}{strokes}" fill="none" stroke="var(--quiet)" stroke-width=".8"/>',
        f'<g fill="var(--ink)" style="font: 10.5px var(--font)">{"".join(texts)}</g>',
    ]
