"""Two network namespaces and a cable between them, and the IKE messages that the packet tests send over it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

CLONE_NEWNET = 0x40000000
IKE_SA_INIT, IKE_AUTH, CREATE_CHILD_SA, INFORMATIONAL, GET_STUB = 34, 35, 36, 37, 240
INITIATOR, RESPONSE = 0x08, 0x20
SA, NI, SYNC = 33, 40, 200
"""payload types"""
COOKIE, NAT_DETECTION_SOURCE_IP = 16390, 16388
"""types of notifications"""


def ike(exchange: int = IKE_SA_INIT, flags: int = INITIATOR, size: int = 28, first: int | None = None) -> bytes:
    """An IKE message (RFC 7296 section 3.1) of `size` octets, its payloads arbitrary but for the type of the first one:
    IKE_SA_SYNC, in GET Stub Ni."""
    spi_r = secrets.token_bytes(8) if flags & RESPONSE else bytes(8)
    kind = first if first is not None else NI if exchange == GET_STUB else SYNC
    header = secrets.token_bytes(8) + spi_r + bytes([kind, 0x20, exchange, flags]) + bytes(4) + size.to_bytes(4)
    return header + secrets.token_bytes(size - 28)


def with_notification(kind: int, following: int) -> bytes:
    """An IKE_SA_INIT request that begins with a notification of this type, as long as a cookie of charon's; then a
    payload of type `following`."""
    body = bytes([following, 0]) + (28).to_bytes(2) + bytes(2) + kind.to_bytes(2) + secrets.token_bytes(20)
    return ike(size=28 + len(body) + 100, first=41)[:28] + body + secrets.token_bytes(100)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in another network namespace; sockets and processes made there stay there."""
    assert threading.current_thread() is threading.main_thread()
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        assert libc.setns(there, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(home)
        os.close(there)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """This thread in a network namespace of its own, with loopback, in which nobody has any port."""
    name = f"iss-{secrets.token_hex(4)}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        with inside(name):
            yield
    finally:
        run("ip", "netns", "del", name)


@dataclass
class End:
    """One end of the cable."""

    namespace: str
    ipv4: str
    ipv6: str
    sockets: list[socket.socket] = field(default_factory=list)

    def address(self, family: str) -> str:
        return self.ipv4 if family == "ipv4" else self.ipv6

    def udp(self, family: str, port: int) -> socket.socket:
        """A bound UDP socket here, as charon's is; it waits two seconds for a datagram."""
        with inside(self.namespace):
            sock = socket.socket(socket.AF_INET if family == "ipv4" else socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((self.address(family), port))
        sock.settimeout(2)
        self.sockets.append(sock)
        return sock

    def close(self) -> None:
        """Close the sockets made here."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()

    def run(self, *command: str) -> str:
        with inside(self.namespace):
            return run(*command)


@dataclass
class Wire:
    """`peer` sends, `host` is where the sidecar would run."""

    host: End
    peer: End

    def close_sockets(self) -> None:
        self.host.close()
        self.peer.close()


FAMILIES = ("ipv4", "ipv6")


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    prefix = f"isnet{secrets.token_hex(3)}"
    host = End(f"{prefix}-host", "192.0.2.1", "2001:db8::1")
    peer = End(f"{prefix}-peer", "192.0.2.2", "2001:db8::2")
    try:
        for end in (host, peer):
            run("ip", "netns", "add", end.namespace)
        run(
            *("ip", "link", "add", "eth0", "netns", host.namespace, "type", "veth"),
            *("peer", "name", "eth0", "netns", peer.namespace),
        )
        for end in (host, peer):
            end.run("ip", "address", "add", f"{end.ipv4}/24", "dev", "eth0")
            end.run("ip", "address", "add", f"{end.ipv6}/64", "dev", "eth0", "nodad")
            end.run("ip", "link", "set", "lo", "up")
            end.run("ip", "link", "set", "eth0", "up")
        for there in (peer.ipv4, peer.ipv6):
            # the first packets of an interface that is just up may wait for neighbour discovery, or be lost
            host.run("ping", "-q", "-n", "-c", "1", "-i", "0.2", "-w", "20", there)
        yield Wire(host, peer)
    finally:
        for end in (host, peer):
            end.close()
            subprocess.run(["ip", "netns", "delete", end.namespace], capture_output=True, check=False)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until `condition` holds; fails after five seconds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for knows of no event
            await asyncio.sleep(0.005)


async def received(sock: socket.socket) -> bytes:
    """The next datagram, while the event loop runs."""
    return await asyncio.to_thread(sock.recv, 65535)
