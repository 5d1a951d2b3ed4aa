"""How many clients are asked at a time to come to a gateway, by its announcements or by the drain of another one. No
I/O.

A gateway that resumes sessions has a queue of them: more clients than it finishes make that queue longer, not the
gateway faster, and a client that waits for its answer sends its request again, which is work too. So the window of
sessions under way follows the time that a client needs from its report, when it sends its request, until it is resumed.
The shortest such time is that without a queue; what it takes longer is the queue.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

WINDOW_MIN: Final = 64
WINDOW_START: Final = 128
WINDOW_MAX: Final = 4096
"""sessions asked and not resumed yet"""
QUEUE_SECONDS: Final = 0.25
"""that a session should wait in the queue: a client sends its request again after 0.4 s (`resume.retransmit`)"""
FIRST_QUEUE: Final = 0.3
"""share of it that ends the quick growth of the beginning, by one for each session"""
STEP: Final = 0.2
"""by how much one session changes the window at most from then on"""
SMOOTHING: Final = 1 / 16
"""the weight of one session in the smoothed time"""


class Pace:
    """The size of the window for one gateway: `start` at first, `least` at least. `queue`: the seconds that a session
    should wait there; one that took `quick` seconds or less has not waited, whatever the shortest time was."""

    def __init__(
        self, start: int = WINDOW_START, least: int = WINDOW_MIN, queue: float = QUEUE_SECONDS, quick: float = 0.0
    ) -> None:
        self.window: float = start
        self._least = least
        self._queue = queue
        self._quick = quick
        self._smoothed: float | None = None
        self._shortest = 0.0
        self._beginning = True

    def resumed(self, seconds: float | None) -> None:
        """A session was resumed, so many seconds after its client reported that it comes; None: it did not report."""
        if seconds is not None:
            before = self._smoothed if self._smoothed is not None else seconds
            self._smoothed = before + SMOOTHING * (seconds - before)
            self._shortest = min(self._shortest or self._smoothed, self._smoothed)
        queue = (self._smoothed or 0.0) - max(self._shortest, self._quick)
        if self._beginning and queue < FIRST_QUEUE * self._queue:
            change = 1.0
        else:
            self._beginning = False
            change = STEP * max(-1.0, 1.0 - queue / self._queue)
        self.window = min(max(self.window + change, self._least), WINDOW_MAX)

    def late(self) -> None:
        """Clients that reported that they come have not arrived."""
        self._beginning = False
        self.window = max(self.window / 2, self._least)


class Window:
    """The sessions under way to one gateway, but for those whose clients have not answered the first message: they are
    no work for it, and keep no other waiting."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace if pace is not None else Pace()
        self._inside: set[Hashable] = set()

    def __contains__(self, session: Hashable) -> bool:
        return session in self._inside

    @property
    def has_room(self) -> bool:
        """Whether one more may be asked."""
        return len(self._inside) < self.pace.window

    def enter(self, session: Hashable) -> None:
        """It is asked, or its client has answered."""
        self._inside.add(session)

    def leave(self, session: Hashable) -> None:
        """It is settled, however it was."""
        self._inside.discard(session)

    def unanswered(self, session: Hashable) -> None:
        """Its client has not answered the first message."""
        if session in self._inside:
            self._inside.discard(session)
            self.pace.resumed(None)
