"""IKE_SA_INIT requests on their way to charon, held until the sidecar has decided on each (NFQUEUE).

Everything fails open: what the sidecar does not understand, does not get round to, or fails on, goes on to charon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from bridge.net.packet import may_begin_handshake, parse_datagram

if TYPE_CHECKING:
    from netfilterqueue import NetfilterQueue
    from netfilterqueue import Packet as Queued

log = structlog.get_logger()

COPY_OCTETS = 3500
"""of a packet that the kernel hands over. NetfilterQueue reads into 4096 octets, netlink's own attributes included,
and loses what is longer; a packet cut here is merely not understood."""
QUEUED_OCTETS = 2560
"""what one packet takes of the netlink socket's buffer, the kernel's overhead included"""

READ_AT_ONCE, READ_BUSY, NO_END = 128, 16, -1
"""packets, then the event loop has its turn; fewer while a request is being served, which needs several turns"""

_QUEUES = "/proc/thread-self/net/netfilter/nfnetlink_queue"

# linux/netlink.h, linux/netfilter/nfnetlink_queue.h
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5
_NLM_F_REQUEST = 1
_NFQNL_MSG_CONFIG = 3 << 8 | 2
_NFQA_CFG_MASK, _NFQA_CFG_FLAGS = 4, 5
_NFQA_CFG_F_FAIL_OPEN = 1


class InterceptUnavailable(Exception):
    """Requests cannot be intercepted; the text names the cause and the fix."""


class _Gate:
    """What is undecided, in order of arrival; and, while it is `closed`, what goes on to charon only afterwards."""

    __slots__ = ("_most", "closed", "held", "waiting")

    def __init__(self, most: int) -> None:
        self.held: dict[Packet, None] = {}
        self.closed = 0
        """by so many"""
        self.waiting: list[Queued] = []
        self._most = most

    def wait(self, queued: Queued) -> None:
        """Until it opens; what is too much is dropped, so that the queue has room for others: who began a handshake
        begins it again."""
        if len(self.waiting) < self._most:
            self.waiting.append(queued)
        else:
            queued.drop()

    def let_go(self) -> None:
        waiting, self.waiting = self.waiting, []
        for queued in waiting:
            queued.accept()


class Packet:
    """A held IKE request. `marker`: it came after a non-ESP marker. Decide once; later decisions do nothing."""

    __slots__ = ("_gate", "_queued", "dport", "dst", "ike", "marker", "sport", "src")

    def __init__(
        self,
        src: str,
        sport: int,
        dst: str,
        dport: int,
        ike: bytes,
        marker: bool,
        queued: Queued,
        gate: _Gate,
    ) -> None:
        self.src = src
        self.sport = sport
        self.dst = dst
        self.dport = dport
        self.ike = ike
        self.marker = marker
        self._queued: Queued | None = queued
        self._gate = gate

    def __repr__(self) -> str:
        state = "held" if self.held else "decided"
        return f"<Packet {self.src}:{self.sport} -> {self.dst}:{self.dport}, {len(self.ike)} octets, {state}>"

    @property
    def held(self) -> bool:
        """Whether it was not decided on yet, neither by the handler that took it nor by the end of the interceptor."""
        return self._queued is not None

    def accept(self) -> None:
        """Let it go on to charon."""
        queued = self._queued
        if queued is not None:
            self._queued = None
            self._gate.held.pop(self, None)
            if self._gate.closed and may_begin_handshake(self.ike):
                self._gate.wait(queued)
            else:
                queued.accept()

    def drop(self) -> None:
        """Keep it from charon: the sidecar answers."""
        queued = self._queued
        if queued is not None:
            self._queued = None
            self._gate.held.pop(self, None)
            queued.drop()


class _Enough(Exception):
    """Ends NetfilterQueue's loop, which reads in C until it is interrupted or there is nothing left."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """`drops`: requests the kernel dropped, because the queue or the socket to the sidecar was full (with fail-open,
    none); `waiting`: in the kernel's queue now; `held`: of these, with the sidecar; `seen`: read since the start."""

    drops: int
    waiting: int
    held: int
    seen: int


