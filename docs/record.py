"""Record a command's real output with its timing as an animated SVG: python docs/record.py OUT.svg COMMAND...

It needs no network and no tool but Python. Where animations are not shown, all lines are.
"""

from __future__ import annotations

import os
import pty
import re
import sys
import time
from html import escape
from pathlib import Path

COLUMNS = 124
CHAR, LINE, EDGE = 7.2, 19, 16
"""a character's width, a line's height, the margin, in pixels"""
COLOURS = {"32": "#7ee787", "31": "#ff7b72", "33": "#e3b341"}
STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #e6edf3; white-space: pre }
.p { fill: #8b949e }
.b { font-weight: bold; fill: #79c0ff }
.l { animation-name: wait; animation-timing-function: step-end }
@keyframes wait { from { opacity: 0 } to { opacity: 1 } }
@media (prefers-reduced-motion: reduce) { .l { animation: none } }
"""


def record(command: list[str]) -> list[tuple[float, str]]:
    """Run it on a terminal; (seconds since its start, line) of all it writes. Raises SystemExit if it fails."""
    began = time.monotonic()
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS))
        os.execvp(command[0], command)  # noqa: S606
    lines, rest = [], b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # its end has been closed
            break
        *whole, rest = (rest + part).split(b"\n")
        lines += [(time.monotonic() - began, line.decode(errors="replace").rstrip("\r")) for line in whole]
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("\n".join(line for _, line in lines))
    return lines


def spans(line: str) -> str:
    """A line with its terminal colours as SVG."""
    styled, out = "", []
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if code := re.fullmatch(r"\x1b\[([0-9;]*)m", part):
            styled = {"0": "", "": "", "1": ' class="b"'}.get(code[1], f' fill="{COLOURS.get(code[1], "#e6edf3")}"')
        elif part:
            text = escape(part)
            out.append(f"<tspan{styled}>{text}</tspan>" if styled else text)
    return "".join(out)


def svg(title: str, lines: list[tuple[float, str]]) -> str:
    """The picture."""
    width, height = round(COLUMNS * CHAR + 2 * EDGE), (len(lines) + 1) * LINE + 2 * EDGE
    rows = [f'<text class="p" x="{EDGE}" y="{EDGE + LINE - 6}"># {escape(title)}</text>']
    for number, (when, line) in enumerate(lines, 2):
        place = f'x="{EDGE}" y="{EDGE + number * LINE - 6}"'
        rows.append(f'<text class="l" style="animation-duration:{when:.2f}s" {place}>{spans(line)}</text>')
    body = "\n".join(rows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'{head} role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
        f'<rect width="100%" height="100%" rx="6" fill="#0d1117"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    out, *argv = sys.argv[1:]
    Path(out).write_text(svg("make demo", record(argv)))
