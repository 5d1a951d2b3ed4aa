"""What a stub bank does: the signals of draft-xu-ike-sa-sync-01 section 3.4, wherever the stubs live."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from bridge.stub.readable import Readable
from bridge.stub.stub import Index, Stub

HEARTBEAT_SECONDS = 5.0
"""between two heartbeats of a gateway"""
HEARTBEAT_TTL = 15.0
"""seconds: a gateway whose last heartbeat is this old counts as failed"""
DOWNLOAD_BATCH = 256
"""stubs that come at a time from `download` and `list`"""


class BankUnavailable(Exception):
    """The bank cannot be reached, or refuses: the text names the cause. Nothing is known of what was asked of it."""


class GatewaySign(NamedTuple):
    """What the bank knows of a gateway: whether its heartbeat lives, and the ids of the keys it has."""

    alive: bool
    keys: frozenset[bytes]


class StubBank(Protocol):
    """Where stubs live. Every method but `close` raises BankUnavailable."""

    @property
    def unreadable(self) -> int:
        """Stubs found that did not open."""
        ...

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        """Initiate and Update Stub, bundled. False where the bank holds a newer revision, which stays.

        May be repeated. Where it raises, some of the stubs may be stored. Raises StubError for one that cannot be
        encoded.
        """
        ...

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """GET Stub. None where there is none, where it has expired, or where it does not open."""
        ...

    async def delete(self, items: Sequence[tuple[Index, int]]) -> list[bool]:
        """Delete Stub: each index with the greatest revision to delete. False where nothing was deleted."""
        ...

    def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncIterator[list[Stub]]:
        """Download Stub: all stubs of a gateway, at most `batch` at a time.

        What is stored or deleted meanwhile may be missing or not. Stubs that do not open are left out.
        """
        ...

    async def heartbeat(self, gateway: str, ttl: float) -> None:
        """Say that a gateway lives, for `ttl` s."""
        ...

    async def revisions(self, indexes: Sequence[Index]) -> list[int]:
        """The revisions that the bank holds, by the readable field; 0 where there is no stub."""
        ...

    async def ended(self, indexes: Sequence[Index]) -> list[bool]:
        """Whether the stub of each index was deleted, within what would have been its life."""
        ...

    async def reseal(self, gateway: str) -> int:
        """Seal the stubs of a gateway with the key that seals now; how many were sealed with another one.

        Repeats nothing, and brings nothing back that is deleted meanwhile.
        """
        ...

    async def gateways(self) -> dict[str, GatewaySign]:
        """The gateways that ever had a heartbeat, by address."""
        ...

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        """Leave `value` under `ike:<kind>:<gateway>` for `ttl` s: what monitors read, and what other gateways heed."""
        ...

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        """What `post` left there, if it is still there. Anyone who can write to the bank can forge it."""
        ...

    async def ping(self) -> float:
        """Seconds that the bank takes to answer."""
        ...

    async def close(self) -> None:
        """Let go of the bank."""
        ...

    def list(self, gateway: str | None = None) -> AsyncIterator[list[Readable]]:
        """The readable fields of the stubs of one gateway, or of all."""
        ...
