"""charon's sockets, as the kernel shows them: are they there, whose are they, how much has charon left to read.

Asked of sock_diag(7), which finds one socket by its addresses; /proc/net/udp, which shows the same, takes a walk
through all UDP sockets of the kernel, and is read where that has no udp_diag.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from ipaddress import ip_address
from typing import Final, NamedTuple

import structlog

from bridge.charon.ha_message import PORT
from bridge.net.netlink import HEADER, attributes, error, request

log = structlog.get_logger()

# linux/sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_SKMEMINFO: Final = 7
_REQUEST: Final = struct.Struct("=BBBxI")
"""family, protocol, extensions, states; the socket follows"""
_SOCKET: Final = struct.Struct("!HH16s16s")
"""ports and addresses of the other end and of this one; interface and cookie follow"""
_ANY: Final = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
_FOUND: Final = struct.Struct("!4x H2x 16s 16s 12x")
"""of the answer: the port and the address that the socket is bound to"""
_STATE: Final = struct.Struct("=4xI4xII")
"""octets to read, (to write,) user, inode"""
_DROPS: Final = struct.Struct("=32xI")
"""the last of the words of SK_MEMINFO"""


class CharonSocket(NamedTuple):
    """charon's end."""

    queued: int
    """octets waiting, with the kernel's overhead"""
    drops: int
    uid: int
    inode: int


def proc_address(address: str, port: int) -> tuple[str, str]:
    """(file, local_address column) of a UDP socket in /proc/net."""
    packed = ip_address(address).packed
    words = [packed[i : i + 4] for i in range(0, len(packed), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    name = b"".join(words).hex().upper()
    return ("/proc/net/udp" if len(packed) == 4 else "/proc/net/udp6"), f"{name}:{port:04X}"


class Peer:
    """Looks at the socket on `charon`'s address and PORT that receives from the one on `listen`, in the network
    namespace of the process that calls `open`."""

    def __init__(self, listen: str, charon: str) -> None:
        self._charon = charon
        here, there = ip_address(listen).packed, ip_address(charon).packed
        self._there = there.ljust(16, b"\0")
        self._question = _question(here, there)
        self._own = _question(there, here)
        self._own_address = here.ljust(16, b"\0")
        self._diag: socket.socket | None = None
        self._proc_file, local = proc_address(charon, PORT)
        # behind the row number: remote_address looks the same
        self._proc_local = f": {local} ".encode()
        self._table: int | None = None

    def open(self) -> None:
        """To be called while the socket on `listen` is bound: the kernel is tried with it."""
        with contextlib.suppress(OSError):
            self._diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_SOCK_DIAG)
            if _ask(self._diag, self._own, self._own_address) is not None:
                return
        self._forgo()

    def close(self) -> None:
        """Give back what is open."""
        self._forgo()
        if self._table is not None:
            os.close(self._table)
            self._table = None

    def look(self) -> CharonSocket | None:
        """charon's end now, or None when there is none: charon is down, or runs without the ha plugin."""
        # metrics are read in another thread
        if (diag := self._diag) is not None:
            try:
                return _ask(diag, self._question, self._there)
            except OSError as error:
                log.warning("sock-diag-unavailable", reason=error.strerror, instead=self._proc_file)
                self._forgo()
        return self._from_table()

    def _forgo(self) -> None:
        if self._diag is not None:
            self._diag.close()
            self._diag = None

    def _from_table(self) -> CharonSocket | None:
        table = self._read_table()
        start = table.find(self._proc_local)
        if start < 0:
            return None
        columns = table[start + 1 : table.find(b"\n", start)].split()
        queued = int(columns[3].split(b":")[1], 16)
        return CharonSocket(queued, int(columns[11]), int(columns[6]), int(columns[8]))

    def _read_table(self) -> bytes:
        """The kernel's table of UDP sockets; kept open, since it is read at every install."""
        with contextlib.suppress(OSError):
            if self._table is None:
                self._table = os.open(self._proc_file, os.O_RDONLY | os.O_CLOEXEC)
            table = b""
            # one read gives whole rows, as many as fit into a page
            while part := os.pread(self._table, 65536, len(table)):
                table += part
                if self._proc_local in table:
                    break
            return table
        return b""


class Sockets:
    """UDP sockets that receive on loopback, in the network namespace of the process that makes this."""

    def __init__(self) -> None:
        self._diag: socket.socket | None = None
        self._questions: dict[tuple[socket.AddressFamily, int], bytes] = {}

    def close(self) -> None:
        """Give back what is open."""
        if self._diag is not None:
            self._diag.close()
            self._diag = None

    def queued(self, family: socket.AddressFamily, port: int) -> int:
        """Octets, with the kernel's overhead, that wait in the socket of a port; 0 where there is none. Raises OSError
        where the kernel does not say."""
        if self._diag is None:
            self._diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_SOCK_DIAG)
        question = self._questions.get((family, port))
        if question is None:
            loopback = ip_address("127.0.0.1" if family == socket.AF_INET else "::1").packed
            question = self._questions[family, port] = _question(loopback, loopback, port)
        answer = _answer(self._diag, question)
        if answer is None:
            return 0
        queued, _, _ = _STATE.unpack_from(answer, HEADER.size + _FOUND.size)
        return int(queued)


def _question(far: bytes, near: bytes, port: int = PORT) -> bytes:
    """What finds the socket that a datagram from `far` to `near`, between sockets of this port, would get to."""
    family = socket.AF_INET if len(near) == 4 else socket.AF_INET6
    body = _REQUEST.pack(family, socket.IPPROTO_UDP, 1 << (_SKMEMINFO - 1), 0xFFFFFFFF)
    body += _SOCKET.pack(port, port, far.ljust(16, b"\0"), near.ljust(16, b"\0")) + _ANY
    return request(_SOCK_DIAG_BY_FAMILY, body)


def _answer(diag: socket.socket, question: bytes) -> bytes | None:
    """What the kernel says of the socket that is found. Raises OSError where it does not answer."""
    diag.send(question)
    answer = diag.recv(4096)
    code = error(answer)
    if code is None:
        return answer
    if code == errno.ENOENT:
        return None
    raise OSError(code, os.strerror(code))


def _ask(diag: socket.socket, question: bytes, bound: bytes) -> CharonSocket | None:
    """The socket that is found and `bound` to this address. Raises OSError where the kernel does not answer."""
    answer = _answer(diag, question)
    if answer is None:
        return None
    at = HEADER.size
    port, address, _ = _FOUND.unpack_from(answer, at)
    if port != PORT or address != bound:
        # bound to all addresses: not charon's
        return None
    at += _FOUND.size
    queued, uid, inode = _STATE.unpack_from(answer, at)
    for name, value in attributes(answer, at + _STATE.size):
        if name == _SKMEMINFO and len(value) >= _DROPS.size:
            return CharonSocket(queued, _DROPS.unpack_from(value)[0], uid, inode)
    raise OSError(errno.EOPNOTSUPP, "no socket memory in the answer")
