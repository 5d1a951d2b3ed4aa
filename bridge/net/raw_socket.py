"""IKE messages from and to ports that are charon's: sent and overheard through raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable

import structlog

from bridge.net.bpf import (
    LOAD_X_IPV4_HEADER,
    LOAD_X_NUMBER,
    RETURN_NONE,
    answers_filter,
    attach,
)
from bridge.net.packet import (
    Datagram,
    ipv6_packet,
    parse_datagram,
    udp_datagram,
)

__all__ = ["Datagram", "RawUdp", "ResponseListener"]

log = structlog.get_logger()

SEND_BUFFER = RECEIVE_BUFFER = 4 << 20
"""octets; for bursts of some thousand messages"""
READ_AT_ONCE = 256
"""datagrams, then the event loop has its turn"""

# linux/in.h, in6.h, asm-generic/socket.h: not all of them are in `socket`
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_IP_PKTINFO, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT, _IP_XFRM_POLICY = 8, 10, 0, 17
_IPV6_XFRM_POLICY = 35
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75

# linux/xfrm.h: struct xfrm_userpolicy_info
_XFRM_SELECTOR = struct.Struct("=32x8xHBBBxxxiI")
_XFRM_POLICY = struct.Struct("=56s64x32xIIBBBB4x")
_XFRM_IN, _XFRM_OUT, _XFRM_ALLOW = 0, 1, 0


class RawUdp:
    """Sends UDP datagrams from any local address and port, those that charon is bound to included."""

    def __init__(self, *, transparent: bool = False) -> None:
        """`transparent`: from addresses of other hosts too. Raises OSError, with the fix, without CAP_NET_RAW and
        CAP_NET_ADMIN."""
        self._ipv4 = raw_socket(socket.AF_INET)
        self._ipv4.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        _send_only(self._ipv4, "127.255.255.254")
        self._ipv6 = raw_socket_ipv6()
        if self._ipv6 is not None:
            _send_only(self._ipv6, "::1")
        if transparent:
            self._ipv4.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
            if self._ipv6 is not None:
                self._ipv6.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        """Send an IKE message, after a non-ESP marker if `marker`. The kernel fragments what the path cannot take.

        Raises OSError: no route, `src` not an address of this host, refused by a filter, buffer full, too long.
        """
        datagram = udp_datagram(src, sport, dst, dport, payload, marker)
        if ":" not in dst:
            # struct in_pktinfo: interface, source, (unused)
            info = struct.pack("=i4s4x", 0, socket.inet_pton(socket.AF_INET, src))
            self._ipv4.sendmsg([datagram], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, (dst, 0))
        elif self._ipv6 is not None:
            # struct in6_pktinfo: source, interface
            info = struct.pack("=16si", socket.inet_pton(socket.AF_INET6, src), 0)
            self._ipv6.sendmsg([datagram], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)], 0, (dst, 0))
        else:
            raise OSError(errno.EAFNOSUPPORT, "this host has no IPv6")

    def close(self) -> None:
        """Give the sockets back."""
        self._ipv4.close()
        if self._ipv6 is not None:
            self._ipv6.close()


class ResponseListener:
    """Receives copies of answers to the ANSWERED exchanges, between any ports; charon gets them too.

    A filter in the kernel lets nothing else up to here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, handler: Callable[[list[Datagram]], None]) -> None:
        self._loop = loop
        self._handler = handler
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        """Begin to listen, in the network namespace of the caller. Raises OSError, with the fix, without
        CAP_NET_RAW."""
        ipv4, ipv6 = raw_socket(socket.AF_INET), raw_socket_ipv6()
        # an IPv4 raw socket gives the IP header as well, an IPv6 one does not
        attach(ipv4, answers_filter((LOAD_X_IPV4_HEADER, 0, 0, 0)))
        self._sockets.append(ipv4)
        if ipv6 is not None:
            attach(ipv6, answers_filter((LOAD_X_NUMBER, 0, 0, 0)))
            ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._sockets.append(ipv6)
        for sock in self._sockets:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
            discard_waiting(sock)
        self._loop.add_reader(ipv4, self._readable, ipv4, _read_ipv4)
        if ipv6 is not None:
            self._loop.add_reader(ipv6, self._readable, ipv6, _read_ipv6)

    def stop(self) -> None:
        """Stop listening."""
        # of no type: uvloop's gives None where others give a bool, which the compiled form of this module would refuse
        remove_reader: Callable[[socket.socket], object] = self._loop.remove_reader
        for sock in self._sockets:
            remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _readable(self, sock: socket.socket, read: Callable[[socket.socket], Datagram | None]) -> None:
        batch = []
        for _ in range(READ_AT_ONCE):
            try:
                datagram = read(sock)
            except BlockingIOError:
                break
            except OSError as error:
                log.warning("answers-unreadable", reason=error.strerror)
                break
            if datagram is not None:
                batch.append(datagram)
        if batch:
            self._handler(batch)


def _read_ipv4(sock: socket.socket) -> Datagram | None:
    return parse_datagram(sock.recv(65535), answers=True)


def _read_ipv6(sock: socket.socket) -> Datagram | None:
    udp, ancillary, _, peer = sock.recvmsg(65535, socket.CMSG_SPACE(20))
    src = socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return parse_datagram(ipv6_packet(src, data[:16], udp), answers=True)
    return None


def _send_only(sock: socket.socket, nobody: str) -> None:
    """Receive nothing. Connected to `nobody`, the kernel does not even copy the host's UDP traffic, all ESP in UDP
    included, to look at it for this socket."""
    attach(sock, [RETURN_NONE])
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    with contextlib.suppress(OSError):  # no loopback: it costs time, no more
        sock.connect((nobody, 0))


def discard_waiting(sock: socket.socket) -> None:
    """What came before the filter was in place."""
    try:
        while True:
            sock.recv(1)
    except BlockingIOError:
        pass


def raw_socket(family: socket.AddressFamily) -> socket.socket:
    """A raw UDP socket that IPsec policies leave alone. Raises OSError, with the fix."""
    try:
        sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_UDP)
    except PermissionError as error:
        raise PermissionError(error.errno, "raw sockets are refused: run as root, or with CAP_NET_RAW") from error
    try:
        _pass_by_ipsec(sock, family)
    except OSError:
        sock.close()
        raise
    return sock


def raw_socket_ipv6() -> socket.socket | None:
    """None on a host without IPv6."""
    try:
        return raw_socket(socket.AF_INET6)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return None
        raise


def _pass_by_ipsec(sock: socket.socket, family: socket.AddressFamily) -> None:
    """Have IPsec policies leave this socket's packets alone, as charon does with its own: IKE never goes through the
    tunnel it is about."""
    try:
        # loads xfrm_user, without which the kernel understands no policy; charon may load it only later
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_XFRM).close()
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return  # a kernel without IPsec: no policies either
        raise
    if family == socket.AF_INET:
        level, option = socket.IPPROTO_IP, _IP_XFRM_POLICY
    else:
        level, option = socket.IPPROTO_IPV6, _IPV6_XFRM_POLICY
    for direction in (_XFRM_IN, _XFRM_OUT):
        selector = _XFRM_SELECTOR.pack(family, 0, 0, 0, 0, 0)
        try:
            sock.setsockopt(level, option, _XFRM_POLICY.pack(selector, 0, 0, direction, _XFRM_ALLOW, 0, 0))
        except OSError as error:
            reason = f"the socket's IPsec policy is refused ({error.strerror}): run as root, or with CAP_NET_ADMIN"
            raise OSError(error.errno, reason) from error
