"""A cable with a delay, for kernels without netem: what comes in at one end leaves the other one later.

`python -m bridge.lab.delay END END SECONDS`, in the network namespace of both interfaces, runs until it is ended.
`python -m bridge.lab.delay whole INTERFACE` first, where the frames come from: it has the checksums filled in.
"""

from __future__ import annotations

import ctypes
import fcntl
import select
import socket
import struct
import sys
import time
from collections import deque

ALL_PROTOCOLS = 0x0003
OUTGOING = 4
"""packet type of what this very host sends (linux/if_packet.h)"""
LONGEST_FRAME = 65536
BUFFER = 16 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17


def whole(interface: str) -> None:
    """Have an interface compute the checksums of what it sends. Between veths the kernel leaves a note that they are
    still to be made, which a copy of the frame does not carry."""
    wanted = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(wanted))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)


def _end(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ALL_PROTOCOLS))
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    sock.bind((interface, ALL_PROTOCOLS))
    return sock


class _Direction:
    """Frames on their way, oldest first."""

    def __init__(self, source: socket.socket, target: socket.socket, seconds: float) -> None:
        self.source = source
        self._target = target
        self._seconds = seconds
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Take in all that waits."""
        due = time.monotonic() + self._seconds
        while True:
            try:
                frame, address = self.source.recvfrom(LONGEST_FRAME)
            except BlockingIOError:
                return
            if address[2] != OUTGOING:
                self._under_way.append((due, frame))

    def deliver(self, now: float) -> float:
        """Deliver what is due; seconds until the next is."""
        while self._under_way:
            due, frame = self._under_way[0]
            if due > now:
                return due - now
            self._under_way.popleft()
            try:
                self._target.send(frame)
            except OSError:
                # a full buffer, or an interface that is down, loses frames, as a cable does
                continue
        return float("inf")


def run(first: str, second: str, seconds: float) -> None:
    """Join two interfaces, for ever."""
    ends = _end(first), _end(second)
    ways = (_Direction(ends[0], ends[1], seconds), _Direction(ends[1], ends[0], seconds))
    print("joined", flush=True)
    while True:
        now = time.monotonic()
        wait = min(way.deliver(now) for way in ways)
        # select(2), for its timeout has microseconds
        ready, _, _ = select.select(ends, (), (), None if wait == float("inf") else wait)
        for way in ways:
            if way.source in ready:
                way.take()


if __name__ == "__main__" and sys.argv[1] == "whole":
    whole(sys.argv[2])
elif __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], float(sys.argv[3]))
