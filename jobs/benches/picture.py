"""The rows of bench.json as a picture: how far each is from its target. Rows in, the text of an SVG file out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from jobs.benches.measure import Row

WIDTH, LABEL, TOP, LINE = 1100, 640, 46, 34
SPAN = 8.0
"""Times the target, either way, that the paper is wide; what lies beyond is drawn at its edge."""


def picture(rows: Sequence[Row]) -> str:
    """A bar for each row from the target, which is the line in the middle, to its ratio; a thin line is the spread."""
    height = TOP + LINE * len(rows) + 12
    middle = _x(1.0)
    pieces = [
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{middle}" y="26" text-anchor="middle" fill="#555">target</text>',
        f'<line x1="{middle}" x2="{middle}" y1="34" y2="{height - 8}" stroke="#555"/>',
    ]
    for place, row in enumerate(rows):
        y = TOP + LINE * place
        reached, low, high = (_x(value / row.target) for value in (row.ratio, row.low, row.high))
        colour = "#2a78b8" if row.ratio >= row.target else "#c2571a"
        title = f"{row.name} | {row.against}"
        pieces += [
            f"<g><title>{escape(title)}</title>",
            f'<text x="{LABEL - 64}" y="{y + 12}" text-anchor="end">{escape(_short(row.name))}</text>',
            f'<text x="{LABEL - 64}" y="{y + 25}" text-anchor="end" font-size="10" fill="#777">'
            f"{escape(_short('against ' + row.against))}</text>",
            f'<text x="{LABEL - 8}" y="{y + 18}" text-anchor="end" font-weight="bold">{row.ratio:.2f}</text>',
            f'<rect x="{min(middle, reached):.1f}" y="{y + 6}" width="{max(abs(reached - middle), 1):.1f}" height="16" '
            f'fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 14}" y2="{y + 14}" stroke="#222"/></g>',
        ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
    return f'{head} font-size="12">' + "\n".join(pieces) + "</svg>\n"


def _x(times: float) -> float:
    """Where so many times the target lies; the scale is logarithmic."""
    share = math.log(min(max(times, 1 / SPAN), SPAN)) / math.log(SPAN)
    return LABEL + (WIDTH - LABEL - 16) * (1 + share) / 2


def _short(text: str) -> str:
    return text if len(text) <= 92 else text[:91] + "\N{HORIZONTAL ELLIPSIS}"
