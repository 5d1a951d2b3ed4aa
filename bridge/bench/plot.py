"""Plots as SVG, with nothing but text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, BAR, GAP, LEFT, RIGHT = 720, 22, 12, 250, 90
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def bars(title: str, unit: str, rows: Sequence[tuple[str, Sequence[float]]], legend: Sequence[str] = ()) -> str:
    """Horizontal bars, each made of parts; the sum is written behind it. `unit` stands after it."""
    height = 50 + len(rows) * (BAR + GAP) + (24 if legend else 0)
    longest = max((sum(parts) for _, parts in rows), default=1.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    top = 40
    for name, parts in rows:
        out.append(f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>')
        at = float(LEFT)
        for number, part in enumerate(parts):
            colour = COLOURS[number % len(COLOURS)]
            out.append(f'<rect x="{at:.1f}" y="{top}" width="{part * scale:.1f}" height="{BAR}" fill="{colour}"/>')
            at += part * scale
        out.append(f'<text x="{at + 6:.1f}" y="{top + 16}">{sum(parts):.3g} {escape(unit)}</text>')
        top += BAR + GAP
    for number, name in enumerate(legend):
        x = LEFT + number * 120
        out.append(f'<rect x="{x}" y="{top}" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 18}" y="{top + 11}">{escape(name)}</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"
