"""Segments of the ha plugin: which one an address is in, and in which one to land rebuilt SAs.

charon puts every IKE_SA into one of `count` segments by a hash of the peer's address, and turns PASSIVE SAs into
ESTABLISHED ones segment by segment. Rebuilt SAs are installed with an address of 198.18.0.0/15 (RFC 2544, for
benchmarking, so no peer has one) that hashes to the chosen segment, and get the peer's address once they are active.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from ipaddress import IPv4Address, ip_address

MAX_SEGMENTS = 16
"""charon's limit for charon.plugins.ha.segment_count."""
SHARE = 0.01
"""of their time that activations may cost established SAs"""
LONGEST_PAUSE = 2.0
"""seconds between activations at most, or clients would give up waiting"""
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


class SegmentChooser:
    """Chooses the segment to land the next batch in.

    A toggle of an active segment makes its established SAs deaf for a moment, and in strongSwan 6 ends handshakes in
    progress there. So: none with a handshake in progress if there is one, then the one with the fewest established
    SAs, then the one that was disturbed longest ago.
    """

    def __init__(self, count: int = MAX_SEGMENTS, handshake_seconds: float = 5.0) -> None:
        self.count = count
        self._handshake_seconds = handshake_seconds
        self._handshakes = [float("-inf")] * (count + 1)
        self._used = [float("-inf")] * (count + 1)
        self._rests_until = [float("-inf")] * (count + 1)
        self._due = float("-inf")
        self._in_use: int | None = None
        self.established: Counter[int] = Counter()
        """Established SAs by segment, kept by whoever tracks them."""

    def handshake_seen(self, address: str, now: float) -> None:
        """An ordinary IKE_SA_INIT request came from `address` at `now` (monotonic seconds)."""
        self._handshakes[segment_of(address, self.count)] = now

    def segment_of(self, address: str) -> int:
        """The segment of a peer address."""
        return segment_of(address, self.count)

    def disturbed(self, segment: int, now: float, seconds: float) -> None:
        """An activation that ended at `now` kept the established SAs of `segment` deaf for `seconds`. They come at
        such distances that, one segment after the other, none is disturbed for more than SHARE of its time, but two at
        once after a pause; what wants to be activated meanwhile shares one, for each makes charon look at every SA."""
        pause = min(seconds / (SHARE * self.count), LONGEST_PAUSE)
        # those of segments without SAs, which wait for nothing, add up to no more than one pause
        self._due = min(max(self._due + pause, now), now + pause)
        if self.established[segment]:
            self._rests_until[segment] = now + self.count * pause
        self._in_use = None

    def wait(self, now: float) -> float:
        """Seconds until the segment in use may be disturbed, or any if none is in use; one without established SAs
        always may."""
        numbers = range(1, self.count + 1) if self._in_use is None else (self._in_use,)
        return min(self._rest(number, now) for number in numbers)

    def _rest(self, segment: int, now: float) -> float:
        until = max(self._rests_until[segment], self._due) if self.established[segment] else now
        return max(until - now, 0.0)

    def next(self, now: float) -> int:
        """The segment to use from `now` until it is `disturbed`."""
        if self._in_use is not None:
            return self._in_use
        busy_since = now - self._handshake_seconds
        segment = min(
            range(1, self.count + 1),
            key=lambda number: (
                self._rest(number, now),
                self._handshakes[number] > busy_since,
                self.established[number],
                self._used[number],
                number,
            ),
        )
        self._in_use = segment
        self._used[segment] = now
        return segment
