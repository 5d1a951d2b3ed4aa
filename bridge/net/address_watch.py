"""Which addresses this host's interfaces have, and news of that from the kernel (rtnetlink)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from typing import Final

import structlog

from bridge.net.netlink import HEADER, NLMSG_ERROR, aligned, attributes, error, request

log = structlog.get_logger()

# linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h
_RTM_NEWADDR, RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_NLMSG_DONE: Final = 3
_NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x300, 0x10
_GROUPS: Final = 0x10 | 0x100
"""RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR"""
ADDRESS: Final = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, interface"""
IFA_ADDRESS, IFA_LOCAL = 1, 2
_IFA_F_TENTATIVE: Final = 0x40
"""IPv6: duplicate address detection goes on, and nothing can be sent from it yet"""
RECEIVE: Final = 1 << 16


Change = tuple[str, int, bool]
"""an address, the index of its interface, and whether it is there"""


def present() -> dict[str, int]:
    """All addresses with the index of their interface, in the network namespace of the caller. Raises OSError."""
    found: dict[str, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        body = ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        sock.send(request(_RTM_GETADDR, body, _NLM_F_DUMP))
        while True:
            data = sock.recv(RECEIVE)
            _raise_error(data)
            changes, done = parse(data)
            found |= {address: interface for address, interface, there in changes if there}
            if done:
                return found


def _raise_error(data: bytes) -> None:
    """OSError where an answer is none: an incomplete list would show addresses as gone."""
    if (code := error(data)) is not None:
        raise OSError(code or errno.EIO, "the kernel does not list its addresses")
    if len(data) >= HEADER.size and HEADER.unpack_from(data)[2] & _NLM_F_DUMP_INTR:
        raise OSError(errno.EINTR, "the list of addresses changed while it was read")


def parse(data: bytes) -> tuple[list[Change], bool]:
    """What rtnetlink messages say of addresses, and whether they end an answer. Never raises."""
    changes: list[Change] = []
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, *_ = HEADER.unpack_from(data, offset)
        if kind in (_NLMSG_DONE, NLMSG_ERROR) or length < HEADER.size:
            return changes, True
        message = data[offset + HEADER.size : offset + length]
        if kind in (_RTM_NEWADDR, RTM_DELADDR) and (read := _read(message)) is not None:
            changes.append((*read, kind == _RTM_NEWADDR))
        offset += aligned(length)
    return changes, False


def _read(message: bytes) -> tuple[str, int] | None:
    if len(message) < ADDRESS.size:
        return None
    family, _, flags, _, interface = ADDRESS.unpack_from(message)
    if flags & _IFA_F_TENTATIVE:
        return None
    found = dict(attributes(message, ADDRESS.size))
    octets = found.get(IFA_LOCAL, found.get(IFA_ADDRESS))
    try:
        return None if octets is None else (socket.inet_ntop(family, octets), interface)
    except (ValueError, OSError):
        return None


class AddressWatch:
    """Calls `handler` with (address, whether it is there) for as long as it is started, and `missed` where news were
    lost. An address that is at another interface too may be reported as gone: see `present`."""

    def __init__(self, handler: Callable[[str, bool], None], missed: Callable[[], None] = lambda: None) -> None:
        self._handler = handler
        self._missed = missed
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Begin, in the network namespace of the caller. Raises OSError."""
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        sock.bind((0, _GROUPS))
        self._socket = sock
        asyncio.get_running_loop().add_reader(sock, self._readable, sock)

    def close(self) -> None:
        """End."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _readable(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    changes, _ = parse(sock.recv(RECEIVE))
                except BlockingIOError:
                    raise
                except OSError as error:
                    # more came than fits: what is there now says the rest
                    log.warning("addresses-missed", reason=error.strerror)
                    self._missed()
                    continue
                for address, _, there in changes:
                    self._handler(address, there)
