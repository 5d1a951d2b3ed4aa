"""The far end of charon's HA channel: a UDP socket on loopback, with what the protocol itself does not give.

It has no acknowledgement, and a full receive buffer drops datagrams in silence. So the sender watches charon's receive
queue (`peer`) and waits when it grows, and the receiver asks for a large buffer and counts what was dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address

import structlog

from bridge.charon.ha_message import MAX_MESSAGE, PORT, HaError, HaMessage, MessageType, decode, encode
from bridge.charon.socket_diag import CharonSocket, Peer

log = structlog.get_logger()

QUEUE_HIGH = 96 * 1024
"""octets (with the kernel's overhead) in charon's receive queue from which on the sender waits; the queue usually
holds 208 KiB"""
BURST = 32
"""datagrams sent between two looks at charon's queue"""
NAP_SECONDS, NAPS = 0.0001, 12
"""between two looks while waiting, and how many such looks: one install takes charon about a millisecond"""
POLL_SECONDS = 0.001
"""between two looks from then on; uvloop's timers know whole milliseconds only"""
STUCK_SECONDS = 30.0
"""a charon that does not empty its queue in this time hangs"""
_LAST_WORDS = (MessageType.IKE_DELETE, MessageType.CHILD_DELETE)
"""what is believed of a charon that is gone"""
RECEIVE_BURST = 256
"""datagrams handled in one turn of the event loop, so that others get theirs"""
_SO_RCVBUFFORCE = 33
_SO_MEMINFO_DROPS = 8
_SO_MEMINFO = 55


class ChannelError(Exception):
    """The HA channel cannot be used; the text names the cause and the mend."""


class HaChannel:
    """Both directions of the HA channel. `open()` holds the address, `start()` hands what charon sends to `handler`."""

    def __init__(
        self,
        listen: str,
        charon: str,
        handler: Callable[[HaMessage], None],
        *,
        receive_buffer: int = 16 * 1024 * 1024,
    ) -> None:
        self.version: int | None = None
        """message version of this charon, learned from VICI or from what it sends"""
        self.received = 0
        self.malformed = 0
        self._listen = listen
        self._charon = charon
        self._handler = handler
        self._receive_buffer = receive_buffer
        self._peer = Peer(listen, charon)
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_uid = False

    def open(self) -> None:
        """Bind the sidecar's end, or take the socket that systemd holds for it. Raises ChannelError."""
        sock = _inherited(self._listen)
        if sock is None:
            family = socket.AF_INET if ip_address(self._listen).version == 4 else socket.AF_INET6
            sock = socket.socket(family, socket.SOCK_DGRAM)
            try:
                sock.bind((self._listen, PORT))
            except OSError as error:
                sock.close()
                raise ChannelError(
                    f"UDP {self._listen}:{PORT} cannot be bound ({error.strerror}): it is charon's HA channel and "
                    "receives keys, so find out who holds it (ss -ulpn) before you start charon again"
                ) from error
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, self._receive_buffer)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        # only datagrams from charon's own address and port are delivered from here on
        sock.connect((self._charon, PORT))
        self._socket = sock
        self._peer.open()

    def discard(self) -> None:
        """Forget what waits in the socket: it came while any user could send it. What charon said meanwhile is missing
        then, as if it had been dropped, and the comparison with VICI finds it."""
        assert self._socket is not None
        forgotten = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    self._socket.recv(1)
                    forgotten += 1
        if forgotten:
            log.warning("ha-datagrams-discarded", datagrams=forgotten, reason="they came before the rules were set")

    def start(self) -> None:
        """Begin to hand on what charon sends; until then the kernel keeps it."""
        assert self._socket is not None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def pause(self) -> None:
        """Hand on nothing more; the kernel keeps what comes, as before `start`."""
        if self._socket is not None and self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Give the socket back."""
        self.pause()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._peer.close()

    # receiving

    def _readable(self) -> None:
        assert self._socket is not None
        alive, trusted = self._holder()
        for _ in range(RECEIVE_BURST):
            try:
                data, sender = self._socket.recvfrom(MAX_MESSAGE * 2)
            except BlockingIOError:
                return
            except OSError:
                # ICMP port unreachable of an earlier send: charon is not there
                continue
            self.received += 1
            if not trusted or sender[:2] != (self._charon, PORT):
                # what came before connect(2) may be from anyone
                self.malformed += 1
                continue
            try:
                message = decode(data)
            except HaError as error:
                self.malformed += 1
                log.warning("ha-message-malformed", octets=len(data), reason=str(error))
                continue
            if self.version is None and alive:
                self.version = message.version
            if not alive and message.type not in _LAST_WORDS:
                # whoever bound charon's port after its end cannot invent SAs
                self.malformed += 1
            elif message.version == self.version:
                self._handler(message)
            else:
                self.malformed += 1

    def drops(self) -> int:
        """Datagrams of charon's that the kernel dropped because the sidecar's buffer was full."""
        if self._socket is None:
            return 0
        try:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * 16)
        except OSError:
            return 0
        words = [int.from_bytes(raw[i : i + 4], sys.byteorder) for i in range(0, len(raw), 4)]
        return words[_SO_MEMINFO_DROPS] if len(words) > _SO_MEMINFO_DROPS else 0

    # sending

    def charon_socket(self) -> CharonSocket | None:
        """charon's end, or None when there is none: charon is down, or runs without the ha plugin."""
        return self._peer.look()

    def _holder(self) -> tuple[bool, bool]:
        """Whether somebody holds charon's end, and whether that is charon or nobody, and no other user's process."""
        end = self.charon_socket()
        if end is not None and end.uid not in (0, os.geteuid()):
            if not self._told_uid:
                log.error(
                    "ha-channel-foreign",
                    uid=end.uid,
                    mend=f"UDP {self._charon}:{PORT} is held by that user and not by charon: stop it",
                )
            self._told_uid = True
            return True, False
        return end is not None, True

    def ready(self) -> bool:
        """Whether messages can be sent: charon's end is there, is root's, and its version is known."""
        return self._socket is not None and self.version is not None and self._holder() == (True, True)

    def encode(self, kind: MessageType, attributes: Iterable[tuple[object, object]] = ()) -> bytes:
        """A message in this charon's version. Raises HaError, also while the version is not known."""
        if self.version is None:
            raise HaError("charon's message version is not known yet")
        return encode(self.version, kind, attributes)  # type: ignore[arg-type]

    async def send(self, messages: Iterable[bytes]) -> None:
        """Send in order, waiting whenever charon's queue is long. Raises ChannelError when charon is not there."""
        assert self._socket is not None
        for count, message in enumerate(messages):
            if count % BURST == 0:
                await self._below(QUEUE_HIGH)
            try:
                self._socket.send(message)
            except BlockingIOError:
                await self._below(QUEUE_HIGH)
                self._socket.send(message)
            except OSError as error:
                raise ChannelError(f"charon does not take HA messages: {error.strerror}") from error

    async def drained(self) -> None:
        """Wait until charon has handled all that was sent before this call. Raises ChannelError.

        charon handles one message after the other, so once a last one, which does nothing, has left the queue, the
        work of all before it is done.
        """
        await self.send([self.encode(MessageType.IKE_MID_INITIATOR)])
        await self._below(1)

    async def _below(self, octets: int) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + STUCK_SECONDS
        naps = 0
        while True:
            end = self.charon_socket()
            if end is None:
                raise ChannelError("charon's end of the HA channel is gone: charon stopped, or has no ha plugin")
            if end.queued < octets:
                return
            if loop.time() > deadline:
                raise ChannelError(f"charon did not read its HA channel for {STUCK_SECONDS:.0f} s")
            naps += 1
            if naps <= NAPS:
                time.sleep(NAP_SECONDS)  # noqa: ASYNC251 - shorter than any timer of the event loop
            else:
                await asyncio.sleep(POLL_SECONDS)


def _inherited(listen: str) -> socket.socket | None:
    """The socket systemd passed (sd_listen_fds(3)) that is bound to our address, if any."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    for descriptor in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))):
        sock = socket.socket(fileno=os.dup(descriptor))
        if sock.type == socket.SOCK_DGRAM and sock.getsockname()[:2] == (listen, PORT):
            os.set_inheritable(sock.fileno(), False)
            return sock
        sock.close()
    return None
