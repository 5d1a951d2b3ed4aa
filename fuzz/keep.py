"""Chooses from a folder of inputs the few that are worth keeping, into fuzz/kept/TARGET.hex.

    python fuzz/keep.py TARGET FOLDER

Greedy: the shortest inputs first, and of these only such as reach lines of bridge/ that none before them reached.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.corpus import KEPT, kept
from fuzz.targets import TARGETS

MAX_OCTETS = 512
MAX_INPUTS = 24


def reached(name: str, data: bytes) -> set[tuple[str, int]]:
    """The lines of bridge/ that a target runs through on an input."""
    lines: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if "/bridge/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        TARGETS[name].run(data)
    finally:
        sys.settrace(before)
    return lines


def main() -> None:
    """The command."""
    name, folder = sys.argv[1:]
    found = {path.read_bytes() for path in Path(folder).iterdir()} | set(kept(name))
    known: set[tuple[str, int]] = set()
    for seed in TARGETS[name].seeds():
        known |= reached(name, seed)
    chosen: list[bytes] = []
    for data in sorted(found, key=lambda data: (len(data), data)):
        if len(data) > MAX_OCTETS or len(chosen) == MAX_INPUTS:
            break
        lines = reached(name, data)
        if not lines <= known:
            known |= lines
            chosen.append(data)
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{name}.hex").write_text("".join(data.hex() + "\n" for data in chosen))
    print(f"{name}: {len(chosen)} of {len(found)} kept")


if __name__ == "__main__":
    main()
