"""No handshake begins while a segment changes hands (bridge.charon.handshakes): in what order that is seen to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from bridge.charon.handshakes import UNREAD_SECONDS, Handshakes, Holds


class Recorder:
    """Holds requests back, and asks charon; notes what is done, in order."""

    def __init__(self, *, able: bool = True, read: bool = True, sure: bool = True) -> None:
        self.done: list[str] = []
        self.held = False
        self.able, self.was_read, self.sure = able, read, sure

    def can_hold(self) -> bool:
        return self.able

    @contextlib.contextmanager
    def holding(self) -> Iterator[Holds]:
        self.held = True
        self.done.append("held back")
        yield lambda: self.held
        self.done.append("let go")

    async def read(self) -> bool:
        self.done.append("read")
        return self.was_read

    async def look(self) -> None:
        self.done.append("looked")

    async def look_surely(self) -> bool:
        self.done.append("looked surely")
        return self.sure

    def handshakes(self, *, ends: bool = True, clock: Callable[[], float] = time.monotonic) -> Handshakes:
        made = Handshakes(self.look, self.look_surely, clock=clock)
        made.hold, made.ends = self, ends
        return made


async def test_charon_is_asked_once_requests_are_held_back_and_it_has_read_what_came_before() -> None:
    recorder = Recorder()
    async with recorder.handshakes().known() as holds:
        assert holds()
        recorder.done.append("activated")
    assert recorder.done == ["held back", "read", "looked surely", "activated", "let go"]


@pytest.mark.parametrize(("able", "ends"), [(False, True), (True, False)])
async def test_where_nothing_can_or_need_be_held_back_charon_is_asked_alone(able: bool, ends: bool) -> None:
    recorder = Recorder(able=able)
    handshakes = recorder.handshakes(ends=ends)
    assert not handshakes.can_hold()
    async with handshakes.known() as holds:
        assert holds()
    assert recorder.done == ["looked"]


@pytest.mark.parametrize(("read", "sure"), [(False, True), (True, False)])
async def test_nothing_is_activated_where_charon_has_not_processed_what_it_received(read: bool, sure: bool) -> None:
    async with Recorder(read=read, sure=sure).handshakes().known() as holds:
        assert not holds()


async def test_where_requests_can_be_held_back_only_since_charon_was_asked_nothing_is_activated() -> None:
    """Those that it received meanwhile would not be looked at."""
    recorder = Recorder(able=False)
    async with recorder.handshakes().known() as holds:
        recorder.able = True
        assert not holds()


@pytest.mark.parametrize("crashes", [True, False])
async def test_a_charon_that_never_has_read_all_does_not_end_activations_for_ever(crashes: bool) -> None:
    """In a flood of what it ignores; unless it would crash."""
    now = 0.0
    recorder = Recorder(read=False)
    handshakes = recorder.handshakes(clock=lambda: now)
    handshakes.crashes = crashes

    async def sure() -> bool:
        async with handshakes.known() as holds:
            return holds()

    assert not await sure()
    now = UNREAD_SECONDS + 1
    assert await sure() is not crashes
    # once it has, the time counts from the next one on
    recorder.was_read = True
    assert await sure()
    recorder.was_read = False
    assert not await sure()


async def test_nothing_is_activated_once_requests_may_have_passed() -> None:
    recorder = Recorder()
    async with recorder.handshakes().known() as holds:
        recorder.held = False
        assert not holds()
    assert recorder.done[-1] == "let go"
