"""Charts as SVG text, to be put into a page whose style sheet gives the classes their colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 38

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour (class c0, c1, …), joined by a line or not."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with a word beside it."""

    at: float
    name: str


def chart(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    shade: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
    y_most: float | None = None,
) -> str:
    """Axes from 0 to the largest value; nothing is negative. `shade`: a stretch of x that is set off."""
    xs = [x for s in series for x, _ in s.points] + [mark.at for mark in marks]
    x_most = max(xs, default=0.0) or 1.0
    x_ticks = [tick for tick in ticks(x_most) if tick <= x_most]
    y_ticks = ticks(y_most or max((y for s in series for _, y in s.points), default=1.0))
    frame = _Frame(x_most, y_ticks[-1])
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">']
    if shade is not None:
        x0, x1 = frame.x(shade[0]), frame.x(shade[1])
        parts.append(
            f'<rect class="window" x="{x0}" y="{_TOP}" width="{max(0.0, x1 - x0):.1f}" height="{frame.height}"/>'
        )
    parts += _axes(frame, x_ticks, y_ticks, x_name, y_name)
    parts += [_draw(frame, s) for s in series]
    for row, mark in enumerate(marks):
        x = frame.x(mark.at)
        side, shift = ("end", -4) if x > _WIDTH * 0.75 else ("start", 4)
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text class="note" x="{x + shift:.1f}" y="{_HEIGHT - _BOTTOM - 8 - 13 * row}" text-anchor="{side}">'
            f"{escape(mark.name)}</text>"
        )
    return "".join([*parts, "</svg>"])


def bar(parts: Sequence[tuple[str, float, int]]) -> str:
    """One bar of (name, size, colour) side by side."""
    whole = sum(size for _, size, _ in parts) or 1.0
    drawn, x = [f'<svg viewBox="0 0 {_WIDTH} 40" role="img" aria-label="shares" preserveAspectRatio="none">'], 0.0
    for name, size, colour in parts:
        width = _WIDTH * size / whole
        title = escape(f"{name}: {100 * size / whole:.1f} %")
        drawn.append(
            f'<rect class="f{colour}" x="{x:.2f}" y="0" width="{width:.2f}" height="40"><title>{title}</title></rect>'
        )
        x += width
    return "".join([*drawn, "</svg>"])


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to the first one that is `most` or above, 4 to 8 of them."""
    if not (most > 0 and math.isfinite(most)):
        most = 1.0
    step = 10.0 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 6)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class _Frame:
    x_most: float
    y_most: float

    @property
    def height(self) -> int:
        return _HEIGHT - _TOP - _BOTTOM

    def x(self, value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, value / self.x_most)), 1)

    def y(self, value: float) -> float:
        return round(_HEIGHT - _BOTTOM - self.height * min(1.0, max(0.0, value / self.y_most)), 1)


def _axes(frame: _Frame, x_ticks: list[float], y_ticks: list[float], x_name: str, y_name: str) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = frame.x(tick)
        parts.append(f'<text class="tick" x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_name)}</text>')
    up = _TOP + frame.height / 2
    turn = f'text-anchor="middle" transform="rotate(-90 12 {up})"'
    parts.append(f'<text class="axis" x="12" y="{up}" {turn}>{escape(y_name)}</text>')
    return parts


def _draw(frame: _Frame, series: Series) -> str:
    name = escape(series.name)
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    if series.dots:
        circles = "".join(f'<circle cx="{x}" cy="{y}" r="2.2"/>' for x, y in places)
        return f'<g class="d{series.colour}"><title>{name}</title>{circles}</g>'
    line = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="c{series.colour}" points="{line}"><title>{name}</title></polyline>'
