"""The failure of a gateway as another one announces it: its sessions, and how far each of them is. No I/O; times are
monotonic seconds."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final

from bridge.bank.failover_progress import RUNNING, FailoverProgress
from bridge.gateway.pace import Window
from bridge.stub.stub import Index, Stub

HEAD_START: Final = 0.35
"""seconds that sessions with traffic have at most before the others are announced. Their clients come after 0.3 s, when
their gateway has not answered; those of the others ask it for as long, and then come behind them"""


class AnnouncementState(StrEnum):
    """Of one session."""

    WAITING = "waiting"
    ANNOUNCED = "announced"
    COMING = "coming"


@dataclass(slots=True, eq=False)
class Announced:
    """One session."""

    stub: Stub
    turn: float
    """when it is this gateway's turn"""
    state: AnnouncementState = AnnouncementState.WAITING
    sent: int = 0
    again: float = 0.0
    coming: float | None = None
    """when its client reported that it comes"""
    octets: bytes = field(default=b"", repr=False)

    @property
    def spis(self) -> bytes:
        """Both SPIs of its IKE_SA."""
        return self.stub.spi_i + self.stub.spi_r


@dataclass(slots=True, eq=False)
class Failure:
    """One gateway's."""

    gateway: str
    began: float
    trial_seconds: float
    """after the first sessions, until the rest follow"""
    stubs: int = 0
    sessions: int = 0
    """of these, those that this gateway may announce"""
    known: set[Index] = field(default_factory=set)
    """those of the stubs, as long as more may follow"""
    first: set[Index] = field(default_factory=set)
    """those that were known before the others: they had traffic"""
    complete: bool = False
    """whether all stubs of the gateway are known"""
    waiting: deque[Announced] = field(default_factory=deque)
    under_way: OrderedDict[Index, Announced] = field(default_factory=OrderedDict)
    counts: Counter[str] = field(default_factory=Counter)
    trial_until: float | None = None
    back: bool = False
    """whether it has a heartbeat again"""
    daemon: int = 0
    """clients that said that the daemon answers, since the announcements began or began again"""
    came: bool = False
    """whether one has said that it moves"""
    paused_until: float = 0.0
    paused: str = ""
    """why"""
    contradicted: bool = False
    window: Window = field(default_factory=Window)
    stopped: str = ""
    ended: float | None = None
    outside: set[Index] = field(default_factory=set)
    """resumed or ended, announced or not"""

    def queue(self, sessions: Iterable[Announced]) -> None:
        """Have sessions wait behind those that wait, each until its turn."""
        self.waiting = deque(sorted((*self.waiting, *sessions), key=lambda one: one.turn))

    def waits_for_first(self, announced: Announced, now: float) -> bool:
        """Whether a session lets those that had traffic go on before it is announced."""
        return announced.stub.index not in self.first and self.first_under_way(now)

    def first_under_way(self, now: float) -> bool:
        """Whether sessions that had traffic have not gone on yet, within their head start."""
        return now < self.began + HEAD_START and (
            any(index in self.under_way for index in self.first)
            or any(one.turn <= now and one.stub.index in self.first for one in islice(self.waiting, 1))
        )

    def progress(self, now: float) -> FailoverProgress:
        """How far it is."""
        return FailoverProgress(
            self.gateway,
            self._state(now),
            self.stopped or (self.paused if now < self.paused_until else ""),
            self.stubs,
            self.sessions,
            len(self.under_way),
            self.counts["announced"],
            self.counts["resumed"],
            self.counts["refused"],
            self.counts["silent"],
            self.counts["elsewhere"],
            round((now if self.ended is None else self.ended) - self.began, 3),
        )

    def _state(self, now: float) -> str:
        if self.ended is None:
            return RUNNING if now >= self.paused_until else "stopped"
        return "stopped" if self.stopped else "done"
