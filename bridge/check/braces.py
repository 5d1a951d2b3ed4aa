"""Blocks in braces, as the configurations of BIRD and keepalived have them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Block(NamedTuple):
    """The `name` in what begins it, and the text between its braces."""

    name: str
    body: str


def blocks(beginning: re.Pattern[str], text: str) -> Iterator[Block]:
    """The blocks that begin with a match, which has a group `name` and the opening brace at its end."""
    for match in beginning.finditer(text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        yield Block(match["name"].strip(), text[match.end() : at if depth else at - 1])
