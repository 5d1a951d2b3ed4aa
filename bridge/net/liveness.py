"""Shows the kernel that the event loop runs, so that the queue's rules hold packets for it; sees that it stood still.

The rules (bridge.net.queue_rules) queue a packet only if a sign of life came within STALL_SECONDS. A process that
hangs, is stopped or is frozen gives none, whatever the cause, and from then on its packets go to charon without it. The
sign is a datagram for nftables, which an output rule notes and drops; for iptables an entry in the list of xt_recent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from bridge.net.firewall import Family, Placed, families
from bridge.net.queue_rules import ALIVE, BEAT_PORT, FLOOD_PORT, FLOODED, HELD, HOLD_PORT, STALL_SECONDS

log = structlog.get_logger()

BEAT_SECONDS = 0.25
_RECENT = Path("/proc/thread-self/net/xt_recent")
_ANY: dict[Family, bytes] = {"ip": b"+0.0.0.0\n", "ip6": b"+::\n"}
"""what is written into the lists: the addresses of all packets are masked to this"""


class Liveness:
    """Beats once `start`ed, and calls `beat` each time. `stalled` is called on the event loop after it stood still,
    before anything else is read; `unnoticed` when a beat met no rule."""

    def __init__(
        self,
        stalled: Callable[[], None],
        unnoticed: Callable[[], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.stalls = 0
        """how often the event loop stood still for STALL_SECONDS"""
        self._stalled = stalled
        self._unnoticed = unnoticed
        self._each = beat
        self._tell: Callable[[], bool] = lambda: True
        self._signed_at = float("inf")
        self._socket: socket.socket | None = None
        self._families: Sequence[Family] = ()
        self._recent: dict[Family, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, placed: Placed) -> None:
        """Begin, in the network namespace of the caller, for rules that were set by `placed`."""
        if placed.backend == "nftables":
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._tell = self._tell_nftables
        elif placed.full:
            self._families = families()
            self._tell = self._tell_iptables
        self._loop = loop
        self._again_and_again()

    def stop(self) -> None:
        """End; the rules let packets pass from STALL_SECONDS on."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._forget_recent()

    def check(self) -> bool:
        """Whether the event loop stood still for so long that packets passed it. What it missed is then settled."""
        stood = time.monotonic() - self._signed_at
        if stood < STALL_SECONDS:
            return False
        self.stalls += 1
        log.warning("event-loop-stood-still", seconds=round(stood, 2))
        self._stalled()
        self._signed_at = time.monotonic()
        return True

    def beat(self) -> None:
        """Give the kernel a sign of life now; also when the rules were just set again."""
        self.check()
        noticed = self._tell()
        self._signed_at = time.monotonic()
        # a kernel that takes no order now gets it with the next one
        with contextlib.suppress(OSError):
            self._each()
        if not noticed:
            self._unnoticed()

    def flood(self) -> None:
        """Tell the kernel that there is a flood: it meters what is not proved to come from where it says, for a moment.
        Where it has no rules for that, nothing changes."""
        self._note(FLOOD_PORT, FLOODED)

    def hold(self) -> bool:
        """Tell the kernel that segments change hands: it queues what may begin a handshake, for a moment. Whether it
        took that."""
        return self._note(HOLD_PORT, HELD)

    def _note(self, port: int, lists: dict[Family, str]) -> bool:
        if self._socket is not None:
            return self._send(port)
        try:
            for family in self._families:
                with open(_RECENT / lists[family], "wb", buffering=0) as file:
                    file.write(_ANY[family])
        except OSError:
            return False
        return bool(self._families)

    def _again_and_again(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(BEAT_SECONDS, self._again_and_again)
        self.beat()

    def _tell_nftables(self) -> bool:
        return self._send(BEAT_PORT)

    def _send(self, port: int) -> bool:
        assert self._socket is not None
        try:
            self._socket.sendto(b"", ("127.0.0.1", port))
        except PermissionError:
            # the rule dropped it, once it had noted it
            return True
        except OSError:
            pass
        return False

    def _tell_iptables(self) -> bool:
        if self._recent and self._write_lists():
            return True
        # a list goes with the last rule that names it, and another one may be there already
        self._forget_recent()
        return self._write_lists()

    def _write_lists(self) -> bool:
        try:
            for family in self._families:
                if family not in self._recent:
                    self._recent[family] = os.open(_RECENT / ALIVE[family], os.O_WRONLY | os.O_CLOEXEC)
                # the file takes a write at its beginning only, and knows no pwrite
                os.lseek(self._recent[family], 0, os.SEEK_SET)
                os.write(self._recent[family], _ANY[family])
        except OSError:
            self._forget_recent()
            return False
        return True

    def _forget_recent(self) -> None:
        for descriptor in self._recent.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._recent.clear()
