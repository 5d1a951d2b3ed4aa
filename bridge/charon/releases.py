"""What differs between releases of strongSwan, as VICI `version` names them ("5.9.8", "6.0.1", "6.1.0dr1"). No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

NEWEST_KNOWN: Final = (6, 1)
"""major and minor number of the newest release whose HA messages are known"""
CRASHES_ON_ACTIVATION: Final = (6, 0, 1)
"""its ha plugin crashes when the segment of an IKE_SA in state CONNECTING changes hands (fixed in 6.0.2)"""


def version_for(release: str) -> int | None:
    """The HA message version of a release; None for a later release than is known: its first message has the
    version."""
    numbers = _numbers(release)
    if numbers[:2] > NEWEST_KNOWN:
        return None
    if numbers <= (6, 0, 0):
        return 3
    return 4 if numbers == (6, 0, 1) else 5


def ends_handshakes_on_activation(release: str) -> bool:
    """Whether the activation of rebuilt SAs ends handshakes in progress of their segment, in whatever way."""
    return _numbers(release) >= CRASHES_ON_ACTIVATION


def crashes_on_activation(release: str) -> bool:
    """Whether the activation of rebuilt SAs beside a handshake in progress crashes this release."""
    return _numbers(release) == CRASHES_ON_ACTIVATION


def _numbers(release: str) -> tuple[int, int, int]:
    numbers = []
    for part in release.split(".")[:3]:
        digits = "".join(_leading_digits(part))
        numbers.append(int(digits) if digits else 0)
    first, second, third = (*numbers, 0, 0, 0)[:3]
    return first, second, third


def _leading_digits(text: str) -> Iterator[str]:
    for character in text:
        if not character.isdigit():
            return
        yield character
