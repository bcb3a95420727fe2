"""Plain charts as inline SVG: numbers in, markup out. Their colours are CSS classes of report.html."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 44
SHADES = 5
"""Steps of the colour scale for a share in [0, 1]: classes s0 to s4."""


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high].

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * about >= (high - low) * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: short, with a thousands separator, no trailing zeros."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.1e}"
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4f}".rstrip("0").rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}")


class _Axes:
    """Where values lie on the paper."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def drawn(self, x_title: str, y_title: str) -> list[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        out = []
        for value in ticks(*self._y, about=4):
            y = self.y(value)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in ticks(*self._x):
            x = self.x(value)
            out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(value)}</text>')
        out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        out.append(f'<text class="title" x="{right}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_title)}</text>')
        out.append(f'<text class="title" x="{LEFT - 50}" y="13">{escape(y_title)}</text>')
        return out


def _svg(pieces: Iterable[str], name: str, width: int = WIDTH, height: int = HEIGHT, kind: str = "chart") -> Markup:
    body = "".join(pieces)
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{body}</svg>'
    )


def histogram(low: float, high: float, before: Sequence[int], after: Sequence[int], threshold: float | None) -> Markup:
    """Rows by score: those that entered behind those that were kept, and the threshold.

    Args:
        low, high: of the scores, low < high.
        before, after: rows in equal intervals between them.
        threshold: drawn as a line, if there is one.
    """
    axes = _Axes((low, high), (0, 1.12 * max([*before, 1])))  # room for the mark
    step, base = (high - low) / len(before), HEIGHT - BOTTOM
    pieces = axes.drawn("score", "rows")
    for rows, kind in ((before, "before"), (after, "after")):
        for i, count in enumerate(rows):
            if count:
                x, width, y = axes.x(low + i * step), axes.x(low + step) - axes.x(low), axes.y(count)
                box = f'x="{x:.1f}" y="{y:.1f}" width="{max(width - 0.8, 0.5):.1f}" height="{base - y:.1f}"'
                pieces.append(f'<rect class="{kind}" {box}/>')
    if threshold is not None and low <= threshold <= high:
        x = axes.x(threshold)
        side, away = ("end", -5) if x > WIDTH * 0.6 else ("start", 5)
        pieces.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{base}"/>')
        pieces.append(
            f'<text class="mark" x="{x + away:.1f}" y="{TOP + 2}" text-anchor="{side}">threshold {threshold:.4g}</text>'
        )
    return _svg(pieces, "rows by score, before and after the cut")


def shade(share: float) -> int:
    """The step of the colour scale for a share in [0, 1]."""
    return min(int(share * SHADES), SHADES - 1)


def largest_radius(clusters: int) -> float:
    """Radius of the cluster with the most members in a scatter of so many: smaller where they would hide each other."""
    return min(13.0, max(13 * math.sqrt(60 / max(clusters, 1)), 3.5))


def scatter(points: Sequence[dict[str, Any]]) -> Markup:
    """Clusters by d_intra and d_inter; area by members, colour by the share that is kept.

    Args:
        points: `d_intra`, `d_inter`, `size` (at least 1), `share` of each cluster; the largest first.
    """
    spans = []
    for name in ("d_intra", "d_inter"):
        values = [p[name] for p in points]
        low, high = min(values), max(values)
        margin = 0.07 * (high - low) or 0.05 * max(abs(high), 1e-6)
        spans.append((low - margin, high + margin))
    axes = _Axes(spans[0], spans[1])
    largest, most_px = max(p["size"] for p in points), largest_radius(len(points))
    pieces = axes.drawn("d_intra", "d_inter")
    for p in points:
        radius = max(most_px * math.sqrt(p["size"] / largest), 1.2)
        x, y = axes.x(p["d_intra"]), axes.y(p["d_inter"])
        title = f"cluster {p['cluster']}: {p['size']:,} members, {p['share']:.0%} kept"
        circle = f'class="s{shade(p["share"])}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
        pieces.append(f"<circle {circle}><title>{title}</title></circle>")
    return _svg(pieces, "clusters by d_intra and d_inter")


def sparkline(values: Sequence[float]) -> Markup:
    """A small line of values in order; its last point is marked."""
    width, height = 120, 26
    low, high = min(values), max(values)
    span = high - low or 1.0
    points = [
        (4 + (width - 8) * i / max(len(values) - 1, 1), height - 4 - (height - 8) * (v - low) / span)
        for i, v in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    pieces = [f'<polyline class="line" points="{line}"/>', f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>']
    return _svg(pieces, f"from {values[0]:.4g} to {values[-1]:.4g}", width, height, "spark")
