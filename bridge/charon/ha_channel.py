"""The far end of charon's HA channel: a UDP socket on loopback, with what the protocol itself does not give.

It has no acknowledgement, and a full receive buffer drops datagrams without an error. So the sender watches charon's
receive queue (`peer`) and waits when it grows, and the receiver asks for a large buffer and counts what was dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address

import structlog

from bridge.charon.ha_codec import encode, leading_ike_id
from bridge.charon.ha_grammar import MalformedMessage, read
from bridge.charon.ha_message import (
    PORT,
    VERSIONS,
    HaError,
    HaMessage,
    IkeId,
    MessageType,
)
from bridge.charon.nap import Naps
from bridge.charon.socket_diag import CharonSocket, Peer
from bridge.service.systemd import inherited
from bridge.service.tasks import spawn

log = structlog.get_logger()

QUEUE_HIGH = 96 * 1024
"""octets (with the kernel's overhead) in charon's receive queue from which on the sender waits; the queue usually
holds 208 KiB"""
QUEUE_FULL = 160 * 1024
"""the same, from which on not even a single message is sent at once"""
BURST = 32
"""datagrams sent between two looks at charon's queue"""
NAP_SECONDS, NAP_MAX, NAP_GROWTH = 0.0001, 0.001, 1.5
"""between two looks while waiting: one install takes charon about a millisecond, a batch of them longer"""
STUCK_SECONDS = 30.0
"""a charon that does not empty its queue in this time hangs"""
MAX_DATAGRAM = 65_536
"""octets to receive: more than any UDP datagram has. Of a CHILD_SA with many traffic selectors charon sends more than
it would receive itself"""
LAST_WORDS, LAST_WORD_OCTETS = 65_536, 1024
"""datagrams of a charon that is gone which wait for a look at the rules: it ends each of its SAs with one"""
RECEIVE_BURST = 256
"""datagrams handled in one turn of the event loop, so that others get theirs"""
_SO_RCVBUFFORCE = 33
# a plain number: to calculate with flags takes far longer
_TRUNCATED = int(socket.MSG_TRUNC)
_SO_MEMINFO_DROPS = 8
_SO_MEMINFO = 55


async def _unguarded(_: float) -> bool:
    return False


class ChannelError(Exception):
    """The HA channel cannot be used; the text names the cause and the fix."""


class HaChannel:
    """Both directions of the HA channel. `open()` holds the address, `start()` hands what charon sends to `handler`."""

    def __init__(
        self,
        listen: str,
        charon: str,
        handler: Callable[[HaMessage, bool], None],
        malformed: Callable[[IkeId | None, str], None],
        *,
        receive_buffer: int = 16 * 1024 * 1024,
    ) -> None:
        self.version: int | None = None
        """message version of this charon: that of what it sends, until then that of the release VICI names"""
        self.unsupported: int | None = None
        """the message version that charon sends, where it is none of VERSIONS"""
        self.guarded: Callable[[float], Awaitable[bool]] = _unguarded
        """whether only root can have sent since this moment (monotonic seconds)"""
        self.received = 0
        self.malformed = 0
        self._listen = listen
        self._charon = charon
        self._handler = handler
        self._malformed = malformed
        self._buffer = bytearray(MAX_DATAGRAM)
        self._held_by: int | None = None
        """who held charon's end when the queue was empty the last time: an inode"""
        self._empty_at: float | None = None
        """when that was (monotonic seconds)"""
        self._last_words: list[tuple[bytes, bool]] = []
        self._judging: asyncio.Task[None] | None = None
        self._receive_buffer = receive_buffer
        self._peer = Peer(listen, charon)
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._logged_uid = False
        self._naps = Naps()
        self._unseen = 0
        """datagrams sent since the last look before sending"""

    def open(self) -> None:
        """Bind the sidecar's end, or take the socket that systemd holds for it. Raises ChannelError."""
        sock = inherited(socket.SOCK_DGRAM, (self._listen, PORT))
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
        self._forget_last_words()

    def close(self) -> None:
        """Give the socket back."""
        self.pause()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._naps.close()
        self._peer.close()

    # receiving

    def expect(self, version: int | None) -> None:
        """Another charon, of a release whose message version is `version`, or not known yet."""
        self._forget_last_words()
        self.version, self.unsupported = version, None

    def receive(self) -> None:
        """Handle what has arrived, without waiting for more."""
        if self._socket is not None:
            self._readable()

    def _readable(self) -> None:
        """Hand on what has arrived.

        Who holds charon's address now may be another process than the one that sent a datagram. But between two looks
        at which one and the same socket holds it, no other can have sent one: those are genuine. So are the last ones
        of a charon that is gone, where rules have let only root send since the queue was empty.
        """
        assert self._socket is not None
        began = time.monotonic()
        end, trusted = self._holder()
        holder = end.inode if end is not None and trusted else None
        genuine = holder is not None and holder == self._held_by
        for _ in range(RECEIVE_BURST):
            try:
                length, _, flags, sender = self._socket.recvmsg_into([self._buffer])
            except BlockingIOError:
                self._held_by = holder
                if self._judging is None:
                    # until it is known what those are, no later moment says anything of them
                    self._empty_at = began
                return
            except OSError:
                # ICMP port unreachable of an earlier send: charon is not there
                continue
            self.received += 1
            if not trusted or sender[:2] != (self._charon, PORT):
                # what came before connect(2) may be from anyone
                self.malformed += 1
                continue
            datagram = bytes(self._buffer[:length]), bool(flags & _TRUNCATED)
            if end is None and self._empty_at is not None and self._loop is not None:
                self._late(datagram, self._empty_at)
            else:
                self._take(*datagram, end is not None, genuine)

    def _late(self, datagram: tuple[bytes, bool], empty_at: float) -> None:
        """One that seems to be of a charon that is gone."""
        if len(self._last_words) == LAST_WORDS or len(datagram[0]) > LAST_WORD_OCTETS:
            self.malformed += 1
            return
        self._last_words.append(datagram)
        if self._judging is None:
            self._judging = spawn("ha-last-words", self._judge(empty_at))

    async def _judge(self, empty_at: float) -> None:
        while self._last_words:
            words, self._last_words = self._last_words, []
            genuine = await self.guarded(empty_at)
            for data, truncated in words:
                self._take(data, truncated, genuine, genuine)
        self._judging = None

    def _forget_last_words(self) -> None:
        self._last_words.clear()
        if self._judging is not None:
            self._judging.cancel()
            self._judging = None

    def _take(self, data: bytes, truncated: bool, alive: bool, genuine: bool) -> None:
        """One datagram from charon's address."""
        if genuine and data and data[0] not in VERSIONS:
            self.malformed += 1
            self._not_supported(data[0])
            return
        try:
            if truncated:
                raise MalformedMessage("it is longer than a UDP datagram can be", leading_ike_id(data))
            message = read(data)
        except MalformedMessage as error:
            self.malformed += 1
            self._malformed_message(data, error, alive)
            return
        if not alive:
            # a process that bound charon's port after its end cannot invent SAs, nor end any
            self.malformed += 1
            return
        if message.version != self.version and (genuine or self.version is None):
            log.info("ha-version", version=message.version, expected=self.version)
            self.version, self.unsupported = message.version, None
        if message.version == self.version:
            self._handler(message, genuine)
        else:
            self.malformed += 1

    def _malformed_message(self, data: bytes, error: MalformedMessage, alive: bool) -> None:
        log.warning(
            "ha-message-malformed",
            octets=len(data),
            reason=str(error),
            **(error.ike_id.logged if error.ike_id is not None else {}),
        )
        if alive:
            self._malformed(error.ike_id, str(error))

    def _not_supported(self, version: int) -> None:
        """charon speaks a version of the HA protocol that was not there when this was written."""
        if self.unsupported == version:
            return
        self.version, self.unsupported = None, version
        log.error(
            "ha-version-unsupported",
            version=version,
            supported=list(VERSIONS),
            effect="no session is stored or resumed",
            fix="install a release of ike-sa-sync that supports this strongSwan, or the strongSwan release before it",
        )

    def drops(self) -> int:
        """Datagrams from charon that the kernel dropped because the sidecar's buffer was full."""
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

    def _holder(self) -> tuple[CharonSocket | None, bool]:
        """charon's end, if there is one, and whether no other user's process holds it."""
        end = self.charon_socket()
        if end is not None and end.uid not in (0, os.geteuid()):
            if not self._logged_uid:
                log.error(
                    "ha-channel-foreign",
                    uid=end.uid,
                    fix=f"stop the process of this user that holds UDP {self._charon}:{PORT} instead of charon",
                )
            self._logged_uid = True
            return end, False
        return end, True

    def holder(self) -> int | None:
        """The inode of charon's end; None where there is none, or a process of another user holds it."""
        end, trusted = self._holder()
        return end.inode if end is not None and trusted else None

    def ready(self) -> bool:
        """Whether messages can be sent: charon's end is there, belongs to root, and its version is known."""
        if self._socket is None or self.version is None:
            return False
        end, trusted = self._holder()
        return end is not None and trusted

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
                self._unseen = 0
            self._unseen += 1
            while not self._sent(message):
                await self._below(QUEUE_HIGH)
                await self._naps.nap(NAP_SECONDS)

    def _sent(self, message: bytes) -> bool:
        """False where the kernel has no room for it now. Raises ChannelError."""
        assert self._socket is not None
        try:
            self._socket.send(message)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelError(f"charon does not take HA messages: {error.strerror}") from error
        return True

    def send_now(self, message: bytes, *, to: int, idle: bool = False) -> bool:
        """Send one message without waiting; False where the charon whose end has the inode `to` is not there, or has so
        much to read that it may not get it; with `idle`, where it has anything to read."""
        end = self.charon_socket()
        if end is None or end.inode != to or end.queued >= (1 if idle else QUEUE_FULL):
            return False
        try:
            return self._sent(message)
        except ChannelError:
            return False

    async def drained(self) -> None:
        """Wait until charon has handled all that was sent before this call. Raises ChannelError.

        charon handles one message after the other, so once a last one, which does nothing, has left the queue, the
        work of all before it is done.
        """
        last = self.encode(MessageType.IKE_MID_INITIATOR)
        if 0 < self._unseen < BURST and self._sent(last):
            # charon cannot have handled what was sent just now: a look costs more than this wait
            self._unseen = 0
            await self._naps.nap(NAP_SECONDS)
        else:
            await self.send([last])
        await self._below(1)

    async def _below(self, octets: int) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + STUCK_SECONDS
        nap = NAP_SECONDS
        while True:
            end = self.charon_socket()
            if end is None:
                raise ChannelError("charon's end of the HA channel is gone: charon stopped, or has no ha plugin")
            if end.queued < octets:
                return
            if clock() > deadline:
                raise ChannelError(f"charon did not read its HA channel for {STUCK_SECONDS:.0f} s")
            await self._naps.nap(nap)
            nap = min(nap * NAP_GROWTH, NAP_MAX)