class Interceptor:
    """One NFQUEUE. `handler` is called on the event loop with every batch of requests, and decides on each, immediately
    or later. At most `max_length` are undecided at a time: the kernel lets the rest pass. `busy` returns whether what
    was held is being worked on; `stood_still`, asked before each look at the queue, that the event loop was not there
    for so long that `let_go` was called."""

    def __init__(
        self,
        queue: int,
        handler: Callable[[list[Packet]], None],
        busy: Callable[[], bool] = lambda: False,
        stood_still: Callable[[], bool] = lambda: False,
        *,
        max_length: int = 4096,
    ) -> None:
        self._number = queue
        self._handler = handler
        self._busy = busy
        self._stood_still = stood_still
        self._max_length = max_length
        self._queue: NetfilterQueue | None = None
        self._fails_open = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._proc = -1
        self._gate = _Gate(max_length // 2)
        self._batch: list[Packet] = []
        self._strangers: list[Queued] = []
        self._seen = 0
        self._left = 0
        """packets to read until the event loop has its turn; below 0 all that there are"""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the queue over, in the network namespace of the caller. Raises InterceptUnavailable."""
        self._queue = queue = _open()
        try:
            with warnings.catch_warnings():
                # a smaller buffer than asked for only means that the kernel lets packets pass sooner
                warnings.simplefilter("ignore", RuntimeWarning)
                queue.bind(
                    self._number,
                    self._arrived,
                    max_len=self._max_length,
                    range=COPY_OCTETS,
                    # the kernel doubles what is asked for
                    sock_len=self._max_length * QUEUED_OCTETS // 2,
                )
            _set_fail_open(queue.get_fd(), self._number, True)
            self._fails_open = True
            self._proc = os.open(_QUEUES, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            queue.unbind()
            self._queue = None
            raise InterceptUnavailable(_why_not_bound(self._number, error)) from error
        self._loop = loop
        loop.add_reader(queue.get_fd(), self._readable)
        # with rules left over from before, packets may have come while the queue was being set up
        loop.call_soon(self._readable)

    def stop(self) -> None:
        """Let all undecided requests go on to charon, and give the queue back. Remove the rules first: what arrives
        between the last look at the queue and its end, the kernel drops."""
        if self._queue is None or self._loop is None:
            return
        # of no type: uvloop's gives None where others give a bool, which the compiled form of this module would refuse
        remove_reader: Callable[[int], object] = self._loop.remove_reader
        remove_reader(self._queue.get_fd())
        self.let_go()
        self._queue.unbind()
        self._queue = None
        os.close(self._proc)

    def fail_open(self, fail_open: bool) -> None:
        """Whether what does not fit into the queue goes on to charon, as from the start on, or is dropped."""
        if self._queue is None or fail_open is self._fails_open:
            return
        _set_fail_open(self._queue.get_fd(), self._number, fail_open)
        self._fails_open = fail_open

    def let_go(self) -> None:
        """Let all undecided requests go on to charon, those in the kernel's queue too: their senders may have sent them
        again, past this queue, and charon answered."""
        if self._queue is None:
            return
        self._read(self._queue, NO_END)
        for packet in [*self._gate.held, *self._batch]:
            packet.accept()
        self._batch = []
        self._gate.let_go()

    def close_gate(self) -> None:
        """From here on what may begin a handshake does not go on to charon, until `open_gate`, or `let_go`, which lets
        what waits go on. The calls are counted."""
        self._gate.closed += 1

    def open_gate(self) -> None:
        """What waits goes on, in order, once no other has closed the gate."""
        self._gate.closed -= 1
        if not self._gate.closed:
            self._gate.let_go()

    def stats(self) -> QueueStats:
        """Counters of this queue, the kernel's among them; those are 0 while it is not started."""
        waiting = drops = 0
        if self._queue is not None:
            row = _row(os.pread(self._proc, 65536, 0).decode(), self._number)
            if row is not None:
                waiting, drops = int(row[2]), int(row[5]) + int(row[6])
        return QueueStats(drops, waiting, len(self._gate.held), self._seen)

    def _arrived(self, queued: Queued) -> None:
        """Called by NetfilterQueue for each packet while it reads; the octets are gone once this returns."""
        parsed = parse_datagram(queued.get_payload())
        if parsed is None:
            self._strangers.append(queued)
        else:
            self._batch.append(Packet(*parsed, queued, self._gate))
        self._left -= 1
        if not self._left:
            raise _Enough

    def _read(self, queue: NetfilterQueue, most: int) -> None:
        """Read what there is, `most` packets at most. With NO_END it ends too: nothing is decided meanwhile, and the
        kernel holds `max_length` at most."""
        self._left = most
        try:
            queue.run(False)
        except _Enough:
            pass
        except OSError as error:
            log.error("queue-unreadable", queue=self._number, reason=error.strerror)
        strangers, self._strangers = self._strangers, []
        for queued in strangers:
            if self._gate.closed:
                # charon may understand what was too long for this program
                self._gate.wait(queued)
            else:
                queued.accept()
        self._seen += len(self._batch) + len(strangers)

    def _readable(self) -> None:
        if self._queue is None or self._stood_still():
            return
        self._read(self._queue, READ_BUSY if self._busy() else READ_AT_ONCE)
        batch, self._batch = self._batch, []
        if not batch:
            return
        try:
            self._handler(batch)
        except Exception:
            log.exception("intercept-handler-failed", requests=len(batch))
            for packet in batch:
                packet.accept()
            return
        self._gate.held.update((packet, None) for packet in batch if packet.held)


def _open() -> NetfilterQueue:
    try:
        from netfilterqueue import NetfilterQueue
    except ImportError as error:
        raise InterceptUnavailable(f"libnetfilter_queue is missing ({error}): install libnetfilter-queue1") from error
    try:
        return NetfilterQueue()
    except OSError as error:
        # the library keeps no errno; the file is there whenever the kernel can do it
        if not os.path.exists(_QUEUES):
            cause = (
                "this kernel has no NFQUEUE: modprobe nfnetlink_queue, or build it with CONFIG_NETFILTER_NETLINK_QUEUE"
            )
        else:
            cause = f"NFQUEUE refused ({error}): run as root, or with CAP_NET_ADMIN"
        raise InterceptUnavailable(cause) from error


def _why_not_bound(number: int, error: OSError) -> str:
    owner = queue_owner(number)
    if owner is not None:
        # netlink's port id is the process id of the first such socket of a process
        return (
            f"queue {number} is taken by netlink port {owner}, most likely that process: "
            "stop it, or set another intercept.queue"
        )
    return f"queue {number} cannot be bound ({error}): run as root, or with CAP_NET_ADMIN"


def queue_owner(number: int) -> int | None:
    """The netlink port id of the process that reads a queue in this network namespace, most likely its process id."""
    with contextlib.suppress(OSError), open(_QUEUES) as file:
        row = _row(file.read(), number)
        return int(row[1]) if row is not None else None
    return None


def _row(table: str, number: int) -> list[str] | None:
    """Columns of the queue: number, port id, waiting, copy mode, copy range, dropped by queue, by user, sequence."""
    for line in table.splitlines():
        columns = line.split()
        if columns and columns[0] == str(number):
            return columns
    return None


def _set_fail_open(descriptor: int, number: int, fail_open: bool) -> None:
    """Have the kernel accept what does not fit into the queue, or drop it; the library has no call for this.

    Sent without asking for an acknowledgement: that would come among the packets. Kernels since 3.6 know the flag.
    """
    mask, flags = _NFQA_CFG_F_FAIL_OPEN, _NFQA_CFG_F_FAIL_OPEN if fail_open else 0
    attributes = struct.pack("=HH", 8, _NFQA_CFG_MASK) + struct.pack("!I", mask)
    attributes += struct.pack("=HH", 8, _NFQA_CFG_FLAGS) + struct.pack("!I", flags)
    body = struct.pack("!BBH", socket.AF_UNSPEC, 0, number) + attributes
    header = struct.pack("=IHHII", 16 + len(body), _NFQNL_MSG_CONFIG, _NLM_F_REQUEST, 0, 0)
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        sock.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        sock.send(header + body)
