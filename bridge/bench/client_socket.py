"""The one UDP socket of all simulated clients: each sends from its own address."""

from __future__ import annotations

import contextlib
import select
import socket
import struct

from bridge.net.packet import MARKER, PORT_NAT_T

BUFFER = 16 << 20
_IP_PKTINFO = 8
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class ClientSocket:
    """In a network namespace in which any address of the clients is the host's own. `port` is a client's and the
    gateway's: at 4500 IKE messages begin with a marker."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._marker = MARKER if port == PORT_NAT_T else b""
        self._socket = sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
        sock.bind(("0.0.0.0", port))  # noqa: S104 - in a network namespace of its own
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: bytes, source: str, gateway: str, *, ike: bool = True) -> None:
        """From a client's address; without `ike` it is ESP."""
        # struct in_pktinfo: interface, source, (unused)
        info = struct.pack("=i4s4x", 0, socket.inet_aton(source))
        ancillary = [(socket.IPPROTO_IP, _IP_PKTINFO, info)]
        # what the buffer does not take is lost, as on any path; the timer sends it again
        with contextlib.suppress(BlockingIOError):
            self._socket.sendmsg([self._marker if ike else b"", message], ancillary, 0, (gateway, self._port))

    def receive(self) -> bytes | None:
        """The next message, to any client; None where there is none."""
        try:
            return self._socket.recv(4096)[len(self._marker) :]
        except BlockingIOError:
            return None

    def wait(self, milliseconds: float) -> None:
        """For a message, so long at most."""
        self._poll.poll(milliseconds)
