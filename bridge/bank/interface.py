"""What a stub bank does: the signals of draft-xu-ike-sa-sync-01 section 3.4, wherever the stubs live."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from msgspec import Struct

from bridge.stub.readable import Readable
from bridge.stub.stub import Index, Stub

DOWNLOAD_BATCH = 256
"""stubs that come at a time from `download` and `list`"""
BEATS = 3
"""heartbeats in the time after which one expires"""
RESTART_SECONDS = 30.0
"""that a heartbeat lives whose sidecar was stopped in order: charon goes on, and the sidecar comes back"""


class BankUnavailable(Exception):
    """The bank cannot be reached, or refuses: the text names the cause.

    `left` are the stubs for which the outcome of the operation is not known; None: all of them. `answers`: whether the
    bank answers other questions. `replies`: what commands got that were sent beside it, as far as that is known.
    """

    event: ClassVar[str] = "bank-unreachable"
    """the log event of a component that waits for the bank because of this error"""

    def __init__(self, reason: str, left: frozenset[Index] | None = None, *, answers: bool = False) -> None:
        super().__init__(reason)
        self.left = left
        self.answers = answers
        self.replies: Sequence[Any] = ()


class BankUnwritable(BankUnavailable):
    """The bank answers reads and accepts no writes now: it is full, a replica, or without its quorum of replicas."""

    event = "bank-unwritable"

    def __init__(self, reason: str, left: frozenset[Index] | None = None) -> None:
        super().__init__(reason, left, answers=True)


class Move(NamedTuple):
    """Where a session goes on, at another gateway."""

    new: Index
    expires: int
    """Unix seconds: when the old IKE_SA would have ended"""


class Ending(Struct, frozen=True, gc=False):
    """A session that ended, or went on elsewhere."""

    index: Index
    expires: int
    """Unix seconds until which a stub of it may live, by a stub that was opened or by the SA itself; 0: not known"""
    epoch: int = 0
    """of the session at the gateway that ended it, where gateways share the address: one that was taken over stays"""
    move: Move | None = None
    """a mark in the bank says so to the gateway that it came from"""


class AddressEntry(NamedTuple):
    """A hint that the stub of `of` has the virtual IP `address` (canonical text). Only the stub itself is proof."""

    address: str
    of: Index


Marked = Index | Literal[False] | None
"""what a session went on as; False where there is no mark, or one that does not open; None where that could not be
asked"""


class GatewaySign(NamedTuple):
    """What the bank knows of a gateway: whether its heartbeat lives, and the ids of the keys it has."""

    alive: bool
    keys: frozenset[bytes]
    at: int | None = None
    """when it was written, by the clock of that gateway (Unix seconds)"""


class Taking(IntEnum):
    """What the bank says to a gateway that takes a session over."""

    CHANGED = 0
    """its stub is another one than was read, or gone"""
    TAKEN = 1
    ENDED = 2


class SharedBank(Protocol):
    """A bank that tells which of the gateways that share an address owns a session."""

    on_taken: Callable[[Index], None]
    """called for a session that this gateway wrote about, and that another one has taken over"""

    async def take(self, stubs: Sequence[tuple[Stub, Stub]]) -> list[Taking]:
        """Compare and set: stubs as they were read and as their new owner has them. Raises BankUnavailable."""
        ...


class StubBank(Protocol):
    """Where stubs live. Every method but `close` raises BankUnavailable."""

    @property
    def unreadable(self) -> int:
        """Stubs found that did not open."""
        ...

    @property
    def spoilt(self) -> int:
        """Keys and members found that no gateway writes; keys of a wrong type were deleted."""
        ...

    def renew(self) -> None:
        """Another server may be the primary: no command from now on goes to the one before without having asked."""
        ...

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        """Initiate and Update Stub, bundled. False where the bank holds a newer revision, which stays, or knows that
        the session has ended.

        May be repeated. Where it raises, some of the stubs may be stored. Raises StubError for one that cannot be
        encoded.
        """
        ...

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """GET Stub. None where there is none, where it has expired, or where it does not open."""
        ...

    async def delete(self, endings: Sequence[Ending]) -> list[bool]:
        """Delete Stub, whatever its revision. False where the bank had none.

        What ended stays ended: the bank refuses to store a stub of it until it would have expired. A session that went
        on elsewhere leaves a mark of that too, until its old IKE_SA would have expired. May be repeated.
        """
        ...

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        """`store`, then `delete`, in as few round trips as that takes; what each of them gives. Where some of it
        failed, all else was tried."""
        ...

    def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncGenerator[list[Stub]]:
        """Download Stub: all stubs of a gateway, at most `batch` at a time.

        What is stored or deleted meanwhile may be missing or not. Stubs that do not open are left out.
        """
        ...

    on_return: Callable[[], None]
    """called when the bank has lost what it had, or one of several banks is back"""

    async def heartbeat(self, gateway: str, ttl: float) -> float:
        """Say that a gateway lives, for `ttl` s. The seconds that the bank whose keyspace is watched took for it, so
        far: the heartbeats of others may be as late as that."""
        ...

    async def leave(self, gateway: str) -> None:
        """Take back that a gateway lives."""
        ...

    async def look(self, indexes: Sequence[Index]) -> list[tuple[Stub | None, bool]]:
        """GET Stub, and beside each stub whether its session is known here to have ended."""
        ...

    async def revisions(self, indexes: Sequence[Index]) -> list[int | None]:
        """The revisions that the bank holds, by the sealed part; 0 where there is no stub, none that opens, or one that
        its bucket does not list; None where that stub could not be asked for."""
        ...

    async def ended(self, indexes: Sequence[Index]) -> list[bool | None]:
        """Whether the session of each index is known to have ended, within what would have been its stub's life; None
        where that could not be asked."""
        ...

    def endings(self) -> AsyncGenerator[list[Ending]]:
        """All sessions, of any gateway, that are known here to have ended."""
        ...

    async def moved(self, indexes: Sequence[Index]) -> list[Marked]:
        """What the session of each index went on as, by its mark."""
        ...

    async def addresses(self, ranges: Sequence[tuple[str, str]]) -> list[AddressEntry]:
        """Which stubs may have a virtual IP in one of these ranges, each given by its first and its last address."""
        ...

    async def forget_addresses(self, entries: Sequence[AddressEntry]) -> None:
        """Give these hints no more: there are no such stubs."""
        ...

    async def reseal(self, gateway: str) -> int:
        """Seal the stubs of a gateway with the key that seals now; how many were sealed with another one.

        Repeats nothing, and brings nothing back that is deleted meanwhile.
        """
        ...

    async def gateways(self) -> dict[str, GatewaySign]:
        """The gateways that had a heartbeat lately, by address."""
        ...

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        """Leave `value` under `ike:<kind>:<gateway>` for `ttl` s: monitors and other gateways read it."""
        ...

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        """What `post` left there, if it is still there. Anyone who can write to the bank can forge it."""
        ...

    async def revocation_stamp(self) -> bytes:
        """Changes whenever the marks of `revocations` do."""
        ...

    async def revocations(self) -> Sequence[Sequence[bytes]]:
        """The sealed marks of locked-out identities (bridge.stub.revocation), of each bank that answers; also some that
        only another key opens."""
        ...

    async def put_revocations(self, marks: Mapping[bytes, int], stale: Collection[bytes]) -> None:
        """Add sealed marks, each with its expiry (Unix seconds), and take `stale` ones away, in all banks."""
        ...

    async def ping(self) -> float:
        """Seconds that the bank takes to answer."""
        ...

    async def close(self) -> None:
        """Let go of the bank."""
        ...

    def list(self, gateway: str | None = None) -> AsyncGenerator[list[Readable]]:
        """The readable fields of the stubs of one gateway, or of all."""
        ...
