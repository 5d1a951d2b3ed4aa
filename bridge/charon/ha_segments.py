"""Segments of the ha plugin: which one an address is in, and in which one to land rebuilt SAs.

charon puts every IKE_SA into one of `count` segments by a hash of the peer's address, and turns PASSIVE SAs into
ESTABLISHED ones segment by segment. Rebuilt SAs are installed with an address of 198.18.0.0/15 (RFC 2544, for
benchmarking, so no peer has one) that hashes to the chosen segment, and get the peer's address once they are active.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, ip_address

from bridge.charon.half_open import HalfOpenSas

MAX_SEGMENTS = 16
"""charon's limit for charon.plugins.ha.segment_count."""
SHARE = 0.01
"""of their time that activations may cost established SAs"""
LONGEST_PAUSE = 2.0
"""seconds between activations at most, or clients would give up waiting"""
BLOCKED_SECONDS = 0.05
"""between two looks for a segment without a handshake in progress, where each has one"""
_MASK = 0xFFFFFFFF
_GOLDEN = 0xDEADBEEF
_LANDING_NETWORK = int(IPv4Address("198.18.0.0"))


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _jhash_1word(word: int) -> int:
    """Jenkins' lookup3 of one 32-bit word with initval 0, as the Linux kernel has it since 4.1 (linux/jhash.h)."""
    base = _GOLDEN + 4
    a, b, c = (base + word) & _MASK, base, base
    c = ((c ^ b) - _rotate(b, 14)) & _MASK
    a = ((a ^ c) - _rotate(c, 11)) & _MASK
    b = ((b ^ a) - _rotate(a, 25)) & _MASK
    c = ((c ^ b) - _rotate(b, 16)) & _MASK
    a = ((a ^ c) - _rotate(c, 4)) & _MASK
    b = ((b ^ a) - _rotate(a, 14)) & _MASK
    return ((c ^ b) - _rotate(b, 24)) & _MASK


@lru_cache(maxsize=65536)
def segment_of(address: str, count: int = MAX_SEGMENTS) -> int:
    """The segment, 1 to `count`, of a peer address; all IPv6 addresses share one."""
    parsed = ip_address(address)
    word = int(parsed) if parsed.version == 4 else 0
    return ((_jhash_1word(word) * count) >> 32) + 1


@lru_cache(maxsize=8)
def landing_addresses(count: int = MAX_SEGMENTS) -> dict[int, str]:
    """For each segment an address of 198.18.0.0/15 that is in it."""
    found: dict[int, str] = {}
    for offset in range(1, 1 << 17):
        address = str(IPv4Address(_LANDING_NETWORK + offset))
        found.setdefault(segment_of.__wrapped__(address, count), address)
        if len(found) == count:
            break
    return found


@lru_cache(maxsize=8)
def _second_addresses(count: int) -> dict[int, str]:
    """For each segment an address of 198.18.0.0/15 that is in it, other than that of `landing_addresses`."""
    first = set(landing_addresses(count).values())
    found: dict[int, str] = {}
    for offset in range(1, 1 << 17):
        address = str(IPv4Address(_LANDING_NETWORK + offset))
        if address not in first:
            found.setdefault(segment_of.__wrapped__(address, count), address)
        if len(found) == count:
            break
    return found


SEGMENTS_MIN = 2
"""that placeholders need: one segment is never activated again"""


def keeping_segment(count: int = MAX_SEGMENTS) -> int:
    """The segment of SAs that are never activated (bridge.charon.placeholders)."""
    return count


def keeping_address(count: int = MAX_SEGMENTS) -> str:
    """Their address."""
    return _second_addresses(count)[keeping_segment(count)]


def waiting_address(count: int = MAX_SEGMENTS) -> str:
    """Where they are until their segment is active: in another one."""
    return _second_addresses(count)[max(count - 1, 1)]


