"""The inputs that are kept for each target: `kept/TARGET.hex`, one a line."""

from __future__ import annotations

from pathlib import Path

KEPT = Path(__file__).parent / "kept"


def kept(name: str) -> list[bytes]:
    """The kept inputs of a target."""
    path = KEPT / f"{name}.hex"
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []
