"""The vectors in tests/vectors: HA messages of real charons, with the keys that these logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS: list[dict[str, Any]] = [
    vector
    for path in sorted((Path(__file__).parent / "vectors").glob("*.json"))
    for vector in json.loads(path.read_text())
]
NAMES = [f"{vector['proposal']} on {vector['strongswan']}" for vector in VECTORS]
SIDES = ("gateway", "client")


def messages(vector: dict[str, Any], side: str) -> list[bytes]:
    """What one side's charon sent, in order."""
    return [bytes.fromhex(text) for text in vector[side]]
