"""What the two roles need of the network: a way to send, and intercepted packets."""

from __future__ import annotations

from typing import Protocol


class Packet(Protocol):
    """An intercepted datagram; see bridge.net.nfqueue.Packet."""

    src: str
    sport: int
    dst: str
    dport: int
    ike: bytes
    marker: bool

    @property
    def held(self) -> bool: ...
    def accept(self) -> None: ...
    def drop(self) -> None: ...


class Sender(Protocol):
    """See bridge.net.raw_socket.RawUdp."""

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None: ...
