"""Whether charon has read all IKE messages that it has received: its receive queues, as the kernel shows them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from typing import Final

from bridge.charon.nap import Naps
from bridge.charon.socket_diag import Sockets

SHORT: Final = bytes(2)
"""a datagram of less octets than a non-ESP marker has: charon ignores it, and says so at log level 3"""
READ_SECONDS: Final = 0.5
"""a charon that has not read what it received by then hangs, or is overloaded"""
NAP_SECONDS: Final = 0.0003
UNSEEN_SECONDS: Final = 0.01
"""given to charon where the kernel does not show its queues"""


class IkeSockets:
    """charon's sockets for IKE, at `ports`, of both families, in the network namespace of the process that uses it."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._sockets = Sockets()
        self._naps = Naps()

    def close(self) -> None:
        """Give back what is open."""
        self._sockets.close()
        self._naps.close()

    async def read(self) -> bool:
        """Wait until charon has read and counted what it received before this call, for READ_SECONDS at most; whether
        it has.

        One thread reads one message after the other, of all sockets. So once the queues have been empty, and a last
        datagram, which charon ignores, has left its queue, the work of that thread on all before it is done.
        """
        deadline = time.monotonic() + READ_SECONDS
        try:
            if not await self._empty(deadline):
                return False
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(SHORT, ("127.0.0.1", self._ports[0]))
            return await self._empty(deadline)
        except OSError:
            await asyncio.sleep(UNSEEN_SECONDS)
            return True

    async def _empty(self, deadline: float) -> bool:
        """Raises OSError where the kernel does not say."""
        waiting = [(family, port) for port in self._ports for family in (socket.AF_INET, socket.AF_INET6)]
        while True:
            waiting = [one for one in waiting if self._sockets.queued(*one)]
            if not waiting:
                return True
            if time.monotonic() > deadline:
                return False
            await self._naps.nap(NAP_SECONDS)