class SegmentChooser:
    """Chooses the segment to activate the next batch of rebuilt SAs in.

    While a segment changes hands, charon processes no IKE messages of its established SAs, and of those in state
    CONNECTING strongSwan 6.0.1 crashes, and later releases destroy them. So: never one that has an SA in that state;
    none with a peer that charon itself may begin a handshake with, which nothing holds back, while there is another;
    then one to which no request is on its way, then the one with the fewest established SAs, then the one that was
    disturbed longest ago.
    """

    def __init__(self, count: int = MAX_SEGMENTS, half_open: HalfOpenSas | None = None) -> None:
        self.count = count
        self.crashes = False
        """whether this charon crashes where others would only end a handshake: then a request on its way to charon
        counts as a handshake too"""
        self.held_back: Callable[[], bool] = lambda: False
        """whether requests are held back during activations, and those that charon has are known (bridge.charon.
        handshakes): then none is on its way"""
        self.peers: Callable[[], Iterable[str]] = tuple
        """addresses that charon itself may begin a handshake with; the same object as long as they are the same"""
        self._peers: Iterable[str] = ()
        self._with_peers: frozenset[int] = frozenset()
        self._half_open = HalfOpenSas() if half_open is None else half_open
        self._used = [float("-inf")] * (count + 1)
        self._rests_until = [float("-inf")] * (count + 1)
        self._due = float("-inf")
        self._in_use: int | None = None
        self.spared: int | None = None
        """a segment that is never to be activated again"""
        self.established: Counter[int] = Counter()
        """Established SAs by segment, kept by the one that tracks them."""

    def segment_of(self, address: str) -> int:
        """The segment of a peer address."""
        return segment_of(address, self.count)

    def disturbed(self, segment: int, now: float, seconds: float) -> None:
        """An activation that ended at `now` kept the established SAs of `segment` from answering for `seconds`. They
        come at such distances that, one segment after the other, none is disturbed for more than SHARE of its time, but
        two in a row after a pause; what wants to be activated meanwhile shares one, for each makes charon look at every
        SA."""
        pause = min(seconds / (SHARE * self.count), LONGEST_PAUSE)
        # those of segments without SAs, which wait for nothing, add up to no more than one pause
        self._due = min(max(self._due + pause, now), now + pause)
        if self.established[segment]:
            self._rests_until[segment] = now + self.count * pause
        self._used[segment] = now
        self._in_use = None

    def blocked(self, now: float) -> bool:
        """Whether there is a handshake in progress in each segment."""
        return len(self.occupied(now)) == self.count

    def wait(self, now: float) -> float:
        """Seconds until the next activation; a segment without established SAs waits for none."""
        free = self._choice(self.occupied(now))
        if not free:
            return BLOCKED_SECONDS
        if self._in_use in free:
            return self._rest(self._in_use, now)
        return min(self._rest(number, now) for number in free)

    def next(self, now: float) -> int:
        """The segment to install in from `now` until the activation."""
        if self._in_use is None:
            self._in_use = self._best(now, () if self.spared is None else (self.spared,))
        return self._in_use

    def to_activate(self, now: float) -> int | None:
        """The segment to activate at `now`: that in which the SAs were installed, or another one where a handshake has
        begun there since. None where there is one in each."""
        blocked = self.occupied(now)
        if self._in_use is None or self._in_use in blocked:
            if len(blocked) == self.count:
                return None
            self._in_use = self._best(now, blocked)
        return self._in_use

    def occupied(self, now: float) -> set[int]:
        """The segments that are not to be activated now: with a handshake in progress, or spared for ever."""
        return self.with_handshakes(now) | ({self.spared} if self.spared is not None else set())

    def with_handshakes(self, now: float) -> set[int]:
        """The segments with a handshake in progress."""
        found = {self.segment_of(address) for address in self._half_open.addresses()}
        if self.crashes and not self.held_back():
            found |= {self.segment_of(address) for address in self._half_open.requested(now)}
        return found

    def with_peers(self) -> frozenset[int]:
        """The segments in which charon itself may begin a handshake at any moment, as far as is known."""
        if (peers := self.peers()) is not self._peers:
            self._peers, self._with_peers = peers, frozenset(map(self.segment_of, peers))
        return self._with_peers

    def _choice(self, blocked: Container[int]) -> list[int]:
        """The segments that are not `blocked`; those without peers alone, if there are any."""
        free = [number for number in range(1, self.count + 1) if number not in blocked]
        with_peers = self.with_peers()
        return [number for number in free if number not in with_peers] or free

    def _rest(self, segment: int, now: float) -> float:
        until = max(self._rests_until[segment], self._due) if self.established[segment] else now
        return max(until - now, 0.0)

    def _best(self, now: float, blocked: Container[int]) -> int:
        handshakes = {self.segment_of(address) for address in self._half_open.addresses()}
        handshakes |= {self.segment_of(address) for address in self._half_open.requested(now)}
        return min(
            self._choice(blocked),
            key=lambda number: (
                self._rest(number, now),
                number in handshakes,
                self.established[number],
                self._used[number],
                number,
            ),
        )
