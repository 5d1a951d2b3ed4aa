"""Waits shorter than the timers of the event loop, which know whole milliseconds (uvloop): timerfd_create(2)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from typing import Final

_NANOSECONDS: Final = 1_000_000_000
_libc = ctypes.CDLL(None, use_errno=True)


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Naps:
    """One timer, used on one event loop. All that wait at a time wake together, when the first of them is due: for
    tasks that look again and again whether something has happened."""

    def __init__(self) -> None:
        self._timer = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[asyncio.Future[None]] = []

    async def nap(self, seconds: float) -> None:
        """Wait for `seconds` at most, less than a second."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._waiting = []
            self.close()
            self._open(loop)
        if not self._waiting:
            length = _Itimerspec(0, 0, 0, max(int(seconds * _NANOSECONDS), 1))
            if _libc.timerfd_settime(self._timer, 0, ctypes.byref(length), None):
                raise OSError(ctypes.get_errno(), "timerfd_settime")
        future = loop.create_future()
        self._waiting.append(future)
        await future

    def close(self) -> None:
        """Give the timer back; who waits wakes."""
        if self._loop is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._timer)
            os.close(self._timer)
            self._loop, self._timer = None, -1
            self._wake()

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop = loop
        loop.add_reader(self._timer, self._due)

    def _due(self) -> None:
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            return
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
